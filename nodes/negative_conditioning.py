"""The node "VSF Negative Conditioning"."""

import logging
from typing import Any

import torch
from comfy_api.latest import io, ui

from . import checks
from .encode import encode_negative, extra_of, scheduled_part, unmasked
from .graph_check import reads_a_picture
from .negative import Negative, attached
from .watch import watch_prompt

log = logging.getLogger(__name__)


class VSFNegativeConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSFNegativeConditioning",
            display_name="VSF Negative Conditioning",
            category="conditioning/VSF",
            description="Attaches a negative prompt to the positive one. The model needs VSF Model Patch. Chain "
            "several to push several things away, each with its own strength and mask.",
            search_aliases=["negative prompt", "NAG", "cfg 1", "value sign flip", "VSF"],
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    tooltip="The positive prompt's conditioning; the negative is attached to all of its entries.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder of the positive prompt; needed for text."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    tooltip="What you do not want to see, in plain words: no 'no' and no 'without'. "
                    "(word:1.3) and embedding:name work where the text encoder has them; the node says what it cannot "
                    "read. Empty: off.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Instead of text: a conditioning that is taken as it is, padding included unless it has "
                    "an attention mask. Text is better: its padding is removed, and so are templates and pictures.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="Multiplies the patch's scale for this negative alone. 0 is not off: bypass the node for "
                    "that.",
                ),
                io.Float.Input(
                    "extrapolation",
                    default=0.0,
                    min=0.0,
                    max=20.0,
                    step=0.5,
                    optional=True,
                    tooltip="Lambda of the paper's Eq. 10: moves the negative away from the empty prompt. 8 in the "
                    "paper's Flux Schnell table; 0 is off. Needs text.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White: the negative acts here. Black: it does not."),
                io.Float.Input(
                    "from_frame",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Video models: where in the video this negative starts to act: 0 is the first frame.",
                ),
                io.Float.Input(
                    "to_frame",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Video models: where in the video this negative stops acting: 1 is after the last frame.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            outputs=[
                io.Conditioning.Output(tooltip="The positive with the negative attached: connect it to the sampler.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """The same for ever: ComfyUI asks at the start of each prompt, cached nodes too."""
        watch_prompt()
        return ""

    @classmethod
    @checks.limited
    def execute(
        cls,
        positive: io.Conditioning.Type,
        clip: io.Clip.Type | None = None,
        text: str = "",
        negative: io.Conditioning.Type | None = None,
        strength: float = 1.0,
        extrapolation: float = 0.0,
        mask: torch.Tensor | None = None,
        from_frame: float = 0.0,
        to_frame: float = 1.0,
    ) -> io.NodeOutput:
        watch_prompt()
        frames = checks.interval("from_frame", from_frame, "to_frame", to_frame)
        where = {"strength": strength, "mask": mask, "frames": frames}
        has_text = bool(text.strip())
        if negative is not None and _says_the_same(positive, negative):
            log.warning(
                "VSF: negative is the positive prompt itself, perhaps through a node that connects inputs by itself "
                f"(Use Everywhere). {'It is not used: text is.' if has_text else 'The prompt pushes itself away!'}"
            )
            negative = None if has_text else negative
        if has_text and negative is not None:
            raise ValueError("VSF: both text and negative are given. Clear the text, or disconnect negative.")
        if has_text:
            if clip is None:
                raise ValueError("VSF: text needs clip: connect the text encoder that encodes the positive prompt.")
            return _from_text(positive, clip, text, extrapolation, where)
        if negative is not None:
            if extrapolation:
                raise ValueError(
                    "VSF: extrapolation needs text and clip, since it compares with the empty prompt. Use text instead "
                    "of negative, or set extrapolation to 0."
                )
            if reader := cls._reads_a_picture():
                raise ValueError(
                    f"VSF: negative comes from {reader}, which encodes a picture with its text: the picture would be "
                    "pushed away too. Disconnect negative and write the words into text: they are encoded alone."
                )
            return _as_given(positive, negative, where)
        return io.NodeOutput(positive, ui=ui.PreviewText("off: no negative"))

    @classmethod
    def _reads_a_picture(cls) -> str | None:
        prompt, node = (cls.hidden.prompt, cls.hidden.unique_id) if cls.hidden else (None, None)
        return reads_a_picture(prompt, str(node), "negative") if prompt else None


def _says_the_same(positive: list, negative: list) -> bool:
    """Whether two conditionings have the same embeddings."""
    pairs = [(a[0], b[0]) for a, b in zip(positive, negative, strict=False)]
    same = all(isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _equal(a, b) for a, b in pairs)
    return len(positive) == len(negative) and same


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(a)))


def _from_text(positive: list, clip: Any, text: str, extrapolation: float, where: dict) -> io.NodeOutput:
    encoded, read = encode_negative(clip, text, extrapolation)
    for remark in read.remarks:
        log.warning(f"VSF: {remark}")
    if not encoded:  # invisible characters
        checks.no_effect("VSF: the text has no word that can be seen: the negative is off.")
        return io.NodeOutput(positive, ui=ui.PreviewText("off: no word in the text"))
    made = {}
    for e in encoded:
        kinds = {"encoder": e.encoder, "pooled": e.pooled, "extra": e.extra, "padded": e.padded}
        made[e.during] = Negative(checks.embedding(e.tokens), **where, **kinds)
    lines = [f"{name}: {' · '.join(words)}" for name, words in read.words.items() if words]
    shown = "\n".join([f"pushes away {encoded[0].count} tokens", *lines, *read.remarks])
    return io.NodeOutput(_attach(positive, made), ui=ui.PreviewText(shown))


def _as_given(positive: list, negative: list, where: dict) -> io.NodeOutput:
    tokens, options = _without_padding(negative), negative[0][1]
    made = Negative(tokens, **where, pooled=options.get("pooled_output"), extra=extra_of(options))
    shown = f"{tokens.shape[1]} tokens, as given"
    return io.NodeOutput(_attach(positive, {None: made}), ui=ui.PreviewText(shown))


def _attach(positive: list, made: dict[tuple[float, float] | None, Negative]) -> list:
    """``positive`` with the negative in each of its entries. Where hooks schedule the encoder, ``made`` has a negative
    for each part of the sampling, and an entry gets that of its own part."""
    out = []
    for cond, options in positive:
        part = scheduled_part(options)
        if len(made) > 1 and part not in made:
            parts = ", ".join(f"{during[0]:g} to {during[1]:g}" for during in made if during)
            raise ValueError(
                f"VSF: hooks schedule this clip in {len(made)} parts of the sampling ({parts}), but not the "
                "positive prompt in this way. Encode both with the same CLIP, or connect here the one from before Set "
                "CLIP Hooks."
            )
        negative = made[part] if len(made) > 1 else next(iter(made.values()))
        out.append([cond, attached(options, negative)])
    return out


def _without_padding(negative: list) -> torch.Tensor:
    """The embedding [b, n, C] of the only entry. Without padding, if an attention mask says which tokens that is."""
    if len(negative) != 1:
        raise ValueError(
            f"VSF: negative has {len(negative)} entries (of a ConditioningCombine, say) where one is needed. Chain one "
            "VSF Negative Conditioning node for each."
        )
    given = checks.embedding(negative[0][0])
    tokens = unmasked(given, negative[0][1])
    if tokens is given:
        log.info(f"VSF: negative has no attention mask: all of its {tokens.shape[1]} positions are kept, padding too.")
    if tokens.shape[1] == 0:
        raise ValueError("VSF: negative has no token left once its padding is removed. Give it some text.")
    return tokens
