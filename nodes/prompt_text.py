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
    return f" {_EMBEDDING}{piece.text} " if piece.is_embedding else re.sub(r"[()]", r"\\\g<0>", piece.text)


@dataclass(frozen=True)
class Reader:
    """One of the tokenizers of a ComfyUI CLIP object. ``name``: for people."""

    clip: Any
    key: str
    tokenizer: Any
    name: str

    @classmethod
    def all_of(cls, clip: Any, segment: Segment) -> Iterator["Reader"]:
        """Those of ``segment``."""
        loaded = segment.present(clip)
        for key, tokenizer in loaded.items():
            name = f"{segment.name}-{key.upper()}" if len(loaded) > 1 else segment.name
            yield cls(clip, key, tokenizer, name)

    def read(self, text: str, pieces: Sequence[Piece], segment: Segment, empty: Chunks) -> tuple[Chunks, list[str]]:
        """The tokens of ``text``, of which ``pieces`` are the parts, and remarks on what they leave out. Of a text that
        the tokenizer takes as it is written they are ComfyUI's own. ``empty``: the tokens of no text."""
        usable, said = self._usable(pieces)
        strips_weights = "(" in text.replace(r"\(", "") and not self.parses_weights
        if strips_weights:
            said.append(f"{self.name} has no weights: words count without theirs.")
        if any(piece.is_embedding for piece in usable) and isinstance(segment, InTemplate):
            parts = [self._part(group, segment, empty) for group in _runs(usable)]
            chunks = segment.joined(parts, self.tokens("a"), self.tokenizer, empty)
        else:
            as_written = usable == list(pieces) and not strips_weights
            chunks = self.tokens(text if as_written else _written(usable, self.parses_weights))
        if isinstance(segment, InTemplate):
            self._check_marks(segment.own_tokens(chunks, self.tokenizer, empty))
        return chunks, said + self._loss()

    def tokens(self, text: str) -> Chunks:
        return tokenized(self.clip, text)[self.key]

    @cached_property
    def parses_weights(self) -> bool:
        """Whether parentheses are weights to it, and no words."""
        return ids_of(self.tokens("(a:1.5)")) == ids_of(self.tokens("a"))

    @cached_property
    def width(self) -> int | None:
        """Channels of the embeddings that its encoder takes, None where there is no encoder."""
        encoder = named(self.clip.cond_stage_model, self.key)
        return None if encoder is None else encoder.transformer.get_input_embeddings().weight.shape[-1]

    def _loss(self) -> list[str]:
        """What the tokenizer does to any text."""
        if self._ids("red roof") != self._ids("redroof"):
            return []
        installed = f"transformers {version('transformers')}"
        return [
            f"{self.name} runs words together, in the positive prompt too, since {installed} reads its vocabulary "
            "wrongly: install a transformers below 5."
        ]

    def _check_marks(self, own: Iterable[tuple]) -> None:
        ids = {token for token, *_ in own if isinstance(token, int)}
        for mark, token in self.tokenizer.tokenizer.get_added_vocab().items():
            if token in ids:
                raise ValueError(f"VSF: the text has {mark}, a mark of the encoder's own template. Please delete it.")

    def _usable(self, pieces: Sequence[Piece]) -> tuple[list[Piece], list[str]]:
        usable, said, unknown = [], [], {}
        for piece in pieces:
            if piece.is_embedding:
                reason = self._why_not(piece.text)
                said += [reason] if reason else []
                usable += [] if reason else [piece]
            else:
                strange = {letter: self._nearest(letter) for letter in _letters(piece.text) if not self._knows(letter)}
                unknown |= strange
                usable.append(replace(piece, text=_replaced(piece.text, strange)))
        if unknown:
            said.append(f"{self.name} does not know {shown(' '.join(unknown))}.")
        return usable, said

    def _why_not(self, name: str) -> str | None:
        """Why the embedding of that name cannot be taken."""
        if self.width is None or getattr(self.tokenizer, "embedding_directory", None) is None:
            return f"{self.name} takes no embeddings: embedding:{shown(name)} is left out."
        rows = self._embedding(name)
        if not rows:
            return f"There is no embedding {shown(name)}."
        if rows[0].shape[-1] != self.width:
            needs = f"{self.name} takes embeddings that are {self.width} wide"
            return f"{needs}: embedding:{shown(name)} is {rows[0].shape[-1]} wide and left out."
        return None

    def _embedding(self, name: str) -> list[Tensor]:
        tokens = self.tokenizer.tokenize_with_weights(f"{_EMBEDDING}{name}")
        return [token for token in ids_of(tokens) if isinstance(token, Tensor)]

    def _knows(self, letter: str) -> bool:
        ids = self._ids(letter)
        return bool(ids) and self._unknown not in ids

    def _nearest(self, letter: str) -> str:
        """What is read in place of a letter that it does not know: the one without the accent, or a blank."""
        bare = unicodedata.normalize("NFD", letter)[0]
        return bare if bare != letter and self._knows(bare) else " "

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
            rows = (row for rows in self._embedding(group[0].text) for row in rows.reshape(-1, rows.shape[-1]))
            return [(row, group[0].weight) for row in rows]
        return segment.own_tokens(self.tokens(_written(group, self.parses_weights)), self.tokenizer, empty)


def tokenized(clip: Any, text: str) -> Tokens:
    """``clip.tokenize``, with an error that people understand."""
    try:
        return clip.tokenize(text)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"VSF: the text encoder cannot read the text: {shown(error)}. Please change it.") from error


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Each embedding by itself, and the words between them together."""
    for is_embedding, group in itertools.groupby(pieces, key=lambda piece: piece.is_embedding):
        run = list(group)
        yield from ([piece] for piece in run) if is_embedding else [run]


def _letters(text: str) -> list[str]:
    """The letters of ``text`` that can be seen, each once, with the accents and marks that belong to them."""
    letters: list[str] = []
    for letter in text:
        joins = unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf") or "\U0001f3fb" <= letter <= "\U0001f3ff"
        if letters and (joins or letters[-1].endswith("\u200d")):
            letters[-1] += letter
        else:
            letters.append(letter)
    return [letter for letter in dict.fromkeys(letters) if letter[0].isprintable() and not letter[0].isspace()]


def _replaced(text: str, letters: Mapping[str, str]) -> str:
    """``text`` with others in place of the ``letters``."""
    longest_first = sorted(letters, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda m: letters[m[0]], text) if letters else text
