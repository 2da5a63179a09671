"""What a negative costs: forward passes of real widths, each method beside the plain model.

    python3 dev.py bench speed [--quick] [--json FILE] [--out DIR] [--shape NAME ...] [--dtype fp32 bf16]

Models of random weights in the real ComfyUI, at SD3.5-Large's, Flux's and Wan's widths and token counts, cut to one or
two blocks (``--full``: all of them and 8 steps, for a GPU). A round runs every method once, in an order that changes;
a figure is the median over rounds of a method's time divided by the plain model's in the same round, with a 95%
bootstrap interval. extra_bytes: by how much a method raises the peak of what is alive during the pass. Then the
attention alone (``speed_attention.py``).
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling import load_pack, open_comfyui
from torch import Tensor

NEGATIVE_TOKENS = 16
SCALE, OFFSET = 3.3, 0.2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OFTEN = ("plain", "VSF")
"""Methods that run in every round; others in every ``SELDOM``-th."""
SELDOM = 4


@dataclass(frozen=True)
class Shape:
    """A model's widths, and what it is given. blocks, all_blocks: the cut model's and the whole one's; methods: what is
    measured unless others are asked for, None = all."""

    family: str
    config: Mapping[str, Any]
    blocks: Mapping[str, int]
    all_blocks: Mapping[str, int]
    latent: tuple[int, ...]
    text: int
    pooled: int = 768
    context: int = 4096
    methods: Sequence[str] | None = None


def joint(
    family: str, all_blocks: Mapping[str, int], latent: tuple[int, ...], text: int, context: int = 4096, **config: Any
) -> Shape:
    """A family of which one block of each type is measured, plain and with VSF."""
    blocks = dict.fromkeys(all_blocks, 1)
    return Shape(family, config, blocks, all_blocks, latent, text, context=context, methods=OFTEN)


FLUX, FLUX_WIDTHS = {"double": 19, "single": 38}, {"hidden_size": 3072, "num_heads": 24}
WAN = {"family": "wan", "latent": (16, 9, 60, 104), "text": 512, "blocks": {"layers": 1}}
SHAPES = {
    "SD3.5-Large 1024x1024": Shape(
        "sd3", {"depth": 38}, {"num_blocks": 1}, {"num_blocks": 38}, (16, 128, 128), 154, pooled=2048
    ),
    "Flux 1024x1024": Shape("flux", {"hidden": 3072}, {"double": 1, "single": 1}, FLUX, (16, 128, 128), 256),
    "Wan 1.3B 832x480x33": Shape(config={"dim": 1536, "ffn": 8960}, all_blocks={"layers": 30}, **WAN),
    "Wan 14B 832x480x33": Shape(config={"dim": 5120, "ffn": 13824}, all_blocks={"layers": 40}, **WAN),
    "Chroma 1024x1024": joint(
        "chroma", FLUX, (16, 128, 128), 256, **FLUX_WIDTHS, hidden_dim=5120, out_dim=3072, n_layers=5
    ),
    "Qwen-Image 1328x1328": joint("qwen_image", {"layers": 60}, (16, 1, 166, 166), 64, 3584, heads=24),
    "Z-Image 1024x1024": joint("z_image", {"layers": 30}, (16, 128, 128), 64, 2560, dim=3840),
    "Flux.2 Klein 4B 1024x1024": joint(
        "flux2", {"double": 5, "single": 20}, (128, 64, 64), 512, 7680, hidden=3072, guidance=False
    ),
    "Flux.2 Dev 1024x1024": joint("flux2", {"double": 8, "single": 48}, (128, 64, 64), 512, 15360, hidden=6144),
    "HunyuanVideo 848x480x13": joint("hunyuan_video", {"double": 20, "single": 40}, (16, 4, 60, 106), 256, hidden=3072),
    "SDXL 1024x1024": Shape("sdxl", {}, {}, {}, (4, 128, 128), 77, 1280, 2048, OFTEN),
    "tiny": Shape("sd3", {"depth": 4}, {"num_blocks": 2}, {"num_blocks": 4}, (16, 32, 32), 20, pooled=2048, context=64),
}
"""``tiny`` tries the command out; its figures mean nothing. SDXL is always whole."""
SHAPES |= {
    "SD3.5-Large 512x512": replace(SHAPES["SD3.5-Large 1024x1024"], latent=(16, 64, 64)),
    "Flux 512x512": replace(SHAPES["Flux 1024x1024"], latent=(16, 64, 64)),
    "Qwen-Image 1024x1024": replace(SHAPES["Qwen-Image 1328x1328"], latent=(16, 1, 128, 128)),
}
FOR_A_GPU = ("SDXL 1024x1024", "SD3.5-Large 512x512", "Flux 512x512", "Qwen-Image 1024x1024")
"""Measured if they are asked for, and by `dev.py gpu`."""


def sdxl_model(context: int) -> torch.nn.Module:
    """ComfyUI's UNet class in the layout and sizes of SDXL."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": context},
        **{"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_head_channels": 64, "legacy": False},
        **{"num_classes": "sequential", "adm_in_channels": 2816, "use_linear_in_transformer": True},
        **{"use_spatial_transformer": True, "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10},
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    )


def weights(shape: Shape, full: bool) -> dict[str, Tensor]:
    """The names and sizes of a model's weights, without any values."""
    import tiny

    with torch.device("meta"):
        make = sdxl_model if shape.family == "sdxl" else getattr(tiny, f"{shape.family}_model")
        return make(context=shape.context, **shape.config, **(shape.all_blocks if full else shape.blocks)).state_dict()


def build(shape: Shape, dtype: torch.dtype, full: bool) -> Any:
    """A ``ModelPatcher`` of the shape with random weights, computing in ``dtype``."""
    import comfy.model_detection
    import comfy.model_management
    import comfy.model_patcher
    import tiny

    state = weights(shape, full)
    config = comfy.model_detection.model_config_from_unet(state, "")
    assert config is not None
    if shape.family == "sd3":  # whose number of blocks ComfyUI reads off the width
        config.unet_config.update(shape.all_blocks if full else shape.blocks)
    config.set_inference_dtype(dtype, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model(state, "", device)
    generator = torch.Generator(device).manual_seed(0)
    for key, weight in model.diffusion_model.state_dict().items():
        tiny.fill_(key, weight, generator)
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=device)


# -- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What the sampler is given."""

    model: Any
    positive: list
    negative: list
    cfg: float = 1.0


def all_methods(shape: Shape, model: Any, pack: Mapping[str, Any]) -> dict[str, Method]:
    """Each way to use a negative of ``NEGATIVE_TOKENS`` tokens. CFG's is as long as the prompt, as encoders pad it."""
    import baselines

    def conditioning(tokens: int, seed: int) -> list:
        g = torch.Generator().manual_seed(seed)
        pooled = {"pooled_output": torch.randn(1, shape.pooled, generator=g)}
        return [[torch.randn(1, tokens, shape.context, generator=g), pooled]]

    positive, padded, unwanted = conditioning(shape.text, 1), conditioning(shape.text, 2), conditioning(16, 3)
    attached = pack["VSFNegativeConditioning"].execute(positive=positive, negative=unwanted).result[0]
    patched = pack["VSFModelPatch"].execute(model=model, scale=SCALE, offset=OFFSET).result[0]
    black_box = patched.clone()
    black_box.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **kw: f(*a, **kw)
    guided = comfy_nag(model)
    dense = baselines.patched(model, baselines.vsf_dense(SCALE, OFFSET), unwanted[0][0])
    others = {
        "NAG, one pass": {"method": "nag", "nag_scale": 12.0, "nag_alpha": 0.5, "nag_tau": 5.0},
        "NASA, one pass": {"method": "nasa", "nasa_scale": 0.4},
    }
    return {
        "plain": Method(model, positive, padded),
        "VSF": Method(patched, attached, padded),
        "VSF, row mask (no log-sum-exp)": Method(black_box, attached, padded),
        "VSF, dense mask (the paper's way)": Method(dense, positive, padded),
        **{
            name: Method(pack["VSFModelPatch"].execute(model=model, **inputs).result[0], attached, padded)
            for name, inputs in others.items()
        },
        **({"NAG, ComfyUI's": Method(guided, positive, padded)} if guided else {}),
        "CFG": Method(model, positive, padded, cfg=2.5),
    }


def comfy_nag(model: Any) -> Any:
    """The model with ComfyUI's NAGuidance, or None where ComfyUI has none."""
    try:
        from comfy_extras.nodes_nag import NAGuidance
    except ImportError:
        return None
    return NAGuidance.execute(model, 12.0, 0.5, 5.0).result[0]


def run(method: Method, shape: Shape, steps: int) -> float:
    """Seconds that the model's ``steps`` calls took inside a run of ComfyUI's sampler."""
    import comfy.samplers

    seconds = 0.0

    def sampler(model: Callable, x: Tensor, sigmas: Tensor, extra_args: dict, **_: Any) -> Tensor:
        nonlocal seconds
        wait(x.device)
        start = time.perf_counter()
        for sigma in sigmas[:-1]:
            model(x, sigma.expand(len(x)), **extra_args)
        wait(x.device)
        seconds = time.perf_counter() - start
        return x

    guider = comfy.samplers.CFGGuider(method.model)
    guider.set_conds(method.positive, method.negative)
    guider.set_cfg(method.cfg)
    noise = torch.randn(1, *shape.latent, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(0.9, 0.0, steps + 1)
    with torch.inference_mode():  # as ComfyUI's executor does
        guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True)
    return seconds


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type != "cpu" and hasattr(torch, device.type):  # torch.cuda, torch.xpu, torch.mps
        getattr(torch, device.type).synchronize()


def peak_bytes(method: Method, shape: Shape) -> int:
    """The most memory that was alive at once in a step, beyond what was before. Warms caches and kernels up, too."""
    import comfy.model_management
    from hosting.live_memory import LiveMemory

    device = comfy.model_management.get_torch_device()
    counter = getattr(torch, device.type, None)
    if hasattr(counter, "reset_peak_memory_stats"):  # torch.cuda, torch.xpu
        counter.reset_peak_memory_stats(device)
        before = counter.memory_allocated(device)
        run(method, shape, 1)
        return counter.max_memory_allocated(device) - before
    with LiveMemory() as memory:
        run(method, shape, 1)
    return memory.peak


# -- figures ----------------------------------------------------------------------------------------------------------


def plan(names: Sequence[str], rounds: int, often: Sequence[str]) -> list[list[str]]:
    """What runs in each round; the order rotates."""
    out = []
    for k in range(rounds):
        chosen = [name for name in names if name in often or k % SELDOM == 0]
        out.append(chosen[k % len(chosen) :] + chosen[: k % len(chosen)])
    return out


def interleaved(calls: Mapping[str, Callable[[], float]], rounds: int, often: Sequence[str], title: str) -> dict:
    """name -> seconds of each round, None in rounds that leave it out."""
    from tqdm import tqdm

    times: dict[str, list[float | None]] = {name: [None] * rounds for name in calls}
    steps = [(k, name) for k, names in enumerate(plan(list(calls), rounds, often)) for name in names]
    for k, name in tqdm(steps, title, unit="run"):
        times[name][k] = calls[name]()
    return times


def row(names: Mapping[str, str], times: Sequence[float | None], plain: Sequence[float | None]) -> dict[str, Any]:
    """The median of ratios with its interval, and how many there are."""
    ratios = np.array([t / p for t, p in zip(times, plain, strict=True) if t and p])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {**names, "ratio": float(np.median(ratios)), "interval": [float(low), float(high)], "runs": len(ratios)}


def measure(name: str, dtype: str, options: argparse.Namespace, pack: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a method for one shape."""
    from tqdm import tqdm

    shape = SHAPES[name]
    methods = all_methods(shape, build(shape, DTYPES[dtype], options.full), pack)
    asked = options.methods or shape.methods or methods
    wanted = {key: m for key, m in methods.items() if key in (*asked, "plain")}
    steps = 8 if options.full else 1
    calls = {key: lambda m=method: run(m, shape, steps) for key, method in wanted.items()}
    peaks = {key: peak_bytes(method, shape) for key, method in tqdm(wanted.items(), f"{name}, {dtype}: memory")}
    times = interleaved(calls, options.repeats, OFTEN, f"{name}, {dtype}: time")
    rows = []
    for key in wanted:
        names = {"shape": name + (", whole model" if options.full else ""), "dtype": dtype, "method": key}
        one = row(names, times[key], times["plain"])
        one |= {"extra_bytes": peaks[key] - peaks["plain"], "plain_bytes": peaks["plain"]}
        if torch.cuda.is_available() and not options.cpu:
            one["seconds"] = float(np.median([t for t in times[key] if t]))
        rows.append(one)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = ["| shape | dtype | method | ratio to plain | extra memory | runs |", "|---|---|---|---|---|---|"]
    for one in rows:
        low, high = one["interval"]
        extra = one.get("extra_bytes")
        share = "" if extra is None else f"{extra / 2**20:+.1f} MiB ({100 * extra / one['plain_bytes']:+.1f}%)"
        ratio = f"{one['ratio']:.3f} [{low:.3f}, {high:.3f}]" + (f" {one['seconds']:.3f} s" if "seconds" in one else "")
        lines.append(f"| {one['shape']} | {one['dtype']} | {one['method']} | {ratio} | {share} | {one['runs']} |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Whole forwards as bars."""
    from charts import bars

    groups: dict[str, dict[str, float]] = {}
    for one in rows:
        groups.setdefault(f"{one['shape']}, {one['dtype']}", {})[one["method"]] = one["ratio"]
    if groups:
        bars(out / "speed.png", "Time of a forward pass, plain = 1", groups)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--out", type=Path, default=Path("bench-output/speed"), metavar="DIR")
    usual = [name for name in SHAPES if name not in ("tiny", *FOR_A_GPU)]
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=usual)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these beside the plain model")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--full", action="store_true", help="whole models, 8 steps")
    parser.add_argument("--cpu", action="store_true", help="on the CPU although there is a GPU")
    parser.add_argument("--kernel", choices=("flash", "efficient", "cudnn"), help="PyTorch's attention kernel on a GPU")
    parser.add_argument("--part", choices=("forward", "attention", "both"), default="both")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.dtype, options.repeats = options.shape[:1], options.dtype[:1], min(options.repeats, 4)
    options.cpu |= not torch.cuda.is_available()
    return options


def kernel(name: str | None) -> Any:
    """A context in which PyTorch's attention is the one of that name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
    return nullcontext() if name is None else sdpa_kernel(getattr(SDPBackend, kinds[name]))


def main() -> None:
    options = parse()
    open_comfyui(options.cpu)
    import speed_attention

    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with kernel(options.kernel):
        for name, dtype in itertools.product(options.shape, options.dtype) if options.part != "attention" else ():
            rows += measure(name, dtype, options, load_pack())
            draw(rows, options.out)
            write(rows, options)
        if options.part != "forward":
            rows += speed_attention.measure(options, DTYPES, sys.modules[__name__])
    write(rows, options)
    print(table(rows), flush=True)


def write(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """What there is so far: a run takes long, and may be stopped."""
    (options.out / "table.md").write_text(table(rows) + "\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
