"""Whatever attention ComfyUI runs, VSF is exact on it, and leaves it in place where it can be."""

import os
import subprocess
import sys
import types

import cases
import comfy.ldm.flux.math
import comfy.ldm.modules.attention as comfy_attention
import pytest
import torch
from cases import CASES
from comfy.patcher_extension import WrappersMP
from helpers import assert_close, with_override
from oracle import oracle_model

FAMILIES = ("sd3", "flux", "wan")
FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def models():
    return {family: CASES[family].load() for family in FAMILIES}


def both(pack, models, family, model, **options):
    """(VSF's latent with ``model``, a stock model whose attention may be another; the oracle's)."""
    positive = CASES[family].prompt(**options)
    return cases.both(pack, CASES[family], model, positive=positive, stock=models[family])


def log_lines(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("VSF")]


@pytest.mark.parametrize("name", ["pytorch", "sub_quad", "split", "basic"])
@FAMILY
def test_every_attention_of_comfyui(pack, models, family, name, caplog):
    """Set by an override, as nodes that let people choose do."""
    chosen = getattr(comfy_attention, f"attention_{name}")
    calls = []

    def override(func, *args, **kw):
        calls.append(name)
        return chosen(*args, **kw)

    result, expected = both(pack, models, family, with_override(models[family], override))
    assert_close(result, expected)
    assert calls and "row mask (override)" in log_lines(caplog)[-1]


@pytest.mark.parametrize(("family", "masked"), [*((family, False) for family in FAMILIES), ("flux", True)])
def test_attention_that_ignores_masks(pack, models, family, masked, caplog):
    """SageAttention's kernels take no mask, and what hands it one often drops it without a word.

    ``masked``: the user has an attention mask of their own, which then must hold too."""
    calls = []

    def deaf(func, q, k, v, heads, mask=None, **kw):
        calls.append(k.shape[2 if kw.get("skip_reshape") else 1])
        return func(q, k, v, heads, mask=None, **kw)

    mask = {"attention_mask": torch.randn(1, 13 + 96, 13 + 96), "attention_mask_img_shape": (8, 12)} if masked else {}
    result, expected = both(pack, models, family, with_override(models[family], deaf), **mask)
    assert_close(result, expected)
    assert any("deaf) ignores or refuses masks" in line for line in log_lines(caplog))
    calls.clear()
    CASES[family].run(with_override(pack.patch(models[family]), deaf), CASES[family].prompt())
    assert len(calls) >= 3 * 2  # without a negative it stays in charge


@pytest.mark.parametrize("most", [64, 108, "never"])
@FAMILY
def test_attention_that_takes_masks_for_few_keys_alone(pack, models, family, most, caplog):
    """Beyond so many keys a kernel without masks runs, or the library refuses them, as flash-attn does."""

    def partly(func, q, k, v, heads, mask=None, **kw):
        if most == "never" and mask is not None:
            raise RuntimeError("this attention does not support masks")
        heeds = most != "never" and k.shape[2 if kw.get("skip_reshape") else 1] <= most
        return func(q, k, v, heads, mask=mask if heeds else None, **kw)

    result, expected = both(pack, models, family, with_override(models[family], partly))
    assert_close(result, expected)
    assert any("partly) ignores or refuses masks" in line for line in log_lines(caplog))


def test_attention_that_ignores_masks_at_the_length_of_the_model_alone(pack, models, caplog):
    """No fixed number of tokens finds it."""
    keys = 5 + 13 + 96

    def deaf_here(func, q, k, v, heads, mask=None, **kw):
        here = k.shape[2 if kw.get("skip_reshape") else 1] == keys
        return func(q, k, v, heads, mask=None if here else mask, **kw)

    result, expected = both(pack, models, "sd3", with_override(models["sd3"], deaf_here))
    assert_close(result, expected)
    assert any("deaf_here) ignores or refuses masks" in line for line in log_lines(caplog))


def test_an_override_made_anew_for_each_call_is_warned_of_once(pack, models, caplog):
    """As by a wrapper around the model's call: it is no override of the run before."""

    def renewed(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kw):
        def deaf(func, q, k, v, heads, mask=None, **kw):
            return func(q, k, v, heads, mask=None, **kw)

        options = {**transformer_options, "optimized_attention_override": deaf}
        return executor(x, t, c_concat, c_crossattn, control, options, **kw)

    model = models["sd3"].clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", renewed)
    result, expected = both(pack, models, "sd3", model)
    assert_close(result, expected)
    assert sum("ignores or refuses masks" in line for line in log_lines(caplog)) == 1


def test_each_device_has_a_backend_of_its_own(pack, models, monkeypatch):
    """Under MultiGPU one run has several: what serves one may not serve another."""
    run, asked = sys.modules[f"{pack.module.__name__}.nodes.run"], []

    def choose(options, device, dtype, head_dim, keys):
        asked.append(device.type)
        return types.SimpleNamespace(warning=lambda joint: None)

    monkeypatch.setattr(run, "choose_backend", choose)
    patch = pack.patch(models["sd3"]).get_all_wrappers(WrappersMP.APPLY_MODEL)[0].__self__
    one = types.SimpleNamespace(backends={}, family=patch.family, head_dim=64)
    devices = (torch.device(name) for name in ("cpu", "meta", "cpu"))
    made = [run.Run.backend(one, {}, device, model=models["sd3"].model, keys=18) for device in devices]
    assert asked == ["cpu", "meta"] and made[0] is made[2] is not made[1]


def test_nothing_left_to_run(pack, models, monkeypatch):
    """An attention without masks on a device without a log-sum-exp: an error, not an inexact picture."""
    backend = sys.modules[f"{pack.module.__name__}.nodes.host_attention"]
    monkeypatch.setattr(backend, "lse_attention", lambda *args: None)
    deaf = with_override(models["sd3"], lambda func, q, k, v, heads, mask=None, **kw: func(q, k, v, heads, **kw))
    with pytest.raises(RuntimeError, match="ignores or refuses masks.*--use-pytorch-cross-attention"):
        both(pack, models, "sd3", deaf)


def plain_attention(q, k, v, scale=None):
    """What a library computes: (Z, lse), all [B, H, L, ...]."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.matmul(logits.softmax(-1), v), logits.logsumexp(-1).float()


@pytest.mark.parametrize("returns_lse", [True, False], ids=["Sage 2", "Sage 1"])
def test_sage_attention_chosen_at_start(pack, models, monkeypatch, caplog, returns_lse):
    """``--use-sage-attention``. The library runs on CUDA alone: a stand-in with its interface."""
    rows = []

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        assert tensor_layout == "HND" or not return_lse
        flip = tensor_layout == "NHD"
        q, k, v = (t.transpose(1, 2) for t in (q, k, v)) if flip else (q, k, v)
        z, lse = plain_attention(q, k, v, sm_scale)
        rows.append((q.shape[2], k.shape[2], return_lse))
        z = z.transpose(1, 2) if flip else z
        return (z, lse) if return_lse and returns_lse else z

    monkeypatch.setitem(sys.modules, "sageattention", types.SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(comfy_attention, "sageattn", sageattn, raising=False)
    for module in (comfy_attention, comfy.ldm.flux.math):
        monkeypatch.setattr(module, "optimized_attention", comfy_attention.attention_sage)
    backends = sys.modules[f"{pack.module.__name__}.vsf_core.backends"]
    monkeypatch.setattr(backends, "SMALL", 60)  # the tiny model's image has 96 tokens
    backends.lse_attention.cache_clear()
    result, expected = both(pack, models, "flux", models["flux"])
    backends.lse_attention.cache_clear()
    assert_close(result, expected)
    line = next(line for line in log_lines(caplog) if "attention:" in line)
    if returns_lse:
        assert "log-sum-exp merge (sageattention)" in line
        assert rows.count((5 + 13 + 96, 13 + 96, True)) == 4 * 2  # the big part, once a block and step
        assert not [row for row in rows if min(row[:2]) <= 60 and row[:2] not in ((8, 8), (37, 21))]  # the trial's
    elif hasattr(comfy_attention, "SAGE_ATTENTION_SUPPORTS_MASK"):
        assert "row mask (attention_sage)" in line
    else:  # ComfyUI before 0.27 hands Sage masks that it ignores
        assert "log-sum-exp merge (cpu_flash)" in line
        assert any("ignores or refuses masks" in other for other in log_lines(caplog))


@pytest.mark.parametrize("force", [None, "mask"])
def test_sage_that_drops_a_mask_which_the_model_needs(pack, monkeypatch, caplog, force):
    """It returns a log-sum-exp, which a text with padding cannot use: before 0.27, ComfyUI's call ignores the mask."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
        z, lse = plain_attention(q, k, v, sm_scale)
        return (z, lse) if return_lse else z

    def attention_sage(*args, mask=None, **kw):
        return comfy_attention.attention_pytorch(*args, mask=None, **kw)

    case = CASES["qwen-image, padding"]
    model = case.load()
    monkeypatch.setitem(sys.modules, "sageattention", types.SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(comfy_attention, "optimized_attention", attention_sage)
    module = sys.modules[type(model.model.diffusion_model).__module__]

    def asked(*args, **kw):  # as ComfyUI's functions do
        override = kw["transformer_options"]["optimized_attention_override"]
        return override(attention_sage, *args, **kw)

    backends = sys.modules[f"{pack.module.__name__}.vsf_core.backends"]
    backends.lse_attention.cache_clear()
    if force:
        monkeypatch.setenv("VSF_ATTENTION", force)
    positive, negative = case.prompt(), case.negative()
    expects = [case.expect(model, positive, negative, 3.3, 0.2)]
    expected = case.run(oracle_model(model, expects)[0], positive)
    monkeypatch.setattr(module, "optimized_attention_masked", asked)
    result = case.run(pack.patch(model, scale=3.3), pack.negative(positive, negative=negative))
    backends.lse_attention.cache_clear()
    assert_close(result, expected)
    assert "row mask (PyTorch)" in next(line for line in log_lines(caplog) if "attention:" in line)


SCRIPT = """
import asyncio, os, sys
sys.path[:0] = [os.environ["VSF_COMFYUI"], {host!r}, {toy!r}]
from comfy.cli_args import args
args.cpu = True
setattr(args, {switch!r}, True)
import comfy.model_management, logging, nodes
logging.getLogger().setLevel(logging.INFO)
assert asyncio.run(nodes.load_custom_node({root!r}))
import helpers, types, test_backends as t
mapping = nodes.NODE_CLASS_MAPPINGS
pack = types.SimpleNamespace(
    patch=lambda model, **kw: mapping["VSFModelPatch"].execute(model=model, **kw).result[0],
    negative=lambda p, **kw: mapping["VSFNegativeConditioning"].execute(positive=p, **kw).result[0],
)
models = {{family: t.CASES[family].load() for family in t.FAMILIES}}
for family in t.FAMILIES:
    print("error", helpers.relative(*t.both(pack, models, family, models[family])))
"""


@pytest.mark.parametrize(
    ("switch", "name"),
    [
        pytest.param("cpu", "attention_sub_quad", marks=pytest.mark.long),
        ("use_split_cross_attention", "attention_split"),
    ],
    ids=["no switch, on a CPU", "--use-split-cross-attention"],
)
def test_command_line_switches(pack, switch, name):
    """The attention is chosen when ComfyUI is imported: a process of its own."""
    here = os.path.dirname(__file__)
    root = os.path.dirname(os.path.dirname(here))
    script = SCRIPT.format(host=here, toy=os.path.join(root, "tests", "toy"), root=root, switch=switch)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    errors = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("error")]
    assert len(errors) == len(FAMILIES), run.stderr[-2000:]
    assert max(errors) <= 1e-5
    assert run.stderr.count(f"row mask ({name})") == len(FAMILIES)
