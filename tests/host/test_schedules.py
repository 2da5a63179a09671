"""Prompts that change during the sampling: encoders scheduled by hooks, ranges, combined and averaged conditionings."""

import comfy.hooks
import comfy_extras.nodes_hooks as nodes_hooks
import pytest
import torch
from helpers import assert_close, conditioning, load_sd3, relative, sample, text
from oracle import Expect, oracle_model
from test_encode import make_clip

import nodes


@pytest.fixture(scope="module")
def model():
    return load_sd3()


def as_cond(tokens):
    return [[tokens, {}]]


def scheduled(clip, other, keyframes=((0.0, 0.0), (0.4, 0.5), (0.7, 1.0))):
    """SetClipHooks: the encoder's weights move to those of ``other``; keyframes are (start_percent, strength)."""
    weights = {key: value.clone() for key, value in other.cond_stage_model.state_dict().items()}
    hooks = comfy.hooks.create_hook_model_as_lora(None, weights, 0.0, 1.0)
    group = comfy.hooks.HookKeyframeGroup()
    for start, strength in keyframes:
        group.add(comfy.hooks.HookKeyframe(strength, start_percent=start))
    hooks.set_keyframes_on_hooks(group)
    return nodes_hooks.SetClipHooks().apply_hooks(clip, True, False, hooks)[0]


def encode(clip, words):
    return nodes.CLIPTextEncode().encode(clip, words)[0]


def test_negative_follows_a_scheduled_encoder(pack):
    """Each part of the sampling gets the negative as the encoder gives it in that part."""
    one, other = (make_clip(clip_g=False, t5=False, seed=seed) for seed in (0, 1))
    clip, model = scheduled(one, other), load_sd3(context=4096)
    pooled = {"pooled_output": text(1, 9, 2048)[:, 0]}  # as wide as a CLIP-L of full size makes it
    positive = [[cond, {**options, **pooled}] for cond, options in encode(clip, "a house")]
    assert len(positive) == 3
    attached = pack.negative(positive, clip=clip, text="the roof")
    made = [options["vsf_negatives"][0]["tokens"] for _, options in attached]
    alone = [
        pack.negative(conditioning(), clip=c, text="the roof")[0][1]["vsf_negatives"][0]["tokens"] for c in (one, other)
    ]
    assert_close(made[0], alone[0])
    assert_close(made[2], alone[1])
    assert relative(made[1], made[0]) > 1e-2 and relative(made[1], made[2]) > 1e-2
    expects = [Expect(p[0], n, 3.3, 0.2) for p, n in zip(positive, made, strict=True)]
    reference, record = oracle_model(model, expects)
    result = sample(pack.patch(model), attached, steps=5)
    assert_close(result, sample(reference, positive, steps=5))
    assert record.joint >= 5 * 3
    extrapolated = pack.negative(positive, clip=clip, text="the roof", extrapolation=2.0)
    by_hand = pack.negative(conditioning(), clip=other, text="the roof", extrapolation=2.0)
    assert_close(*(c[-1][1]["vsf_negatives"][0]["tokens"] for c in (extrapolated, by_hand)))


def test_a_schedule_that_the_positive_does_not_share_is_refused(pack):
    one, other = (make_clip(clip_g=False, t5=False, seed=seed) for seed in (0, 1))
    clip = scheduled(one, other)
    with pytest.raises(ValueError, match=r"schedule this clip in 3 parts of the sampling \(0 to 0.4, 0.4 to 0.7"):
        pack.negative(encode(one, "a house"), clip=clip, text="roof")
    constant = pack.negative(encode(clip, "a house"), clip=one, text="roof")  # the other way round is no question
    assert len({id(options["vsf_negatives"][0]["tokens"]) for _, options in constant}) == 1


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_number_of_tokens_changes_on_the_way(pack, model, cfg):
    """A schedule by ConditioningSetTimestepRange: 3 negative tokens, then 8, then none."""
    setter = nodes.ConditioningSetTimestepRange()
    bounds, lengths = ((0.0, 0.35), (0.35, 0.7), (0.7, 1.0)), (3, 8, 0)
    plain, attached, expects = [], [], []
    for seed, (bound, n) in enumerate(zip(bounds, lengths, strict=True)):
        (part,) = setter.set_range(conditioning(seed=seed), *bound)
        plain += part
        attached += pack.negative(part, negative=as_cond(text(n, 5 + seed))) if n else part
        expects += [Expect(part[0][0], text(n, 5 + seed), 3.3, 0.2)] if n else []
    reference, record = oracle_model(model, expects)
    result = sample(pack.patch(model), attached, cfg=cfg, steps=6)
    assert_close(result, sample(reference, plain, cfg=cfg, steps=6))
    assert 0 < record.joint < 6 * 3


def test_concat_and_average_keep_the_negative_of_conditioning_to(pack, model):
    """As the README says: what hangs on the other input is dropped by ComfyUI itself."""
    to, other = conditioning(seed=1), conditioning(seed=2)
    a, b = text(4, 5), text(6, 6)
    with_a, with_b = pack.negative(to, negative=as_cond(a)), pack.negative(other, negative=as_cond(b))
    concat, average = nodes.ConditioningConcat().concat, nodes.ConditioningAverage().addWeighted
    for join in (lambda x, y: concat(x, y)[0], lambda x, y: average(x, y, 0.6)[0]):
        plain = join(to, other)
        reference, _ = oracle_model(model, [Expect(plain[0][0], a, 3.3, 0.2)])
        assert_close(sample(pack.patch(model), join(with_a, with_b)), sample(reference, plain))
        assert torch.equal(sample(pack.patch(model), join(to, with_b)), sample(model, plain))


def test_combine_keeps_both(pack, model):
    """With ConditioningCombine each entry keeps its own; attached after it, both get the same."""
    one, two = conditioning(seed=1), conditioning(seed=2)
    combine = nodes.ConditioningCombine().combine
    a, b = text(4, 5), text(6, 6)
    joined = combine(pack.negative(one, negative=as_cond(a)), pack.negative(two, negative=as_cond(b)))[0]
    for cond, negatives in ((joined, (a, b)), (pack.negative(combine(one, two)[0], negative=as_cond(a)), (a, a))):
        expects = [Expect(p[0][0], n, 3.3, 0.2) for p, n in zip((one, two), negatives, strict=True)]
        reference, _ = oracle_model(model, expects)
        assert_close(sample(pack.patch(model), cond), sample(reference, one + two))
