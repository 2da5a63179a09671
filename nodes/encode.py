"""Encode a negative prompt without its padding (the paper's Appendix C), by any text encoder that a family declares.
How the padding is found depends on the encoder: see ``text_encoder.py``."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..vsf_core import extrapolate, null_embedding
from .checks import shown
from .families import FAMILIES
from .text_encoder import Own, TextEncoder, Tokens

ENCODERS = tuple({encoder.name: encoder for family in FAMILIES for encoder in family.text_encoders}.values())

Parts = dict[str, tuple[Tensor, Own]]
"""Segment's name -> its embedding [1, L, C], and which of these positions are the negative's own."""


@dataclass(frozen=True)
class EncodedPrompt:
    """``tokens`` [1, n, C] without padding; ``pooled`` [1, C']; ``words``: what each segment's tokens say to people;
    ``during``: from and to which part of the sampling (0..1) it counts, None = all of it;
    ``extra``: see ``extra_of``."""

    tokens: Tensor
    pooled: Tensor | None
    encoder: str
    words: dict[str, list[str]]
    during: tuple[float, float] | None
    extra: dict[str, Any]

    @property
    def count(self) -> int:
        """How many tokens the model will see."""
        ids, start = self.extra.get("t5xxl_ids"), self.extra.get("unprocessed_ltxav_embeds", False)
        return self.tokens.shape[1] - start if ids is None else len(ids)


def encode_negative(clip: Any, text: str, extrapolation: float = 0.0) -> list[EncodedPrompt]:
    """Encode ``text`` with a ComfyUI CLIP object, keep its own tokens only, apply Eq. 10 where ``extrapolation`` != 0.

    The list has one result; where hooks schedule the encoder (SetClipHooks), one for each of its keyframes. Weights
    like ``(word:1.3)`` and ``embedding:name`` work as in CLIPTextEncode. Raises ``ValueError`` for an encoder that is
    not in ``ENCODERS``.
    """
    encoder = _encoder_of(clip)
    tokens, empty = _tokenized(clip, text), clip.tokenize("")
    words, sent = {}, dict(tokens)
    for segment in encoder.segments:
        for key, tokenizer in segment.present(clip).items():
            words.setdefault(segment.name, segment.words(tokens[key], tokenizer, empty[key]))  # CLIP-G's are CLIP-L's
            sent[key] = segment.sent(tokens[key], tokenizer)
    encodings = _encodings(clip, encoder, sent, empty)
    nulls = _null_embeddings(clip, encoder, empty) if extrapolation else [{}] * len(encodings)
    out = []
    for (parts, options), null in zip(encodings, nulls, strict=True):
        kept = {name: embedding[:, own.kept] for name, (embedding, own) in parts.items()}
        if extrapolation:
            kept = {name: extrapolate(part, null[name], extrapolation) for name, part in kept.items()}
        pooled, during, extra = options.get("pooled_output"), scheduled_part(options), extra_of(options)
        out.append(EncodedPrompt(torch.cat([*kept.values()], dim=1), pooled, encoder.name, words, during, extra))
    return out


def _tokenized(clip: Any, text: str) -> dict:
    for i, letter in enumerate(text):
        if "\ud800" <= letter <= "\udfff":  # half of a pair, which every tokenizer refuses in its own way
            raise ValueError(f"VSF: character {i + 1} of the text is not valid Unicode. Please delete it.")
    try:
        return clip.tokenize(text)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = "its parentheses are nested too deep" if isinstance(error, RecursionError) else shown(error)
        raise ValueError(f"VSF: the text encoder cannot read the text: {reason}. Please change the text.") from error


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


_null_cache: WeakKeyDictionary = WeakKeyDictionary()


def _null_embeddings(clip: Any, encoder: TextEncoder, empty: Tokens) -> list[dict[str, Tensor]]:
    """Eq. 10's null condition for each encoding and segment. They are kept while the encoder lives and has the same
    patches and layer; where hooks change the encoder, they are made anew."""
    key = (clip.patcher.patches_uuid, clip.layer_idx)
    cached = _null_cache.setdefault(clip.cond_stage_model, {})
    if key not in cached or clip.patcher.forced_hooks is not None:
        cached.clear()
        padded = [parts for parts, _ in _encodings(clip, encoder, empty, empty)]
        if any(own.content >= embedding.shape[1] for parts in padded for embedding, own in parts.values()):
            raise ValueError(
                "VSF: extrapolation compares with the padding of an empty prompt, which only the text encoders of "
                f"SD3, Flux.1, Wan and UNets have as the paper means it, not that of {encoder.title}. Set "
                "extrapolation to 0."
            )
        cached[key] = [{name: null_embedding(e, own.content) for name, (e, own) in parts.items()} for parts in padded]
    return cached[key]
