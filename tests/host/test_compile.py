"""torch.compile as ComfyUI's TorchCompileModel node does it, and KJNodes': guards on ``transformer_options`` are
dropped, so graphs made with and without VSF, and for other lengths and settings, must not be taken for each other."""

import importlib
import logging

import pytest
import torch
from cases import CASES, DISTINCT, model_of, region
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from helpers import assert_close, conditioning, load_flux, load_sd3, load_wan, relative, sample, text
from hosting.interpreter import triton_interpreted

FAMILIES = {
    "sd3": (load_sd3, 64, 2048, (8, 12)),
    "flux": (load_flux, 64, 768, (8, 12)),
    "wan": (load_wan, 4096, 1, (2, 8, 12)),
}
ONE_FAMILY = pytest.mark.parametrize(
    "family", ["flux", *(pytest.param(name, marks=pytest.mark.long) for name in ("sd3", "wan"))]
)
"""Each compiles for some ten seconds; Flux has both kinds of blocks."""


@pytest.fixture(autouse=True)
def _fresh(caplog):
    caplog.set_level(logging.WARNING)  # dynamo logs its whole trace below that
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=32):  # a test shows more shapes than a session does
        yield
    torch._dynamo.reset()


def compiled(model, backend="eager"):
    clone, options = model.clone(), {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=clone, backend=backend, options=options, fullgraph=True)
    return clone


def runs(pack, family, order="compile first", apply=lambda model: model):
    """A function that samples with given lengths and settings, compiled and not, and gives the relative difference."""
    load, width, pooled, size = FAMILIES[family]
    model = apply(load())
    whole = compiled(model)

    def with_vsf(m, **settings):
        if m is model or order == "compile first":
            return pack.patch(m, **settings)
        return compiled(pack.patch(model, **settings))

    def check(length, n=0, seed=5, **settings):
        positive = conditioning(length, 1, width, pooled)
        if n:
            positive = pack.negative(positive, negative=[[text(n, seed, width), {}]])
        pair = [with_vsf(m, **settings) if n else m for m in (model, whole)]
        with torch.no_grad():
            eager, result = (sample(m, positive, size=size, steps=1) for m in pair)
        return relative(result, eager)

    return check


@pytest.mark.parametrize(
    ("family", "order", "method"),
    [
        pytest.param("sd3", "compile first", "ong", marks=pytest.mark.long),
        ("flux", "vsf first", "nasa"),
        pytest.param("wan", "compile first", "ong", marks=pytest.mark.long),
    ],
)
def test_no_graph_is_taken_for_another(pack, family, order, method):
    """Stock and VSF in turn, over lengths that make dynamo's graphs dynamic, settings and negatives; no graph break."""
    check = runs(pack, family, order)
    assert check(13) == 0.0
    assert check(20) == 0.0
    assert check(13, n=5) <= 1e-5
    assert check(20, n=7, scale=2.0) <= 1e-5
    assert check(29) == 0.0  # as many text tokens as with the negative of 5, padded to 16
    assert check(13, n=40) <= 1e-5
    assert check(45, n=5) <= 1e-5  # as long as that
    assert check(13, n=16, scale=4.0, offset=1.0) <= 1e-5
    assert check(13, n=5, seed=6, scale=-1.0) <= 1e-5
    assert check(13, n=5, blocks="double:1") <= 1e-5
    assert check(13, n=5, method="nag") <= 1e-5
    assert check(13, n=7, method=method) <= 1e-5
    assert check(13, n=5, method="nag", nag_tau=1.1) <= 1e-5
    assert check(13, n=5) <= 1e-5
    assert check(21) == 0.0


def test_other_negatives_reuse_the_graph(pack):
    counters = torch._dynamo.utils.counters
    check = runs(pack, "flux")
    check(13, n=5)
    before = counters["stats"]["unique_graphs"]
    for n, settings in ((5, {"scale": 1.0}), (9, {"offset": 3.0}), (16, {})):
        assert check(13, n=n, **settings) <= 1e-5
    assert counters["stats"]["unique_graphs"] == before > 0


@ONE_FAMILY
def test_a_block_patch_in_a_compiled_model(pack, family):
    """Flux's last double block has the text alone, and the next one text and picture in one stream."""

    def warmer(model):
        patched = model.clone()
        patched.set_model_patch_replace(
            lambda args, extra: extra["original_block"]({**args, "img": args["img"] * 1.1}), "dit", "double_block", 1
        )
        return patched

    check = runs(pack, family, apply=warmer)
    assert max(check(13), check(13, 5), check(13, 4, seed=6), check(13)) <= 1e-6


BLOCKS = ("joint_blocks", "double_blocks", "single_blocks", "layers", "transformer_blocks", "blocks")
"""Where models keep what KJNodes' TorchCompileModelAdvanced compiles one by one; SD3's it does not know."""
ORDINARY = {
    "sd3": ("vsf", "released", "as long as that"),
    "flux": ("stock", "released", "record", "METHODS"),
    "wan": ("nasa", "blocks", "two", "longer", "vsf"),
    "z-image": ("vsf", "nag", "stock"),
}
"""Which runs the usual test command has one after the other; with --long all of ``kinds_of``, for every model."""


def compiled_in_parts(model, backend, names):
    """A clone compiled as that node does it: no dynamic shapes, graphs may break, and one dict of options for all
    blocks, out of which torch takes the filter at the first. The whole model where it has none of the ``names``."""
    clone, diffusion_model = model.clone(), model.model.diffusion_model
    lists = {name: getattr(diffusion_model, name) for name in names if hasattr(diffusion_model, name)}
    keys = [f"diffusion_model.{name}.{k}" for name, blocks in lists.items() for k in range(len(blocks))]
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(clone, backend, options, dynamic=False, keys=keys)
    return clone


def kinds_of(name, case, methods, only=()):
    """Runs of a model that differ in what a graph may take for granted: inputs of VSF Model Patch and, in capitals, of
    the run; None: without VSF."""
    kinds = {"stock": None, **{method: {"method": method} for method in methods}}
    kinds |= {"mask": {"MASK": True}, "blocks": {"blocks": next(iter(case.blocks))}, "two": {"NEGATIVES": (5, 4)}}
    kinds |= {"longer": {"NEGATIVES": (21,)}, "prompt": {"PROMPT": 20}}
    if case.cross or name in ("sd3", "flux"):
        kinds |= {"released": {"layout": "released"}, "as long as that": {"NEGATIVES": (32,)}}
    if not name.startswith("sd") or name == "sd3":  # a UNet has no map
        kinds["record"] = {"RECORD": True}
    wanted = {*only, *(methods if "METHODS" in only else ())} or set(kinds)
    return {name: kind for name, kind in kinds.items() if name in wanted}


def run_of(pack, case, model, kind):
    """The latent, and the map behind it where there is one."""
    if kind is None:
        return case.run(model, case.prompt(), steps=1)
    positive, lengths = case.prompt(kind.get("PROMPT", 13)), kind.get("NEGATIVES", (5,))
    node = {"mask": region(case.sizes[0])[1]} if "MASK" in kind else {}
    for n in lengths:
        ((tokens, options),) = case.negative(n, seed=n)
        pooled = {"pooled_output": text(1, 8, case.pooled)[:, 0]} if "layout" in kind else {}
        positive = pack.negative(positive, negative=[[tokens, {**options, **pooled}]], **node)
    model = pack.patch(model, **{name: value for name, value in kind.items() if name.islower()})
    if "RECORD" not in kind:
        return case.run(model, positive, steps=1)
    model, holder = pack.mapping["VSFRecord"].execute(model=model).result
    return torch.cat([case.run(model, positive, steps=1).flatten(), holder.record.mean().flatten()])


def every_pair(names):
    """A walk in which each of ``names`` follows each other one once: torch tries the latest graph first."""
    left, stack, path = {a: [b for b in names if b != a] for a in names}, [names[0]], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            path.append(stack.pop())
    return path


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("part", ["blocks", "whole"])
@pytest.mark.parametrize("name", DISTINCT)
def test_any_run_after_any_other(request, pack, name, case, part, backend):
    """With blocks compiled one by one, and the whole: no run takes the graph of another, and none needs to stop."""
    long, usual = request.config.getoption("--long"), name in ORDINARY and (part, backend) == ("blocks", "eager")
    if not usual and (not long or (backend == "inductor" and name not in ORDINARY)):
        pytest.skip("up to some minutes each; --long runs it")
    methods = importlib.import_module(f"{pack.module.__name__}.nodes.methods").METHODS
    kinds = kinds_of(name, case, methods, () if long and backend == "eager" else ORDINARY[name])
    model = model_of(name)
    expected = {name: run_of(pack, case, model, kind) for name, kind in kinds.items()}
    tried = compiled_in_parts(model, backend, BLOCKS if part == "blocks" else ())
    before, wrong = None, {}
    with torch._dynamo.config.patch(recompile_limit=64):
        for now in every_pair(list(kinds)):
            error = relative(run_of(pack, case, tried, kinds[now]), expected[now])
            if error > (1e-5 if backend == "eager" else 1e-4):
                wrong[before, now] = error
            before = now
    assert not wrong
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > len(kinds) // 2, "no graph was made"


def test_blocks_that_came_compiled(pack):
    """By a node that tells ComfyUI nothing of it."""
    case, model = CASES["wan"], load_wan()
    tried, options = model.clone(), {"guard_filter_fn": skip_torch_compile_dict}
    for k, block in enumerate(model.model.diffusion_model.blocks):
        made = torch.compile(block, backend="eager", options=options, dynamic=False)
        tried.add_object_patch(f"diffusion_model.blocks.{k}", made)
    graphs, made = torch._dynamo.utils.counters["stats"], []
    for kind in (None, {}, {"method": "nasa"}, None, {"method": "nasa"}, {}):
        assert_close(run_of(pack, case, tried, kind), run_of(pack, case, model, kind), 1e-5)
        made.append(graphs["unique_graphs"])
    assert 0 < made[0] < made[1] < made[2] == made[-1]


@ONE_FAMILY
def test_the_attention_map(pack, family):
    """A graph made without VSF Record is not taken for one with it."""
    load, width, pooled, size = FAMILIES[family]
    model = load()
    attached = pack.negative(conditioning(13, 1, width, pooled), negative=[[text(5, 5, width), {}]])

    def run(m, record):
        m = pack.patch(m, blocks="double:1")
        kept = None
        if record:
            m, holder = pack.mapping["VSFRecord"].execute(model=m).result
            kept = holder.record
        with torch.no_grad():
            return sample(m, attached, size=size, steps=1), kept

    eager, expected = run(model, True)
    whole = compiled(model)
    for record in (False, True, False, True):
        result, kept = run(whole, record)
        assert_close(result, eager)
        if kept is not None:
            torch.testing.assert_close(kept.mean(), expected.mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [pytest.param("flux", marks=pytest.mark.long), "wan"])
def test_the_fused_kernel_is_kept_as_one_call(pack, monkeypatch, family):
    """No graph break, over lengths that make graphs dynamic; the other ways' graphs are not taken for its own."""
    with triton_interpreted():
        fused = importlib.import_module(f"{pack.module.__name__}.vsf_core.fused")
    kernel, launches = fused.attention_kernel, []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(fused, "attention_kernel", Counted())
    monkeypatch.setattr(fused.FusedAttention, "_check", lambda *kind: None)
    check = runs(pack, family)
    for way, length, n, settings in (("fused", 7, 5, {}), ("merge", 7, 5, {}), ("fused", 9, 21, {"method": "nag"})):
        monkeypatch.setenv("VSF_ATTENTION", way)
        assert check(length, n, **settings) < 1e-5
        assert len(launches) == (2 * CASES[family].layers if way == "fused" else 0)  # eager, and compiled
        launches.clear()
