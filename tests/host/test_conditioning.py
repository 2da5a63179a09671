"""What travels in a CONDITIONING: several negatives, masks, areas, timestep ranges, combined entries, odd batches."""

import pytest
import torch
from helpers import assert_close, conditioning, load_sd3, sample, spy_override, text, with_override
from oracle import Expect, oracle_model

import nodes


@pytest.fixture(scope="module")
def model():
    return load_sd3()


def as_cond(tokens, **options):
    return [[tokens, options]]


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_chained_negatives_each_with_its_own_strength(pack, model, cfg):
    positive, a, b = conditioning(), text(3, 5), text(6, 6)
    both = pack.negative(pack.negative(positive, negative=as_cond(a), strength=0.5), negative=as_cond(b), strength=2.0)
    alpha = torch.tensor([1.5] * 3 + [6.0] * 6)
    reference, _ = oracle_model(model, [Expect(positive[0][0], torch.cat((a, b), 1), alpha, 0.2)])
    result = sample(pack.patch(model, scale=3.0), both, cfg=cfg, batch=2)
    assert_close(result, sample(reference, positive, cfg=cfg, batch=2))


def test_negative_of_a_batch(pack, model):
    """A negative of batch 2 on a batch of 2: each picture gets its own."""
    positive, a, b = conditioning(), text(4, 5), text(4, 6)
    noise = {"batch": 2, "size": (16, 24)}
    result = sample(pack.patch(model), pack.negative(positive, negative=as_cond(torch.cat((a, b)))), **noise)
    for i, one in enumerate((a, b)):
        alone = sample(pack.patch(model), pack.negative(positive, negative=as_cond(one)), **noise)
        assert_close(result[i], alone[i])


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("size", [(16, 24), (15, 21)], ids=["even", "odd"])
def test_mask(pack, model, cfg, size):
    """Outside the mask beta is +inf, exactly: the oracle forbids those keys."""
    positive, negative = conditioning(), text(5, 5)
    h, w = (size[0] + 1) // 2, (size[1] + 1) // 2
    tokens = torch.zeros(h, w)
    tokens[2:5, 1:7] = 1.0
    pixels = tokens.repeat_interleave(16, 0).repeat_interleave(16, 1)[None, : size[0] * 8, : size[1] * 8]
    attached = pack.negative(positive, negative=as_cond(negative), mask=pixels)
    keep = tokens.reshape(-1, 1).expand(-1, 5)
    reference, _ = oracle_model(model, [Expect(positive[0][0], negative, 3.3, 0.2, keep=keep)])
    result = sample(pack.patch(model), attached, cfg=cfg, size=size)
    assert_close(result, sample(reference, positive, cfg=cfg, size=size))
    everywhere = pack.negative(positive, negative=as_cond(negative), mask=torch.ones(1, 64, 64))
    unmasked = pack.negative(positive, negative=as_cond(negative))
    full = sample(pack.patch(model), everywhere, cfg=cfg, size=size)
    assert_close(full, sample(pack.patch(model), unmasked, cfg=cfg, size=size), 1e-6)
    nowhere = pack.negative(positive, negative=as_cond(negative), mask=torch.zeros(1, 64, 64))
    none = sample(pack.patch(model), nowhere, cfg=cfg, size=size)
    assert_close(none, sample(model, positive, cfg=cfg, size=size), 1e-6)


def test_two_negatives_with_two_masks(pack, model):
    positive, a, b = conditioning(), text(3, 5), text(4, 6)
    left, right = torch.zeros(1, 128, 192), torch.zeros(1, 128, 192)
    left[..., :96], right[..., 96:] = 1.0, 1.0
    both = pack.negative(pack.negative(positive, negative=as_cond(a), mask=left), negative=as_cond(b), mask=right)
    keep = torch.zeros(8, 12, 7)
    keep[:, :6, :3], keep[:, 6:, 3:] = 1.0, 1.0
    reference, _ = oracle_model(model, [Expect(positive[0][0], torch.cat((a, b), 1), 3.3, 0.2, keep=keep.view(-1, 7))])
    assert_close(sample(pack.patch(model), both), sample(reference, positive))


@pytest.mark.smoke
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_combined_entries_of_different_lengths(pack, model, cfg):
    """Two positives in one batch, one with 3 negative tokens, one with 8, and an uncond with none."""
    one, two = conditioning(seed=1), conditioning(seed=2)
    a, b = text(3, 5), text(8, 6)
    combined = pack.negative(one, negative=as_cond(a)) + pack.negative(two, negative=as_cond(b))
    expects = [Expect(one[0][0], a, 3.3, 0.2), Expect(two[0][0], b, 3.3, 0.2)]
    reference, record = oracle_model(model, expects)
    result = sample(pack.patch(model), combined, cfg=cfg, batch=2)
    assert_close(result, sample(reference, one + two, cfg=cfg, batch=2))
    assert max(record.forwards) == (2 if cfg == 1.0 else 3)  # they really shared a batch
    released = sample(pack.patch(model, layout="released"), combined, cfg=cfg, batch=2)
    reference, _ = oracle_model(model, expects, released=True)
    assert_close(released, sample(reference, one + two, cfg=cfg, batch=2))


def test_only_one_of_two_positives_has_a_negative(pack, model):
    one, two = conditioning(seed=1), conditioning(seed=2)
    a = text(3, 5)
    reference, _ = oracle_model(model, [Expect(one[0][0], a, 3.3, 0.2)])
    result = sample(pack.patch(model), pack.negative(one, negative=as_cond(a)) + two)
    assert_close(result, sample(reference, one + two))


def test_negative_is_attached_to_every_positive_entry(pack, model):
    one, two = conditioning(seed=1), conditioning(seed=2)
    a = text(3, 5)
    expects = [Expect(p[0][0], a, 3.3, 0.2) for p in (one, two)]
    reference, _ = oracle_model(model, expects)
    result = sample(pack.patch(model), pack.negative(one + two, negative=as_cond(a)))
    assert_close(result, sample(reference, one + two))


@pytest.mark.smoke
@pytest.mark.parametrize("masked", [False, True])
def test_area(pack, model, masked):
    """ComfyUI copies a positive with an area into the uncond branch, our key and all: uncond must stay without N."""
    base, region = conditioning(seed=1), conditioning(seed=2)
    region = nodes.ConditioningSetArea().append(region, 96, 128, 32, 0, 1.0)[0]
    negative = text(5, 5)
    pixels = torch.ones(1, 128, 192)
    pixels[:, :64] = 0.0
    keep = None
    if masked:
        inside = torch.zeros(8, 12)
        inside[4:] = 1.0
        keep = inside[:8, 2:8].reshape(-1, 1).expand(-1, 5)  # x from 32 px = 2 tokens, 6 wide, all 8 rows
    attached = base + pack.negative(region, negative=as_cond(negative), mask=pixels if masked else None)
    reference, record = oracle_model(model, [Expect(region[0][0], negative, 3.3, 0.2, keep=keep)])
    result = sample(pack.patch(model), attached, cfg=2.5)
    assert_close(result, sample(reference, base + region, cfg=2.5))
    assert record.joint


def test_conditioning_mask_of_comfyui(pack, model):
    """One negative a region, with ComfyUI's own ConditioningSetMask."""
    left = torch.zeros(1, 128, 192)
    left[..., :96] = 1.0
    one = nodes.ConditioningSetMask().append(conditioning(seed=1), left, "default", 1.0)[0]
    two = nodes.ConditioningSetMask().append(conditioning(seed=2), 1 - left, "default", 1.0)[0]
    a, b = text(3, 5), text(5, 6)
    reference, _ = oracle_model(model, [Expect(one[0][0], a, 3.3, 0.2), Expect(two[0][0], b, 3.3, 0.2)])
    attached = pack.negative(one, negative=as_cond(a)) + pack.negative(two, negative=as_cond(b))
    assert_close(sample(pack.patch(model), attached, cfg=2.0), sample(reference, one + two, cfg=2.0))


def test_timestep_ranges(pack, model):
    """While the entry that carries the negative is out of its range, steps are bit-identical to stock."""
    setter = nodes.ConditioningSetTimestepRange()
    plain = setter.set_range(conditioning(seed=1), 0.0, 0.6)[0]
    other = setter.set_range(conditioning(seed=2), 0.6, 1.0)[0]
    attached = pack.negative(other, negative=as_cond(text(4, 5)))

    def steps(m, cond):
        seen = []
        sample(m, cond, steps=6, callback=lambda i, x0, x, total: seen.append(x.clone()))
        return seen

    stock, vsf = steps(model, plain + other), steps(pack.patch(model), plain + attached)
    same = [torch.equal(a, b) for a, b in zip(stock, vsf, strict=True)]
    assert same[0] and same[1] and not same[-1]
    seen = []  # and no token of N is carried along before its time
    sample(with_override(pack.patch(model), spy_override(seen)), plain + attached, steps=6)
    late = seen.index(4 + 13 + 8 * 12)
    assert late >= 3 * 2 and set(seen[:late]) == {13 + 8 * 12}


def test_negative_with_an_attention_mask_is_trimmed(pack, model):
    negative = text(6, 5)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0]])
    trimmed = pack.negative(conditioning(), negative=as_cond(negative, attention_mask=keep))
    short = pack.negative(conditioning(), negative=as_cond(negative[:, :4]))
    assert torch.equal(sample(pack.patch(model), trimmed), sample(pack.patch(model), short))
