"""What the attention needs to know of one forward pass, and of one block in it."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from threading import Lock, get_ident
from typing import Any, Protocol

import torch
from torch import Tensor

from ..vsf_core import LAYERS, Method, NegativeTerms, TokenLayout, beside_plain, layer_of
from .blocks import Block
from .compiled import bind_graph, described
from .families import Family, Released
from .host_attention import Backend
from .host_check import changed_host
from .negative_batch import NegativeBatch
from .text_stream import TextStream

FORWARD_KEY = "vsf_forward"
BLOCK_KEY = "vsf_block"
PASSING = {"run", "text", "calls", "cached_keys", "keys_before", "backend_on", "made", "placed", "network", "whole"}
PASSING |= {"parts", "by_thread", "thread", "lock"}
"""Of a ``ForwardContext``, what no graph takes for granted."""


class RunFacts(Protocol):
    """What a pass needs to know of its run (``run.Run``)."""

    family: Family
    settings: Any
    blocks: tuple[Block, ...]
    selected: frozenset[Block]
    paths: set[str]
    reported: bool

    def largest(self, device: torch.device) -> Tensor: ...

    def method(self, device: torch.device) -> Method: ...


def forward_of(options: Mapping[str, Any]) -> "ForwardContext":
    """The context of the pass with these ``transformer_options``; a graph that asks fits passes of its kind alone."""
    bind_graph()
    return options[FORWARD_KEY].value.here()


def spread(found: str) -> RuntimeError:
    """The error for an attention that has not all of a step's tokens."""
    return RuntimeError(
        f"VSF: {found}. Something spreads the picture over several GPUs (sequence parallelism, as Raylight's), or "
        "another node adds or leaves out tokens: VSF would be wrong there. Turn that off; several GPUs of which each "
        "makes pictures of its own are fine."
    )


@dataclass(eq=False)
class ForwardContext:
    """What the attention needs to know during one forward pass; travels in ``transformer_options``.

    Under torch.compile the guards on those are dropped, so whatever may change between runs and is not in ``kind`` is a
    tensor here, read from the options of the call at hand and never from a closure.
    """

    family: Family
    run: RunFacts
    tokens: int
    """Length of N."""
    text: TextStream
    alpha: Tensor
    beta: Tensor
    """[B, I or 1, n or 1]: masks and what references may see included."""
    nowhere: Tensor
    """Like ``beta``, but +inf: that of blocks which are not selected."""
    padding: Tensor | None
    released: Released | None
    """Set where the layout is that of the authors' released pipeline."""
    method: Method
    padding_as_text: Tensor | None
    """bool [B, N]: which tokens of N, where the released layout shows it as ordinary text, are padding."""
    backend: Backend
    backend_on: Callable[[torch.device], Backend]
    """That for the blocks which another node has put on another device."""
    width: int | None
    """Channels of the picture's attention over text; None where nothing else attends to it."""
    rows: Mapping[int, slice]
    """The rows of ``beta`` and ``attention_mass`` for each number of image tokens that blocks attend from."""
    own: slice
    """Those of the latent's tokens among the image's; the others are reference images'."""
    kept: Tensor | None
    """int: which of the latent's tokens these are, where the model leaves some out."""
    taken: set[int]
    """Of families whose calls are told apart by it: how many keys the attentions over anything but text have."""
    reached: Tensor
    """int [3, blocks]: how often each block ran, how often its attention over text did, and how often that was noted in
    ``attention_mass``. On the CPU: read without waiting for a device."""
    attention_mass: Tensor | None
    """[layer groups, B, image tokens]: 1 - W, summed over blocks; None without VSF Record."""
    largest: Tensor
    """``Run.largest``."""
    batch: int = 1
    """Rows of what the network was called with; 1 where that was not seen."""
    calls: int = 0
    """Attentions over text so far that no block patch enclosed."""
    cached_keys: int = 0
    """How many keys of references a patch has put behind those of the sequence, in the block at work."""
    keys_before: tuple[Tensor, Tensor, Tensor] | None = None
    """Its queries, keys and values as they went into the patches of others."""
    made: dict = field(default_factory=dict)
    """What the block before returned."""
    placed: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    """Tensors of this pass on other devices, by their id."""
    network: Any = None
    """The network, where parts of a pass can be told apart (``parts.py``): not under torch.compile."""
    whole: tuple[Tensor, ...] = ()
    """What it was called with: latent, if that was seen, and text."""
    parts: "list[ForwardContext]" = field(default_factory=list)
    """What began since: each start of the network is one."""
    by_thread: "dict[int, ForwardContext]" = field(default_factory=dict)
    """That at work in each thread."""
    thread: int = field(default_factory=get_ident)
    lock: Any = field(default_factory=Lock)

    def here(self) -> "ForwardContext":
        """This pass, or the part of it that is at work in this thread."""
        if torch.compiler.is_compiling():
            return self
        thread = get_ident()
        if not self.parts and thread == self.thread:
            return self
        part = self.by_thread.get(thread)
        if part is None:
            raise RuntimeError(
                "VSF: another node runs this model in threads of its own on copies of its network, perhaps one for "
                f"each GPU (as ParallelAnything does), and on {self.family.title} VSF cannot tell which rows of the "
                "batch are where. Remove that node, or VSF Model Patch."
            )
        return part

    def collect(self) -> None:
        """After the pass: its parts' counts are its own."""
        for part in self.parts:
            self.reached += part.reached
            self.text.leading, self.text.begun = part.text.leading, len(self.parts)

    def at(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A ``tensor`` of this pass on ``device``, where it is put once a pass."""
        if tensor.device == device:
            return tensor
        key = id(tensor), device
        if key not in self.placed:
            self.placed[key] = tensor.to(device)
        return self.placed[key]

    def method_on(self, device: torch.device) -> Method:
        """The method with its numbers on ``device``."""
        return self.method if device == self.largest.device else self.run.method(device)

    def attention_on(self, device: torch.device) -> Backend:
        """The attention for calls on ``device``."""
        return self.backend if device == self.largest.device else self.backend_on(device)

    def block(self, block: Block, seen: Tensor, note: tuple[Tensor, Tensor] | None = None) -> "BlockContext":
        """What the attention inside a block gets to know of where it is; ``seen`` counts its calls."""
        selected = block in self.run.selected
        return BlockContext(block[0], selected, self.beta if selected else self.nowhere, seen, note)

    def block_outside(self, options: Mapping[str, Any]) -> "BlockContext":
        """The same for an attention over text that no block patch encloses. Beside those that are (VACE's blocks), it
        does not count."""
        block = self.family.block_of(options, self.calls)
        if block not in self.run.blocks:
            raise changed_host(f"an attention over text runs in {block[0]} block {block[1]}, which this model lacks")
        self.calls += 1
        if self.family.block_hook == "dit":
            return self.block(block, torch.zeros_like(self.reached[1, 0]))
        position = self.run.blocks.index(block)
        return self.block(block, self.reached[1, position], self.note(position))

    def terms(self, block: "BlockContext", image: int, device: torch.device, seen: bool = True) -> NegativeTerms:
        """How ``image`` tokens on ``device`` see the negative in a block, or that they don't."""
        alpha, padding = self.at(self.alpha, device), None if self.padding is None else self.at(self.padding, device)
        if not seen:
            return NegativeTerms(alpha, None, padding)
        beta = self.at(block.beta, device)
        if beta.shape[1] > 1:
            if image not in self.rows:
                known = ", ".join(map(str, self.rows))
                raise RuntimeError(
                    f"VSF: a block of this model attends from {image} image tokens, where masks of negatives know "
                    f"{known}: another node changes the size of the picture inside the model, or leaves out or adds "
                    "some of its tokens. Remove that node, or the mask."
                )
            beta = beta[:, self.rows[image]]
        return NegativeTerms(alpha, beta, padding)

    def check_tokens(self, layout: TokenLayout, block: str) -> None:
        """Raises ``RuntimeError`` where a joint attention of a block has not all of the picture and of the text: what
        another node takes away to other GPUs comes back below this pack's attention, or not at all."""
        text, image, added = layout.positive + layout.negative, layout.image, self.text.added
        if text == self.text.expected - added:  # where text and picture are one stream, behind the text
            text, image = text + added, image - added
        if not any(image == count for count in self.rows) or text != self.text.expected:
            whole = " or ".join(map(str, sorted(self.rows)))
            raise spread(
                f"a {block} block of this model attends from {layout.image} tokens of the picture and {text} of the "
                f"text, where this step has {whole} and {self.text.expected}"
            )

    def check_rows(self, rows: int) -> None:
        """Raises ``RuntimeError`` where an attention over text is called with another batch than the pass has."""
        batch = max(self.alpha.shape[0], self.beta.shape[0], self.batch)
        if batch not in (1, rows):
            raise RuntimeError(
                f"VSF: this step has {batch} rows in its batch, but another node calls the attention over text with "
                f"{rows} of them, so VSF cannot tell whose negative that is. A node such as WanVideoNAG takes half of "
                "them for the sampler's negative: set its input_type to batch, or use cfg 1 and one picture at a time, "
                "or remove that node."
            )

    def checked(self, out: Tensor) -> Tensor:
        """``out``, an attention's. In fp16 its largest value is noted: models cut off what is infinite, to a picture
        that is finite and wrong."""
        if out.dtype == torch.float16:
            largest = self.largest if out.device == self.largest.device else self.run.largest(out.device)
            largest.copy_(torch.maximum(largest, torch.linalg.vector_norm(out, torch.inf)))
        return out

    def note(self, position: int) -> tuple[Tensor, Tensor] | None:
        """Where the block at ``position`` adds its attention mass, and counts that it did."""
        if self.attention_mass is None:
            return None
        return self.attention_mass[layer_of(position, len(self.run.blocks))], self.reached[2, position]

    def recorded(self, mass: Tensor, grid: int) -> tuple[Tensor, list[float]]:
        """After the pass: of its attention ``mass`` that of the latent's ``grid`` tokens, [layer groups, B, I], 0 where
        the model left them out; and over how many blocks it is a sum, of each layer group."""
        counts = [0.0] * len(LAYERS)
        for position, block in enumerate(self.run.blocks):
            reached, noted = self.reached[1:, position].tolist()
            if block not in self.run.selected or (self.released is not None and block[0] not in self.released.kinds):
                continue  # here the image does not see N1
            counts[layer_of(position, len(self.run.blocks))] += noted
            if noted < reached:
                raise RuntimeError(
                    f"VSF: VSF Record saw nothing of {block[0]} block {block[1]}: torch.compile took a graph that it "
                    "made without VSF Record. Remove the node that compiles the model, or VSF Record."
                )
        own = mass[:, :, self.own]
        if self.kept is None:
            return own, counts
        return own.new_zeros(*own.shape[:2], grid).index_copy_(2, self.kept, own), counts

    def real_tokens(self) -> Tensor:
        """int [B or 1]: how many of N's tokens are no padding."""
        if self.padding is None:
            return torch.full((1,), self.tokens, device=self.beta.device)
        return (~self.padding).sum(dim=1)

    def kind(self) -> str:
        """All that a graph compiled for this pass takes for granted and torch.compile does not guard: no values."""
        text, passing = self.text, PASSING
        told = self.family.block_hook == "dit" and (self.released is None or not self.released.copy)
        stream = text.negative, text.start, len(text.strangers), None if told else text.given  # else by the layout
        blocks = "".join(str(int(block in self.run.selected)) for block in self.run.blocks)
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in passing}
        return described((own, stream, blocks))


@dataclass(frozen=True, eq=False)
class BlockContext:
    """One block of a forward pass. beta: the pass's, or +inf where the block is not selected; seen: counts its calls.

    Blocks that torch.compile takes one by one share a graph: there, only the tensors differ from block to block.
    """

    kind: str
    selected: bool
    beta: Tensor
    seen: Tensor
    note: tuple[Tensor, Tensor] | None = None
    """``ForwardContext.note`` of this block."""

    def attention_mass(self, tokens: int, rows: Mapping[int, slice]) -> Tensor | None:
        """Where this block's 1 - W goes, [B, image tokens], counting that it does; None without VSF Record. rows:
        ``ForwardContext.rows``."""
        if self.note is None:
            return None
        mass, count = self.note
        if tokens not in rows:
            raise RuntimeError(
                f"VSF: VSF Record expects {mass.shape[1]} image tokens (the picture's and its references'), "
                f"but this model attends from {tokens}: another node adds or drops some. Remove that node, or VSF "
                "Record."
            )
        count.add_(1)
        return mass[:, rows[tokens]]

    def enter(self, paths: set[str], path: str) -> bool:
        """Note that the attention over text is running, and how; whether N must be attended to."""
        self.seen.add_(1)
        if torch.compiler.is_compiling():
            return True
        paths.add(path if self.selected else "not selected")
        return self.selected


def make_forward_context(
    run: RunFacts,
    batch: NegativeBatch,
    latent: Tensor,
    conds: Mapping[str, Any],
    diffusion_model: Any,
    text: TextStream,
    taken: set[int],
    kept: Tensor | None,
    backend_on: Callable[[torch.device], Backend],
    recorded: bool,
) -> ForwardContext:
    """The context of a pass on ``latent`` with ``conds``, to which ``batch`` was added; ``kept``: see
    ``Family.kept_tokens``."""
    family, settings = run.family, run.settings
    before, after = family.reference_tokens(conds, diffusion_model)
    filling, own = family.image_padding(latent, diffusion_model), family.grid(latent) if kept is None else len(kept)
    is_padding, released = torch.isinf(batch.beta.float()[:, 0]), settings.released_by(family)
    alpha, beta = batch.alpha.float(), batch.beta.float()
    if released is not None and released.plain:
        alpha, beta = beside_plain(alpha, beta)
    others = before, after, filling
    beta = _image_beta(family, beta, batch.mask, latent, kept, others, settings.affect_references)
    shape = len(LAYERS), latent.shape[0], before + own + after + filling
    return ForwardContext(
        family=family,
        run=run,
        tokens=batch.length,
        text=text,
        alpha=alpha,
        beta=beta,
        nowhere=beta if len(run.selected) == len(run.blocks) else torch.full_like(beta, torch.inf),
        padding=is_padding if is_padding.shape[1] > 1 else None,
        released=released,
        method=run.method(latent.device),
        padding_as_text=is_padding.expand(-1, batch.length) if released is not None and batch.has_padding else None,
        backend=backend_on(latent.device),
        backend_on=backend_on,
        width=family.attention_width(diffusion_model),
        rows=_rows(family.grids(latent), before + own, after, filling),
        own=slice(before, before + own),
        kept=kept,
        taken=taken,
        reached=torch.zeros(3, len(run.blocks), dtype=torch.int32),
        attention_mass=torch.zeros(shape, device=latent.device) if recorded else None,
        largest=run.largest(latent.device),
    )


def _image_beta(
    family: Family,
    beta: Tensor,
    mask: Tensor | None,
    latent: Tensor,
    kept: Tensor | None,
    others: tuple[int, int, int],
    affect_references: bool,
) -> Tensor:
    """``beta`` per token [B, 1, n or 1], plus ``mask`` and what reference images may see: [B, I or 1, n or 1].

    kept: which of the latent's tokens there are; others: tokens of references before and after those, and of padding.
    """
    shown = (affect_references, affect_references, False)
    if mask is None and all(see for count, see in zip(others, shown, strict=True) if count):
        return beta
    if mask is None:
        mask = torch.ones(1, 1, *latent.shape[2:], device=latent.device)
    inside = family.image_tokens(mask.float())
    inside = inside if kept is None else inside.index_select(1, kept)
    size = inside.shape[0], inside.shape[2]
    before, after, padding = (
        inside.new_full((size[0], count, size[1]), float(see)) for count, see in zip(others, shown, strict=True)
    )
    # -log m: a soft mask scales the negative's attention weight by m; outside (m = 0) it is +inf, exactly
    return beta - torch.log(torch.cat([before, inside, after, padding], dim=1))


def _rows(grids: list[int], own: int, after: int, filling: int) -> dict[int, slice]:
    """Where in a mask's rows are those of a call from so many image tokens: each of several grids has its own (of equal
    ones, of one pixel, either serves); of a single one, references behind the picture may have been taken out."""
    if len(grids) == 1:
        return {own: slice(0, own), own + after + filling: slice(None)}
    ends = list(itertools.accumulate(grids))
    return {n: slice(end - n, end) for n, end in zip(grids, ends, strict=True)}
