"""Blocks on two devices, and packs that walk into, copy or move what they find in ``transformer_options``.

There is no second device here. A stand-in is one: its tensors say that they are on "meta" and hold their numbers on the
CPU, and an operation on tensors of both fails, as it does between two GPUs.
"""

import copy
import pickle
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import pytest
import torch
from cases import CASES, model_of
from helpers import assert_close, sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

THERE = torch.device("meta")


class There(torch.Tensor):
    """A tensor on the other device."""

    @staticmethod
    def __new__(cls, inner):
        size = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **size, device=THERE)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_two(func, args, kwargs or {})


def on_two(func, args, kwargs):
    """Runs an operation where its tensors are. Raises ``RuntimeError`` where these are on two devices."""
    name, flat = (
        func.overloadpacket.__name__,
        [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)],
    )
    moves = name in ("_to_copy", "copy_")
    devices = {t.device for t in flat if t.ndim or isinstance(t, There)}
    if len(devices) > 1 and not moves:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} has {devices}")
    target = kwargs.get("device")
    there = target == THERE if target is not None else any(isinstance(t, There) for t in flat)
    if name == "copy_":
        there = isinstance(args[0], There)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
    out = func(*args, **kwargs)
    return tree_map(lambda t: There(t) if there and isinstance(t, torch.Tensor) else t, out)


class TwoDevices(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_two(func, args, kwargs or {})


def test_the_stand_in_is_a_second_device():
    with TwoDevices():
        a = torch.ones(3)
        b = torch.ones(3).to(THERE)
        assert b.device == THERE and (b + b).device == THERE and torch.zeros(2, device=THERE).device == THERE
        assert (b.to("cpu") + a).tolist() == [2, 2, 2] and float(b.sum()) == 3
        with pytest.raises(RuntimeError, match="on the same device"):
            a + b
        with pytest.raises(RuntimeError, match="on the same device"):
            torch.where(a > 0, a, b)


def moved(value, device):
    """What a block that is on another device does to its arguments, as ParallelAnything's: dicts, lists and dataclasses
    are walked into, and their tensors moved."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(one, device) for one in value)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    if is_dataclass(value):
        made = copy.copy(value)
        for one in fields(value):
            setattr(made, one.name, moved(getattr(value, one.name), device))
        return made
    return value


@contextmanager
def block_elsewhere(module, device=THERE):
    """While open, a block's weights are on another device: its arguments go there, and what it gives comes back."""
    kept = {name: parameter for name, parameter in module.named_parameters()}
    forward = module.forward

    def there(*args, **kwargs):
        return moved(forward(*moved(args, device), **moved(kwargs, device)), torch.device("cpu"))

    def put(name, value):
        *path, last = name.split(".")
        owner = module.get_submodule(".".join(path))
        owner._parameters[last] = value

    for name, parameter in kept.items():
        put(name, torch.nn.Parameter(There(parameter.data), requires_grad=False))
    module.forward = there
    try:
        yield
    finally:
        del module.forward
        for name, parameter in kept.items():
            put(name, parameter)


BLOCKS = {
    "sd3": lambda network: network.joint_blocks[1],
    "flux": lambda network: network.single_blocks[0],
    "qwen-image": lambda network: network.transformer_blocks[1],
    "wan": lambda network: network.blocks[1],
}


@pytest.mark.parametrize("method", ["vsf", "nasa"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_on_another_device(pack, case, model, name, method):
    """All that the attention needs is where the queries are: also masks, padding and the method's numbers."""
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:48, 16:64] = 1
    attached = pack.negative(case.prompt(), negative=case.negative(), mask=mask)
    if method == "vsf":  # another length: the first is padded to it
        attached = attached + pack.negative(case.prompt(seed=2), negative=case.negative(3))
    patched = pack.patch(model, method=method)
    run = {"size": case.sizes[0], "channels": case.channels, "steps": 1}
    with torch.no_grad():  # tensors of inference mode are not for stand-ins
        expected = sample(patched, attached, case.uncond(), **run)
        with block_elsewhere(BLOCKS[name](model.model.diffusion_model)), TwoDevices():
            made = sample(patched, attached, case.uncond(), **run)
    assert_close(made, expected)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_options_that_a_pack_copies(pack, case, model, name):
    """Counters stay one, whoever copies them: a copy that lost them would say that the negative had no effect."""
    attached = pack.negative(case.prompt(), negative=case.negative())
    expected = case.run(pack.patch(model), attached, steps=1)
    for change in (copy.deepcopy, copy.copy, lambda options: moved(options, torch.device("cpu"))):

        def wrapper(executor, x, t, c_concat, context, control, options, change=change, **kwargs):
            return executor(x, t, c_concat, context, control, change(options), **kwargs)

        m = pack.patch(model)
        m.add_wrapper("apply_model", wrapper)
        assert torch.equal(case.run(m, attached, steps=1), expected)


def test_options_that_a_pack_sends_elsewhere(pack):
    case, model, seen = CASES["flux"], model_of("flux"), []
    m = pack.patch(model)

    def wrapper(executor, x, t, c_concat, context, control, options, **kwargs):
        seen.append(options)
        return executor(x, t, c_concat, context, control, options, **kwargs)

    m.add_wrapper("apply_model", wrapper)
    case.run(m, pack.negative(case.prompt(), negative=case.negative()), steps=1)
    ours = {key: value for key, value in seen[0].items() if key.startswith("vsf")}
    assert set(ours) == {"vsf_run", "vsf_forward"}
    for value in ours.values():
        with pytest.raises(TypeError, match="sends a forward pass of this run to another process"):
            pickle.dumps(value)
