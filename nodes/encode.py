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
    words_only: bool = False
    """Start and end tokens are not kept either."""
    led: bool = False
    """Padded on the left, which the encoder leaves out; the start token leads the words through what the model makes of
    them, and is not kept after that."""

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
    tokenizer_class: str | None = None
    """Where several models share the class, each with a template of its own."""


_T5 = Segment("T5", {"t5xxl": "t5xxl"}, causal=False)


def _clip_words(encoders: dict[str, str]) -> tuple[Segment, ...]:
    """CLIP where it is all the text there is: its start token takes the attention that nothing else gets, so to flip it
    would push away more than the words."""
    return (Segment("CLIP", encoders, causal=True, words_only=True),)


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
    Encoder(
        "hunyuan_video",
        "HunyuanVideo (DualCLIPLoader of type hunyuan_video)",
        "HunyuanVideoClipModel",
        (Segment("LLaMA", {"llama": "llama"}, causal=True, template=True),),
    ),
    Encoder(
        "hunyuan_video_15",
        "HunyuanVideo 1.5 (DualCLIPLoader of type hunyuan_video_15)",
        "HunyuanImageTEModel",
        (Segment("Qwen2.5-VL", {"qwen25_7b": "qwen25_7b"}, causal=True, template=True),),
        tokenizer_class="HunyuanVideo15Tokenizer",
    ),
    Encoder(
        "cosmos",
        "Cosmos Predict2 (CLIPLoader of type cosmos)",
        "CosmosT5XXL",
        (_T5,),
    ),
    Encoder(
        "anima",
        "Anima (CLIPLoader with its Qwen3 0.6B)",
        "AnimaTEModel",
        (Segment("Qwen3", {"qwen3_06b": "qwen3_06b"}, causal=True),),
    ),
    Encoder("ltxv", "LTX-Video (CLIPLoader of type ltxv)", "MochiT5XXL", (_T5,)),
    Encoder(
        "ltxav",
        "LTX-2 (LTXAVTextEncoderLoader)",
        "LTXAVTEModel",
        (Segment("Gemma", {"gemma3_12b": "gemma3_12b"}, causal=True, led=True),),
    ),
    Encoder("sd1", "Stable Diffusion 1.5 (its checkpoint's CLIP)", "SD1ClipModel", _clip_words({"l": "clip_l"})),
    Encoder("sd2", "Stable Diffusion 2.1 (its checkpoint's CLIP)", "SD2ClipModel", _clip_words({"h": "clip_h"})),
    Encoder(
        "sdxl",
        "SDXL (its checkpoint's CLIP, or DualCLIPLoader of type sdxl)",
        "SDXLClipModel",
        _clip_words({"l": "clip_l", "g": "clip_g"}),
    ),
)


@dataclass(frozen=True)
class EncodedPrompt:
    """``tokens`` [1, n, C] without padding; ``pooled`` [1, C']; ``words``: what each segment's tokens say to people;
    ``during``: which part of the sampling it is for (``Encoding``); ``extra``: see ``extra_of``."""

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


@dataclass(frozen=True)
class Part:
    """A segment of an encoder's output: its embedding [1, L, C], how many leading positions are content, and which
    positions are the negative's."""

    segment: Segment
    embedding: Tensor
    content: int
    kept: list[int]


@dataclass(frozen=True)
class Encoding:
    """One output of an encoder: its present segments; the pooled embedding; from and to which part of the sampling
    (0..1) it counts, None = all of it; and ``extra_of`` its options."""

    parts: list[Part]
    pooled: Tensor | None
    during: tuple[float, float] | None
    extra: dict[str, Any]


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
        for part in encoding.parts:
            name, kept = part.segment.name, part.embedding[:, part.kept]
            parts.append(extrapolate(kept, null[name], extrapolation) if extrapolation else kept)
            words[name] = _words(clip, part.segment, tokens)
        tokens_of_n = torch.cat(parts, dim=1)
        out.append(EncodedPrompt(tokens_of_n, encoding.pooled, encoder.name, words, encoding.during, encoding.extra))
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
    mro = type(clip.cond_stage_model).__mro__
    classes = {c.__name__ for c in mro}
    named = next(c.__name__ for c in mro if "<locals>" not in c.__qualname__)  # ComfyUI makes one inside a function
    for encoder in ENCODERS:
        # many derive from SD1ClipModel that have another encoder inside, some from Qwen-Image's with another template
        is_it = encoder.model_class == named if encoder.segments[0].template else encoder.model_class in classes
        is_it = is_it and encoder.tokenizer_class in (None, type(clip.tokenizer).__name__)
        if is_it and any(segment.present(clip) for segment in encoder.segments):
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
    lengths, contents, kept, tokens = [], [], [], dict(tokens)
    for segment in present:
        of_keys, positions = [], set()
        for key, tokenizer in segment.present(clip).items():
            *full, last = tokens[key]
            if segment.template:
                words = _words_in(clip, segment, key, tokens)
                of_keys.append((sum(map(len, tokens[key])), words.stop))
                positions |= set(range(words.start, words.stop))
                continue
            if segment.led:
                last = last[_same([t[0] for t in last], [tokenizer.pad_token] * len(last)) :]
            end = tokenizer.end_token if tokenizer.end_token is not None else tokenizer.pad_token
            content = content_length([t[0] for t in last], tokenizer.pad_token, end)
            before = sum(map(len, full))
            if trim and not segment.causal:
                last = last[:content]
                tokens[key] = [*full, last]
            of_keys.append((before + len(last), before + content))
            positions |= _word_positions(tokens[key], tokenizer) if segment.words_only else set(range(before + content))
        lengths.append(min(length for length, _ in of_keys))  # as SD3 cuts CLIP-L and CLIP-G to the shorter one
        contents.append(min(lengths[-1], max(content for _, content in of_keys)))
        kept.append(sorted(position for position in positions if position < lengths[-1]))
    out = []
    for embedding, options in clip.encode_from_tokens_scheduled(tokens, show_pbar=False):
        extra = extra_of(options)
        if present[-1].led and not extra:  # led through already: the model's learned tokens follow
            embedding, kept = embedding[:, : sum(lengths)], [kept[0][1:]]
        missing = sum(lengths) - embedding.shape[1]
        cut = missing if present[-1].template else 0  # what the encoder leaves out of the template's beginning
        if missing != cut or not 0 <= cut <= min(kept[-1], default=cut):
            raise RuntimeError(
                f"VSF: {encoder.model_class} returned {embedding.shape[1]} positions where {sum(lengths)} were "
                "expected; this ComfyUI encodes text in a way that this version of ComfyUI-VSF does not know. Please "
                "report it."
            )
        parts = embedding.split([length - cut for length in lengths], dim=1)
        parts = list(map(Part, present, parts, contents, [[p - cut for p in k if p >= cut] for k in kept]))
        out.append(Encoding(parts, options.get("pooled_output"), scheduled_part(options), extra))
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


def _word_positions(chunks: list, tokenizer: Any) -> set[int]:
    """Where the words are in the chunks of a token list, without start, end and padding."""
    end = tokenizer.end_token
    found, before = set(), 0
    for chunk in chunks:
        ids = [pair[0] for pair in chunk]
        content = ids[: content_length(ids, tokenizer.pad_token, end)]
        found |= {
            before + i for i, t in enumerate(content) if not isinstance(t, int) or t not in (tokenizer.start_token, end)
        }
        before += len(chunk)
    return found


def extra_of(options: dict) -> dict[str, Any]:
    """What a CONDITIONING entry's dict says of its text that the model will need to read it (Anima, LTX-2)."""
    keys = ("t5xxl_ids", "t5xxl_weights", "unprocessed_ltxav_embeds")
    return {key: options[key] for key in keys if options.get(key) is not None}


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
        if any(p.segment.template or p.content >= p.embedding.shape[1] for e in padded for p in e.parts):
            raise ValueError(
                "VSF: extrapolation compares with the padding of an empty prompt, which only the text encoders of "
                f"SD3, Flux.1, Wan and UNets have as the paper means it, not that of {encoder.title}. Set "
                "extrapolation to 0."
            )
        cached[key] = [{p.segment.name: null_embedding(p.embedding, p.content) for p in e.parts} for e in padded]
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
        elif tokenizer.start_token is None and tokenizer.end_token is None:  # a language model's, of bytes
            words.append(tokenizer.tokenizer.decode([token]).strip())
        elif token not in special:
            words.append(tokenizer.inv_vocab[token].replace("</w>", "").replace("\u2581", ""))
    return words
