"""torch.compile as ComfyUI's TorchCompileModel node does it: guards on ``transformer_options`` are dropped, so graphs
compiled with and without VSF, and for other lengths and settings, must not be taken for each other."""

import importlib
import logging

import pytest
import torch
from cases import CASES
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from helpers import assert_close, conditioning, load_flux, load_sd3, load_wan, relative, sample, text
from hosting.interpreter import triton_interpreted

FAMILIES = {
    "sd3": (load_sd3, 64, 2048, (8, 12), "joint_blocks"),
    "flux": (load_flux, 64, 768, (8, 12), "double_blocks,single_blocks"),
    "wan": (load_wan, 4096, 1, (2, 8, 12), "blocks"),
}


@pytest.fixture(autouse=True)
def _fresh(caplog):
    caplog.set_level(logging.WARNING)  # dynamo logs its whole trace below that
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):  # a test shows more shapes than a session does
        yield
    torch._dynamo.reset()


def compiled(model, family, part, backend="eager"):
    keys = ["diffusion_model"]
    if part == "blocks":
        lists = FAMILIES[family][4].split(",")
        keys = [
            f"diffusion_model.{name}.{k}"
            for name in lists
            for k in range(len(getattr(model.model.diffusion_model, name)))
        ]
    clone = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=clone, backend=backend, options=options, keys=keys, fullgraph=True)
    return clone


def runs(pack, family, part, order="compile first", apply=lambda model: model):
    """A function that samples with given lengths and settings, compiled and not, and gives the relative difference."""
    load, width, pooled, size, _ = FAMILIES[family]
    model = apply(load())
    whole = compiled(model, family, part)

    def with_vsf(m, **settings):
        if m is model or order == "compile first":
            return pack.patch(m, **settings)
        return compiled(pack.patch(model, **settings), family, part)

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
    [("sd3", "compile first", "ong"), ("flux", "vsf first", "nasa"), ("wan", "compile first", "ong")],
)
def test_no_graph_is_taken_for_another(pack, family, order, method):
    """Stock and VSF in turn, over lengths that make dynamo's graphs dynamic, settings and negatives; no graph break."""
    check = runs(pack, family, "whole", order)
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
    check = runs(pack, "flux", "whole")
    check(13, n=5)
    before = counters["stats"]["unique_graphs"]
    for n, settings in ((5, {"scale": 1.0}), (9, {"offset": 3.0}), (16, {})):
        assert check(13, n=n, **settings) <= 1e-5
    assert counters["stats"]["unique_graphs"] == before > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_patch_in_a_compiled_model(pack, family):
    """Flux's last double block has the text alone, and the next one text and picture in one stream."""

    def warmer(model):
        patched = model.clone()
        patched.set_model_patch_replace(
            lambda args, extra: extra["original_block"]({**args, "img": args["img"] * 1.1}), "dit", "double_block", 1
        )
        return patched

    check = runs(pack, family, "whole", apply=warmer)
    assert max(check(13), check(13, 5), check(13, 4, seed=6), check(13)) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compiled_alone_are_right_or_loud(pack, family):
    """A block's graph from a run without VSF cannot be told apart from outside: where it is taken, the run stops."""
    check = runs(pack, family, "blocks")
    assert check(13, n=5, blocks="double:1") <= 1e-5  # blocks share their graphs: block 0's serves block 1
    assert check(13, n=5) <= 1e-5
    assert check(13, n=5, scale=1.0) <= 1e-5
    assert check(20) == 0.0
    assert check(26) == 0.0
    try:
        assert check(17, n=5) <= 1e-5
    except RuntimeError as error:
        assert "compile the whole model instead" in str(error)


@pytest.mark.parametrize(
    ("family", "part"), [("sd3", "whole"), ("flux", "whole"), ("wan", "whole"), ("flux", "blocks")]
)
def test_the_attention_map_is_right_or_loud(pack, family, part):
    """A graph made without VSF Record is not taken for one with it; where a block's is, the run stops."""
    load, width, pooled, size, _ = FAMILIES[family]
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
    whole = compiled(model, family, part)
    for record in (False, True, False, True) if part == "whole" else (True, True):
        result, kept = run(whole, record)
        assert_close(result, eager)
        if kept is not None:
            torch.testing.assert_close(kept.mean(), expected.mean(), rtol=0, atol=1e-5)
    if part == "blocks":
        torch._dynamo.reset()
        run(whole, False)
        try:
            _, kept = run(whole, True)
            torch.testing.assert_close(kept.mean(), expected.mean(), rtol=0, atol=1e-5)
        except RuntimeError as error:
            assert "VSF Record saw nothing of" in str(error)


@pytest.mark.parametrize("family", ["flux", "wan"])
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
    check = runs(pack, family, "whole")
    for way, length, n, settings in (("fused", 7, 5, {}), ("merge", 7, 5, {}), ("fused", 9, 21, {"method": "nag"})):
        monkeypatch.setenv("VSF_ATTENTION", way)
        assert check(length, n, **settings) < 1e-5
        assert len(launches) == (2 * CASES[family].layers if way == "fused" else 0)  # eager, and compiled
        launches.clear()
