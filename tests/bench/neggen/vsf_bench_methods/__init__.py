"""Custom nodes for the benchmark: NAG and NASA on this pack's hooks, at cfg 1. Not for artists, and not shipped.

The negative comes in as VSF Negative Conditioning attached it, its padding removed, and is taken off again: the model
that comes out knows it.
"""

import sys
from pathlib import Path

BENCH = str(Path(__file__).resolve().parents[2])
KEY = "vsf_negatives"


class _Rule:
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

        carried = [entry.get(KEY, ()) for _, entry in positive]
        if [len(negatives) for negatives in carried] != [1]:
            raise ValueError("expected a positive of one entry with one negative from VSF Negative Conditioning")
        bare = [(tokens, {k: v for k, v in entry.items() if k != KEY}) for tokens, entry in positive]
        rule = getattr(baselines, self.RULE)(**numbers)
        return baselines.patched(model, rule, carried[0][0].tokens), [list(entry) for entry in bare]


class VSFBenchNAG(_Rule):
    """Normalized Attention Guidance."""

    RULE, NUMBERS = "nag", {"phi": 4.0, "blend": 0.125, "tau": 2.5}


class VSFBenchNASA(_Rule):
    """Negative-Aware Self-Attention."""

    RULE, NUMBERS = "nasa", {"phi": 0.25}


NODE_CLASS_MAPPINGS = {"VSFBenchNAG": VSFBenchNAG, "VSFBenchNASA": VSFBenchNASA}
