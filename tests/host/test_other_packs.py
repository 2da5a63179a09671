"""What well-known packs do to a model, done by stand-ins of our own: the picture is right, or an error says why not."""

import logging
from unittest import mock

import pytest
import torch
from cases import CASES, model_of
from helpers import assert_close

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
