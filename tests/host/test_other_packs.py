"""What well-known packs do to a model, done by stand-ins of our own: the picture is right, or an error says why not."""

import logging
import re
from functools import partial
from types import MethodType
from unittest import mock

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from cases import CASES, model_of
from encoders import make_clip, make_flux_clip
from helpers import assert_close, conditioning, relative, text

LISTS = {
    "sd3": ("joint_blocks", (0, 1)),
    "flux": ("double_blocks", ("img", "txt")),
    "qwen-image": ("transformer_blocks", ("encoder_hidden_states", "hidden_states")),
    "hunyuan": ("double_blocks", ("img", "txt")),
    "z-image": ("layers", (0,)),
    "wan": ("blocks", (0,)),
    "ltxv": ("transformer_blocks", (0,)),
    "cosmos": ("blocks", (0,)),
}
"""By model, the list of its blocks, and where in a block's arguments that goes which the one before it returned."""


class AsOne(torch.nn.Module):
    """All blocks of a list as a single one, as caches of the first block make of them."""

    def __init__(self, blocks, into):
        super().__init__()
        self.blocks, self.into = blocks, into

    def forward(self, *args, **kwargs):
        for block in self.blocks:
            made = block(*args, **kwargs)
            given = dict(zip(self.into, made if isinstance(made, tuple) else (made,), strict=True))
            args = tuple(given.get(i, arg) for i, arg in enumerate(args))
            kwargs = {name: given.get(name, value) for name, value in kwargs.items()}
        return made


def as_one(model, name):
    """A clone whose blocks run as one, from before the model is called until it is done."""
    attribute, into = LISTS[name]
    m = model.clone()
    network = m.model.diffusion_model
    one = torch.nn.ModuleList([AsOne(getattr(network, attribute), into)])

    def wrapper(apply, given):
        with mock.patch.object(network, attribute, one):
            return apply(given["input"], given["timestep"], **given["c"])

    m.set_model_unet_function_wrapper(wrapper)
    return m


@pytest.mark.parametrize("name", LISTS)
def test_blocks_that_run_as_one(pack, case, model, name):
    """Nobody can say which blocks see the negative then. Where all do and are of one type, it does not matter."""
    positive, negative = case.prompt(), case.negative()
    attached = pack.negative(positive, negative=negative)
    assert_close(case.run(as_one(model, name), positive), case.run(model, positive))  # the stand-in changes nothing
    first, rest = list(case.blocks)[:2]
    for blocks in (first, rest):
        with pytest.raises(RuntimeError, match="ran more often than the block|ran without the attention"):
            case.run(as_one(pack.patch(model, blocks=blocks), name), attached)
    if name in ("sd3", "qwen-image", "wan", "ltxv"):
        assert_close(case.run(as_one(pack.patch(model), name), attached), case.run(pack.patch(model), attached))
    else:
        with pytest.raises(RuntimeError, match="ran more often than the block|ran without the attention"):
            case.run(as_one(pack.patch(model), name), attached)


def test_record_needs_to_know_the_blocks(pack):
    case, model = CASES["sd3"], model_of("sd3")
    recorded = pack.mapping["VSFRecord"].execute(model=pack.patch(model)).result[0]
    with pytest.raises(RuntimeError, match="ran more often than the block itself.*no VSF Record"):
        case.run(as_one(recorded, "sd3"), pack.negative(case.prompt(), negative=case.negative()))


def without_block(model, index):
    """A clone with a patch that skips a block."""
    m = model.clone()
    m.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", index)
    return m


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image", "wan", "hunyuan", "ltxv"])
def test_selected_blocks_that_never_run(pack, case, model, name, caplog):
    attached = pack.negative(case.prompt(), negative=case.negative())
    with pytest.raises(RuntimeError, match=r"none of the blocks that should see the negative \(double:1\) ran"):
        case.run(without_block(pack.patch(model, blocks="double:1"), 1), attached)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    case.run(without_block(pack.patch(model, blocks="double:0-1"), 1), attached)
    assert caplog.text.count("1 of 2 blocks that should see the negative never ran (double:1)") == 1
    caplog.clear()
    case.run(without_block(pack.patch(model, blocks="double:0"), 1), attached)
    assert "never ran" not in caplog.text


# -- nodes that attend to a text of their own, beside the prompt's ----------------------------------------------------


def attending_to_more(model, other, halves=False):
    """A clone whose attention over text also attends to ``other`` [1, tokens, C], with the same queries, and keeps a
    part of that, as NAG packs do to Wan. halves: for the first half of the batch alone, whose attention is a call of
    its own then."""
    m = model.clone()
    for i, block in enumerate(m.model.diffusion_model.blocks):
        own = partial(type(block.cross_attn).forward, block.cross_attn)  # what a run before has patched in may be there

        def forward(x, context, attention=own, **kw):
            parts = x.chunk(2) if halves and len(x) > 1 else [x]
            texts = context.chunk(len(parts))
            made = [attention(part, given, **kw) for part, given in zip(parts, texts, strict=True)]
            made[0] = 0.7 * made[0] + 0.3 * attention(parts[0], other.expand(len(parts[0]), -1, -1), **kw)
            return torch.cat(made)

        m.add_object_patch(f"diffusion_model.blocks.{i}.cross_attn.forward", forward)
    return m


def test_a_second_text_in_the_same_block(pack):
    """Calls over it are told by their number of keys; with as many as the prompt's and the negative's, by nothing."""
    case, model = CASES["wan"], model_of("wan")
    positive, attached = case.prompt(), pack.negative(case.prompt(), negative=case.negative())
    for tokens in (13, 5 + 13 + 1):
        theirs = attending_to_more(model, text(tokens, 77, 256))
        stock = case.run(theirs, positive)
        assert_close(case.run(pack.patch(theirs, offset=60), attached), stock)
        assert relative(case.run(pack.patch(theirs), attached), stock) > 1e-3
    theirs = attending_to_more(model, text(5 + 13, 77, 256))
    with pytest.raises(RuntimeError, match="just as many tokens as the prompt with the negative"):
        case.run(pack.patch(theirs), attached)


@pytest.mark.parametrize("run", [{"cfg": 2.5}, {"batch": 2}])
def test_attention_over_half_of_the_batch(pack, run):
    case, model = CASES["wan"], model_of("wan")
    attached = pack.negative(case.prompt(), negative=case.negative())
    theirs = attending_to_more(model, text(7, 77, 256), halves=True)
    case.run(theirs, case.prompt(), **run)
    with pytest.raises(RuntimeError, match="2 rows in its batch, but .* with 1 of them.*input_type to batch"):
        case.run(pack.patch(theirs), attached, **run)
    whole = attending_to_more(model, text(7, 77, 256))
    stock = case.run(whole, case.prompt(), **run)
    assert_close(case.run(pack.patch(whole, offset=60), attached, **run), stock)


# -- networks and forward passes of other packs -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux", "z-image", "wan"])
def test_the_class_that_a_run_will_have(pack, case, model, name):
    """A patcher may put a class of its own on the network that all patchers of a model share; it stays there until
    another one runs."""
    kind = type(model.model.diffusion_model)
    theirs = model.clone()
    theirs.add_object_patch("diffusion_model.__class__", type("Other", (kind,), {"__module__": "a/custom_nodes/p.q"}))
    attached = pack.negative(case.prompt(), negative=case.negative())
    expected = case.run(pack.patch(model), attached)
    case.run(theirs, case.prompt())
    assert type(model.model.diffusion_model) is not kind  # it is left there
    plain = pack.patch(model)
    for refused in (lambda: pack.patch(theirs), lambda: case.run(sum_of(plain, theirs), attached)):
        with pytest.raises(ValueError, match=r"models of class Other \(of p\.q\) are not supported"):
            refused()
    assert torch.equal(case.run(plain, attached), expected)


def sum_of(patcher, other):
    """A clone of ``patcher`` with the object patches of ``other``."""
    m = patcher.clone()
    for name, value in other.object_patches.items():
        m.add_object_patch(name, value)
    return m


class OwnForward(comfy.samplers.CFGGuider):
    """A guider that puts its own forward pass on the network, and takes it off where all goes well."""

    def sample(self, *args, **kwargs):
        network = self.model_patcher.model.diffusion_model
        before = network.forward

        def forward(this, *given, **kw):
            return before(*given, **kw)

        network.forward = MethodType(partial(forward), network)
        made = super().sample(*args, **kwargs)
        network.forward = before
        return made


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "sdxl"])
def test_a_guider_with_a_forward_pass_of_its_own(pack, case, model, name):
    def run(patcher, positive):
        guider = OwnForward(patcher)
        guider.set_conds(positive, case.uncond())
        guider.set_cfg(1.0)
        latent = torch.zeros(1, case.channels, *case.sizes[0])
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0])
        with torch.inference_mode():
            return guider.sample(latent + 1, latent, sampler, sigmas, seed=1)

    attached, expected = pack.negative(case.prompt(), negative=case.negative()), case.run(model, case.prompt())
    run(model, case.prompt())
    run(pack.patch(model), case.prompt())  # without a negative it may do what it likes
    with pytest.raises(RuntimeError, match=r"OwnForward \(of .*test_other_packs\) runs the model by a forward pass"):
        run(pack.patch(model), attached)
    network = model.model.diffusion_model
    assert network.forward.__func__ is type(network).forward
    assert torch.equal(case.run(model, case.prompt()), expected)


# -- a negative that does nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "wan", "sdxl", "z-image"])
def test_a_negative_that_does_nothing_is_said(pack, case, model, name, caplog):
    def said(patch, node):
        caplog.clear()
        attached = pack.negative(case.prompt(), negative=case.negative(), **node)
        return case.run(pack.patch(model, **patch), attached), [
            r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "VSF" in r.getMessage()
        ]

    stock = case.run(model, case.prompt())
    black, dot = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    dot[:, 20:30, 20:30] = 1
    for patch, node, what in (
        ({}, {"mask": black}, "mask of 1 of 1 negatives is black"),
        ({"offset": 60}, {}, "offset of 60"),
        ({"method": "nag", "nag_scale": 1}, {}, "method nag does nothing at this nag_scale"),
        ({"method": "nag", "nag_alpha": 0}, {}, "method nag does nothing at this nag_alpha"),
        ({"method": "nasa"}, {"strength": 0}, "method nasa does nothing at this strength"),
    ):
        made, lines = said(patch, node)
        assert_close(made, stock)
        assert len(lines) == 1 and what in lines[0], lines
    made, lines = said({}, {"mask": dot})
    assert not lines and relative(made, stock) > 1e-4
    if name == "wan":
        three = torch.zeros(3, 64, 64)
        three[0] = 1
        assert "is black" in said({}, {"mask": three, "from_frame": 0.5})[1][0]
        assert not said({}, {"mask": three, "to_frame": 0.5})[1]


@pytest.mark.parametrize("level", [logging.CRITICAL + 1, logging.ERROR])
def test_a_node_that_turns_the_log_off(pack, level, caplog):
    """As UltimateSDUpscale does while it samples: what VSF has to say is said."""
    case, model, root = CASES["sd3"], model_of("sd3"), logging.getLogger()
    attached = pack.negative(case.prompt(), negative=case.negative(), mask=torch.zeros(1, 64, 64))
    before = root.level
    root.setLevel(level)
    try:
        case.run(pack.patch(model), attached)
    finally:
        root.setLevel(before)
    assert "mask of 1 of 1 negatives is black" in caplog.text


# -- windows of other packs --------------------------------------------------------------------------------------------


def in_windows(model, slices):
    """A clone that samples a batch of frames in windows of two, as AnimateDiff-Evolved's context options do. slices:
    whether conds of the batch's length are cut to the window, as they are there."""

    def part(cond, batch, at):
        alone = hasattr(cond, "cond") and isinstance(cond.cond, torch.Tensor) and cond.cond.shape[0] == batch
        return cond._copy_with(cond.cond[at]) if alone else cond

    def windows(executor, m, conds, x, timestep, options):
        outs = []
        for at in ([0, 2], [1, 3]):
            shown = [
                branch
                and [
                    {**e, "model_conds": {k: part(c, len(x), at) for k, c in e["model_conds"].items()}} for e in branch
                ]
                for branch in conds
            ]
            outs.append(executor(m, shown if slices else conds, x[at], timestep[at], options))
        return [torch.stack([a, b], dim=1).flatten(0, 1) for a, b in zip(*outs, strict=True)]

    m = model.clone()
    m.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "windows", windows)
    return m


@pytest.mark.parametrize("slices", [True, False])
@pytest.mark.parametrize("order", ["theirs first", "vsf first"])
def test_a_mask_with_a_row_a_frame_in_windows(pack, order, slices):
    """Each row stays with its frame, or the run is refused; one mask for all is right."""
    case, model = CASES["sd3"], model_of("sd3")
    patched = (
        pack.patch(in_windows(model, slices)) if order == "theirs first" else in_windows(pack.patch(model), slices)
    )
    rows = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(0)).round()
    for mask, may_fail in ((rows[:1], False), (rows, True)):
        attached = pack.negative(case.prompt(), negative=case.negative(), mask=mask)
        expected = case.run(pack.patch(model), attached, batch=4)
        try:
            made = case.run(patched, attached, batch=4)
        except RuntimeError as error:
            assert may_fail and re.search("some of the 4 pictures at a time", str(error))
        else:
            assert_close(made, expected)
    assert relative(case.run(model, case.prompt(), batch=4), expected) > 1e-3


# -- tiles ------------------------------------------------------------------------------------------------------------


class Tiler:
    """A wrapper around the model that shows it the left half of a step, then the right one."""

    tile_width = 12

    def __call__(self, apply, given):
        halves = given["input"].chunk(2, dim=-1)
        return torch.cat([apply(half, given["timestep"], **given["c"]) for half in halves], dim=-1)


@pytest.mark.parametrize("name", ["sd3", "flux", "z-image", "sdxl"])
def test_tiles_inside_a_step(pack, case, model, name):
    def tiled(m):
        m = m.clone()
        m.set_model_unet_function_wrapper(Tiler())
        return m

    bare = pack.negative(case.prompt(), negative=case.negative())
    stock = case.run(tiled(model), case.prompt(), size=(16, 24))
    assert_close(case.run(tiled(pack.patch(model, offset=60)), bare, size=(16, 24)), stock)
    assert relative(case.run(tiled(pack.patch(model)), bare, size=(16, 24)), stock) > 1e-3
    masked = pack.negative(case.prompt(), negative=case.negative(), mask=torch.ones(1, 64, 64))
    with pytest.raises(ValueError, match=r"Tiler \(of .*test_other_packs\) samples the picture in tiles"):
        case.run(tiled(pack.patch(model)), masked, size=(16, 24))
    if name != "sdxl":
        recorded = pack.mapping["VSFRecord"].execute(model=pack.patch(model)).result[0]
        with pytest.raises(RuntimeError, match="or by a node that samples in tiles"):
            case.run(tiled(recorded), bare, size=(16, 24))


@pytest.mark.parametrize("make", [lambda: make_clip(clip_g=False, t5=False), make_flux_clip], ids=["sd3", "flux"])
def test_a_clip_that_encodes_every_token_twice(pack, make):
    """As CLIPNegPip's does: keys and values of a token are two positions."""
    clip = make().clone()
    clip.patcher.model_options["ppm_negpip"] = True
    name = "clip_l" if hasattr(clip.tokenizer, "clip_g") else "t5xxl"
    encode = getattr(clip.cond_stage_model, name).encode_token_weights

    def doubled(tokens):
        out, *rest = encode(tokens)
        return out.repeat_interleave(2, dim=1), *rest

    clip.patcher.add_object_patch(f"{name}.encode_token_weights", doubled)
    with pytest.raises(ValueError, match="comes from a NegPip node"):
        pack.negative(conditioning(), clip=clip, text="roof")
    clip.patcher.unpatch_model()
