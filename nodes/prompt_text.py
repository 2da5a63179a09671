"""What a negative's text says, read as ComfyUI's own nodes read a prompt; and how much of it one tokenizer can take."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor

from .checks import shown
from .text_encoder import Chunks, InTemplate, Segment, Tokens, ids_of, named

_EMBEDDING = "embedding:"
_TEMPLATES = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>")
"""How a text begins that ComfyUI takes for a template of its own."""


@dataclass(frozen=True)
class Piece:
    """Words of one weight, or the name of an embedding."""

    text: str
    weight: float = 1.0
    is_embedding: bool = False


def pieces_of(text: str) -> list[Piece]:
    """``text`` taken apart. Raises ``ValueError`` for a weight that a negative cannot have, or a nameless embedding."""
    pieces: list[Piece] = []
    try:
        weighted = token_weights(escape_important(text), 1.0)
    except RecursionError as error:
        raise ValueError("VSF: the text's parentheses are nested too deep. Please change the text.") from error
    for words, weight in weighted:
        for part in filter(None, re.split(rf"(?:^|(?<=\s))(?={_EMBEDDING})", unescape_important(words))):
            name = re.match(rf"{_EMBEDDING}\s*,*([^\s<\[]*[^\s<\[,])?", part)
            if name is not None:
                pieces.append(Piece(name[1] or "", weight, is_embedding=True))
            if rest := part[name.end() if name else 0 :]:
                pieces.append(Piece(rest, weight))
    for piece in pieces:
        _check(piece)
    return pieces


def _check(piece: Piece) -> None:
    if piece.is_embedding and not piece.text:
        raise ValueError('VSF: "embedding:" in the text has no name behind it. Name one, or delete it.')
    if piece.text.strip() and not 0 < piece.weight < float("inf"):
        why = (
            "which would draw it instead"
            if piece.weight < 0
            else "which is not off"
            if piece.weight == 0
            else "no number"
        )
        raise ValueError(
            f'VSF: the text gives "{shown(piece.text.strip())}" the weight {piece.weight:g}, {why}. A negative takes '
            "weights above 0. Delete these words, or give them no weight; strength says how hard to push."
        )


def without_embeddings(text: str, pieces: Sequence[Piece]) -> str:
    """``text``, of which ``pieces`` are the parts, with its words alone."""
    words = [piece for piece in pieces if not piece.is_embedding]
    return text if words == list(pieces) else _written(words, weighted=True)


def _written(pieces: Iterable[Piece], weighted: bool) -> str:
    """``pieces`` as one text again. weighted: for a tokenizer that parses weights."""
    return "".join(_with_weight(piece) if weighted and piece.weight != 1 else _bare(piece) for piece in pieces)


def _with_weight(piece: Piece) -> str:
    return f"({_bare(piece).strip() if piece.is_embedding else _bare(piece)}:{piece.weight!r})"


def _bare(piece: Piece) -> str:
    text = re.sub(r"[()]", r"\\\g<0>", piece.text)
    return f" {_EMBEDDING}{text} " if piece.is_embedding else text


@dataclass(frozen=True)
class Reading:
    """What one tokenizer reads of a text: tokens, remarks on what it leaves out, and on what it reads otherwise."""

    chunks: Chunks
    left_out: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Reader:
    """One of the tokenizers of a ComfyUI CLIP object. ``name``: for people; ``embeds``: whether it may be given
    embeddings."""

    clip: Any
    key: str
    tokenizer: Any
    name: str
    embeds: bool

    @classmethod
    def all_of(cls, clip: Any, segment: Segment, embeds: bool) -> Iterator["Reader"]:
        """Those of ``segment``."""
        loaded = segment.present(clip)
        for key, tokenizer in loaded.items():
            name = f"{segment.name}-{key.upper()}" if len(loaded) > 1 else segment.name
            yield cls(clip, key, tokenizer, name, embeds)

    def read(self, text: str, pieces: Sequence[Piece], segment: Segment, empty: Chunks) -> "Reading":
        """What is read of ``text``, of which ``pieces`` are the parts. Of a text that the tokenizer takes as it is
        written, the tokens are ComfyUI's own. ``empty``: the tokens of no text."""
        if isinstance(segment, InTemplate) and text.startswith(_TEMPLATES):
            raise _mark_in_text(next(mark for mark in _TEMPLATES if text.startswith(mark)))
        usable, left_out = self._usable(pieces)
        strips_weights = self._strips_weights(text, pieces)
        if any(piece.is_embedding for piece in usable) and isinstance(segment, InTemplate):
            parts = [self._part(group, segment, empty) for group in _runs(usable)]
            chunks = segment.joined(parts, self.tokens("a"), self.tokenizer, empty)
        else:
            ends_oddly = re.search(rf"{_EMBEDDING}\S*[<\[]", text)  # older ComfyUIs take this for a part of the name
            as_written = usable == list(pieces) and not strips_weights and not ends_oddly
            chunks = self.tokens(text if as_written else _written(usable, self.parses_weights))
        if isinstance(segment, InTemplate):
            self._check_marks(segment.own_tokens(chunks, self.tokenizer, empty))
        notes = [f"{self.name} has no weights: words count without theirs."] * strips_weights
        return Reading(chunks, left_out, notes + self._loss())

    def tokens(self, text: str) -> Chunks:
        return tokenized(self.clip, text)[self.key]

    @cached_property
    def parses_weights(self) -> bool:
        """Whether parentheses are weights to it, and no words."""
        return ids_of(self.tokens("(a:1.5)")) == ids_of(self.tokens("a"))

    def _strips_weights(self, text: str, pieces: Sequence[Piece]) -> bool:
        """Whether ``text`` has parentheses that are no words, which the tokenizer would take for some."""
        read = "".join(piece.text for piece in pieces)
        return not self.parses_weights and read.count("(") < unescape_important(escape_important(text)).count("(")

    @cached_property
    def width(self) -> int:
        """Channels of the embeddings that its encoder takes."""
        return named(self.clip.cond_stage_model, self.key).transformer.get_input_embeddings().weight.shape[-1]

    @cached_property
    def _is_broken(self) -> bool:
        """Whether it loses the blanks between words."""
        return self._ids("red roof") == self._ids("redroof")

    def _loss(self) -> list[str]:
        """What the tokenizer does to any text."""
        if not self._is_broken:
            return []
        installed = f"transformers {version('transformers')}"
        return [
            f"{self.name} runs words together, in the positive prompt too, since {installed} reads its vocabulary "
            "wrongly: install a transformers below 5."
        ]

    def _check_marks(self, own: Iterable[tuple]) -> None:
        inner, ids = self.tokenizer.tokenizer, {token for token, *_ in own if isinstance(token, int)}
        if hasattr(inner, "get_added_vocab"):
            marks = [mark for mark, token in inner.get_added_vocab().items() if token in ids]
        else:  # ComfyUI's own, from 0.31 on, leaves them out of what it writes
            found = [inner.decode([token], skip_special_tokens=False) for token in ids if not inner.decode([token])]
            marks = [mark for mark in found if mark]
        if marks:
            raise _mark_in_text(marks[0])

    def _usable(self, pieces: Sequence[Piece]) -> tuple[list[Piece], list[str]]:
        usable, said, unknown = [], [], []
        for piece in pieces:
            if piece.is_embedding:
                reason = self._why_not(piece.text)
                said += [reason] if reason else []
                usable += [] if reason else [piece]
            else:
                suspects = [] if self._knows(piece.text) and not self._is_broken else _letters(piece.text)
                strange = {letter: self._nearest(letter) for letter in suspects if not self._knows(letter)}
                unknown += [
                    letter for letter, read in strange.items() if read != _seen(letter) and letter not in unknown
                ]
                usable.append(replace(piece, text=_replaced(piece.text, strange)))
        if unknown:
            said.append(f"{self.name} does not know {shown(' '.join(unknown))}.")
        return usable, said

    def _why_not(self, name: str) -> str | None:
        """Why the embedding of that name cannot be taken."""
        if not self.embeds or self._is_broken or getattr(self.tokenizer, "embedding_directory", None) is None:
            return f"{self.name} takes no embeddings: embedding:{shown(name)} is left out."
        try:
            rows = self._embedding(name)
        except Exception as error:  # a file of another kind says so in many ways
            return f"embedding:{shown(name)} cannot be read and is left out ({type(error).__name__}: {shown(error)})."
        if not rows:
            return f"There is no embedding {shown(name)}."
        if rows[0].ndim != 1:
            return f"embedding:{shown(name)} is no table of tokens and is left out."
        if rows[0].shape[-1] != self.width:
            needs = f"{self.name} takes embeddings that are {self.width} wide"
            return f"{needs}: embedding:{shown(name)} is {rows[0].shape[-1]} wide and left out."
        return None

    def _embedding(self, name: str) -> list[Tensor]:
        tokens = self.tokenizer.tokenize_with_weights(_bare(Piece(name, is_embedding=True)).strip())
        return [token for token in ids_of(tokens) if isinstance(token, Tensor)]

    def _knows(self, letter: str) -> bool:
        ids = self._ids(letter)
        return self._unknown not in ids and bool(ids or not _seen(letter))

    def _nearest(self, letter: str) -> str:
        """What is read in place of a letter that it does not know: the same without what cannot be seen, or without
        the accent, or a blank."""
        nearer = (_seen(letter), unicodedata.normalize("NFD", letter)[0])
        return next((other for other in nearer if other != letter and self._knows(other)), " ")

    @cached_property
    def _unknown(self) -> int | None:
        """The token that stands for whatever the tokenizer does not know."""
        inner = self.tokenizer.tokenizer
        pieces = getattr(inner, "tokenizer", inner)  # ComfyUI's wrapper around sentencepiece
        return pieces.unk_id() if hasattr(pieces, "unk_id") else getattr(inner, "unk_token_id", None)

    def _ids(self, text: str) -> list[int]:
        """The tokens of ``text`` alone, without what marks start and end."""
        special = {self.tokenizer.start_token, self.tokenizer.end_token}
        return [token for token in self.tokenizer.tokenizer(text)["input_ids"] if token not in special]

    def _part(self, group: list[Piece], segment: InTemplate, empty: Chunks) -> list[tuple]:
        """(token, weight) of an embedding, or of words without their template."""
        if group[0].is_embedding:
            weight = group[0].weight if self.parses_weights else 1.0
            return [(row, weight) for row in self._embedding(group[0].text)]
        return segment.own_tokens(self.tokens(_written(group, self.parses_weights)), self.tokenizer, empty)


def tokenized(clip: Any, text: str) -> Tokens:
    """``clip.tokenize``, with an error that people understand."""
    try:
        return clip.tokenize(text)
    except Exception as error:  # tokenizers, and files of embeddings, say it in many ways
        raise ValueError(f"VSF: the text encoder cannot read the text: {shown(error)}. Please change it.") from error


def _mark_in_text(mark: str) -> ValueError:
    return ValueError(f"VSF: the text has {mark}, a mark of a text encoder's template. Please delete it.")


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Each embedding by itself, and the words between them together."""
    for is_embedding, group in itertools.groupby(pieces, key=lambda piece: piece.is_embedding):
        run = list(group)
        yield from ([piece] for piece in run) if is_embedding else [run]


def _letters(text: str) -> list[str]:
    """The letters of ``text``, each once, with the accents and marks that belong to them."""
    letters: list[str] = []
    for letter in text:
        joins = unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf") or "\U0001f3fb" <= letter <= "\U0001f3ff"
        if letters and (joins or letters[-1].endswith("\u200d")):
            letters[-1] += letter
        else:
            letters.append(letter)
    return [letter for letter in dict.fromkeys(letters) if not letter[0].isspace()]


def _seen(letter: str) -> str:
    """``letter`` without marks that cannot be seen: of control, of direction, of an emoji's style."""
    return re.sub("[\ufe00-\ufe0f]", "", "".join(c for c in letter if unicodedata.category(c) not in ("Cc", "Cf")))


def _replaced(text: str, letters: Mapping[str, str]) -> str:
    """``text`` with others in place of the ``letters``."""
    longest_first = sorted(letters, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda m: letters[m[0]], text) if letters else text
