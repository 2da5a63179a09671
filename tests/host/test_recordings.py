"""What newer ComfyUIs record of a model's blocks and replay, by stand-ins on the CPU."""

import sys
import threading
import types

import pytest
import torch
from cases import CASES, DISTINCT, model_of
from helpers import assert_close, spy_override, with_override
from recordings import AllocationRecorder, GraphedBlocks, blocks_of, prefetch_module

PREFETCH = "comfy.model_prefetch"


@pytest.fixture
def host(monkeypatch):
    """Puts names in the place of ComfyUI's module of both recordings."""

    def put(**names):
        monkeypatch.setitem(sys.modules, PREFETCH, prefetch_module(**names))

    return put


def log_lines(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("VSF")]


@pytest.fixture
def watched(pack, host, monkeypatch):
    """The recorder after a run of one step, of stock or not."""
    override, run_block = pack.module.nodes.attention_override, pack.module.nodes.attention_override._run_block

    def run(case, model, positive, stock=False, pause=True, **run):
        hook = pack.module.nodes.families.family_of(model).block_hook
        network = model.model.diffusion_model
        recorder = AllocationRecorder(network, [] if hook == "dit" and not stock else blocks_of(network))
        host(**({"pause_malloc_graph": recorder.pause} if pause else {}))
        monkeypatch.setattr(override, "_run_block", recorder.marking(run_block))
        with torch.inference_mode(), recorder:
            case.run(model, positive, steps=1, **run)
        assert recorder.blocks > case.layers // 2 and recorder.left
        return recorder

    return run


def double_block(args, extra):
    return extra["original_block"](args)


@pytest.mark.parametrize("name", [name for name in DISTINCT if name != "sd1"])  # as sdxl
def test_nothing_outlives_the_block_that_it_was_made_in(pack, watched, name):
    """With masks, several negatives, VSF Record and another node's patches, merged; and NAG through an attention that
    takes masks. What is kept of a pass when it ends is no more than without VSF."""
    case, model = CASES[name], model_of(name)
    stock = watched(case, model, case.prompt(), stock=True)
    assert stock.outlived == []
    attached = pack.negative(case.prompt(), negative=case.negative(5), mask=torch.linspace(0, 1, 64).view(1, 8, 8))
    attached = pack.negative(attached, negative=case.negative(3, seed=4), strength=0.5)
    patched = pack.patch(model)
    if not name.startswith("sd") or name.startswith("sd3"):
        patched = pack.mapping["VSFRecord"].execute(patched).result[0]
        patched.set_model_patch_replace(double_block, "dit", "double_block", 0)
    plain = pack.negative(case.prompt(), negative=case.negative())
    nag = with_override(pack.patch(model, method="nag"), spy_override([]))
    for m, positive, run in ((patched, attached, {"cfg": 1.0}), (nag, plain, {})):
        recorder = watched(case, m, positive, **run)
        assert recorder.outlived == []
        assert max(recorder.left) <= max(stock.left)


def test_the_recorder_finds_what_outlives_a_block(pack, watched, monkeypatch):
    """Were the attention's result kept; and the copy of a text, on a ComfyUI without a pause."""
    case, model = CASES["flux"], model_of("flux")
    patched = pack.patch(model)
    patched.set_model_patch_replace(double_block, "dit", "double_block", 0)
    positive = pack.negative(case.prompt(), negative=case.negative())
    assert {who.split(":")[0] for who in watched(case, patched, positive, pause=False).outlived} == {"recordings.py"}
    kept = []
    monkeypatch.setattr(
        pack.module.nodes.forward_context.ForwardContext, "checked", lambda self, out: kept.append(out) or out
    )
    recorder = watched(case, patched, positive)
    assert {who.split(":")[0] for who in recorder.outlived} == {"backends.py"} and recorder.left[0] >= case.layers


# -- Triton's kernels -------------------------------------------------------------------------------------------------


class Kernel:
    """In the place of the fused one."""

    def joint(self, call, two=False):
        raise RuntimeError("the kernel runs")


@pytest.mark.parametrize("recording", ["this thread", "maybe", "another thread", "switched off", "an old ComfyUI"])
def test_the_fused_kernel_stays_out_of_a_recording(pack, host, monkeypatch, caplog, recording):
    monkeypatch.setattr(pack.module.nodes.host_attention, "fused_attention", lambda *kind, **kw: Kernel())
    thread = threading.get_ident() + (recording == "another thread")
    names = {
        "malloc_graph_enabled": lambda device: recording != "switched off",
        "MALLOC_GRAPHS": {thread: types.SimpleNamespace(_comfy_active=True)},
    }
    if recording == "maybe":
        del names["MALLOC_GRAPHS"]
    host(**({} if recording == "an old ComfyUI" else names))
    case, model = CASES["sd3"], model_of("sd3")
    positive = pack.negative(case.prompt(), negative=case.negative())
    if recording in ("this thread", "maybe"):
        case.run(pack.patch(model), positive, steps=1)
        assert "attention: log-sum-exp merge (cpu_flash)" in log_lines(caplog)[-1]
    else:
        with pytest.raises(RuntimeError, match="the kernel runs"):
            case.run(pack.patch(model), positive, steps=1)


# -- CUDA graphs ------------------------------------------------------------------------------------------------------

WINDOWS = {"all steps": {}, "the first": {"end_percent": 0.5}, "the last": {"start_percent": 0.5}}


@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_that_are_replayed(pack, host, caplog, window):
    """Steps with a negative run without graphs; those of stock keep theirs."""
    case, model = CASES["sd3"], model_of("sd3")
    patched = pack.patch(model, **WINDOWS[window])
    positive = pack.negative(case.prompt(), negative=case.negative())
    expected = case.run(patched, positive, steps=6)
    diffusion_model = model.model.diffusion_model
    with GraphedBlocks(diffusion_model, blocks_of(diffusion_model)) as graphed:
        host(GRAPH_WARMED_MODULES=graphed.warm)
        assert_close(case.run(patched, positive, steps=6), expected, 0.0)
    assert (graphed.replays > 0) == (window != "all steps")
    assert sum("would replay CUDA graphs" in line for line in log_lines(caplog)) == 1


def test_graphs_that_other_nodes_make(pack, monkeypatch):
    """Of which nothing tells before."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    case, model = CASES["sd3"], model_of("sd3")
    positive = pack.negative(case.prompt(), negative=case.negative())
    with pytest.raises(RuntimeError, match="VSF: a CUDA graph is being made of this model, and when it is replayed"):
        case.run(pack.patch(model), positive, steps=1)
