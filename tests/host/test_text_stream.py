"""N is found where it really is: patches of other nodes put tokens into the text, in every place that ComfyUI offers,
or move those that are there. What VSF cannot follow is an error that names the patch, never a flipped style token."""

import importlib
import inspect
from functools import partial

import comfy.ldm.cosmos.predict2 as cosmos
import comfy.ldm.flux.layers as flux_layers
import comfy.ldm.qwen_image.model as qwen
import pytest
import torch
from cases import CASES, model_of
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from helpers import assert_close, load_flux, load_sd3, only_rounded
from oracle import oracle_model

FluxKVCache = getattr(importlib.import_module("comfy_extras.nodes_flux"), "FluxKVCache", None)
PATCHED_KEYS = "attn1_patch" in inspect.getsource(flux_layers)
"""Older ComfyUIs ask for fewer patches: here, for those of a joint attention's keys,"""
PATCHED_TEXT = {
    "qwen-image": "post_input" in inspect.getsource(qwen),
    "cosmos": "attn2_patch" in inspect.getsource(cosmos),
}
"""for those of Qwen-Image's text before its blocks, and of the text of one attention of Cosmos Predict2 and Anima."""


@pytest.fixture(autouse=True)
def _skip_what_this_host_does_not_ask_for(request):
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name", "")
    asked = request.function.__name__
    if name and "qwen" in name and asked != "test_tokens_inside_one_block" and not PATCHED_TEXT["qwen-image"]:
        pytest.skip("this ComfyUI's Qwen-Image has no post_input")
    if name in ("cosmos", "anima") and not PATCHED_TEXT["cosmos"]:
        pytest.skip("this ComfyUI's Cosmos has no attn2_patch")
    if "keys" in asked and not PATCHED_KEYS or asked == "test_cached_references" and FluxKVCache is None:
        pytest.skip("this ComfyUI has no patches of keys")


X = 9
"""How many tokens the stand-ins put in."""
PLACES = ("front", "behind", "between")
WITH_INPUT_PATCHES = ("flux", "kontext", "flux.2 dev", "flux.2 klein", "qwen-image", "qwen-image edit")
COUNTED = ("flux.2 dev", "flux.2 klein", "qwen-image", "qwen-image edit")
"""Models that count their text through."""


def placed(tokens, extra, where, text, dim=1):
    """``tokens``, of which the first ``text`` are text, with ``extra`` in front of them, behind, or between."""
    at = {"front": 0, "behind": text, "between": min(8, text)}[where]
    a, b = tokens.split([at, tokens.shape[dim] - at], dim=dim)
    return torch.cat([a, extra, b], dim=dim)


def style(like, count=X):
    """Tokens of another encoder [B, count, C]."""
    g = torch.Generator().manual_seed(31)
    return (2 * torch.randn(1, count, like.shape[2], generator=g)).expand(like.shape[0], -1, -1).to(like)


def input_patch(where):
    """A ``post_input`` patch like core's USO Style Reference, which puts its tokens in front."""

    def style_reference(args):
        text = args["txt"].shape[1]
        ids = args["txt_ids"].new_full((args["txt_ids"].shape[0], X, args["txt_ids"].shape[2]), 3)
        args["txt_ids"] = placed(args["txt_ids"], ids, where, text)
        args["txt"] = placed(args["txt"], style(args["txt"]), where, text)
        return args

    return style_reference


def with_input_patch(model, patch):
    patched = model.clone()
    patched.set_model_patch(patch, "post_input")
    return patched


def compared(pack, case, model, apply, **run):
    """The latents with VSF and the patch that ``apply`` makes, and of stock with it; and that offset 60 is stock."""
    stock = partial(case.run, positive=case.prompt(), **run)
    plain = stock(apply(model))
    attached = pack.negative(case.prompt(), negative=case.negative())
    neutral = case.run(apply(pack.patch(model, offset=60.0)), attached, **run)
    assert only_rounded(neutral, plain, apply(model), stock)
    return case.run(apply(pack.patch(model)), attached, **run), plain


@pytest.mark.parametrize("name", WITH_INPUT_PATCHES)
def test_tokens_before_the_blocks(pack, name):
    """Attention does not know of order, so wherever the same tokens stand, the picture is the same; and it is the
    oracle's."""
    case, model = CASES[name], model_of(name)
    made = {}
    for where in PLACES[: 2 if name in COUNTED else 3]:
        made[where], plain = compared(pack, case, model, lambda m, w=where: with_input_patch(m, input_patch(w)))
        assert_close(made[where], made["front"])
    assert (made["front"] - plain).abs().max() > 1e-3 * plain.abs().max()
    expects = [case.expect(model, case.prompt())]
    oracle = with_input_patch(oracle_model(model, expects, in_front=X)[0], input_patch("front"))
    assert_close(made["front"], case.run(oracle, case.prompt()))


def test_cores_style_reference(pack):
    """The class of the node itself, around a projector of its own."""
    from comfy_extras.nodes_model_patch import UsoStyleProjectorPatch

    case, model = CASES["flux"], model_of("flux")
    projector = ModelPatcher(torch.nn.Identity(), torch.device("cpu"), torch.device("cpu"))
    image = style(torch.zeros(1, 1, model.model.diffusion_model.hidden_size))
    compared(pack, case, model, lambda m: with_input_patch(m, UsoStyleProjectorPatch(projector, image)))


def test_text_that_is_counted_through(pack):
    """Ovis-Image loads as Flux and counts its text: N has the positions of a prompt of its own."""
    case, model = CASES["flux"], load_flux()
    model.model.diffusion_model.params.txt_ids_dims = [1, 2]
    result, plain = compared(pack, case, model, lambda m: m, size=(15, 21))
    oracle, record = oracle_model(model, [case.expect(model, case.prompt())])
    assert_close(result, case.run(oracle, case.prompt(), size=(15, 21)))
    assert record.joint > 0


def moved(args):
    return {**args, "txt": args["txt"].flip(1), "txt_ids": args["txt_ids"].flip(1)}


def moved_in_place(args):
    args["txt"][:], args["txt_ids"] = args["txt"].flip(1), args["txt_ids"].flip(1)
    return args


def dropped(args):
    return {**args, "txt": args["txt"][:, 2:], "txt_ids": args["txt_ids"][:, 2:]}


def repeated(args):
    return {**args, **{name: torch.cat([args[name], args[name]], dim=1) for name in ("txt", "txt_ids")}}


def replaced(args):
    return {**args, "txt": style(args["txt"], args["txt"].shape[1])}


@pytest.mark.parametrize("name", ["flux", "flux.2 klein", "qwen-image"])
@pytest.mark.parametrize("patch", [moved, moved_in_place, dropped, repeated, replaced])
def test_a_patch_that_loses_n_is_named(pack, name, patch):
    case = CASES[name]
    attached = pack.negative(case.prompt(), negative=case.negative())
    with pytest.raises(RuntimeError, match=rf"patch of another node \(\S*{patch.__name__}\)"):
        case.run(with_input_patch(pack.patch(model_of(name)), patch), attached)
    off = case.run(with_input_patch(pack.patch(model_of(name)), patch), case.prompt())
    assert torch.equal(off, case.run(with_input_patch(model_of(name), patch), case.prompt()))


def rolled(args):
    """P's last tokens stand in front of N."""
    return {**args, "txt": args["txt"].roll(3, 1)}


def rolled_in_place(args):
    args["txt"].copy_(args["txt"].roll(3, 1))
    return args


def rolled_later(args):
    if "transformer_options" not in args:
        pytest.skip("this ComfyUI does not tell a patch of the step")
    options = args["transformer_options"]
    return args if options["sigmas"][0] >= options["sample_sigmas"][0] else rolled(args)


@pytest.mark.parametrize("patch", [rolled, rolled_in_place, rolled_later])
def test_tokens_that_change_places(pack, patch):
    """As many as before, in every step or from the second one on."""
    compared(pack, CASES["flux"], model_of("flux"), lambda m: with_input_patch(m, patch), steps=3)


@pytest.mark.parametrize("name", COUNTED)
def test_tokens_inside_a_counted_text(pack, name):
    case = CASES[name]
    model = with_input_patch(pack.patch(model_of(name)), input_patch("between"))
    with pytest.raises(RuntimeError, match="between the negative and the prompt"):
        case.run(model, pack.negative(case.prompt(), negative=case.negative()))


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
@pytest.mark.parametrize("where", ["front", "behind"])
def test_text_whose_values_change_too(pack, name, where):
    """Louder text is still the text; with nothing else changed, the oracle's."""
    case, model = CASES[name], model_of(name)

    def louder(args):
        return input_patch(where)({**args, "txt": args["txt"] * 1.2 + 0.01})

    compared(pack, case, model, lambda m: with_input_patch(m, louder))
    only = lambda m: with_input_patch(m, lambda args: {**args, "txt": args["txt"] * 1.2})  # noqa: E731
    result, _ = compared(pack, case, model, only)
    oracle = only(oracle_model(model, [case.expect(model, case.prompt())])[0])
    assert_close(result, case.run(oracle, case.prompt()))


def test_a_negative_that_is_the_prompt(pack):
    """P's words once more: the one in front is N."""
    case, model = CASES["flux"], model_of("flux")
    n = [[case.prompt()[0][0], {}]]
    attached = pack.negative(case.prompt(), negative=n)
    oracle, _ = oracle_model(model, [case.expect(model, case.prompt(), n)], in_front=X)
    for where in PLACES[:2]:
        result = case.run(with_input_patch(pack.patch(model), input_patch(where)), attached)
        assert_close(result, case.run(with_input_patch(oracle, input_patch("front")), case.prompt()))


# -- inside blocks -----------------------------------------------------------------------------------------------------


def stream_of(args):
    """The name of a block's argument that has the text, and how many tokens of it are text."""
    name = next(name for name in ("v_context", "txt", "img") if name in args)
    return name, args["transformer_options"]["img_slice"][0] if name == "img" else args[name].shape[1]


def in_block(where):
    """A block replacement that puts tokens into the text for the length of one block."""

    def image_prompt(args, extra):
        name, text = stream_of(args)
        whole = args[name].shape[1]
        inner = {**args, name: placed(args[name], style(args[name]), where, text)}
        joint = whole if name == "img" else whole + args["img"].shape[1] if torch.is_tensor(args["img"]) else 0
        at = [d for d, size in enumerate(args["pe"].shape) if size == joint] if torch.is_tensor(args.get("pe")) else []
        if at:  # rotations of a joint sequence
            first = args["pe"].narrow(at[0], 0, 1).repeat_interleave(X, at[0])
            inner["pe"] = placed(args["pe"], first, where, text, at[0])
        mask = args.get("attention_mask")
        if torch.is_tensor(mask) and mask.shape[-1] == text:
            inner["attention_mask"] = placed(mask, mask.new_zeros(*mask.shape[:-1], X), where, text, -1)
        out = dict(extra["original_block"](inner))
        if name in out and out[name] is not None:
            at = {"front": 0, "behind": text, "between": min(8, text)}[where]
            out[name] = torch.cat([out[name][:, :at], out[name][:, at + X :]], dim=1)
        return out

    return image_prompt


def with_block_patch(model, patch, kind="double", number=1):
    patched = model.clone()
    patched.set_model_patch_replace(patch, "dit", f"{kind}_block", number)
    return patched


BLOCKS = [
    *((name, "double") for name in ("sd3", "flux", "chroma", "qwen-image", "flux.2 klein", "hunyuan", "hunyuan 1.5")),
    *((name, "single") for name in ("flux", "chroma", "hunyuan 1.5")),
]


@pytest.mark.parametrize(("name", "kind"), BLOCKS)
def test_tokens_inside_one_block(pack, name, kind):
    case, model, made = CASES[name], model_of(name), {}
    for where in PLACES:
        apply = partial(with_block_patch, patch=in_block(where), kind=kind)
        made[where], plain = compared(pack, case, model, apply)
    assert (made["front"] - plain).abs().max() > 1e-3 * plain.abs().max()
    if kind == "double":  # in a single stream, what stands behind the text is picture
        assert_close(made["front"], made["behind"])
        assert_close(made["between"], made["behind"])


@pytest.mark.parametrize("name", ["wan", "wan i2v", "wan vace", "ltxv", "ltx2"])
def test_tokens_inside_one_cross_attention_block(pack, name):
    case, model, made = CASES[name], model_of(name), {}
    if name == "wan i2v":
        pytest.skip("its blocks split off CLIP vision's tokens by their number: stock itself mixes them up")
    for where in ("front", "behind"):
        made[where], plain = compared(pack, case, model, partial(with_block_patch, patch=in_block(where)))
    assert (made["front"] - plain).abs().max() > 1e-3 * plain.abs().max()
    assert_close(made["front"], made["behind"])


def test_a_block_that_loses_n_is_named(pack):
    case = CASES["flux"]

    def reversed_text(args, extra):
        return extra["original_block"]({**args, "txt": args["txt"].flip(1)})

    model = with_block_patch(pack.patch(model_of("flux")), reversed_text)
    with pytest.raises(RuntimeError, match="reversed_text"):
        case.run(model, pack.negative(case.prompt(), negative=case.negative()))


def test_tokens_that_stay(pack):
    """A replacement that leaves its tokens in the stream, in front; later blocks follow."""
    case, model = CASES["flux"], model_of("flux")

    def adds(args, extra):
        out = extra["original_block"](args)
        return {**out, "txt": torch.cat([style(out["txt"], 1) * 0 + out["txt"][:, -1:], out["txt"]], dim=1)}

    def drops(args, extra):
        inner = {**args, "txt": args["txt"][:, 1:]}
        return extra["original_block"](inner)

    def apply(m):
        pe = with_block_patch(m, adds, number=0)
        return with_block_patch(pe, drops, number=1)

    compared(pack, case, model, apply)


@pytest.mark.parametrize("skipped", ["0", "0,1", "1"])
@pytest.mark.parametrize("name", ["hunyuan 1.5", "flux"])
def test_skipped_blocks(pack, name, skipped):
    """Core's Skip Layer Guidance: HunyuanVideo 1.5 has other encoders' text in front of N, whichever block is first."""
    case, model = CASES[name], model_of(name)

    def apply(m):
        return SkipLayerGuidanceDiT.execute(m, skipped, "", 2.0, 0.0, 1.0, 0.0).result[0]

    try:
        apply(model)
    except TypeError:  # the order of its inputs differs from host to host
        apply = lambda m: SkipLayerGuidanceDiT.execute(m, 2.0, 0.0, 1.0, skipped, "", 0.0).result[0]  # noqa: E731
    result, plain = compared(pack, case, model, apply)
    assert (result - plain).abs().max() > 1e-3 * plain.abs().max()


# -- patches of attention ----------------------------------------------------------------------------------------------

REFERENCES = ("flux.2 klein", "qwen-image edit")


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("affect", [True, False])
def test_cached_references(pack, name, affect):
    """Core's Flux KV Cache: after the first pass, references have keys and values, but no queries."""
    case, model = CASES[name], model_of(name)

    def apply(m):
        return FluxKVCache.execute(m).result[0]

    result, plain = compared(pack, case, model, apply, steps=3)
    assert (result - plain).abs().max() > 1e-3 * plain.abs().max()
    keep = torch.cat([torch.ones(case.grids()[0]), torch.full((case.references()[1],), float(affect))])
    expects = [case.expect(model, case.prompt(), keep=keep[:, None].expand(-1, 5))]
    recorded, holder = pack.mapping["VSFRecord"].execute(pack.patch(model, affect_references=affect)).result
    result = case.run(apply(recorded), pack.negative(case.prompt(), negative=case.negative()), steps=3)
    oracle, record = oracle_model(model, expects)
    assert_close(result, case.run(apply(oracle), case.prompt(), steps=3))
    shares = torch.stack([share for _, share in record.shares]).double().mean(0)[:, : case.grids()[0]]
    assert_close(holder.record_here().mean().flatten(), shares.flatten(), 1e-4)


def with_keys(model, patch):
    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    return patched


def keys_in_front(q, k, v, pe=None, attn_mask=None, extra_options=None):
    return {"k": torch.cat([k[:, :, -4:], k], dim=2), "v": torch.cat([v[:, :, -4:], v], dim=2)}


def keys_reversed(q, k, v, pe=None, attn_mask=None, extra_options=None):
    return {"k": k.flip(2), "v": v.flip(2)}


def queries_warmer(q, k, v, pe=None, attn_mask=None, extra_options=None):
    return {"q": q * 1.2}


@pytest.mark.parametrize("patch", [keys_in_front, keys_reversed])
def test_keys_that_move_are_named(pack, patch):
    case = CASES["flux"]
    with pytest.raises(RuntimeError, match=patch.__name__):
        case.run(with_keys(pack.patch(model_of("flux")), patch), pack.negative(case.prompt(), negative=case.negative()))


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_keys_whose_values_change(pack, name):
    case, model = CASES[name], model_of(name)
    result, _ = compared(pack, case, model, lambda m: with_keys(m, queries_warmer))
    oracle = with_keys(oracle_model(model, [case.expect(model, case.prompt())])[0], queries_warmer)
    assert_close(result, case.run(oracle, case.prompt()))


def unet_text(change):
    def patch(n, context, value, options):
        return n, change(context), change(value)

    return patch


def cosmos_text(change):
    def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
        return {"k": change(k), "v": change(v)}

    return patch


CROSS_TEXT = {"sd1": unet_text, "sdxl": unet_text, "cosmos": cosmos_text, "anima": cosmos_text}


@pytest.mark.parametrize("name", CROSS_TEXT)
def test_text_of_one_attention(pack, name):
    """An ``attn2_patch`` puts tokens around the text of each cross-attention."""
    case, model, made = CASES[name], model_of(name), {}
    for where in ("front", "behind"):

        def apply(m, where=where):
            patched = m.clone()
            around = CROSS_TEXT[name](lambda text: placed(text, style(text), where, text.shape[1]))
            patched.set_model_attn2_patch(around)
            return patched

        made[where], plain = compared(pack, case, model, apply)
    assert_close(made["front"], made["behind"])


@pytest.mark.parametrize("name", CROSS_TEXT)
@pytest.mark.parametrize(
    "change",
    [lambda t: t.repeat(2, 1, 1), lambda t: t.repeat(1, 2, 1), lambda t: t.flip(1), lambda t: t[:, 1:]],
    ids=["regions with texts of their own", "repeated", "reversed", "cut"],
)
def test_text_of_one_attention_that_loses_n(pack, name, change):
    """As attention couple does: more texts than pictures, repeated to one length."""
    case, model = CASES[name], pack.patch(model_of(name))
    model.set_model_attn2_patch(CROSS_TEXT[name](change))
    with pytest.raises(RuntimeError, match=r"patch of another node \(\S+_text\.<locals>\.patch\)"):
        case.run(model, pack.negative(case.prompt(), negative=case.negative()))


def test_text_after_a_block(pack):
    """Z-Image has no block replacements: patches after a block get its text, and may give it back changed."""
    case, model = CASES["z-image"], model_of("z-image")

    def apply(m, change):
        patched = m.clone()
        patched.set_model_patch(change, "double_block")
        return patched

    compared(pack, case, model, lambda m: apply(m, lambda args: {"txt": args["txt"] * 1.1}))

    def reversed_text(args):
        return {"txt": args["txt"].flip(1)}

    with pytest.raises(RuntimeError, match="reversed_text"):
        case.run(apply(pack.patch(model), reversed_text), pack.negative(case.prompt(), negative=case.negative()))


# -- the whole model, or a block, more than once -----------------------------------------------------------------------


def around_the_model(model, wrapper):
    wrapped = model.clone()
    wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another pack", wrapper)
    return wrapped


@pytest.mark.parametrize("name", ["flux", "hunyuan 1.5", "wan", "z-image"])
@pytest.mark.parametrize("where", ["front", "behind"])
def test_tokens_around_the_whole_model_are_named(pack, name, where):
    """A wrapper puts tokens into the text before the model embeds it."""
    case = CASES[name]

    def adds_tokens(executor, x, timestep, context, *args, **kw):
        return executor(x, timestep, placed(context, style(context), where, context.shape[1]), *args, **kw)

    model = around_the_model(pack.patch(model_of(name)), adds_tokens)
    with pytest.raises(RuntimeError, match=r"adds_tokens\) puts tokens into the text of the whole model"):
        case.run(model, pack.negative(case.prompt(), negative=case.negative()))


@pytest.mark.parametrize("name", ["chroma", "hunyuan", "hunyuan 1.5", "z-image", "cosmos"])
def test_a_model_that_runs_twice_in_a_pass(pack, name):
    case, model = CASES[name], model_of(name)

    def twice(executor, *args, **kw):
        return (executor(*args, **kw) + executor(*args, **kw)) / 2

    result, _ = compared(pack, case, model, lambda m: around_the_model(m, twice))
    once = case.run(pack.patch(model), pack.negative(case.prompt(), negative=case.negative()))
    assert_close(result, once)


def test_a_block_that_runs_twice(pack):
    """On what it was given, both times; it makes of the text something else altogether."""
    case, model = CASES["sd3"], load_sd3()
    with torch.no_grad():
        model.model.diffusion_model.joint_blocks[1].context_block.mlp.fc2.weight *= 3e4

    def twice(args, extra):
        first, again = (extra["original_block"](args) for _ in range(2))
        return {name: (value + again[name]) / 2 for name, value in first.items()}

    compared(pack, case, model, lambda m: with_block_patch(m, twice))
