"""Other ways to use a negative at cfg 1, and VSF's ablations, on the pack's hooks.

A rule sees one attention call over text: joint over [N, P, I] (negative text, positive text, image), or in Wan the
image's queries over [N, P]. Formulas of NAG, NASA and ONG: Normalized Attention Guidance, Negative-Aware
Self-Attention, and Orthogonal Negative Guidance as this project reads its abstract, per token and before the output
projection, for image tokens only. The negative's own stream reads the image and itself, as it would in a second pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """q, k, v [B, H, L, D] and the lengths of N and P. cross: q holds the image alone, k and v the text alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    negative: int
    positive: int
    cross: bool = False

    @property
    def n(self) -> slice:
        return slice(0, self.negative)

    @property
    def p(self) -> slice:
        return slice(self.negative, self.negative + self.positive)

    @property
    def i(self) -> slice:
        return slice(self.negative + self.positive, self.k.shape[2])

    def attend(self, query: slice, *keys: slice) -> Tensor:
        """Plain attention of one group on others, [B, H, Lq, D]."""
        k, v = (torch.cat([t[:, :, span] for span in keys], dim=2) for t in (self.k, self.v))
        return F.scaled_dot_product_attention(self.q[:, :, query], k, v)

    def with_text(self, image: Tensor) -> Tensor:
        """The image's rows with those of the text, each stream as in a pass of its own."""
        n, p, i = self.n, self.p, self.i
        text = [] if self.cross else [self.attend(n, n, i), self.attend(p, p, i)]
        return torch.cat([*text, image], dim=2)


Rule = Callable[[Call], Tensor]


def guided(combine: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """A rule that steers the image's result by what it would be with N in P's place: ``combine(Z+, Z-)``."""

    def rule(call: Call) -> Tensor:
        queries = slice(None) if call.cross else call.i
        image = combine(call.attend(queries, call.p, call.i), call.attend(queries, call.n, call.i))
        return call.with_text(image)

    return rule


def beyond(candidate: str, scale: float, offset: float, **own: float) -> Rule:
    """One of ``beyond_methods.py``'s candidates."""
    from beyond_methods import CANDIDATES, parts_of

    from vsf_core import lse_attention

    combine = CANDIDATES[candidate]

    def rule(call: Call) -> Tensor:
        attend = lse_attention(call.q.device, call.q.dtype, call.q.shape[-1])
        assert attend is not None
        q = call.q if call.cross else call.q[:, :, call.i]
        after, n, p = slice(call.negative, None), call.n, call.p
        z_pos, lse_pos = attend(q, call.k[:, :, after], call.v[:, :, after], None)
        z_neg, lse_neg = attend(q, call.k[:, :, n], call.v[:, :, n], None)
        z_text, lse_text = attend(q, call.k[:, :, p], call.v[:, :, p], None)
        parts = parts_of(z_pos, lse_pos, z_neg, lse_neg - offset, z_text, lse_text)
        return call.with_text(combine(parts, scale, **own))

    return rule


def nag(phi: float, blend: float, tau: float) -> Rule:
    """Normalized Attention Guidance with s = 1 + phi, a = ``blend``; L1 norms over all heads' channels."""

    def norm(z: Tensor) -> Tensor:
        return z.abs().sum((1, 3), keepdim=True).clamp_min(1e-6)

    def combine(z_pos: Tensor, z_neg: Tensor) -> Tensor:
        z = (1 + phi) * z_pos - phi * z_neg
        ratio = norm(z) / norm(z_pos)
        z = z * ratio.clamp_max(tau) / ratio
        return blend * z + (1 - blend) * z_pos

    return guided(combine)


def nasa(phi: float) -> Rule:
    """Z+ - phi Z-."""
    return guided(lambda z_pos, z_neg: z_pos - phi * z_neg)


def ong(scale: float, per_head: bool = False) -> Rule:
    """Z+ less ``scale`` times the part of Z- that is orthogonal to Z+: of a token's vector over all heads, or of each
    head's."""
    over = 3 if per_head else (1, 3)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(over, keepdim=True)

    def combine(z_pos: Tensor, z_neg: Tensor) -> Tensor:
        along = dot(z_neg, z_pos) / dot(z_pos, z_pos).clamp_min(1e-12)
        return z_pos - scale * (z_neg - along * z_pos)

    return guided(combine)


def vsf_without_mask(scale: float, offset: float) -> Rule:
    """VSF's duplication, but everyone attends to everyone: [N, P, I] and, as keys only, the flipped N."""

    def rule(call: Call) -> Tensor:
        k = torch.cat([call.k, call.k[:, :, call.n]], dim=2)
        v = torch.cat([call.v, -scale * call.v[:, :, call.n]], dim=2)
        mask = torch.zeros(k.shape[2], dtype=k.dtype, device=k.device)
        mask[-call.negative :] = -offset
        return F.scaled_dot_product_attention(call.q, k, v, attn_mask=mask.expand(call.q.shape[2], -1))

    return rule


def vsf_dense(scale: float, offset: float) -> Rule:
    """VSF as the paper computes it (Listing 1): duplicated keys and one dense mask, made once a run."""
    masks: dict[tuple, Tensor] = {}

    def mask_of(call: Call) -> Tensor:
        key = (call.q.shape[2], call.k.shape[2], call.negative, call.q.dtype)
        if key not in masks:
            masks.clear()
            mask = torch.zeros(call.q.shape[2], call.k.shape[2] + (not call.cross) * call.negative)
            if call.cross:
                mask[:, call.n] = -offset
            else:
                flipped = slice(call.k.shape[2], None)
                for rows, columns in ((call.i, call.n), (call.p, call.n), (call.n, call.p)):
                    mask[rows, columns] = -torch.inf
                mask[: call.i.start, flipped] = -torch.inf
                mask[call.i, flipped] = -offset
            masks[key] = mask.to(call.q)
        return masks[key]

    def rule(call: Call) -> Tensor:
        flipped = -scale * call.v[:, :, call.n]
        if call.cross:
            k, v = call.k, torch.cat([flipped, call.v[:, :, call.p]], dim=2)
        else:
            k, v = torch.cat([call.k, call.k[:, :, call.n]], dim=2), torch.cat([call.v, flipped], dim=2)
        return F.scaled_dot_product_attention(call.q, k, v, attn_mask=mask_of(call))

    return rule


def vsf_without_duplication(scale: float) -> Rule:
    """N's values flipped in place, and no mask: N and P see the flipped values too."""

    def rule(call: Call) -> Tensor:
        v = torch.cat([-scale * call.v[:, :, call.n], call.v[:, :, call.n.stop :]], dim=2)
        return F.scaled_dot_product_attention(call.q, call.k, v)

    return rule


def patched(model: Any, rule: Rule, tokens: Tensor) -> Any:
    """A clone of a ComfyUI model (SD3, Flux, Wan) that sees ``tokens`` [1, n, C] through ``rule``. For cfg 1."""
    import comfy.patcher_extension

    def apply_model(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict = {},  # noqa: B006 (ComfyUI's own signature; never written to)
        **kwargs: Any,
    ) -> Tensor:
        assert c_crossattn is not None
        if any(transformer_options.get("cond_or_uncond", ())):
            raise ValueError("this method is for cfg 1: at any other the model runs on the other negative prompt too")
        context = torch.cat([tokens.to(c_crossattn).expand(len(x), -1, -1), c_crossattn], dim=1)
        replace = transformer_options.get("patches_replace", {})
        dit = {**replace.get("dit", {}), **dict.fromkeys(_blocks(executor.class_obj.diffusion_model), run_block)}
        options = {**transformer_options, "patches_replace": {**replace, "dit": dit}}
        return executor(x, t, c_concat, context, control, options, **kwargs)

    cross = hasattr(model.model.diffusion_model, "patch_embedding")  # Wan

    def run_block(args: dict, extra: dict) -> dict:
        text = args["txt"].shape[1] if "txt" in args else args["transformer_options"]["img_slice"][0]
        image = args["img"].shape[1] - (0 if "txt" in args else text)
        length = text if cross else text + image

        def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *a: Any, **kw: Any) -> Tensor:
            split = kw.get("skip_reshape", False)
            if k.shape[2 if split else 1] != length:  # SD3.5 Medium's second attention, Wan's self-attention
                return func(q, k, v, heads, *a, **kw)
            if not split:
                q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
            call = Call(q, k, v, tokens.shape[1], text - tokens.shape[1], cross)
            return rule(call).transpose(1, 2).flatten(2)

        options = {**args["transformer_options"], "optimized_attention_override": override}
        return extra["original_block"]({**args, "transformer_options": options})

    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "baseline", apply_model)
    return clone


def _blocks(diffusion_model: Any) -> list[tuple[str, int]]:
    """The keys in ``patches_replace["dit"]`` of the model's blocks."""
    lists = {"joint_blocks": "double", "double_blocks": "double", "single_blocks": "single", "blocks": "double"}
    found = ((kind, getattr(diffusion_model, name, ())) for name, kind in lists.items())
    return [(f"{kind}_block", k) for kind, blocks in found for k in range(len(blocks))]
