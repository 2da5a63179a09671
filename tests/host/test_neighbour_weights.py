"""Weights that are not plain tensors of their model: merged, hooked, quantised, in fp8, offloaded; and two at once."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import pytest
import tiny
import torch
from cases import CASES, compare
from comfy_extras.nodes_model_merging import ModelMergeSimple
from helpers import assert_close, relative, with_override
from oracle import Expect, oracle_model
from safetensors.torch import save_file

FAMILY = pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
ORDER = pytest.mark.parametrize("order", ["theirs first", "vsf first"])
WEIGHTS = {"sd3": tiny.sd3, "flux": tiny.flux, "wan": tiny.wan}
ONE_LAYER = {
    "sd3": "joint_blocks.0.x_block.attn.qkv",
    "flux": "double_blocks.0.img_attn.qkv",
    "wan": "blocks.0.cross_attn.v",
}


def attached(pack, family, positive=None):
    return pack.negative(positive or CASES[family].prompt(), negative=CASES[family].negative())


@ORDER
@FAMILY
def test_model_merge(pack, family, order):
    other = comfy.sd.load_diffusion_model_state_dict(WEIGHTS[family](seed=3))

    def apply(m):
        return ModelMergeSimple().merge(m, other, 0.4)[0]

    result, expected, without = compare(pack, family, apply, order)
    assert_close(result, expected)
    assert relative(without, expected) > 1e-2


# -- a LoRA whose strength changes from step to step ------------------------------------------------------------------


def scheduled_lora(family, state):
    """Hooks of a LoRA that is off in the first half of the sampling."""
    key = ONE_LAYER[family]
    rows, columns = state[f"{key}.weight"].shape
    g = torch.Generator().manual_seed(3)
    lora = {
        f"diffusion_model.{key}.lora_up.weight": torch.randn(rows, 4, generator=g),
        f"diffusion_model.{key}.lora_down.weight": torch.randn(4, columns, generator=g),
    }
    hooks = comfy.hooks.create_hook_lora(lora, 0.2, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(0.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(1.0, start_percent=0.5))
    hooks.set_keyframes_on_hooks(keyframes)
    return hooks


@FAMILY
@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("order", ["hooks first", "vsf first"])
def test_hook_scheduled_lora(pack, family, cfg, order):
    """At cfg 2.5 the uncond has no hooks, so the two run apart, each with its own weights."""
    state = WEIGHTS[family]()
    hooks = scheduled_lora(family, state)
    model, positive = CASES[family].load(), CASES[family].prompt()

    def hooked(cond):
        return comfy.hooks.set_hooks_for_conditioning(cond, hooks)

    cond = attached(pack, family, hooked(positive)) if order == "hooks first" else hooked(attached(pack, family))
    expects = [Expect(positive[0][0], CASES[family].negative()[0][0], 3.3, 0.2)]

    def steps(m, cond):
        seen = []
        CASES[family].run(m, cond, cfg=cfg, steps=4, callback=lambda i, x0, x, total: seen.append(x0.clone()))
        return seen

    result = steps(pack.patch(model), cond)
    expected = steps(oracle_model(model, expects)[0], hooked(positive))
    without = steps(oracle_model(model, expects)[0], positive)
    assert_close(torch.stack(result), torch.stack(expected))
    assert_close(without[0], expected[0], 1e-6)
    assert relative(without[-1], expected[-1]) > 1e-4
    assert torch.equal(steps(model, cond)[-1], steps(model, hooked(positive))[-1])


# -- quantised weights ------------------------------------------------------------------------------------------------


class Dequantising(comfy.ops.manual_cast):
    """GGUF's way: operations whose weights are packed in the file and unpacked in each forward."""

    class Linear(comfy.ops.manual_cast.Linear):
        calls = 0

        def _load_from_state_dict(self, state_dict, prefix, *args):
            weight = state_dict[prefix + "weight"]
            self.row_scale = weight.abs().amax(1, keepdim=True) / 7
            packed = (weight / self.row_scale).round().to(torch.int8)
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
            if prefix + "bias" in state_dict:
                self.bias = torch.nn.Parameter(state_dict[prefix + "bias"])

        def forward(self, x):
            type(self).calls += 1
            weight = (self.weight.to(x.dtype) * self.row_scale.to(x)).to(x)
            return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x))


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """GGUF's own kind of patcher, which its clones must stay."""

    def clone(self, *args, **kwargs):
        copy = super().clone(*args, **kwargs)
        copy.__class__ = PackedPatcher
        return copy


@FAMILY
def test_operations_that_dequantise(pack, family):
    model = comfy.sd.load_diffusion_model_state_dict(
        WEIGHTS[family](), model_options={"custom_operations": Dequantising, "dtype": torch.float32}
    )
    model.__class__ = PackedPatcher
    Dequantising.Linear.calls = 0
    result, expected, _ = compare(pack, family, model=model)
    assert Dequantising.Linear.calls and isinstance(pack.patch(model), PackedPatcher)
    assert_close(result, expected)
    assert relative(compare(pack, family)[1], expected) > 1e-3


def check_against_its_oracle(pack, family, model):
    """VSF equals the oracle on a model of rounded weights, which really are others than those of the file."""
    result, expected, _ = compare(pack, family, model=model)
    assert relative(compare(pack, family)[1], expected) > 1e-3
    assert_close(result, expected)


@FAMILY
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_weights(pack, family, kind):
    """As UNETLoader's weight_dtype loads them."""
    dtype = getattr(torch, kind)
    model = comfy.sd.load_diffusion_model_state_dict(WEIGHTS[family](), model_options={"dtype": dtype})
    assert dtype in {p.dtype for p in model.model.parameters()}
    check_against_its_oracle(pack, family, model)


@FAMILY
def test_mixed_precision_weights(pack, family):
    """ComfyUI's own format of quantised layers: fp8 weights and a scale in every second layer, a note beside them."""
    state, count = WEIGHTS[family](), 0
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for key in [k for k in state if k.endswith(".weight") and state[k].ndim == 2 and "block" in k][::2]:
        layer, scale = key.removesuffix(".weight"), state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        state[f"{layer}.weight_scale"], state[f"{layer}.comfy_quant"] = scale, note
        count += 1
    with torch.inference_mode():  # as ComfyUI does
        model = comfy.sd.load_diffusion_model_state_dict(state)
    quantised = [m for m in model.model.modules() if getattr(m, "quant_format", None) == "float8_e4m3fn"]
    assert len(quantised) == count > 5
    check_against_its_oracle(pack, family, model)


# -- offloading, threads ----------------------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("lora", [False, True])
def test_partly_loaded_model(pack, family, lora, monkeypatch):
    """Low VRAM: what does not fit is cast, and patched by LoRAs, layer by layer as it is used."""
    load = comfy.model_patcher.ModelPatcher.load
    offloaded = []

    def load_a_part(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **kw):
        result = load(self, device_to, self.model_size() // 3, force_patch_weights, False, **kw)
        offloaded.append(self.model.model_lowvram)
        return result

    def apply(m):
        if not lora:
            return m
        key = f"diffusion_model.{ONE_LAYER[family]}.weight"
        weight = torch.randn(m.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(3))
        m = m.clone()
        m.add_patches({key: (weight * 0.05,)})
        return m

    whole, _, _ = compare(pack, family, apply)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load_a_part)
    result, expected, _ = compare(pack, family, apply)
    assert offloaded and all(offloaded)
    assert_close(result, expected)
    assert_close(result, whole)


def test_two_threads_at_once(pack, monkeypatch):
    """As with several GPUs: models with other settings, and of other families, sampled at the same time.

    Each is loaded for itself: of clones of one model, stock ComfyUI too can sample one at a time only. Its list of
    loaded models is one for all threads and not guarded, so that loading takes turns here.
    """
    load_models, turn, jobs = comfy.model_management.load_models_gpu, threading.Lock(), []

    def load_in_turn(*args, **kw):
        with turn:
            return load_models(*args, **kw)

    def sampled(family, model, positive):
        return CASES[family].run(model, positive, steps=6)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_in_turn)
    for family in ("sd3", "flux", "wan"):
        load = CASES[family].load
        for scale in (1.0, 4.0):
            jobs.append((family, pack.patch(load(), scale=scale), attached(pack, family)))
        jobs.append((family, load(), CASES[family].prompt()))
    alone = [sampled(*job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda job: sampled(*job), jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len({a.sum().item() for a in alone}) == len(jobs)


@pytest.mark.smoke
@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("order", ["theirs first", "vsf first"])
def test_multigpu(pack, order, cfg, monkeypatch, tmp_path):
    """ComfyUI's own MultiGPU, with the CPU twice: the entries of a step run in a thread per device."""
    multigpu = pytest.importorskip("comfy.multigpu", reason="this ComfyUI has no MultiGPU")
    save_file(tiny.sd3(), tmp_path / "sd3.safetensors")
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *a, **kw: devices)
    threads = set()

    def spy(func, q, k, v, heads, **kw):
        threads.add(threading.get_ident())
        return func(q, k, v, heads, **kw)

    def spread(m):
        return multigpu.create_multigpu_deepclones(m, 2)

    loaded = comfy.sd.load_diffusion_model(str(tmp_path / "sd3.safetensors"))
    patched = pack.patch(spread(loaded)) if order == "theirs first" else spread(pack.patch(loaded))
    one, two = CASES["sd3"].prompt(), CASES["sd3"].prompt(seed=2)
    result = CASES["sd3"].run(with_override(patched, spy), attached(pack, "sd3", one + two), cfg=cfg)
    assert len(threads) == 2
    expects = [Expect(p[0][0], CASES["sd3"].negative()[0][0], 3.3, 0.2) for p in (one, two)]
    reference, _ = oracle_model(CASES["sd3"].load(), expects)
    assert_close(result, CASES["sd3"].run(reference, one + two, cfg=cfg))
