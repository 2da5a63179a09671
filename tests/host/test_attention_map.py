"""The attention map: 1 - W as the oracle's dense softmax has it, and pictures that do not notice the recording."""

import pytest
import torch
from cases import CASES as MODELS
from cases import latents
from helpers import load_sd3, sample, spy_override, text, windowed, with_override
from oracle import Expect, oracle_model

LAYERS = ("early", "middle", "late")
NAMES = ("sd3", "sd3.5 medium", "flux", "wan", "wan vace", "wan control")


@pytest.fixture(scope="module")
def models():
    return {name: MODELS[name].load() for name in NAMES}


def prompt(family, seed=1, **options):
    return MODELS[family].prompt(13, seed, **options)


def negative(family, n=5, seed=5):
    return MODELS[family].negative(n, seed)[0][0]


def record(pack, model):
    """The model with VSF Record, and its record."""
    recorded, holder = pack.mapping["VSFRecord"].execute(model=model).result
    return recorded, holder.record


def expected(shares, blocks, size, layers, before=0):
    """The oracle's 1 - W of one step, [B, frames, grid height, grid width]."""
    group = range(3) if layers == "all" else [LAYERS.index(layers)]
    mean = torch.stack([share for block, share in shares if block * 3 // blocks in group]).mean(0)
    frames, (h, w) = size[0] if len(size) == 3 else 1, ((side + 1) // 2 for side in size[-2:])
    return mean[:, before : before + frames * h * w].reshape(-1, frames, h, w)


CASES = {
    "one": {},
    "batch": {"batch": 3},
    "cfg": {"batch": 2, "cfg": 2.5},
    "blocks": {"blocks": "double:1", "seen": {1}},
    "mask": {"mask": True, "batch": 2},
    "two": {"second": 3},
    "mask on one of two": {"mask": True, "second": 3, "batch": 2},
    "two and cfg": {"second": 3, "cfg": 2.5, "batch": 2},
}


def check(pack, model, family, positive=None, path="merge", before=0, patch=(), released=False, size=None, **case):
    """The maps of a run of two steps equal the oracle's; and the picture is that of the run without the recording."""
    size = size or MODELS[family].sizes[family != "wan control"]
    positive = positive or prompt(family)
    n = negative(family)
    made = {"negative": [[n, {"pooled_output": text(1, 77, 768)[:, 0]}]]}
    alpha, keep = torch.full((5,), 3.3), None
    if case.get("mask"):
        cells = torch.zeros((size[-2] + 1) // 2, (size[-1] + 1) // 2)
        cells[1:3, 1:4] = 1.0
        made["mask"] = cells.repeat_interleave(16, 0).repeat_interleave(16, 1)[None, : size[-2] * 8, : size[-1] * 8]
        keep = cells.repeat(size[0] if len(size) == 3 else 1, 1, 1).reshape(-1, 1)
        keep = torch.cat([torch.zeros(before, 1) + 1.0, keep]).expand(-1, 5)
    attached = pack.negative(positive, **made)
    if case.get("second"):
        other = negative(family, case["second"], seed=6)
        attached = pack.negative(attached, negative=[[other, {}]], strength=0.5)
        n, alpha = torch.cat([n, other], dim=1), torch.cat([alpha, torch.full((case["second"],), 1.65)])
        keep = None if keep is None else torch.cat([keep, torch.ones(len(keep), case["second"])], dim=1)
    expect = Expect(positive[0][0], n, alpha, 0.2, keep, case.get("seen"), pooled=text(1, 77, 768)[:, 0])
    oracle, seen = oracle_model(model, [expect], released=released)
    run = {"size": size, "batch": case.get("batch", 1), "cfg": case.get("cfg", 1.0), "steps": 2}
    sample(oracle, positive, **run)

    settings = {"blocks": case.get("blocks", ""), "layout": "released" if released else "paper", **dict(patch)}
    patched = pack.patch(model, **settings)
    if path == "row mask":
        patched = with_override(patched, spy_override([]))
    with_record, kept = record(pack, patched)
    assert torch.equal(sample(with_record, attached, **run), sample(patched, attached, **run))

    blocks, per_step = 4 if family == "flux" else 3, len(seen.shares) // 2
    assert per_step > 0 and kept.acted == [0, 1]
    for step in (0, 1):
        shares = seen.shares[step * per_step : (step + 1) * per_step]
        for layers in ("all", *LAYERS):
            if layers != "all" and not any(block * 3 // blocks == LAYERS.index(layers) for block, _ in shares):
                assert not kept.mean(layers, step).any()
                continue
            oracle_map = expected(shares, blocks, size, layers, before)
            assert oracle_map.max() > 0.03
            torch.testing.assert_close(kept.mean(layers, step).double(), oracle_map, rtol=0, atol=1e-5)
    both = (kept.mean("all", 0) + kept.mean("all", 1)) / 2
    torch.testing.assert_close(kept.mean("all"), both)


@pytest.mark.parametrize("path", ["merge", "row mask"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
def test_equals_the_oracle(pack, models, family, case, path):
    check(pack, models[family], family, path=path, **CASES[case])


def test_second_attention_of_medium_does_not_count(pack, models):
    check(pack, models["sd3.5 medium"], "sd3.5 medium")


def test_vace_blocks_do_not_count(pack, models):
    check(pack, models["wan vace"], "wan vace", cfg=2.5)


@pytest.mark.parametrize("path", ["merge", "row mask"])
def test_reference_tokens_are_cut_off(pack, models, path):
    after = prompt("flux", reference_latents=[latents(10, 12)])
    check(pack, models["flux"], "flux", after, path, batch=2)
    check(pack, models["wan control"], "wan control", None, path, before=20, mask=True)


def test_users_own_attention_mask(pack, models):
    """Redux with attn_bias: the row-mask path, and the bias counts."""
    length = 13 + 8 * 12
    mask = torch.randn(1, length, length, generator=torch.Generator().manual_seed(3)) * 2
    mask[..., 13:, 13:] = 0
    positive = prompt("flux", attention_mask=mask, attention_mask_img_shape=(8, 12))
    check(pack, models["flux"], "flux", positive, size=(16, 24))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_released_layout(pack, models, family):
    """SD3's plain copy is ordinary text and does not count; on Flux N0 counts beside N1, and single blocks do not."""
    check(pack, models[family], family, released=True)


def test_window_of_steps_and_combined_entries(pack, models):
    model = models["sd3"]
    attached = pack.negative(prompt("sd3"), negative=[[negative("sd3"), {}]])
    with_record, kept = record(pack, pack.patch(model, start_percent=0.5))
    sample(with_record, attached, steps=4)
    assert kept.steps == 4 and kept.acted and kept.acted[0] > 0
    assert not kept.mean("all", 0).any() and kept.mean("all", kept.acted[0]).max() > 0.05

    # an entry without a negative does not count: the first step's map is as if it were not there
    one, kept_one = record(pack, pack.patch(model))
    sample(one, attached, steps=1)
    two, kept_two = record(pack, pack.patch(model))
    sample(two, attached + prompt("sd3", seed=2), steps=1)
    torch.testing.assert_close(kept_two.mean(), kept_one.mean(), rtol=0, atol=1e-6)


def test_only_the_positive_branch_counts(pack, models):
    model = models["sd3"]
    attached = pack.negative(prompt("sd3"), negative=[[negative("sd3"), {}]])
    uncond = pack.negative(prompt("sd3", seed=99), negative=[[negative("sd3", seed=8), {}]])
    runs = []
    for other in (prompt("sd3", seed=99), uncond):
        with_record, kept = record(pack, pack.patch(model))
        sample(with_record, attached, other, steps=1, cfg=2.5)
        runs.append(kept.mean())
    torch.testing.assert_close(*runs, rtol=0, atol=1e-6)


def test_a_sampler_that_looks_twice_a_step(pack, models):
    with_record, kept = record(pack, pack.patch(models["sd3"]))
    attached = pack.negative(prompt("sd3"), negative=[[negative("sd3"), {}]])
    sample(with_record, attached, steps=4, sampler="heun")
    assert kept.steps == 4 and kept.acted == [0, 1, 2, 3]


def test_context_windows(pack, models):
    """Each frame's map is the mean over the windows that showed it."""
    model, positive, size = models["wan"], prompt("wan"), (8, 8, 10)
    windows = ([0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7])

    oracle, seen = oracle_model(model, [Expect(positive[0][0], negative("wan"), 3.3, 0.2)])
    sample(windowed(oracle), positive, size=size, steps=1)
    total, count = torch.zeros(1, 8, 4, 5, dtype=torch.float64), torch.zeros(8)
    assert len(seen.shares) == 3 * len(windows)
    for i, frames in enumerate(windows):
        shares = seen.shares[3 * i : 3 * i + 3]
        if shares[0][1].shape[1] == 5 * 4 * 5:  # newer ComfyUI shows the frame before a window too
            frames = [frames[0] - 1, *frames]
        total[:, frames] += expected(shares, 3, (len(frames), 8, 10), "all")
        count[frames] += 1
    with_record, kept = record(pack, windowed(pack.patch(model)))
    sample(with_record, pack.negative(positive, negative=[[negative("wan"), {}]]), size=size, steps=1)
    torch.testing.assert_close(kept.mean().double(), total / count[:, None, None], rtol=0, atol=1e-5)


def test_a_new_run_empties_the_record(pack, models):
    """Even one in which the negative does not act."""
    with_record, kept = record(pack, pack.patch(models["sd3"]))
    attached = pack.negative(prompt("sd3"), negative=[[negative("sd3"), {}]])
    sample(with_record, attached, batch=2)
    assert kept.acted == [0, 1, 2] and kept.mean().shape == (2, 1, 8, 12)
    sample(with_record, prompt("sd3"), size=(8, 8))
    assert kept.acted == [] and kept.mean().shape == (1, 1, 4, 4) and not kept.mean().any()


def test_nothing_is_computed_without_the_node(pack, models):
    """On the row-mask path a share is one more call of the host's attention in each block: none without VSF Record."""
    attached = pack.negative(prompt("sd3"), negative=[[negative("sd3"), {}]])
    seen = {True: [], False: []}
    for recorded, calls in seen.items():
        model = with_override(pack.patch(models["sd3"]), spy_override(calls))
        sample(record(pack, model)[0] if recorded else model, attached, steps=2)
    assert len(seen[True]) - len(seen[False]) == 2 * 3
    assert len(seen[False]) == 2 * 3 * 3  # image, P and N0 in each block and step


@pytest.mark.parametrize("tokens", [1, 40])
def test_memory_is_bounded(pack, models, tokens):
    """Two fp32 numbers a step, layer group and token, whatever the negative's length and number of evaluations."""
    with_record, kept = record(pack, pack.patch(models["flux"]))
    attached = pack.negative(prompt("flux"), negative=[[negative("flux", tokens), {}]])
    sample(with_record, attached, steps=3, sampler="heun", batch=2, cfg=2.5)
    tensors = [*kept._totals.values()]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 2 * 3 * 3 * 2 * 8 * 12 * 4
    assert {(t.dtype, t.device.type) for t in tensors} == {(torch.float32, "cpu")}


def test_areas_are_refused(pack, models):
    area = pack.negative(prompt("sd3", area=(8, 8, 0, 0)), negative=[[negative("sd3"), {}]])
    with_record, _ = record(pack, pack.patch(models["sd3"]))
    with pytest.raises(RuntimeError, match="ConditioningSetMask instead"):
        sample(with_record, area)


def test_recording_twice_and_unsupported_models(pack, models):
    with pytest.raises(ValueError, match="VSF Record already"):
        record(pack, record(pack, models["sd3"])[0])
    model = load_sd3()
    model.model.__class__ = type("Other", (type(model.model),), {})
    with pytest.raises(ValueError, match="class Other .* are not supported"):
        record(pack, model)


def test_image_tokens_that_another_node_adds_are_an_error(pack, models):
    def add(args):
        img = torch.cat([args["img"], args["img"][:, :3]], dim=1)
        return {**args, "img": img, "img_ids": torch.nn.functional.pad(args["img_ids"], (0, 0, 0, 3))}

    model = models["flux"].clone()
    model.set_model_patch(add, "post_input")
    with_record, _ = record(pack, pack.patch(model))
    attached = pack.negative(prompt("flux"), negative=[[negative("flux"), {}]])
    with pytest.raises(RuntimeError, match="attends from 99 tokens of the picture .* this step has 96"):
        sample(with_record, attached)
