"""How a family's file declares its text encoders; and the five ways to tell a negative's own tokens from the rest of
what an encoder makes of it, each a kind of ``Segment``."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..vsf_core import content_length

Chunks = list[list[tuple]]
"""What ComfyUI makes of a text before it is encoded: lists of (token, weight). A token is a number or an embedding."""
Tokens = dict[str, Chunks]
_MOST_BYTES = 8
"""More tokens than any letter is made of."""


@dataclass(frozen=True)
class Own:
    """The positions of an encoder's output: how many there are, how many of them come before the padding, and which
    are the negative's own."""

    length: int
    content: int
    kept: Sequence[int]


@dataclass(frozen=True)
class Segment:
    """A stretch of an encoder's output. ``keys``: of ComfyUI's token dict; several (CLIP-L, CLIP-G) share the same
    positions. What is here is so in most encoders."""

    name: str
    keys: tuple[str, ...]

    exact_class = False
    """Whether an encoder of a class that derives from the declared one is another."""

    filled_up = False
    """Whether the model itself fills a prompt up, in a way of its own."""

    def present(self, clip: Any) -> dict[str, Any]:
        """Key -> tokenizer, of the encoders that are loaded."""
        return {key: named(clip.tokenizer, key) for key in self.keys if named(clip.cond_stage_model, key) is not None}

    def own(self, clip: Any, tokens: Tokens, empty: Tokens) -> Own:
        """What the output for ``tokens`` will be. ``empty``: the tokens of a text without words."""
        found = [self.own_of(tokens[key], tokenizer, empty[key]) for key, tokenizer in self.present(clip).items()]
        length = min(own.length for own in found)  # as SD3 cuts CLIP-L and CLIP-G to the shorter one
        kept = {position for own in found for position in own.kept if position < length}
        return Own(length, min(length, max(own.content for own in found)), sorted(kept))

    def sent(self, chunks: Chunks, tokenizer: Any) -> Chunks:
        """What the encoder is given of a text's ``chunks``."""
        return chunks

    def own_of(self, chunks: Chunks, tokenizer: Any, empty: Chunks) -> Own:
        ids = ids_of(chunks)
        content = _content(ids, tokenizer)
        return Own(len(ids), content, range(content))

    def returned(self, embedding: Tensor, own: Own, extra: dict) -> tuple[Tensor, Own]:
        """The ``embedding`` [1, L, C] that came, with ``own`` as it is there: encoders may leave something out, or add
        something. ``extra``: what else the encoder said of the text."""
        return embedding, own

    def words(self, chunks: Chunks, tokenizer: Any, empty: Chunks) -> list[str]:
        """The tokens as text for people, without start, end and padding."""
        special = (tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token)
        return _spoken([t for t in ids_of(chunks) if not isinstance(t, int) or t not in special], tokenizer)


class CutAfterEnd(Segment):
    """CLIP and other causal encoders: no embedding depends on what comes later. The text is encoded with its padding,
    and the embeddings are cut after the end token."""


class Trimmed(Segment):
    """T5 is bidirectional: every embedding depends on the padding, too. So the padding is cut off before the text is
    encoded."""

    def sent(self, chunks: Chunks, tokenizer: Any) -> Chunks:
        *full, last = chunks
        return [*full, last[: _content(ids_of([last]), tokenizer)]]


class Asked(Trimmed):
    """Tokens that no encoder reads: the model itself asks its text with them, and sees one embedding for each."""

    filled_up = True

    def present(self, clip: Any) -> dict[str, Any]:
        return {key: named(clip.tokenizer, key) for key in self.keys}


class WordsOnly(Segment):
    """CLIP where it is all the text there is. Its start token takes the attention that nothing else gets, so to flip it
    would push away more than the words: start and end tokens are not kept."""

    def own_of(self, chunks: Chunks, tokenizer: Any, empty: Chunks) -> Own:
        special, kept, before = (tokenizer.start_token, tokenizer.end_token), [], 0
        for ids in (ids_of([chunk]) for chunk in chunks):
            content = ids[: content_length(ids, tokenizer.pad_token, tokenizer.end_token)]
            kept += [before + i for i, t in enumerate(content) if not isinstance(t, int) or t not in special]
            before += len(ids)
        return replace(super().own_of(chunks, tokenizer, empty), kept=kept)


class InTemplate(Segment):
    """Language models, around whose prompts ComfyUI puts a fixed template: system text, turns of a chat. The whole is
    encoded, and only the words' embeddings are kept. The output may lack some of the template's beginning."""

    exact_class = True  # many derive from Qwen-Image's, each with a template of its own

    def own_of(self, chunks: Chunks, tokenizer: Any, empty: Chunks) -> Own:
        length = len(ids_of(chunks))
        return Own(length, length, range(length)[self._between(chunks, tokenizer, empty)])

    def returned(self, embedding: Tensor, own: Own, extra: dict) -> tuple[Tensor, Own]:
        left_out = own.length - embedding.shape[1]
        if 0 <= left_out <= min(own.kept, default=left_out):
            own = Own(own.length - left_out, own.content, [position - left_out for position in own.kept])
        return embedding, own

    def words(self, chunks: Chunks, tokenizer: Any, empty: Chunks) -> list[str]:
        return _spoken(ids_of(chunks)[self._between(chunks, tokenizer, empty)], tokenizer)

    def own_tokens(self, chunks: Chunks, tokenizer: Any, empty: Chunks) -> list[tuple]:
        """(token, weight) of the words alone."""
        return _pairs(chunks)[self._between(chunks, tokenizer, empty)]

    def joined(self, parts: Iterable[list[tuple]], frame: Chunks, tokenizer: Any, empty: Chunks) -> Chunks:
        """``parts`` in the template, in place of the words of ``frame``, some other text's tokens: ComfyUI would tear
        the template at an embedding. The padding at the end shrinks."""
        pairs, between = _pairs(frame), self._between(frame, tokenizer, empty)
        padding = len(pairs) - content_length(ids_of(frame), tokenizer.pad_token, -1)
        out = [*pairs[: between.start], *itertools.chain(*parts), *pairs[between.stop : len(pairs) - padding]]
        return [out + [(tokenizer.pad_token, 1.0)] * (len(pairs) - len(out))]

    def _between(self, chunks: Chunks, tokenizer: Any, empty: Chunks) -> slice:
        """Where the words are: between the beginning and the end that the template has without words, too."""
        given, bare = (ids[: content_length(ids, tokenizer.pad_token, -1)] for ids in map(ids_of, (chunks, empty)))
        start = _same(given, bare)
        return slice(start, len(given) - _same(given[start:][::-1], bare[start:][::-1]))


class BosPrefix(Segment):
    """LTX-2's Gemma: padded on the left, which the encoder leaves out. The start token (bos) stays in front until the
    connectors of the model have seen it, and is not kept after that."""

    filled_up = True

    def own_of(self, chunks: Chunks, tokenizer: Any, empty: Chunks) -> Own:
        *full, last = chunks
        padding = _same(ids_of([last]), [tokenizer.pad_token] * len(last))
        return super().own_of([*full, last[padding:]], tokenizer, empty)

    def returned(self, embedding: Tensor, own: Own, extra: dict) -> tuple[Tensor, Own]:
        if extra:
            return embedding, own
        return embedding[:, : own.length], replace(own, kept=own.kept[1:])  # seen: the model's learned tokens follow


T5 = Trimmed("T5", ("t5xxl",))
QWEN25_VL = InTemplate("Qwen2.5-VL", ("qwen25_7b",))


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of ComfyUI: its class and, in order, the segments of its output."""

    name: str
    title: str
    model_class: str
    segments: tuple[Segment, ...]
    tokenizer_class: str | None = None
    """Where several models share the class, each with a template of its own."""
    asked: Asked | None = None
    """What the model makes of the segments' output, where it does not see that itself."""

    @property
    def shown(self) -> tuple[Segment, ...]:
        """The segments whose tokens are those that the model sees."""
        return self.segments if self.asked is None else (self.asked,)

    @property
    def filled_up(self) -> bool:
        return any(segment.filled_up for segment in self.shown)

    def is_of(self, clip: Any) -> bool:
        """Whether a ComfyUI CLIP object is this encoder, with at least one of its segments loaded."""
        classes = type(clip.cond_stage_model).__mro__
        if self.segments[0].exact_class:
            classes = [c for c in classes if "<locals>" not in c.__qualname__][:1]  # ComfyUI makes one in a function
        is_it = self.model_class in {c.__name__ for c in classes}
        is_it = is_it and self.tokenizer_class in (None, type(clip.tokenizer).__name__)
        return is_it and any(segment.present(clip) for segment in self.segments)


def named(owner: Any, key: str) -> Any:
    """The part of a CLIP's tokenizer, or of its encoder, that ComfyUI keeps under ``key``; None where it has none."""
    found = getattr(owner, key, None)
    return found if found is not None else getattr(owner, f"clip_{key}", None)


def ids_of(chunks: Chunks) -> list:
    """The tokens of all chunks, one after the other, without their weights."""
    return [pair[0] for pair in _pairs(chunks)]


def _pairs(chunks: Chunks) -> list[tuple]:
    return [pair for chunk in chunks for pair in chunk]


def _spoken(ids: Sequence, tokenizer: Any) -> list[str]:
    """What tokens say: those that are a word, or a letter, only together (bytes, a word's mark) as one."""
    words: list[str] = []
    for is_word, group in itertools.groupby(ids, key=lambda token: isinstance(token, int)):
        together: list[int] = []
        for token in group:
            together.append(token)
            said = tokenizer.tokenizer.decode(together).strip() if is_word else "[embedding]"
            if said and (not said.endswith("\N{REPLACEMENT CHARACTER}") or len(together) == _MOST_BYTES):
                words.append(said)
                together = []
        if together and (said := tokenizer.tokenizer.decode(together).strip()):
            words.append(said)
    return words


def _content(ids: list, tokenizer: Any) -> int:
    """How many of the tokens come before the padding."""
    end = tokenizer.end_token if tokenizer.end_token is not None else tokenizer.pad_token
    return content_length(ids, tokenizer.pad_token, end)


def _same(a: list, b: list) -> int:
    """How many of their first tokens two lists share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if not isinstance(x, int) or x != y), min(len(a), len(b)))
