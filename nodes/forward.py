"""What the attention needs to know of a run, of one forward pass in it, and of one block of that."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..vsf_core import LAYERS, Guidance, layer_of
from .blocks import Block
from .families import Family, Released
from .host_attention import Backend
from .host_check import changed_host

FORWARD_KEY = "vsf_forward"
PLACE_KEY = "vsf_place"


@dataclass(eq=False)
class Run:
    """One sampling run: from before its first step to its end, never longer."""

    blocks: tuple[Block, ...]
    selected: frozenset[Block]
    tokens: int
    scales: tuple[float, ...]
    latent_frames: int | None
    paths: set[str] = field(default_factory=set)
    cache: dict = field(default_factory=dict)
    backends: dict[tuple[Callable | None, torch.device], Backend] = field(default_factory=dict)
    steps: int = 0
    """How often ComfyUI asked for a prediction through ``calc_cond_batch``."""
    applied: bool = False
    """Whether a negative reached ``apply_model``."""
    missed: RuntimeError | None = None
    """Why a negative did not reach the blocks, in a step that a cache may have skipped."""
    reported: bool = False


@dataclass(eq=False)
class Forward:
    """What the attention needs to know during one forward pass; travels in ``transformer_options``.

    Under torch.compile the guards on those are dropped (TorchCompileModel), so whatever may change between runs and is
    not in ``signature`` is a tensor here, read from the options of the call at hand and never from a closure.
    """

    family: Family
    run: Run
    tokens: int
    alpha: Tensor
    bias: Tensor
    nowhere: Tensor
    """Like ``bias``, but +inf: that of blocks which are not selected."""
    padding: Tensor | None
    released: Released | None
    """Set where the layout is that of the authors' released pipeline."""
    guide: Guidance | None
    """NAG or NASA; None is VSF."""
    hidden: Tensor | None
    """bool [B, N]: which tokens of N, where the released layout shows it as ordinary text, are padding."""
    backend: Backend
    text: int
    """Length of the whole text stream, N included."""
    width: int | None
    """Channels of the picture's attention over text; None where nothing else attends to it."""
    rows: Mapping[int, slice]
    """The rows of ``bias`` for each number of image tokens that blocks attend from; empty where there is but one."""
    reached: Tensor
    """int [3, blocks]: how often each block ran, how often its attention over text did, and how often that was noted in
    ``shares``. On the CPU: read without waiting for a device."""
    shares: Tensor | None
    """[layer groups, B, image tokens]: 1 - W, summed over blocks; None without VSF Record."""
    calls: int = 0
    """Attentions over text so far that no block patch enclosed."""

    def place(self, block: Block, seen: Tensor, note: tuple[Tensor, Tensor] | None = None) -> "Place":
        """What the attention inside a block gets to know of where it is; ``seen`` counts its calls."""
        selected = block in self.run.selected
        return Place(block[0], selected, self.bias if selected else self.nowhere, seen, note)

    def place_outside(self, options: Mapping[str, Any]) -> "Place":
        """The same for an attention over text that no block patch encloses. Beside those that are (VACE's blocks), it
        does not count."""
        block = self.family.block_of(options, self.calls)
        if block not in self.run.blocks:
            raise changed_host(f"an attention over text runs in {block[0]} block {block[1]}, which this model lacks")
        self.calls += 1
        if self.family.marker == "dit":
            return self.place(block, torch.zeros_like(self.reached[1, 0]))
        position = self.run.blocks.index(block)
        return self.place(block, self.reached[1, position], self.note(position))

    def bias_for(self, place: "Place", tokens: int) -> Tensor:
        """``place.bias`` for a call with so many image tokens."""
        if place.bias.shape[1] == 1:
            return place.bias
        rows = self.rows or {place.bias.shape[1]: slice(None)}
        if tokens in rows:
            return place.bias[:, rows[tokens]]
        known = ", ".join(map(str, rows))
        raise RuntimeError(
            f"VSF: a block of this model attends from {tokens} image tokens, where masks of negatives know {known}: "
            "another node changes the size of the picture inside the model, or leaves out or adds some of its tokens. "
            "Remove that node, or the mask."
        )

    def note(self, position: int) -> tuple[Tensor, Tensor] | None:
        """Where the block at ``position`` adds its share, and counts that it did."""
        if self.shares is None:
            return None
        return self.shares[layer_of(position, len(self.run.blocks))], self.reached[2, position]

    def acts_in(self, block: Block) -> bool:
        """Whether the image sees N1 in this block."""
        return block in self.run.selected and (self.released is None or block[0] in self.released.kinds)

    def real_tokens(self) -> Tensor:
        """int [B or 1]: how many of N's tokens are no padding."""
        if self.padding is None:
            return torch.full((1,), self.tokens, device=self.bias.device)
        return (~self.padding).sum(dim=1)

    def signature(self) -> str:
        """All that a graph compiled for this pass takes for granted and torch.compile does not guard: no values."""
        shapes = (self.tokens, *self.alpha.shape, *self.bias.shape)
        kinds = (self.padding is None, self.hidden is None, self.released is None, self.shares is None)
        blocks = "".join(str(int(block in self.run.selected)) for block in self.run.blocks)
        b = self.backend
        attention = (b.library, b.attend and b.attend.__name__, b.deaf is None)
        return "_".join(map(str, (*shapes, *map(int, kinds), *attention, blocks, type(self.guide).__name__)))


@dataclass(frozen=True, eq=False)
class Place:
    """One block of a forward pass. bias: the pass's, or +inf where the block is not selected; seen: counts its calls.

    Blocks that torch.compile takes one by one share a graph: there, only the tensors differ from block to block.
    """

    kind: str
    selected: bool
    bias: Tensor
    seen: Tensor
    note: tuple[Tensor, Tensor] | None = None
    """``Forward.note`` of this block."""

    def share(self, tokens: int) -> Tensor | None:
        """Where this block's 1 - W goes, [B, image tokens], counting that it does; None without VSF Record."""
        if self.note is None:
            return None
        if tokens != self.note[0].shape[1]:
            raise RuntimeError(
                f"VSF: VSF Record expects {self.note[0].shape[1]} image tokens (the picture's and its references'), "
                f"but this model attends from {tokens}: another node adds some. Remove that node or VSF Record."
            )
        self.note[1].add_(1)
        return self.note[0]

    def enter(self, run: Run, path: str) -> bool:
        """Note that the attention over text is running, and how; whether N must be attended to."""
        self.seen.add_(1)
        if torch.compiler.is_compiling():
            return True
        run.paths.add(path if self.selected else "not selected")
        return self.selected


def make_forward(
    family: Family,
    run: Run,
    ours: dict,
    latent: Tensor,
    others: tuple[int, int, int],
    *,
    text: int,
    width: int | None,
    backend: Backend,
    released: Released | None,
    guide: Guidance | None,
    affect_references: bool,
    recorded: bool,
) -> Forward:
    """The ``Forward`` of a pass on ``latent``, to which ``step_conds`` added ``ours`` (without their prefix).

    ``others``: tokens of reference images before and after the image's, and padding behind them.
    """
    bias, length = ours["bias"].float(), ours["tokens"].shape[1]
    is_padding = torch.isinf(bias[:, 0])
    image_bias = _image_bias(family, bias, ours.get("mask"), latent, others, affect_references)
    all_selected = len(run.selected) == len(run.blocks)
    shape = len(LAYERS), latent.shape[0], family.grid(latent) + sum(others)
    return Forward(
        family=family,
        run=run,
        tokens=length,
        alpha=ours["alpha"].float(),
        bias=image_bias,
        nowhere=image_bias if all_selected else torch.full_like(image_bias, torch.inf),
        padding=is_padding if is_padding.shape[1] > 1 else None,
        released=released,
        guide=guide and guide.on(latent.device),
        hidden=is_padding.expand(-1, length) if released is not None and ours["mixed"] else None,
        backend=backend,
        text=text,
        width=width,
        rows=_rows(family.grids(latent)),
        reached=torch.zeros(3, len(run.blocks), dtype=torch.int32),
        shares=torch.zeros(shape, device=latent.device) if recorded else None,
    )


def _image_bias(
    family: Family,
    bias: Tensor,
    mask: Tensor | None,
    latent: Tensor,
    others: tuple[int, int, int],
    affect_references: bool,
) -> Tensor:
    """Beta per token [B, 1, n or 1], plus masks and what reference images may see: [B, I or 1, n or 1]."""
    shown = (affect_references, affect_references, False)
    if mask is None and all(see for count, see in zip(others, shown, strict=True) if count):
        return bias
    if mask is None:
        mask = torch.ones(1, 1, *latent.shape[2:], device=latent.device)
    inside = family.image_tokens(mask.float())
    size = inside.shape[0], inside.shape[2]
    before, after, padding = (
        inside.new_full((size[0], count, size[1]), float(see)) for count, see in zip(others, shown, strict=True)
    )
    # -log m: a soft mask scales the negative's attention weight by m; outside (m = 0) it is +inf, exactly
    return bias - torch.log(torch.cat([before, inside, after, padding], dim=1))


def _rows(grids: list[int]) -> dict[int, slice]:
    """Where in a mask's rows each of several grids has its own; of equal ones (one pixel) either serves."""
    ends = list(itertools.accumulate(grids))
    return {n: slice(end - n, end) for n, end in zip(grids, ends, strict=True)} if len(grids) > 1 else {}
