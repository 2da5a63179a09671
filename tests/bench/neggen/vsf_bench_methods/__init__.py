"""Custom nodes for the benchmark: NAG, NASA and VSF's ablations, at cfg 1. Not for artists, and not shipped.

The negative comes in as VSF Negative Conditioning attached it, and is taken off again: the model that comes out has it.
"""

import sys
from pathlib import Path

BENCH = str(Path(__file__).resolve().parents[2])
KEY = "vsf_negatives"
CROSS = "WAN21"
KNOWN = ("SD3", "Flux", CROSS)
"""Classes of models that ``baselines.patched`` knows its way about in."""


class _Rule:
    """JOINT: there is nothing to leave out of cross-attention, which has neither a mask nor a duplicate (Eq. 9)."""

    JOINT = False
    PADDED = False
    """Whether the rule takes the negative as a prompt is encoded, with its padding, as its paper's code does."""
    CATEGORY = "VSF/bench"
    RETURN_TYPES = ("MODEL", "CONDITIONING")
    FUNCTION = "patch"
    NUMBERS = {}

    @classmethod
    def INPUT_TYPES(cls):
        numbers = {name: ("FLOAT", {"default": value, "step": 0.001}) for name, value in cls.NUMBERS.items()}
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), **numbers}}

    def patch(self, model, positive, **numbers):
        if BENCH not in sys.path:
            sys.path.append(BENCH)
        import baselines

        kind = type(model.model).__name__
        if kind not in KNOWN or (self.JOINT and kind == CROSS):
            known = ", ".join(one for one in KNOWN if not (self.JOINT and one == CROSS))
            raise ValueError(f"{type(self).__name__} is for {known}, not for {kind}")
        carried = [entry.get(KEY, ()) for _, entry in positive]
        if [len(negatives) for negatives in carried] != [1]:
            raise ValueError("expected a positive of one entry with one negative from VSF Negative Conditioning")
        bare = [(tokens, {k: v for k, v in entry.items() if k != KEY}) for tokens, entry in positive]
        rule = getattr(baselines, self.RULE)(**numbers)
        negative = carried[0][0]
        whole = self.PADDED and negative["padded"] is not None
        tokens = negative["padded"] if whole else negative["tokens"]
        return baselines.patched(model, rule, tokens), [list(entry) for entry in bare]


class VSFBenchNAG(_Rule):
    """Normalized Attention Guidance."""

    RULE, NUMBERS, PADDED = "nag", {"phi": 4.0, "blend": 0.125, "tau": 2.5}, True


class VSFBenchNASA(_Rule):
    """Negative-Aware Self-Attention."""

    RULE, NUMBERS, PADDED = "nasa", {"phi": 0.25}, True


class VSFBenchNoMask(_Rule):
    """VSF with its duplicate of N, whose values are flipped, and without a mask: all see all. Paper, 6.3."""

    RULE, NUMBERS, JOINT = "vsf_without_mask", {"scale": 1.0, "offset": 0.0}, True


class VSFBenchNoDuplication(_Rule):
    """N's own values flipped, and no mask: N and P see the flipped values too. Paper, 6.3."""

    RULE, NUMBERS, JOINT = "vsf_without_duplication", {"scale": 1.0}, True


class VSFBenchWholeEmbeddingFlip:
    """The negative's embedding, padding included, times -scale behind the positive's, as ordinary text. Paper, 6.3."""

    CATEGORY = "VSF/bench"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "flip"

    @classmethod
    def INPUT_TYPES(cls):
        scale = ("FLOAT", {"default": 1.0, "step": 0.001})
        return {"required": {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "scale": scale}}

    def flip(self, positive, negative, scale):
        import torch

        if len(negative) != 1 or any("attention_mask" in entry for _, entry in (*positive, *negative)):
            raise ValueError("expected a negative of one entry, and a text encoder that gives no attention mask")
        ((unwanted, _),) = negative
        return ([[torch.cat([text, -scale * unwanted.to(text)], dim=1), entry] for text, entry in positive],)


NODES = (VSFBenchNAG, VSFBenchNASA, VSFBenchNoMask, VSFBenchNoDuplication, VSFBenchWholeEmbeddingFlip)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
