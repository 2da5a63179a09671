"""Encode a negative prompt without its padding (the paper's Appendix C), by any text encoder that a family declares.
How the padding is found depends on the encoder: see ``text_encoder.py``; what of a text an encoder can read:
``prompt_text.py``."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..vsf_core import extrapolate, null_embedding
from .families import FAMILIES
from .prompt_text import Reader, pieces_of, tokenized, without_embeddings
from .text_encoder import InTemplate, Own, Segment, TextEncoder, Tokens

ENCODERS = tuple({encoder.name: encoder for family in FAMILIES for encoder in family.text_encoders}.values())

Parts = dict[str, tuple[Tensor, Own]]
"""Segment's name -> its embedding [1, L, C], and which of these positions are the negative's own."""


@dataclass(frozen=True)
class ReadText:
    """What a CLIP's tokenizers read of a text. padded: ComfyUI's tokens; tokens: those without the padding that would
    change the others' embeddings; words: what they say to people, by segment; left_out: remarks on what they could not
    read; notes: on what they read otherwise than it is written."""

    padded: Tokens
    tokens: Tokens
    words: dict[str, list[str]]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        return self.left_out + self.notes


@dataclass(frozen=True)
class EncodedPrompt:
    """``tokens`` [1, n, C] without padding; ``padded`` [1, m, C], encoded as a prompt is, None where the model itself
    fills a prompt up; ``pooled`` [1, C']; ``during``: from and to which part of the sampling
    (0..1) it counts, None = all of it; ``extra``: see ``extra_of``."""

    tokens: Tensor
    padded: Tensor | None
    pooled: Tensor | None
    encoder: str
    during: tuple[float, float] | None
    extra: dict[str, Any]

    @property
    def count(self) -> int:
        """How many tokens the model will see."""
        ids, start = self.extra.get("t5xxl_ids"), self.extra.get("unprocessed_ltxav_embeds", False)
        return self.tokens.shape[1] - start if ids is None else len(ids)


def encode_negative(clip: Any, text: str, extrapolation: float = 0.0) -> tuple[list[EncodedPrompt], ReadText]:
    """Encode ``text`` with a ComfyUI CLIP object, keep its own tokens only, apply Eq. 10 where ``extrapolation`` != 0.

    The list has one result; where hooks schedule the encoder (SetClipHooks), one for each of its keyframes; none where
    nothing can be seen in the text. Weights like ``(word:1.3)`` and ``embedding:name`` work where the encoder has them.
    Raises ``ValueError`` for an encoder that is not in ``ENCODERS``, and for a text of which it can read nothing.
    """
    encoder, empty = _encoder_of(clip), clip.tokenize("")
    read = _read(clip, encoder, text.strip(), empty)
    if not any(read.words.values()):
        if read.left_out:
            raise ValueError(f"VSF: nothing is left of the text. {' '.join(read.remarks)} Say it in other words.")
        return [], read
    encodings = _encodings(clip, encoder, read.tokens, empty)
    padded = encodings if _sizes(read.padded) == _sizes(read.tokens) else _encodings(clip, encoder, read.padded, empty)
    nulls = _null_embeddings(clip, encoder, empty) if extrapolation else [{}] * len(encodings)
    out = []
    for (parts, options), (prompt, said), null in zip(encodings, padded, nulls, strict=True):
        own = {name: embedding[:, own.kept] for name, (embedding, own) in parts.items() if read.words.get(name, True)}
        whole = {name: embedding for name, (embedding, _) in prompt.items()}
        pooled, during, extra = options.get("pooled_output"), scheduled_part(options), extra_of(options)
        out.append(
            EncodedPrompt(
                _joined(own, null, extrapolation),
                None if encoder.filled_up else unmasked(_joined(whole, null, extrapolation), said),
                pooled,
                encoder.name,
                during,
                extra,
            )
        )
    return out, read


def _sizes(tokens: Tokens) -> list[int]:
    return [len(chunk) for chunks in tokens.values() for chunk in chunks]


def _joined(parts: dict[str, Tensor], nulls: dict[str, Tensor], extrapolation: float) -> Tensor:
    """The segments' embeddings one after the other, moved away from their null embeddings."""
    if extrapolation:
        parts = {name: extrapolate(part, nulls[name], extrapolation) for name, part in parts.items()}
    return torch.cat([*parts.values()], dim=1)


def unmasked(tokens: Tensor, options: dict) -> Tensor:
    """An embedding [b, n, C] without what its attention mask hides, if it has one."""
    keep = options.get("attention_mask")
    if not isinstance(keep, Tensor) or not keep.ndim or keep.shape[-1] != tokens.shape[1]:
        return tokens
    return tokens[:, keep.reshape(-1, keep.shape[-1]).bool().any(dim=0)]


def _read(clip: Any, encoder: TextEncoder, text: str, empty: Tokens) -> ReadText:
    pieces, words, left_out, notes = pieces_of(text), {}, {}, {}
    padded = tokenized(clip, without_embeddings(text, pieces))  # with keys, too, that only some texts have
    tokens = dict(padded)
    for segment, embeds in _segments(encoder, empty):
        said = {}
        for reader in Reader.all_of(clip, segment, embeds):
            read = reader.read(text, pieces, segment, empty[reader.key])
            said[reader.name] = segment.words(read.chunks, reader.tokenizer, empty[reader.key])
            padded[reader.key], tokens[reader.key] = read.chunks, segment.sent(read.chunks, reader.tokenizer)
            if segment in encoder.shown:
                left_out |= dict.fromkeys(read.left_out)
                notes |= dict.fromkeys(read.notes)
        if segment in encoder.shown:
            alike = len({*map(tuple, said.values())}) == 1  # CLIP-L's and CLIP-G's, but for embeddings
            words |= {segment.name: next(iter(said.values()))} if alike else said
    return ReadText(padded, tokens, words, tuple(left_out), tuple(notes))


def _segments(encoder: TextEncoder, empty: Tokens) -> Iterator[tuple[Segment, bool]]:
    """All that is encoded, those of which only the pooled output is used last; and whether it may have embeddings."""
    known = dict.fromkeys((*encoder.segments, *encoder.shown))
    yield from ((segment, encoder.asked is None) for segment in known)
    whole = not any(isinstance(segment, InTemplate) for segment in known)  # ComfyUI's HunyuanVideo fails with them
    others = empty.keys() - {key for segment in known for key in segment.keys}
    yield from ((Segment(key, (key,)), whole) for key in sorted(others))


def _encoder_of(clip: Any) -> TextEncoder:
    for encoder in ENCODERS:
        if encoder.is_of(clip):
            return encoder
    supported = "; ".join(e.title for e in ENCODERS)
    raise ValueError(
        f"VSF: cannot encode a negative with the text encoder {type(clip.cond_stage_model).__name__}. "
        f"Supported: {supported}. Connect the CLIP that also encodes the positive prompt."
    )


def _encodings(clip: Any, encoder: TextEncoder, tokens: Tokens, empty: Tokens) -> list[tuple[Parts, dict]]:
    """Encode ``tokens``, once for each keyframe of a scheduled encoder: what came, and its options."""
    expected = {segment: segment.own(clip, tokens, empty) for segment in encoder.segments if segment.present(clip)}
    ends, out = list(accumulate(own.length for own in expected.values())), []
    for embedding, options in clip.encode_from_tokens_scheduled(tokens, show_pbar=False):
        extra, parts = extra_of(options), {}
        for piece, (segment, own) in zip(embedding.tensor_split(ends[:-1], dim=1), expected.items(), strict=True):
            parts[segment.name] = segment.returned(piece, own, extra)
        if any(piece.shape[1] != own.length for piece, own in parts.values()):
            if any("negpip" in str(option) for option in clip.patcher.model_options):
                raise ValueError(
                    "VSF: this clip comes from a NegPip node, which encodes every token twice. Connect the CLIP from "
                    "before that node, and write what you do not want into text."
                )
            raise RuntimeError(
                f"VSF: {encoder.model_class} returned {embedding.shape[1]} positions where {ends[-1]} were "
                "expected; this ComfyUI encodes text in a way that this version of ComfyUI-VSF does not know. Please "
                "report it."
            )
        out.append((parts, options))
    return out


def extra_of(options: dict) -> dict[str, Any]:
    """What a CONDITIONING entry's dict says of its text that the model will need to read it (Anima, LTX-2)."""
    keys = ("t5xxl_ids", "t5xxl_weights", "unprocessed_ltxav_embeds")
    return {key: options[key] for key in keys if options.get(key) is not None}


def scheduled_part(options: dict) -> tuple[float, float] | None:
    """Which part of the sampling a CONDITIONING entry's dict is for, as a scheduled encoder says it."""
    return (options["clip_start_percent"], options["clip_end_percent"]) if "clip_start_percent" in options else None


def _null_embeddings(clip: Any, encoder: TextEncoder, empty: Tokens) -> list[dict[str, Tensor]]:
    """Eq. 10's null condition for each encoding and segment."""
    padded = [parts for parts, _ in _encodings(clip, encoder, empty, empty)]
    if any(own.content >= embedding.shape[1] for parts in padded for embedding, own in parts.values()):
        raise ValueError(
            "VSF: extrapolation compares with the padding of an empty prompt, which only the text encoders of "
            f"SD3, Flux.1, Wan and UNets have as the paper means it, not that of {encoder.title}. Set "
            "extrapolation to 0."
        )
    return [{name: null_embedding(e, own.content) for name, (e, own) in parts.items()} for parts in padded]
