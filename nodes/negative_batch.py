"""The negatives of one prediction as tensors, on their way through ComfyUI's ``model_conds`` to the model."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import comfy.conds
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from .latent_map import LatentMap, View
from .negative import Negative, count_tokens, same_mask, spans

PREFIX = "vsf_"
"""Prefix of what a patched model finds in ``model_conds`` while VSF is active."""


@dataclass(frozen=True, eq=False)
class NegativeBatch:
    """What a forward pass gets of the negatives; b: 1 or more, n: tokens, m: masks, 1 or n.

    Of entries that share a batch all have the same fields and shapes: negatives shorter than the longest are padded
    with tokens of beta +inf, and an entry without any is all padding.
    """

    tokens: Tensor
    """[b, n, C]"""
    alpha: Tensor
    """[b, n, 1]: scale times each negative's strength."""
    beta: Tensor
    """[b, 1, n or 1]: the offset per token; one column where an entry's tokens all share it."""
    has_padding: bool
    """Whether some entry has tokens of padding."""
    view: View
    """What of the run's latent this prediction shows."""
    mask: Tensor | None = None
    """[b, m, (frames,) h, w], where a negative does not act everywhere: in latent size, cut by ComfyUI as areas are."""
    pooled: Tensor | None = None
    """[b, 1, C']: the negative's pooled embedding, NaN where an entry has none; only where the layout mixes it in."""
    once: frozenset[str] = frozenset()
    """Which of these are one row for all entries and pictures, so that any part of the batch may be run."""

    @classmethod
    def collate(
        cls,
        groups: Sequence[Sequence[Negative]],
        alphas: Sequence[float],
        offset: float,
        latent_map: LatentMap,
        view: View,
        like: Tensor,
        pooled: bool = False,
        affect_references: bool = True,
    ) -> "list[NegativeBatch]":
        """One for each of a prediction's entries, given by its negatives; on the device and in the type of ``like``.

        alphas: one for all, or one for each of the run's pictures; pooled: whether the layout mixes pooled embeddings;
        affect_references: whether frames of references and guides see the negative.
        """
        length = max(map(count_tokens, groups))
        width = next(n.tokens.shape[-1] for group in groups for n in group)
        same_beta = all(count_tokens(group) in (0, length) for group in groups)
        masked = any(_is_masked(n, latent_map, affect_references) for group in groups for n in group)
        same = same_beta and all(_act_alike(group, latent_map) for group in groups)
        made: list[dict[str, Tensor]] = []
        for group in groups:
            beta = torch.full((1, 1, length), torch.inf)
            beta[..., : count_tokens(group)] = offset
            own = {
                "alpha": _alpha(group, length, alphas, latent_map, view),
                "beta": beta[..., :1] if same_beta else beta,
            }
            if masked:  # no view of all: that would keep every token's mask in memory
                mask = _mask(group, length, latent_map, view, len(latent_map.shape), affect_references)
                own["mask"] = mask[:, :1].clone() if same else mask
            made.append(own)
        once = frozenset(name for name in made[0] if _is_one_row([own[name] for own in made]))
        made = [{name: t.to(like.device) for name, t in own.items()} for own in made]
        made = [{**own, **{name: made[0][name] for name in once}} for own in made]
        for group, own in zip(groups, made, strict=True):
            own["tokens"] = _tokens(group, length, width, latent_map, view, like)
            if pooled:
                own["pooled"] = _pooled(group, groups).to(like)[:, None]
        if all(group == groups[0] for group in groups) and made[0]["tokens"].shape[0] == 1:
            made, once = [{**own, "tokens": made[0]["tokens"]} for own in made], once | {"tokens"}
        has_padding = any(count_tokens(other) != length for other in groups)
        return [cls(**own, has_padding=has_padding, view=view, once=once) for own in made]

    def to_conds(self) -> dict[str, comfy.conds.CONDRegular]:
        """What goes into ``model_conds``: ComfyUI repeats it to the batch, and stacks that of entries run as one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        kinds = {"mask": comfy.conds.CONDNoiseShape, "has_padding": comfy.conds.CONDConstant}
        kinds["view"] = comfy.conds.CONDConstant
        kinds |= {name: _OneMask if name == "mask" else _OneRow for name in values.pop("once")}
        return {
            PREFIX + name: kinds.get(name, comfy.conds.CONDRegular)(value)
            for name, value in values.items()
            if value is not None
        }

    @classmethod
    def taken_from(cls, kwargs: dict) -> "NegativeBatch | None":
        """Takes what ``to_conds`` made, and all else of ours, out of the arguments of ``apply_model``; None if there is
        nothing."""
        ours = {key.removeprefix(PREFIX): kwargs.pop(key) for key in list(kwargs) if key.startswith(PREFIX)}
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in ours.items() if name in names}) if "tokens" in ours else None

    def check_rows(self, rows: int) -> None:
        """Raises ``RuntimeError`` where the model is called with other ``rows`` of the batch than these."""
        ours = (self.tokens, self.alpha, self.beta, self.mask, self.pooled)
        if odd := {t.shape[0] for t in ours if t is not None} - {1, rows}:
            raise RuntimeError(
                f"VSF: another node calls the model with {rows} of the {max(odd)} rows of a step, so VSF cannot tell "
                "whose negative is whose. It splits the batch, perhaps over several GPUs: remove it, or use cfg 1 and "
                "one picture at a time."
            )

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def padded(self, extra: int) -> "NegativeBatch":
        """This with ``extra`` tokens of padding at the end of N, maybe none, and a beta per token."""
        mask = self.mask
        if mask is not None:
            mask = mask.expand(-1, self.length, *(-1,) * (mask.ndim - 2))
            mask = torch.cat([mask, mask[:, -1:].expand(-1, extra, *(-1,) * (mask.ndim - 2))], dim=1)
        return replace(
            self,
            tokens=F.pad(self.tokens, (0, 0, 0, extra)),
            alpha=F.pad(self.alpha, (0, 0, 0, extra)),
            beta=F.pad(self.beta.expand(-1, -1, self.length), (0, extra), value=torch.inf),
            has_padding=True,
            mask=mask,
        )

    def padded_to_unique_length(self, positive: int, taken: set[int], multiple: int) -> "NegativeBatch":
        """This with N padded until no other attention of the model has as many keys as the text stream.

        Where a call is known by its number of keys alone, the picture's own tokens (self-attention) and CLIP-vision
        tokens must not count the same. ``taken``: how many keys those have; ``multiple``: to what the model fills its
        text up.
        """
        n = self.length
        positive += -positive % multiple  # the model goes on filling up P alone if N before it comes out even
        extra = next(e for e in itertools.count(-n % multiple, multiple) if positive + n + e not in taken)
        return self.padded(extra) if extra else self


class _OneRow(comfy.conds.CONDRegular):
    """One row, the very same for all that may share a batch."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> "_OneRow":
        return super().process_cond(1, **kwargs)

    def can_concat(self, other: Any) -> bool:
        mine, theirs = self.cond, other.cond
        return mine is theirs or (mine.data_ptr(), mine.shape) == (theirs.data_ptr(), theirs.shape)

    def concat(self, others: Any) -> Tensor:
        return self.cond


class _OneMask(_OneRow, comfy.conds.CONDNoiseShape):
    """The same of a mask, which ComfyUI cuts as it does areas."""


def _is_one_row(tensors: Sequence[Tensor]) -> bool:
    return tensors[0].shape[0] == 1 and all(torch.equal(tensors[0], t) for t in tensors[1:])


def _is_masked(n: Negative, latent_map: LatentMap, affect_references: bool) -> bool:
    """Whether a negative does not act everywhere in the latent."""
    others = latent_map.before + latent_map.after
    in_part = latent_map.is_video and n.frames != (0.0, 1.0)
    return n.mask is not None or in_part or (others > 0 and not affect_references)


def _act_alike(group: Sequence[Negative], latent_map: LatentMap) -> bool:
    return all(
        same_mask(n.mask, group[0].mask) and (n.frames == group[0].frames or not latent_map.is_video) for n in group[1:]
    )


def _tokens(
    group: Sequence[Negative], length: int, width: int, latent_map: LatentMap, view: View, like: Tensor
) -> Tensor:
    """[b, length, width]: the tokens of ``group`` one after the other, then zeros."""
    shown = [view.pictures_of(n.tokens, latent_map.batch).to(like) for n in group]
    batch = max((t.shape[0] for t in shown), default=1)
    rest = like.new_zeros(batch, length - sum(t.shape[1] for t in shown), width)
    return torch.cat([*(t.expand(batch, -1, -1) for t in shown), rest], dim=1)


def _alpha(
    group: Sequence[Negative], length: int, alphas: Sequence[float], latent_map: LatentMap, view: View
) -> Tensor:
    """[alphas, length, 1]"""
    per_picture = view.pictures_of(torch.tensor(alphas, dtype=torch.float64)[:, None, None], latent_map.batch)
    alpha = torch.zeros(per_picture.shape[0], length, 1)
    for n, span in spans(group):
        alpha[:, span] = (per_picture * n.strength).float()
    return alpha


def _mask(
    group: Sequence[Negative], length: int, latent_map: LatentMap, view: View, ndim: int, affect_references: bool
) -> Tensor:
    """[b, length, (frames,) h, w]: each token's mask; 1 where there is none."""
    made = [(latent_map.mask_of(n, view, float(affect_references)), span) for n, span in spans(group)]
    batch = max((mask.shape[0] for mask, _ in made), default=1)
    whole = torch.ones(batch, length, len(view.frames), len(view.rows), len(view.columns))
    for mask, span in made:
        whole[:, span] = mask[:, None]
    return whole if ndim == 5 else whole[:, :, 0]


def _pooled(group: Sequence[Negative], groups: Sequence[Sequence[Negative]]) -> Tensor:
    """The one negative's pooled embedding [b, C'], or NaN in its place."""
    some = next(n.pooled for other in groups for n in other if n.pooled is not None)
    return group[0].pooled if group and group[0].pooled is not None else torch.full_like(some[:1], torch.nan)
