"""Every way to compute VSF, forced by ``VSF_ATTENTION`` as for a bug report: whole tiny models give one picture, and
the log says which way it was. The fused kernel runs under Triton's interpreter, as there is no GPU."""

import importlib
import sys

import pytest
import torch
from cases import CASES, DISTINCT, both, model_of
from helpers import assert_close
from hosting.interpreter import triton_interpreted

WORDS = {"fused": "fused kernel", "merge": "log-sum-exp merge (", "mask": "row mask (", "reference": "reference"}
FORCE = "VSF_ATTENTION"
SLOW = {"flux.2 dev", "flux.2 klein", "anima", "cosmos", "sd1", "kontext", "ltxv", "sd3.5 medium"}
"""In the interpreter; others like them are tried."""
NAG = {"method": "nag", "nag_scale": 3.0, "nag_alpha": 0.5, "nag_tau": 1.2}


@pytest.fixture
def force(pack, monkeypatch, caplog):
    """Forces a way; what the log says of it afterwards."""
    with triton_interpreted():
        importlib.import_module(f"{pack.module.__name__}.vsf_core.fused")

    def put(way):
        monkeypatch.setenv(FORCE, way)
        return lambda: [r.getMessage() for r in caplog.records if "attention: " in r.getMessage()][-1].split(": ")[-1]

    return put


@pytest.mark.parametrize("name", DISTINCT)
def test_the_fused_kernel(pack, force, name, request):
    """One step at an odd size."""
    if name in SLOW and not request.config.getoption("--long"):
        pytest.skip("slow in the interpreter; --long runs it")
    case, model, said = CASES[name], model_of(name), force("fused")
    assert_close(*both(pack, case, model, size=case.sizes[1], steps=1))
    assert said() == WORDS["fused"]


@pytest.mark.parametrize("way", ["merge", "mask", "reference"])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "sdxl", "z-image"])
def test_other_ways(pack, force, name, way):
    said = force(way)
    assert_close(*both(pack, CASES[name], model_of(name), cfg=2.5))
    assert said().startswith(WORDS[way])


@pytest.mark.parametrize("way", WORDS)
@pytest.mark.parametrize("name", ["sd3", "wan"])
@pytest.mark.parametrize("method", [{}, NAG], ids=["vsf", "nag"])
def test_every_way_gives_one_picture(pack, force, monkeypatch, name, way, method):
    """With padding in a batch, several negatives and a mask."""
    case, model = CASES[name], model_of(name)
    positive, mask = case.prompt(), torch.linspace(0, 1, 64).view(1, 8, 8)
    attached = pack.negative(positive, negative=case.negative(5), mask=mask)
    if not method:  # the others take several as one
        attached = pack.negative(attached, negative=case.negative(3, seed=4), strength=0.5)
    other = pack.negative(case.prompt(seed=9), negative=case.negative(9))
    monkeypatch.delenv(FORCE, raising=False)
    expected = case.run(pack.patch(model, **method), attached, other, cfg=2.5, steps=1)
    said = force(way)
    assert_close(case.run(pack.patch(model, **method), attached, other, cfg=2.5, steps=1), expected)
    crossed = case.cross and method and way in ("merge", "mask")
    assert said().startswith("two cross-attentions" if crossed else WORDS[way])


@pytest.mark.parametrize("way", ["fused", "reference"])
def test_a_text_mask(pack, force, way):
    """Of one row: ``merge`` refuses it, and says so."""
    case, model, said = CASES["qwen-image, padding"], model_of("qwen-image, padding"), force(way)
    assert_close(*both(pack, case, model))
    assert said() == WORDS[way]
    force("merge")
    with pytest.raises(
        RuntimeError, match="VSF: VSF_ATTENTION=merge does not work with this model: the way 'merge', .* no mask"
    ):
        both(pack, case, model)


def test_a_name_that_is_none(pack, force):
    force("flash")
    with pytest.raises(ValueError, match="VSF_ATTENTION is 'flash', and may be fused, merge, mask, reference"):
        both(pack, CASES["sd3"], model_of("sd3"))


def test_a_way_that_is_not_to_be_had(pack, monkeypatch):
    """Without Triton, say."""
    module = sys.modules[f"{pack.module.__name__}.nodes.host_attention"]
    for way, words in (("fused", "needs Triton and a CUDA device"), ("merge", "needs an attention with a log-sum-exp")):
        monkeypatch.setattr(module, "fused_attention", lambda *kind, **kw: None)
        monkeypatch.setattr(module, "lse_attention", lambda *kind: None)
        monkeypatch.setenv(FORCE, way)
        with pytest.raises(RuntimeError, match=f"VSF_ATTENTION={way} {words}, which cpu in torch.float32 with heads"):
            both(pack, CASES["sd3"], model_of("sd3"))


def test_no_triton_on_a_cpu(pack):
    """It is imported where it is used alone: neither at start, nor by a run that nobody forced."""
    names = f"{pack.module.__name__}.vsf_core.fused", f"{pack.module.__name__}.vsf_core.fused_kernel"
    held = {name: sys.modules.pop(name, None) for name in names}
    try:
        both(pack, CASES["sd3"], model_of("sd3"))
        assert not any(name in sys.modules for name in names)
    finally:
        sys.modules.update({name: module for name, module in held.items() if module})
