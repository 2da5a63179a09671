"""VSF's attention alone beside plain attention: by backend, by the number of image tokens, by that of negative ones."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, POSITIVE = 4, 154
IMAGE, NEGATIVE = 4096, 16
IMAGES, NEGATIVES = (1024, 4096, 8192, 16384, 32768), (1, 16, 40, 77, 256)
DIMS = (64, 128)
DENSE = 8192
"""Beyond that many image tokens, no dense mask (4 GB at 32,768), and a single head."""


def timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def joint_ways(image: int, negative: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """Each way of computing one joint attention, and plain attention without the negative."""
    from vsf_core import VSF, AttentionBackend, NegativeTerms, TokenLayout, attend_joint, joint_mask
    from vsf_core.backends import CANDIDATES

    layout = TokenLayout(image, POSITIVE, negative)
    heads = HEADS if image <= DENSE else 1
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.length, heads, dim, generator=g).to(device, dtype).transpose(1, 2) for _ in "qkv")
    alpha, bias = torch.full((1, 1, 1), 3.3, device=device), torch.full((1, 1, 1), 0.2, device=device)
    n = layout.span("N")

    def dense(mask: Tensor | None) -> Tensor:
        mask = joint_mask(layout, bias).to(dtype) if mask is None else mask
        keys = torch.cat((k, k[:, :, n]), dim=2)
        return plain(q, keys, torch.cat((v, v[:, :, n] * -3.3), dim=2), mask)

    attends = CANDIDATES[device.type] if dtype != torch.float32 else CANDIDATES[device.type][-1:]  # the one for fp32
    backends = {f"merge ({f.__name__})": AttentionBackend(plain, f) for f in attends}
    backends["row mask"] = AttentionBackend(plain)
    negative = NegativeTerms(alpha, bias)
    ways = {
        "plain": lambda: plain(*(layout.take("PI", t) for t in (q, k, v))),
        **{way: partial(attend_joint, VSF(), b, q, k, v, layout, negative) for way, b in backends.items()},
    }
    if image > DENSE:
        return ways
    mask = joint_mask(layout, bias).to(dtype)
    return {**ways, "dense mask, made once": lambda: dense(mask), "dense mask, made each call": lambda: dense(None)}


def cross_ways(image: int, negative: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """The same for Wan's cross-attention: 512 positive tokens, heads of 128."""
    from vsf_core import VSF, AttentionBackend, NegativeTerms, attend_cross, cross_attention_reference, lse_attention

    g = torch.Generator().manual_seed(0)
    lengths = (image, 512, 512, negative, negative)
    q, k, v, kn, vn = (torch.randn(1, n, HEADS, 128, generator=g).to(device, dtype).transpose(1, 2) for n in lengths)
    alpha, bias = torch.full((1, 1, 1), 3.3, device=device), torch.full((1, 1, 1), 0.2, device=device)
    attend = lse_attention(device, dtype, 128)
    assert attend is not None
    shared, negative = (q, k, v, kn, vn), NegativeTerms(alpha, bias)
    return {
        "plain": lambda: plain(q, k, v),
        f"merge ({attend.__name__})": lambda: attend_cross(VSF(), AttentionBackend(plain, attend), *shared, negative),
        "row mask": lambda: attend_cross(VSF(), AttentionBackend(plain), *shared, negative),
        "dense mask, made each call": lambda: cross_attention_reference(*shared, alpha, bias),
    }


def backend_ways(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """VSF through one of ComfyUI's attention functions that returns no log-sum-exp, beside that function itself."""
    import comfy.ldm.modules.attention as comfy_attention

    from vsf_core import VSF, AttentionBackend, NegativeTerms, TokenLayout, attend_joint

    function = getattr(comfy_attention, f"attention_{name}")

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return function(q, k, v, HEADS, mask=mask, skip_reshape=True, skip_output_reshape=True)

    layout = TokenLayout(IMAGE, POSITIVE, NEGATIVE)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.length, HEADS, 64, generator=g).to(device, dtype).transpose(1, 2) for _ in "qkv")
    alpha, bias = torch.full((1, 1, 1), 3.3, device=device), torch.full((1, 1, 1), 0.2, device=device)
    backend, negative = AttentionBackend(attend), NegativeTerms(alpha, bias)
    return {
        "plain": lambda: attend(*(layout.take("PI", t) for t in (q, k, v))),
        "row mask": lambda: attend_joint(VSF(), backend, q, k, v, layout, negative),
    }


def cases(dtype: torch.dtype, device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(shape, what makes its ways), each small enough to be held alone."""
    for dim in DIMS:
        yield f"joint, I {IMAGE}, n {NEGATIVE}, D {dim}", partial(joint_ways, IMAGE, NEGATIVE, dim, dtype, device)
    if quick:
        return
    for image in IMAGES:
        if image != IMAGE:
            yield f"joint, I {image}, n {NEGATIVE}, D 64", partial(joint_ways, image, NEGATIVE, 64, dtype, device)
    for negative in NEGATIVES:
        if negative != NEGATIVE:
            yield f"joint, I {IMAGE}, n {negative}, D 64", partial(joint_ways, IMAGE, negative, 64, dtype, device)
    yield f"cross, I 32760, n {NEGATIVE}, D 128", partial(cross_ways, 32760, NEGATIVE, dtype, device)
    for name in ("sub_quad", "split"):
        yield f"ComfyUI's {name}, I {IMAGE}, n {NEGATIVE}, D 64", partial(backend_ways, name, dtype, device)


def measure(options: argparse.Namespace, dtypes: Mapping[str, torch.dtype], tools: Any) -> list[dict[str, Any]]:
    """A row a way and case; charts of the growth in ``options.out``. tools: ``interleaved`` and ``row`` of speed.py."""
    device = torch.device("cpu" if options.cpu else "cuda")
    rows: list[dict[str, Any]] = []
    for name in options.dtype:
        for shape, make in cases(dtypes[name], device, options.quick):
            ways = make()
            calls = {key: partial(timed, way, device) for key, way in ways.items()}
            often = [key for key in ways if not key.startswith("dense")]
            for way in ways.values():
                way()  # memory and kernels warm up
            with torch.inference_mode():
                times = tools.interleaved(calls, options.repeats, often, f"{shape}, {name}")
            rows += [
                tools.row({"shape": f"attention: {shape}", "dtype": name, "method": key}, times[key], times["plain"])
                for key in ways
            ]
    if not options.quick:
        draw(rows, options.out)
    return rows


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Ratio over image tokens, and over negative ones."""
    from charts import chart

    for letter, values, fixed in (("I", IMAGES, f"n {NEGATIVE}"), ("n", NEGATIVES, f"I {IMAGE}")):
        series: dict[str, list] = {}
        for one in rows:
            shape = one["shape"]
            found = [v for v in values if f" {letter} {v}," in shape]
            if shape.startswith("attention: joint") and fixed in shape and shape.endswith("D 64") and found:
                point = (float(values.index(found[0])), one["ratio"], f"{found[0]}")
                series.setdefault(f"{one['method']}, {one['dtype']}", []).append(point)
        words = {"I": "image tokens", "n": "negative tokens"}[letter]
        lines = {name: sorted(points) for name, points in series.items()}
        chart(out / f"growth-{letter}.png", f"Attention alone over {words} (plain = 1)", words, "ratio", lines, 2.5)
