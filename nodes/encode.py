"""Encode a negative prompt with its padding removed (Appendix C), for each text encoder that a family knows.

T5 is bidirectional: its token list is trimmed before it is encoded, since the kept part of a padded encoding is another
thing. CLIP is causal and insists on 77 tokens: it is encoded padded, and its embeddings are cut after the end token.
Language models get the words inside the template that ComfyUI puts around every prompt; the words' embeddings are kept,
those of the template (system text, turns of the chat) are not what anybody wants pushed away.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..vsf_core import content_length, extrapolate, null_embedding
from .checks import shown


@dataclass(frozen=True)
class Segment:
    """A stretch of an encoder's output positions."""

    name: str
    encoders: dict[str, str]
    """Key in the token dict -> attribute of the model; several (CLIP-L, CLIP-G) share the same positions."""
    causal: bool
    template: bool = False
    """Its tokens are words inside a fixed template, of whose beginning the encoder's output may lack something."""

    def present(self, clip: Any) -> dict[str, Any]:
        """Key in the token dict -> tokenizer, of the encoders that are loaded."""
        return {
            key: getattr(clip.tokenizer, attribute, None) or getattr(clip.tokenizer, f"clip_{attribute}")
            for key, attribute in self.encoders.items()
            if getattr(clip.cond_stage_model, attribute, None) is not None
        }


@dataclass(frozen=True)
class Encoder:
    """A text encoder of ComfyUI: its class and, in order, the segments of its output."""

    name: str
    title: str
    model_class: str
    segments: tuple[Segment, ...]


_T5 = Segment("T5", {"t5xxl": "t5xxl"}, causal=False)

ENCODERS = (
    Encoder(
        "sd3",
        "Stable Diffusion 3 (CLIPLoader, DualCLIPLoader or TripleCLIPLoader of type sd3)",
        "SD3ClipModel",
        (
            Segment("CLIP", {"l": "clip_l", "g": "clip_g"}, causal=True),
            _T5,
        ),
    ),
    Encoder(
        "wan", "Wan (CLIPLoader of type wan)", "WanT5Model", (Segment("umT5", {"umt5xxl": "umt5xxl"}, causal=False),)
    ),
    Encoder("flux", "Flux.1 (DualCLIPLoader of type flux)", "FluxClipModel", (_T5,)),
    Encoder("chroma", "Chroma (CLIPLoader of type chroma)", "PixArtT5XXL", (_T5,)),
    Encoder(
        "qwen_image",
        "Qwen-Image (CLIPLoader of type qwen_image)",
        "QwenImageTEModel",
        (Segment("Qwen2.5-VL", {"qwen25_7b": "qwen25_7b"}, causal=True, template=True),),
    ),
    Encoder(
        "z_image",
        "Z-Image (CLIPLoader of type lumina2)",
        "ZImageTEModel",
        (Segment("Qwen3", {"qwen3_4b": "qwen3_4b"}, causal=True, template=True),),
    ),
    Encoder(
        "flux2",
        "Flux.2 (CLIPLoader of type flux2)",
        "Flux2TEModel",
        (
            Segment(
                "Mistral or Qwen3",
                {name: name for name in ("mistral3_24b", "qwen3_4b", "qwen3_8b")},
                causal=True,
                template=True,
            ),
        ),
    ),
)


@dataclass(frozen=True)
class EncodedPrompt:
    """``tokens`` [1, n, C] without padding; ``pooled`` [1, C']; ``words``: what each segment's tokens say to people;
    ``during``: which part of the sampling it is for (``Encoding``)."""

    tokens: Tensor
    pooled: Tensor | None
    encoder: str
    words: dict[str, list[str]]
    during: tuple[float, float] | None


@dataclass(frozen=True)
class Encoding:
    """One output of an encoder: each present segment with its embedding [1, L, C] and which positions are content; the
    pooled embedding; and from and to which part of the sampling (0..1) it counts, None = all of it."""

    segments: list[tuple[Segment, Tensor, slice]]
    pooled: Tensor | None
    during: tuple[float, float] | None


def encode_negative(clip: Any, text: str, extrapolation: float = 0.0) -> list[EncodedPrompt]:
    """Encode ``text`` with a ComfyUI CLIP object, keep its own tokens only, apply Eq. 10 where ``extrapolation`` != 0.

    One result, but where hooks schedule the encoder (SetClipHooks) one for each of its keyframes. Weights like
    ``(word:1.3)`` and ``embedding:name`` work as in CLIPTextEncode. Raises ``ValueError`` for an encoder that is not in
    ``ENCODERS``.
    """
    encoder = _encoder_of(clip)
    tokens = _tokenized(clip, text)
    encodings = _encodings(clip, encoder, tokens, trim=True)
    nulls = _null_embeddings(clip, encoder) if extrapolation else [{}] * len(encodings)
    out = []
    for encoding, null in zip(encodings, nulls, strict=True):
        parts, words = [], {}
        for segment, embedding, content in encoding.segments:
            kept = embedding[:, content]
            parts.append(extrapolate(kept, null[segment.name], extrapolation) if extrapolation else kept)
            words[segment.name] = _words(clip, segment, tokens)
        out.append(EncodedPrompt(torch.cat(parts, dim=1), encoding.pooled, encoder.name, words, encoding.during))
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


def _encoder_of(clip: Any) -> Encoder:
    classes = {c.__name__ for c in type(clip.cond_stage_model).__mro__}
    for encoder in ENCODERS:
        if encoder.model_class in classes:
            return encoder
    supported = "; ".join(e.title for e in ENCODERS)
    raise ValueError(
        f"VSF: cannot encode a negative with the text encoder {type(clip.cond_stage_model).__name__}. "
        f"Supported: {supported}. Connect the CLIP that also encodes the positive prompt."
    )


def _encodings(clip: Any, encoder: Encoder, tokens: dict, *, trim: bool) -> list[Encoding]:
    """Encode ``tokens``, once for each keyframe of a scheduled encoder.

    ``trim`` shortens the token lists of bidirectional encoders before they are encoded.
    """
    present = [segment for segment in encoder.segments if segment.present(clip)]
    lengths, contents, tokens = [], [], dict(tokens)
    for segment in present:
        of_keys = []
        for key, tokenizer in segment.present(clip).items():
            *full, last = tokens[key]
            if segment.template:
                of_keys.append((sum(map(len, tokens[key])), _words_in(clip, segment, key, tokens)))
                continue
            end = tokenizer.end_token if tokenizer.end_token is not None else tokenizer.pad_token
            content = content_length([t[0] for t in last], tokenizer.pad_token, end)
            before = sum(map(len, full))
            if trim and not segment.causal:
                last = last[:content]
                tokens[key] = [*full, last]
            of_keys.append((before + len(last), slice(0, before + content)))
        lengths.append(min(length for length, _ in of_keys))  # as SD3 cuts CLIP-L and CLIP-G to the shorter one
        last = max((content for _, content in of_keys), key=lambda content: content.stop)
        contents.append(slice(last.start, min(lengths[-1], last.stop)))
    out = []
    for embedding, options in clip.encode_from_tokens_scheduled(tokens, show_pbar=False):
        missing = sum(lengths) - embedding.shape[1]
        cut = missing if present[-1].template else 0  # what the encoder leaves out of the template's beginning
        if missing != cut or not 0 <= cut < sum(lengths):
            raise RuntimeError(
                f"VSF: {encoder.model_class} returned {embedding.shape[1]} positions where {sum(lengths)} were "
                "expected; this ComfyUI encodes text in a way that this version of ComfyUI-VSF does not know. Please "
                "report it."
            )
        parts = embedding.split([length - cut for length in lengths], dim=1)
        kept = [slice(max(0, content.start - cut), max(0, content.stop - cut)) for content in contents]
        segments = list(zip(present, parts, kept, strict=True))
        out.append(Encoding(segments, options.get("pooled_output"), scheduled_part(options)))
    return out


def _words_in(clip: Any, segment: Segment, key: str, tokens: dict) -> slice:
    """Where the words are in the tokens ``key`` of a segment with a template: between the beginning and the end that it
    has without words, too."""
    tokenizer = segment.present(clip)[key]
    given, bare = ([t[0] for chunk in made[key] for t in chunk] for made in (tokens, clip.tokenize("")))
    given, bare = (ids[: content_length(ids, tokenizer.pad_token, -1)] for ids in (given, bare))
    start = _same(given, bare)
    return slice(start, len(given) - _same(given[start:][::-1], bare[start:][::-1]))


def _same(a: list, b: list) -> int:
    """How many of their first tokens two lists share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if not isinstance(x, int) or x != y), min(len(a), len(b)))


def scheduled_part(options: dict) -> tuple[float, float] | None:
    """Which part of the sampling a CONDITIONING entry's dict is for, as a scheduled encoder says it."""
    return (options["clip_start_percent"], options["clip_end_percent"]) if "clip_start_percent" in options else None


_null_cache: WeakKeyDictionary = WeakKeyDictionary()


def _null_embeddings(clip: Any, encoder: Encoder) -> list[dict[str, Tensor]]:
    """Eq. 10's null condition per encoding and segment, kept for as long as the encoder lives with these patches and
    layer; made anew where hooks change the encoder."""
    key = (clip.patcher.patches_uuid, clip.layer_idx)
    cached = _null_cache.setdefault(clip.cond_stage_model, {})
    if key not in cached or clip.patcher.forced_hooks is not None:
        cached.clear()
        padded = _encodings(clip, encoder, clip.tokenize(""), trim=False)
        if any(s.template or content.stop >= emb.shape[1] for e in padded for s, emb, content in e.segments):
            raise ValueError(
                "VSF: extrapolation compares with the padding of an empty prompt, which only the text encoders of "
                f"SD3, Flux.1 and Wan have as the paper means it, not that of {encoder.title}. Set extrapolation to 0."
            )
        cached[key] = [{s.name: null_embedding(emb, content.stop) for s, emb, content in e.segments} for e in padded]
    return cached[key]


def _words(clip: Any, segment: Segment, tokens: dict) -> list[str]:
    """The text of a segment's tokens, without start, end, padding and template."""
    key, tokenizer = next(iter(segment.present(clip).items()))
    given = [pair[0] for chunk in tokens[key] for pair in chunk]
    if segment.template:
        given = [t for t in given[_words_in(clip, segment, key, tokens)] if isinstance(t, int)]
        return [piece for t in given if (piece := tokenizer.tokenizer.decode([t]).strip())]
    special, words = {tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token}, []
    for token in given:
        if not isinstance(token, int):
            words.append("[embedding]")
        elif token not in special:
            words.append(tokenizer.inv_vocab[token].replace("</w>", "").replace("\u2581", ""))
    return words
