"""Attention as ComfyUI chooses it from 0.32 on, by stand-ins that do what its nodes do."""

import sys
import types

import cases
import comfy.ldm.flux.math
import comfy.ldm.modules.attention as comfy_attention
import pytest
import torch
from cases import CASES, model_of
from helpers import assert_close, relative, spy_override, with_override
from hosting.int8 import int8_attention

FAMILIES = ("sd3", "wan")
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def log_lines(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("VSF")]


def way_of(caplog):
    return next(line for line in log_lines(caplog) if "attention: " in line).split("attention: ")[1]


def both(pack, family, apply=lambda model: model, **options):
    return cases.both(pack, CASES[family], apply(model_of(family)), stock=model_of(family), **options)


# -- the node that chooses an attention -------------------------------------------------------------------------------


class ModelPatcher:
    """In the place of ComfyUI's, which puts such an override in the slot."""

    @staticmethod
    def set_model_optimized_attention(optimized_attention):
        def optimized_attention_override(_, *args, **kwargs):
            return optimized_attention(*args, **kwargs)

        if getattr(optimized_attention, "container_function", None) is not None:
            optimized_attention_override.container_function = optimized_attention.container_function
        return optimized_attention_override


def chosen(function):
    return lambda model: with_override(model, ModelPatcher.set_model_optimized_attention(function))


def test_the_name_is_comfyuis():
    """Of the override, on those ComfyUIs that have it."""
    from comfy.model_patcher import ModelPatcher as Patcher

    setter = getattr(Patcher, "set_model_optimized_attention", None)
    if setter is not None:
        patcher = types.SimpleNamespace(model_options={"transformer_options": {}})
        setter(patcher, comfy_attention.attention_pytorch)
        (made,) = patcher.model_options["transformer_options"].values()
        ours = ModelPatcher.set_model_optimized_attention(comfy_attention.attention_pytorch)
        assert made.__qualname__ == ours.__qualname__ and made.__code__.co_freevars == ours.__code__.co_freevars


@FAMILY
def test_pytorchs_attention_by_choice_is_as_quick_as_by_default(pack, family, caplog):
    assert_close(*both(pack, family, chosen(comfy_attention.attention_pytorch)))
    assert way_of(caplog) == "log-sum-exp merge (cpu_flash)"


@FAMILY
def test_another_one_by_choice_runs_everywhere(pack, family, caplog):
    calls = []

    def attention_split(*args, **kwargs):
        calls.append(args[0].shape)
        return comfy_attention.attention_split(*args, **kwargs)

    assert_close(*both(pack, family, chosen(attention_split)))
    assert way_of(caplog) == "row mask (attention_split)" and calls


# -- INT8 -------------------------------------------------------------------------------------------------------------


def attention_comfy_kitchen_int8(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    if not skip_reshape:
        q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    out = int8_attention(q, k, v, mask, kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("how", ["node", "command line"])
@FAMILY
def test_int8(pack, monkeypatch, family, how, caplog):
    """PyTorch's attention runs where the image attends to text: as close to the oracle as stock is to its own."""
    case, model = CASES[family], model_of(family)
    plain = case.run(model, case.prompt())
    rough = chosen(attention_comfy_kitchen_int8)
    stock_error = relative(case.run(rough(model), case.prompt()), plain)
    assert stock_error > 1e-4
    if how == "command line":
        _, expected = both(pack, family)
        caplog.clear()
        monkeypatch.setattr(comfy_attention, "optimized_attention", attention_comfy_kitchen_int8)
        module = sys.modules[type(model.model.diffusion_model).__module__]

        def asked(*args, **kwargs):
            override = kwargs.get("transformer_options", {}).get("optimized_attention_override")
            if override is None:
                return attention_comfy_kitchen_int8(*args, **kwargs)
            return override(attention_comfy_kitchen_int8, *args, **kwargs)

        monkeypatch.setattr(module, "optimized_attention", asked)
        result = case.run(pack.patch(model, scale=1.9 if case.cross else 3.3), attached(pack, case))
    else:
        result, expected = both(pack, family, rough)
    assert relative(result, expected) < 1.5 * stock_error
    assert way_of(caplog) == "log-sum-exp merge (cpu_flash)"
    (line,) = [line for line in log_lines(caplog) if "on one scale" in line]
    assert "(attention_comfy_kitchen_int8) rounds the negative's values and all others on one scale" in line


def attached(pack, case):
    return pack.negative(case.prompt(), negative=case.negative())


@FAMILY
def test_int8_where_there_is_nothing_else(pack, monkeypatch, family, caplog):
    """The negative has a call of its own."""
    monkeypatch.setattr(pack.module.nodes.host_attention, "lse_attention", lambda *kind: None)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[1].shape)
        return attention_comfy_kitchen_int8(*args, **kwargs)

    counted.__name__ = attention_comfy_kitchen_int8.__name__
    result, expected = both(pack, family, chosen(counted))
    assert relative(result, expected) < 0.05
    assert way_of(caplog) == "row mask (attention_comfy_kitchen_int8)"
    asked = [shape for shape in calls if shape[2] >= (5 + 13 if family == "wan" else 5 + 13 + 96)]
    assert asked


@pytest.mark.parametrize("beyond", [64, 129, 1152])
def test_masks_that_give_garbage_beyond_some_keys(pack, beyond, caplog):
    """As INT8 attention does on some AMD cards with more than 64."""

    def attention_comfy_kitchen_int8(q, k, v, heads, mask=None, **kw):
        out = comfy_attention.attention_pytorch(q, k, v, heads, mask=mask, **kw)
        axis = 2 if kw.get("skip_reshape") else 1
        wrong = mask is not None and k.shape[axis] > beyond
        return (
            out + 0.5 * out.std() * torch.randn(out.shape, generator=torch.Generator().manual_seed(0)) if wrong else out
        )

    assert_close(*both(pack, "sd3", chosen(attention_comfy_kitchen_int8)))
    assert any("(attention_comfy_kitchen_int8) ignores or refuses masks" in line for line in log_lines(caplog))


# -- sparse attention, and others that are quicker without a mask -----------------------------------------------------


def make_attention_override(patch, previous):
    """As that of Model Sparse Attention: without a mask it leaves out some of the keys."""

    def override(func, q, k, v, heads, mask=None, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        if mask is None and q.shape == k.shape:
            patch.append(k.shape[axis])
            keep = torch.arange(0, k.shape[axis], 2)
            k, v = k.index_select(axis, keep), v.index_select(axis, keep)
        run = func if previous is None else lambda *args, **kw: previous(func, *args, **kw)
        return run(q, k, v, heads, mask=mask, **kwargs)

    return override


make_attention_override.__module__ = "comfy_extras.nodes_sparse_attention"


def sparse(seen, previous=None):
    override = make_attention_override(seen, previous)
    override.__module__ = "comfy_extras.nodes_sparse_attention"
    return lambda model: with_override(model, override)


@pytest.mark.parametrize("over", [None, "a choice", "another node's"])
def test_a_joint_model_attends_to_all_and_says_so(pack, over, caplog):
    """With what is beneath the sparse one."""
    seen, calls = [], []
    choice = ModelPatcher.set_model_optimized_attention(comfy_attention.attention_pytorch)
    previous = {None: None, "a choice": choice, "another node's": spy_override(calls)}[over]
    assert_close(*both(pack, "sd3", sparse(seen, previous)))
    assert not seen and bool(calls) == (over == "another node's")
    assert way_of(caplog).startswith("row mask" if over == "another node's" else "log-sum-exp merge")
    (line,) = [line for line in log_lines(caplog) if "quicker without a mask" in line]
    assert "(Model Sparse Attention)" in line


def test_a_cross_attention_model_stays_sparse_elsewhere(pack, caplog):
    case, model, seen = CASES["wan"], model_of("wan"), []
    apply = sparse(seen)
    positive = attached(pack, case)
    result = case.run(apply(pack.patch(model, scale=1.9)), positive)
    kept = len(seen)
    assert kept == 3 * 2 and not any(
        "quicker without" in line for line in log_lines(caplog)
    )  # each block's own, 2 steps
    assert way_of(caplog) == "log-sum-exp merge (cpu_flash)"
    expected = case.run(apply(model), case.prompt())
    assert torch.isfinite(result).all() and relative(result, expected) > 1e-3


@pytest.mark.parametrize("quick", [True, False])
def test_overrides_that_only_hurry_without_a_mask_are_named(pack, quick, caplog):
    """Sage-like ones of other packs: 8 bits without a mask, PyTorch's with one."""

    def sage_like(func, q, k, v, heads, mask=None, **kwargs):
        attend = attention_comfy_kitchen_int8 if quick and mask is None else comfy_attention.attention_pytorch
        return attend(q, k, v, heads, mask=mask, **kwargs)

    result, expected = both(pack, "sd3", lambda model: with_override(model, sage_like))
    assert relative(result, expected) < 0.02
    assert [("(sage_like)" in line) for line in log_lines(caplog) if "quicker without a mask" in line] == [True] * quick


# -- containers, and an attention of the checkpoint's -----------------------------------------------------------------


class Container:
    """As ComfyUI's ``AttentionTensorContainer``: it is emptied once."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None, "taken before"
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


def contained(monkeypatch, model, function):
    """Has the model hand its attention containers, as ``wrap_attn`` of newer ComfyUIs passes them on; notes how."""
    notes = []

    def asked(q, k, v, heads, transformer_options, **kwargs):
        named = {**kwargs, "transformer_options": transformer_options, "_inside_attn_wrapper": True}
        held = tuple(map(Container, (q, k, v)))
        override = transformer_options.get("optimized_attention_override")
        if hasattr(override, "container_function"):
            notes.append("ours")
            return override.container_function(*held, heads, **named)
        assert override is None or function.container_function is None
        return (function if override is None else lambda *a, **n: override(function, *a, **n))(q, k, v, heads, **named)

    def container_function(q, k, v, heads, **kwargs):
        notes.append("containers")
        return function(q.take(), k.take(), v.take(), heads, **kwargs)

    function.container_function = container_function
    module = sys.modules[type(model.model.diffusion_model).__module__]
    monkeypatch.setattr(comfy_attention, "optimized_attention", function)
    monkeypatch.setattr(module, "optimized_attention", asked)
    return notes


@pytest.mark.parametrize("by", ["command line", "a choice"])
def test_containers_are_handed_on(pack, monkeypatch, by):
    """From calls that VSF leaves alone: self-attention in Wan; those over text are taken out."""
    case, model = CASES["wan"], model_of("wan")
    positive = attached(pack, case)
    expected = case.run(pack.patch(model, scale=1.9), positive)

    def attention_pytorch(*args, **kwargs):
        return comfy_attention.attention_pytorch(*args, **kwargs)

    notes = contained(monkeypatch, model, attention_pytorch)
    apply = chosen(attention_pytorch) if by == "a choice" else lambda m: m
    assert_close(case.run(apply(pack.patch(model, scale=1.9)), positive), expected)
    assert notes.count("ours") == 2 * notes.count("containers") == 3 * 2 * 2


def test_an_attention_of_the_checkpoints_own_is_said_to_be_passed_over(pack, caplog):
    class ComfyAttention(torch.nn.Module):
        function = staticmethod(attention_comfy_kitchen_int8)

    case, model = CASES["sd3"], CASES["sd3"].load()
    case.run(pack.patch(model), attached(pack, case))
    assert not any("asks for" in line for line in log_lines(caplog))
    for block in model.model.diffusion_model.joint_blocks[:2]:
        block.comfy_attention = ComfyAttention()
    case.run(pack.patch(model), attached(pack, case))
    (line,) = [line for line in log_lines(caplog) if "asks for" in line]
    assert "asks for attention_comfy_kitchen_int8 in 2 layers" in line


# -- heads that are shared --------------------------------------------------------------------------------------------


def grouped(q, k, v, heads, skip_reshape):
    """The first half of the heads of k and v alone."""
    if skip_reshape:
        return k[:, : heads // 2], v[:, : heads // 2]
    return (t[..., : t.shape[-1] // 2] for t in (k, v))


def repeated(t, heads, skip_reshape):
    if skip_reshape:
        return t.repeat_interleave(2, dim=1)
    return t.unflatten(-1, (heads // 2, -1)).repeat_interleave(2, dim=2).flatten(2)


@pytest.mark.parametrize("attention", ["pytorch", "sub_quad", "split", "basic"])
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_grouped_query_attention(pack, monkeypatch, family, attention):
    """k and v with half as many heads as q give what the same heads give, each twice."""
    case, model = CASES[family], model_of(family)
    function = getattr(comfy_attention, f"attention_{attention}")
    module = comfy.ldm.flux.math if family == "flux" else sys.modules[type(model.model.diffusion_model).__module__]
    positive = attached(pack, case)

    def run(share):
        def asked(q, k, v, heads, mask=None, transformer_options={}, skip_reshape=False, **kwargs):  # noqa: B006
            k, v = grouped(q, k, v, heads, skip_reshape)
            if share:
                kwargs["enable_gqa"] = True
            else:
                k, v = (repeated(t, heads, skip_reshape) for t in (k, v))
            named = {"mask": mask, "transformer_options": transformer_options, "skip_reshape": skip_reshape, **kwargs}
            return function(q, k, v, heads, **named)

        monkeypatch.setattr(module, "optimized_attention", asked)
        return case.run(pack.patch(model, scale=1.9), positive)

    assert_close(run(share=True), run(share=False))


def test_fewer_heads_that_nobody_shares_are_an_error(pack, monkeypatch):
    case, model = CASES["flux"], model_of("flux")

    def asked(q, k, v, heads, **kwargs):
        k, v = grouped(q, k, v, heads, kwargs.get("skip_reshape", False))
        return comfy_attention.attention_pytorch(q, k, v, heads, **kwargs)

    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", asked)
    with pytest.raises(RuntimeError, match=r"VSF: an attention over text has \d heads of queries and \d of keys"):
        case.run(pack.patch(model), attached(pack, case))
