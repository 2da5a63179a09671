"""The door for engines that spread the tokens of one picture over several devices (ring attention, Ulysses).

There, a rank holds some tokens of the sequence, in an order of the engine's. What this pack needs to know of each is
which one of the whole it is: ``TokenIndex``. With that, VSF is exact on each rank's own rows, in one of two ways:

- ``attend_gathered``: the rank has the keys and values of all tokens (Ulysses; or after an all-gather);
- ``attend_spread``: the engine's attention over the picture's keys on all ranks returns its log-sum-exp (a ring). Keys
  and values of the text are whole on every rank: they are few.

Neither communicates. Shapes: q, k, v [B, H, L, D], of as many heads as the engine gives a rank.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import NegativeTerms, merge_negative_, padding_beta
from .backends import AttentionBackend, LSEAttention
from .layout import TokenLayout, padding_mask, unless_all
from .methods import VSF, attend_cross


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """Which tokens some queries or keys are: ``places``, int [L], are their numbers in the whole sequence, whose groups
    ``layout`` names. In any order; keys may come several times, and count once.

    Raises ``ValueError`` for places that the layout has not.
    """

    layout: TokenLayout
    places: Tensor

    def __post_init__(self) -> None:
        odd = self.places[(self.places < 0) | (self.places >= self.layout.keys)]
        if self.places.ndim != 1 or len(odd):
            raise ValueError(
                f"places must be a list of numbers from 0 to {self.layout.keys - 1}, got shape "
                f"{tuple(self.places.shape)}, with {odd[:3].tolist()} outside"
            )

    def rows(self, group: str) -> Tensor:
        """int: where among these tokens those of a group are, "I", "P" or "N"."""
        spans = self.layout.spans(group, keys=True)
        inside = torch.zeros_like(self.places, dtype=torch.bool)
        for span in spans:
            inside |= (self.places >= span.start) & (self.places < span.stop)
        return inside.nonzero().flatten()

    def order(self) -> Tensor:
        """int [layout.keys]: where each token of the whole is, the first time that it comes. Raises ``ValueError`` if
        one does not."""
        order = self.places.argsort(stable=True)
        found = self.places[order]
        order = order[torch.cat([found[:1] >= 0, found[1:] != found[:-1]])]
        if len(order) != self.layout.keys:
            lacking = sorted(set(range(self.layout.keys)) - set(found.tolist()))
            raise ValueError(f"{len(lacking)} of {self.layout.keys} keys are missing, the first is {lacking[0]}")
        return order


def attend_gathered(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: TokenIndex,
    keys: TokenIndex,
    negative: NegativeTerms,
) -> Tensor:
    """VSF's joint attention for some of the queries, [B, H, Lq, D], over all keys. ``negative.beta`` is that of all
    image tokens. ``ValueError`` where a key is missing, or the two have not one layout."""
    layout, order = queries.layout, keys.order()
    if keys.layout != layout:
        raise ValueError(f"queries are of {layout} and keys of {keys.layout}")
    k, v = k[:, :, order], v[:, :, order]
    parts = {groups: (layout.take(groups, k), layout.take(groups, v)) for groups in ("PI", "NI", "N")}
    z = torch.empty_like(q)
    if len(image := queries.rows("I")):
        terms = _of_rows(negative, queries, image)
        z[:, :, image] = attend_cross(VSF(), backend, q[:, :, image], *parts["PI"], *parts["N"], terms)
    if len(positive := queries.rows("P")):
        z[:, :, positive] = backend.black_box(q[:, :, positive], *parts["PI"], None)
    if len(text := queries.rows("N")):
        z[:, :, text] = backend.black_box(q[:, :, text], *parts["NI"], _hidden(negative, layout, q))
    return z


def attend_spread(
    spread: LSEAttention,
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    queries: TokenIndex,
    negative: NegativeTerms,
) -> Tensor:
    """VSF's joint attention for a rank's queries, [B, H, Lq, D], over an engine's attention.

    spread: called once, with ``q``, this rank's image keys ``k``, ``v`` and the softmax's scale; gives the attention of
    ``q`` over those of all ranks, and its log-sum-exp. k_text, v_text: of all text tokens in the order of the whole
    sequence, the same on every rank. ``backend`` needs an attention with a log-sum-exp. ``ValueError`` without one.
    """
    layout = queries.layout
    if k_text.shape[2] != layout.positive + layout.negative:
        raise ValueError(f"{layout} has {layout.positive + layout.negative} tokens of text, got {k_text.shape[2]} keys")
    keys = {g: (_of_text(layout, g, k_text), _of_text(layout, g, v_text)) for g in ("P", "N")}
    z, lse = spread(q, k, v, backend.softmax_scale)
    hidden = padding_beta(negative.padding)
    rows = {group: queries.rows(group) for group in "IPN"}
    own = rows["N"]
    from_n = z[:, :, own]
    if len(own):
        merge_negative_(from_n, lse[:, :, own], q[:, :, own], *keys["N"], None, hidden, backend)
    if layout.positive:
        z_text, lse_text = backend.with_lse(q, *keys["P"])
        total = torch.logaddexp(lse, lse_text)
        z = (z * torch.exp(lse - total)[..., None] + z_text * torch.exp(lse_text - total)[..., None]).to(q.dtype)
        lse = total
    image = rows["I"]
    if len(image) and negative.beta is not None and layout.negative:
        terms = _of_rows(negative, queries, image)
        beta = terms.beta if hidden is None or terms.beta is None else terms.beta + hidden
        made = z[:, :, image]
        merge_negative_(made, lse[:, :, image], q[:, :, image], *keys["N"], terms.alpha, beta, backend)
        z[:, :, image] = made
    z[:, :, own] = from_n.to(z.dtype)
    return z


def _of_text(layout: TokenLayout, group: str, x: Tensor) -> Tensor:
    """The tokens of a group of the text ``x`` alone."""
    return torch.cat([x[:, :, span] for span in layout.spans(group)] or [x[:, :, :0]], dim=2)


def _of_rows(negative: NegativeTerms, queries: TokenIndex, image: Tensor) -> NegativeTerms:
    """``negative`` for those of the image's tokens that the ``image`` rows of the queries are."""
    beta = negative.beta
    if beta is None or beta.shape[1] == 1:
        return negative
    return replace(negative, beta=beta[:, queries.places[image] - queries.layout.span("I").start])


def _hidden(negative: NegativeTerms, layout: TokenLayout, like: Tensor) -> Tensor | None:
    """The mask over the keys [N, I], or [I] and N in their order, of N's own rows: its padding is hidden."""
    if negative.padding is None:
        return None
    padding = unless_all(negative.padding)
    whole = torch.zeros(padding.shape[0], layout.image + layout.cached + layout.negative, dtype=torch.bool)
    whole = whole.to(padding.device)
    whole[:, : layout.negative] = padding  # N comes before I in every layout
    return padding_mask(whole[:, None, None], like.dtype)
