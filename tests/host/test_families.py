"""What makes a family right, each by the same tests: whole tiny models through ComfyUI's own loader and sampler."""

from functools import partial

import pytest
import torch
from cases import CASES, DISTINCT, JOINT, SMOKE, both, region
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from helpers import assert_close, only_rounded, relative, spy_override, with_override
from oracle import Expect, oracle_model


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


def only(names):
    """For some of the cases; the first ones, so that a model's tests stay together."""
    return pytest.mark.parametrize("name", names, indirect=True)


DISTINCT_MODELS = only(DISTINCT)
ALL_AND_SMOKE = only([pytest.param(name, marks=pytest.mark.smoke) if name in SMOKE else name for name in CASES])


@pytest.mark.parametrize(
    ("n", "size", "batch", "cfg"),
    [(1, 0, 3, 1.0), (5, 1, 1, 2.5), (40, -1, 2, 2.5)],
    ids=["1, batch", "5, odd, cfg", "40, batch, cfg"],
)
def test_parity_with_dense_attention(pack, case, model, n, size, batch, cfg):
    run = {"size": case.sizes[size], "batch": batch, "cfg": cfg}
    result, expected = both(pack, case, model, n, **run)
    assert_close(result, expected)
    if n == 5:  # and it matters
        stock = case.run(model, case.prompt(size=run["size"]), **run)
        assert relative(stock, expected) > (1e-4 if case.cross else 1e-3)


@DISTINCT_MODELS
@pytest.mark.parametrize(("alpha", "beta"), [(-2.0, -0.6), (6.0, 2.0)])
def test_parity_over_scale_and_offset(pack, case, model, alpha, beta):
    assert_close(*both(pack, case, model, alpha=alpha, beta=beta))


@DISTINCT_MODELS
def test_each_prompt_its_own_negative(pack, case, model):
    """Two of different lengths in one batch are padded to one, which moves neither."""
    prompts, negatives = (case.prompt(), case.prompt(seed=9)), (case.negative(5), case.negative(40))
    expects = [case.expect(model, p, n) for p, n in zip(prompts, negatives, strict=True)]
    positive, other = (pack.negative(p, negative=n) for p, n in zip(prompts, negatives, strict=True))
    expected = case.run(oracle_model(model, expects)[0], prompts[0], prompts[1], cfg=2.5)
    assert_close(case.run(pack.patch(model), positive, other, cfg=2.5), expected)


@ALL_AND_SMOKE
@pytest.mark.parametrize(("n", "size", "batch", "cfg"), [(1, 1, 2, 1.0), (40, 0, 1, 2.5)])
def test_neutrality_at_a_large_finite_offset(pack, case, model, n, size, batch, cfg):
    """Offset 60 equals stock whatever N is, while N went through every block: nothing of it leaks into P, and it shifts
    no position, count, mask or modulation."""
    size, seen = case.sizes[size], []
    positive = case.prompt(size=size)
    plain = partial(case.run, positive=positive, batch=batch, cfg=cfg, size=size)
    stock, patched = plain(model), pack.patch(model, offset=60.0)
    attached = pack.negative(positive, negative=case.negative(n, gain=3.0))
    for m in (patched, with_override(patched, spy_override(seen))):
        neutral = case.run(m, attached, batch=batch, cfg=cfg, size=size)
        assert only_rounded(neutral, stock, model, plain)
    length = (case.length or 13) + n
    if case.cross:
        assert seen.count(length) == 2 * case.layers if cfg == 1.0 else seen.count(length) >= 2 * case.layers
    else:
        # the row-mask path: image rows and N0's rows see all keys, in each block of each step
        assert max(seen) >= length + case.grids(size)[0] + sum(case.references(size))
        assert seen.count(max(seen)) >= 2 * case.layers * 2


@DISTINCT_MODELS
def test_isolation(pack, case, model):
    """The picture does not see N (each token's mask is black): then changing N changes nothing at all."""
    patched, kw = pack.patch(model, scale=5.0, affect_references=False), {"cfg": 2.5}
    black = torch.zeros(1, 32, 32)
    first, second, third = (
        case.run(patched, pack.negative(case.prompt(), negative=case.negative(n, seed, gain=3.0), mask=black), **kw)
        for n, seed in ((5, 5), (5, 6), (40, 7))
    )
    assert torch.equal(first, second)
    plain = partial(case.run, positive=case.prompt(), **kw)
    stock = plain(model)
    assert only_rounded(first, stock, model, plain) and only_rounded(third, stock, model, plain)


@only(JOINT)
def test_n_reads_nothing_of_p(pack, case, model):
    """In the first block, whose picture P has not reached yet, N0 comes out the same whatever P is; and so does P
    whatever N is."""
    kept = {}
    for p, n in ((1, 5), (2, 5), (1, 6)):
        m = model.clone()

        def note(args, extra, key=(p, n)):
            out = extra["original_block"](args)
            kept.setdefault(key, (out["txt"] if "txt" in out else out["img"]).clone())
            return out

        def note_after(args, key=(p, n)):  # of models whose blocks cannot be replaced
            if args["block_index"] == 0:
                kept.setdefault(key, args["txt"].clone())
            return {}

        if model.model.diffusion_model.__class__.__name__ == "NextDiT":
            m.set_model_patch(note_after, "double_block")
        m.set_model_patch_replace(note, "dit", "double_block", 0)
        case.run(pack.patch(m), pack.negative(case.prompt(seed=p), negative=case.negative(5, n)), steps=1)
    first, other_p, other_n = kept[1, 5], kept[2, 5], kept[1, 6]
    others = (case.options.get("conditioning_byt5small"), case.options.get("clip_vision_output", {}))
    front = 0 if others[0] is None else others[0].shape[1] + others[1]["last_hidden_state"].shape[1]
    n, rest = slice(front, front + 5), slice(-13 - -13 % case.filled_to, None)
    assert torch.equal(first[:, n], other_p[:, n])
    assert not torch.equal(first[:, rest], other_p[:, rest])
    assert torch.equal(first[:, rest], other_n[:, rest])
    assert not torch.equal(first[:, n], other_n[:, n])


@ALL_AND_SMOKE
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_off(pack, case, model, cfg):
    """Of what turns it off, and of what happened before, ``test_off.py`` has more, on one model."""
    positive = case.prompt()
    stock = case.run(model, positive, cfg=cfg)
    patched, with_n = pack.patch(model), pack.negative(positive, negative=case.negative())
    off = {
        "no negative": (patched, positive),
        "no patch": (model, with_n),
        "outside the window": (pack.patch(model, start_percent=0.999), with_n),
    }
    for what, (m, p) in off.items():
        assert torch.equal(case.run(m, p, cfg=cfg), stock), what
    if cfg == 1.0:
        return

    def fail(func, q, k, v, heads, **kw):
        raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        case.run(with_override(patched, fail), with_n, cfg=cfg)
    assert not torch.equal(case.run(patched, with_n, cfg=cfg), stock)
    assert torch.equal(case.run(model, positive, cfg=cfg), stock)


@pytest.mark.parametrize(("size", "batch", "cfg", "affected"), [(0, 2, 1.0, True), (1, 1, 2.5, False)])
def test_mask(pack, case, model, size, batch, cfg, affected):
    """A negative acts where its mask is white; reference images see it, unless told otherwise."""
    size = case.sizes[size]
    cells, pixels = region(size)
    run, keep = {"size": size, "batch": batch, "cfg": cfg}, case.keep(size, cells, affected=affected)
    patch = {"affect_references": affected}
    result, expected = both(pack, case, model, patch=patch, node={"mask": pixels}, expect={"keep": keep}, **run)
    assert_close(result, expected)
    everywhere = pack.negative(case.prompt(size=size), negative=case.negative())
    assert relative(case.run(pack.patch(model), everywhere, **run), expected) > 1e-4


@DISTINCT_MODELS
def test_two_negatives_with_a_region_each(pack, case, model):
    size, positive, left, right = case.sizes[0], case.prompt(), case.negative(5, 5), case.negative(3, 6)
    cells, pixels = region(size)
    attached = pack.negative(positive, negative=left, mask=pixels)
    attached = pack.negative(attached, negative=right, mask=1 - pixels, strength=0.5)
    keep = [case.keep(size, cells, 5), case.keep(size, 1 - cells, 3)]
    keep = {t: torch.cat([k[t] for k in keep], 1) for t in keep[0]} if len(case.patches) > 1 else torch.cat(keep, 1)
    seen = torch.cat([case.seen(model, left), case.seen(model, right)], dim=1)
    alpha = torch.tensor([2.0] * 5 + [1.0] * 3)
    oracle, _ = oracle_model(model, [Expect(case.seen(model, positive), seen, alpha, 0.2, keep=keep)])
    assert_close(case.run(pack.patch(model, scale=2.0), attached, cfg=2.5), case.run(oracle, positive, cfg=2.5))


@DISTINCT_MODELS
def test_each_picture_of_a_batch_its_own_mask(pack, case, model):
    if len(case.sizes[0]) == 3 and case.sizes[0][0] > 1:
        pytest.skip("a batch of masks is one for each frame")
    masks = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    pair, one = (pack.negative(case.prompt(), negative=case.negative(), mask=m) for m in (masks, masks[1:]))
    patched = pack.patch(model, affect_references=False)
    result, seen = case.run(patched, pair, batch=2), case.run(patched, one, batch=2)
    stock = case.run(model, case.prompt(), batch=2)
    assert_close(result[:1], stock[:1])
    assert_close(result[1:], seen[1:])


@ALL_AND_SMOKE
def test_blocks(pack, case, model):
    """In blocks that are not selected the picture does not see N; N0 goes on in isolation."""
    everywhere = case.run(pack.patch(model), pack.negative(case.prompt(), negative=case.negative()))
    for blocks, selected in case.blocks.items():
        result, expected = both(pack, case, model, alpha=3.3, patch={"blocks": blocks}, expect={"blocks": selected})
        assert_close(result, expected)
        assert (relative(everywhere, expected) > 1e-4) == (blocks != "all"), blocks
    for blocks, right in case.bad_blocks.items():
        with pytest.raises(ValueError, match=right):
            pack.patch(model, blocks=blocks)


@DISTINCT_MODELS
def test_row_mask_path(pack, case, model):
    """An attention of another pack's: no log-sum-exp, so with a mask of one row, or of a row for each image token."""
    cells, pixels = region(case.sizes[0])
    for node, expect, cfg in ({}, {}, 1.0), ({"mask": pixels}, {"keep": case.keep(case.sizes[0], cells)}, 2.5):
        positive, negative, seen = case.prompt(), case.negative(), []
        oracle, _ = oracle_model(model, [case.expect(model, positive, negative, **expect)])
        patched = with_override(pack.patch(model), spy_override(seen))
        result = case.run(patched, pack.negative(positive, negative=negative, **node), cfg=cfg)
        assert_close(result, case.run(oracle, positive, cfg=cfg))
        assert len(seen) > 2 * case.layers


def test_encoder_and_width_are_checked(pack, case, model):
    wide = [[torch.nn.functional.pad(case.negative()[0][0], (0, 1)), case.negative()[0][1]]]
    with pytest.raises(ValueError, match=f"{case.width + 1} wide, but this model .* takes .*{case.width}"):
        case.run(pack.patch(model), pack.negative(case.prompt(), negative=wide))
    made = pack.negative(case.prompt(), negative=case.negative())
    made[0][1]["vsf_negatives"][0]["encoder"] = "none that there is"
    with pytest.raises(ValueError, match='of type "none that there is", but this model'):
        case.run(pack.patch(model), made)


@only(JOINT)
def test_the_released_pipeline_knows_two_families_alone(pack, name, model):
    if name.split()[0] in ("sd3", "sd3.5", "flux", "kontext"):
        pack.patch(model, layout="released")
        return
    with pytest.raises(ValueError, match="they have none for .*Set layout to paper"):
        pack.patch(model, layout="released")


@pytest.mark.long
def test_compiled_whole(pack, name, case, model):
    """ComfyUI's TorchCompileModel: no graph break of ours, and no graph of stock or of another negative is mistaken."""
    torch._dynamo.reset()
    compiled, options = model.clone(), {"guard_filter_fn": skip_torch_compile_dict}
    in_pieces = name == "hunyuan 1.5" or name.startswith("ltx2")  # ComfyUI's own code of these breaks the graph
    set_torch_compile_wrapper(compiled, "eager", options, keys=["diffusion_model"], fullgraph=not in_pieces)
    for n, settings, node in (
        (0, {}, {}),
        (5, {}, {}),
        (9, {"scale": 1.0}, {}),
        (0, {}, {}),
        (5, {"blocks": next(iter(case.blocks))}, {}),
        (5, {}, {"mask": region(case.sizes[0])[1]}),
    ):
        positive, pair = case.prompt(), [model, compiled]
        if n:
            positive = pack.negative(positive, negative=case.negative(n), **node)
            pair = [pack.patch(m, **settings) for m in pair]
        eager, result = (case.run(m, positive, steps=1) for m in pair)
        assert_close(result, eager, 1e-5 if n else 0.0)
    torch._dynamo.reset()
