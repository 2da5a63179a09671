"""An oracle of VSF on whole models that imports nothing of the pack and sits on other seams.

It replaces the model file's own attention function by a dense fp64 softmax with Listing 1's mask, written out by hand,
and appends the negative at the END of the text (the pack puts it first). Entries of a batch run one by one.
"""

import contextlib
from dataclasses import dataclass, field

import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import torch


@dataclass
class Expect:
    """What the oracle should do to the entry whose text embedding equals ``positive`` [1, P, C].

    negative [1, n, C]; alpha: float or [n]; beta: float; keep: [I, n] in 0..1 or None; blocks: indices that see N.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    alpha: float | torch.Tensor
    beta: float
    keep: torch.Tensor | None = None
    blocks: frozenset | None = None


@dataclass
class Record:
    """What really happened, so that a test can see that the oracle was in force."""

    joint: int = 0
    passed: int = 0
    forwards: list = field(default_factory=list)


def dense(q, k, v, heads, allowed, bias):
    """softmax(q k^T / sqrt(d) + bias where allowed) v in fp64; q, k, v [B, L, H*D]."""
    b, _, c = q.shape
    d = c // heads
    q, k, v = (t.double().view(b, -1, heads, d).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) / d**0.5 + bias
    logits = logits.masked_fill(~allowed, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, -1, c)


def listing_1(q, k, v, heads, image, positive, n, expect, block):
    """Sequence [P, N0, I] (text first, as the model file builds it), keys of N1 appended.

    In the released pipeline's [P, N, N0] the plain copy N is ordinary text: it counts as the end of P here.
    """
    length = positive + n + image
    p, n0, i = slice(0, positive), slice(positive, positive + n), slice(positive + n, length)
    n1 = slice(length, length + n)
    alpha = torch.as_tensor(expect.alpha, dtype=torch.float64, device=v.device).expand(n)
    v = v.flatten(2)
    k = torch.cat([k, k[:, n0]], dim=1)
    v = torch.cat([v.double(), -alpha[:, None] * v[:, n0].double()], dim=1)
    allowed = torch.zeros(length, length + n, dtype=torch.bool)
    allowed[i, i] = allowed[i, p] = allowed[i, n1] = True
    allowed[p, i] = allowed[p, p] = True
    allowed[n0, i] = allowed[n0, n0] = True
    bias = torch.zeros(length, length + n, dtype=torch.float64)
    bias[i, n1] -= expect.beta
    if expect.keep is not None:
        bias[i, n1] += expect.keep.double().log()
    if expect.blocks is not None and block not in expect.blocks:
        allowed[i, n1] = False
    return dense(q, k, v, heads, allowed, bias).to(q.dtype)


@contextlib.contextmanager
def sd3_attention(image, positive, n, expect, record):
    """While open, SD3's attention on [text, image] is Listing 1; on the image alone (Medium) it is untouched."""
    original = mmdit.optimized_attention
    joint = {"block": 0}

    def attention(q, k, v, heads, **kwargs):
        if q.shape[1] == image:
            record.passed += 1
            return original(q, k, v, heads=heads, **kwargs)
        assert q.shape[1] == positive + n + image
        record.joint += 1
        joint["block"] += 1
        return listing_1(q, k, v, heads, image, positive, n, expect, joint["block"] - 1)

    mmdit.optimized_attention = attention
    try:
        yield
    finally:
        mmdit.optimized_attention = original


def oracle_model(model, expects, released=False):
    """A clone of ``model`` (stock) on which every entry with an ``Expect`` runs as the oracle says; and its record."""
    record = Record()

    def run(apply_model, params):
        chunks = len(params["cond_or_uncond"])
        record.forwards.append(chunks)
        pieces = []
        for j in range(chunks):
            c = {k: _chunk(v, chunks, j) for k, v in params["c"].items()}
            x, t = params["input"].chunk(chunks)[j], params["timestep"].chunk(chunks)[j]
            expect = next(
                (e for e in expects if torch.equal(e.positive.to(c["c_crossattn"]), c["c_crossattn"][:1])), None
            )
            if expect is None:
                pieces.append(apply_model(x, t, **c))
                continue
            n = expect.negative.expand(x.shape[0], -1, -1).to(c["c_crossattn"])
            image = ((x.shape[-2] + 1) // 2) * ((x.shape[-1] + 1) // 2)
            positive = c["c_crossattn"].shape[1] + (n.shape[1] if released else 0)
            c["c_crossattn"] = torch.cat([c["c_crossattn"], *([n] if released else []), n], dim=1)
            with sd3_attention(image, positive, n.shape[1], expect, record):
                pieces.append(apply_model(x, t, **c))
        return torch.cat(pieces)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(run)
    return clone, record


def _chunk(value, chunks, j):
    if isinstance(value, torch.Tensor):
        return value.chunk(chunks)[j]
    if isinstance(value, dict) and "output" in value:  # a ControlNet's residuals
        return {k: [None if t is None else t.chunk(chunks)[j] for t in ts] for k, ts in value.items()}
    return value
