"""Where N stands in the text on its way through a model.

VSF puts N in front of P, and a model's own code keeps the order of its text. Patches of other nodes need not: they may
put tokens in front, between or behind. So N is looked for wherever a patch has had the text in its hands: what went in
is kept, and what comes out is searched for N's rows. What was found where so many tokens go in and out holds for the
rest of the run, so that later passes compare nothing and never wait for a device.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recordings import lasting_copy

Known = dict[tuple, tuple[int, bool]]
"""Of a run: (stage, whether the very tensor that went in comes out, N's first token going in, tokens going in, tokens
coming out) -> N's first token coming out, and whether P still follows N as it did."""

ALIKE, ALIKE_IN_PLACE = 0.9, 0.5
"""Mean cosine from which rows whose values a patch has changed are still taken for N's: anywhere, and where N was."""


class TextStream:
    """One forward pass. ``start``: N's first token in the text as it is now; ``count``: how many tokens that has, N
    included; ``leading``: how many the model itself has put in front, ``given`` how many the model was given."""

    def __init__(self, negative: int, count: int, known: Known, device: torch.device) -> None:
        self.negative, self.given, self.known = negative, count, known
        self.moved = torch.zeros(1, dtype=torch.bool, device=device)
        """Set by a compiled graph, which cannot look for N, where N is not where it was."""
        self.strangers: Sequence[Callable] = ()
        """Patches of others that get the text in or between blocks."""
        self.copies = False
        """Whether what goes into a patch is copied: in a run's first pass, since some write into what they get."""
        self.begun = -1
        """How often the model has started in this pass, as far as wrappers around it tell."""
        self.begin()

    def begin(self) -> None:
        """The model starts, maybe once more in this pass."""
        self.begun += 1
        self.start, self.count, self.leading = 0, self.given, 0
        self.expected = self.given
        """How many tokens of text there should be in the block at work: those given, and what patches have added."""
        self.added = 0
        """Of these, how many a patch around the block has added inside it."""
        self.in_one_piece = True
        """Whether P still follows N, as it was given to the model."""
        self._held: tuple[Tensor, Tensor] | None = None
        """What went into a patch, and that or a copy of it."""
        self._entered: tuple[int, int] | None = None
        self._left: tuple[str, int] | None = None
        """Of the block before: its type, and how many tokens the stream had that came out of it, patches and all."""

    def hold(self, text: Tensor, start: int | None = None) -> None:
        """Keep ``text`` [B, tokens, C] as it goes into a patch; ``start``: where N is known to stand."""
        self._held, self.count = (text, lasting_copy(text) if self.copies else text), text.shape[1]
        if start is not None:
            self.start = start

    def follow(self, text: Tensor, stage: object, patches: Iterable[Callable | None]) -> int:
        """N's first token in ``text`` [B, tokens, C] as it comes out of ``patches`` at ``stage``.

        Raises ``RuntimeError`` that names the patches where N is gone, there twice, or cannot be told.
        """
        if self._held is None:
            return self.start
        (given, held), self._held = self._held, None
        key = stage, text is given, self.start, held.shape[1], text.shape[1]
        if text is held and key not in self.known:
            return self.start
        if torch.compiler.is_compiling():
            self._check_unmoved(held, text, patches)
        else:
            if key not in self.known:
                self.known[key] = self.found(held, text, patches)
            self.start, whole = self.known[key]
            self.in_one_piece = self.in_one_piece and whole
        if self._entered is None:
            self.expected += text.shape[1] - held.shape[1]
        self.count = text.shape[1]
        return self.start

    def enter_block(self, block: tuple[str, int], text: Tensor, tokens_before: Callable[[int, int], int]) -> int:
        """N's first token in ``text`` as it goes into a block; ``tokens_before``: see ``Family``."""
        if self._left is not None and self._left[0] == block[0]:  # else another stream, maybe with the picture
            self.expected += text.shape[1] - self._left[1]
        if self._entered is None:
            self.leading = tokens_before(text.shape[1], self.count)
            self.expected += self.leading
            self.start, self._held = self.start + self.leading, None
        elif not torch.compiler.is_compiling():
            self.follow(text, ("before", block), self.strangers)
        elif self.strangers:  # in one stream with the picture, text comes first
            self.follow(text[:, : self.count], ("before", block), self.strangers)
        self.count = text.shape[1]
        self._entered = self.start, self.count
        return self.start

    def enter_again(self, text: Tensor, given: Tensor, start: int) -> None:
        """A patch around a block runs it on ``text``: made of what the block was ``given``, where N stood at ``start``,
        or what came out when it ran before."""
        self.expected, self.added = self.expected - self.added, text.shape[1] - given.shape[1]
        self.expected += self.added
        if self._held is None or text is not self._held[0]:
            self.hold(given, start)

    def leave_patches(self, block: tuple[str, int], given: Tensor, text: Tensor | None) -> None:
        """A block and all patches around it are done: ``given`` went in, ``text`` comes out, or none."""
        count = given.shape[1] if text is None else text.shape[1]
        self.expected, self.added = self.expected - self.added + count - given.shape[1], 0
        self._left = block[0], count

    def leave_block(self, text: Tensor | None) -> None:
        """Keep the ``text`` that comes out of a block; None: the next one gets what this one got."""
        if text is not None:
            self.hold(text)
        elif self._entered is not None:
            self.start, self.count = self._entered

    def _check_unmoved(self, held: Tensor, text: Tensor, patches: Iterable[Callable | None]) -> None:
        """In a compiled graph: no look at values, so that it stays in one piece."""
        if self.count != text.shape[1]:
            raise lost("changes how many tokens the text has, under torch.compile", patches)
        span = slice(self.start, self.start + self.negative)
        self.moved |= (held[:, span] != text[:, span]).any()

    def found(self, held: Tensor, text: Tensor, patches: Iterable[Callable | None]) -> tuple[int, bool]:
        """N's first token in ``text``, which ``patches`` made of ``held``, and whether P still follows it as it did."""
        if held.shape[0] != text.shape[0] or held.shape[2] != text.shape[2]:
            raise lost("gives parts of the picture texts of their own", patches)
        if held.dtype == torch.float16 and text.shape[1] >= held.shape[1] and _is_broken(held):
            return self.start, True  # that is no patch's doing, and ends in an error of its own
        n = slice(self.start, self.start + self.negative)
        before, after = _occurrences(held[:, n], held), _occurrences(held[:, n], text)
        if not after:
            moved = _occurrences(held[:, n][:, :1], text)  # to the bit, but not with the rest behind it
            start = None if moved else _most_alike(held, n, text)
            if start is None:
                raise lost("takes the negative out of the text, takes it apart, or makes something else of it", patches)
            given = slice(self.start, self.start + self.given)
            return start, _most_alike(held, given, text) == start
        if len(after) != len(before):
            raise lost(f"leaves the negative {len(after)} times in the text, where it was {len(before)} times", patches)
        start = after[before.index(self.start)]
        given, made = held[:, self.start :][:, : self.given], text[:, start:][:, : self.given]
        return start, torch.equal(given, made)


def _is_broken(held: Tensor) -> bool:
    """Whether values went beyond fp16; where models put a number for each NaN, all rows are alike then."""
    return not torch.isfinite(held).all() or torch.equal(held, held[:, :1].expand_as(held))


def _occurrences(rows: Tensor, text: Tensor) -> list[int]:
    """Where ``rows`` [B, n, C] stand in ``text`` [B, tokens, C], in every picture of the batch."""
    n = rows.shape[1]
    firsts = (text == rows[:, :1]).all(dim=-1).all(dim=0).nonzero().flatten().tolist()
    return [i for i in firsts if i + n <= text.shape[1] and torch.equal(text[:, i : i + n], rows)]


def _most_alike(held: Tensor, n: slice, text: Tensor) -> int | None:
    """Where in ``text``, whose values a patch has changed, rows stand that are most like the rows ``n`` of ``held``;
    None if that is not sure."""
    if text.shape[1] < held[:, n].shape[1]:
        return None
    before, after = (F.normalize((x - x.mean(dim=1, keepdim=True)).float(), dim=-1) for x in (held, text))
    cosines = (before[:, n] @ after.mT).mean(dim=0)
    rows, columns = cosines.shape
    diagonals = cosines.contiguous().as_strided((columns - rows + 1, rows), (1, columns + 1))
    scores = diagonals.mean(dim=1)
    best = int(scores.argmax())
    if held.shape == text.shape and best == n.start and scores[best] > ALIKE_IN_PLACE:
        return best
    second = scores[torch.arange(len(scores), device=scores.device) != best].max() if len(scores) > 1 else -1.0
    return best if scores[best] > ALIKE > second else None


def lost(what: str, patches: Iterable[Callable | None]) -> RuntimeError:
    """The error for ``patches`` that do ``what``."""
    names = ", ".join(dict.fromkeys(_name(patch) for patch in patches if patch is not None)) or "another node"
    return RuntimeError(
        f"VSF: a patch of another node ({names}) {what}. So VSF cannot tell where the negative is, and would push away "
        "something else. Remove that node, or VSF Model Patch."
    )


def _name(patch: Any) -> str:
    """Whose patch this is, for people: module and name of the function or class."""
    patch = getattr(patch, "func", patch)
    kind = patch if hasattr(patch, "__qualname__") else type(patch)
    return f"{kind.__module__}.{kind.__qualname__}"
