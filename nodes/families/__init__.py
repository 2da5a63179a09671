"""Which models VSF knows. Adding a family: a file beside this one and a line in ``FAMILIES``."""

from typing import Any

from .base import Family, Released
from .flux import Flux
from .sd3 import SD3
from .wan import Wan

FAMILIES: tuple[Family, ...] = (SD3(), Flux(), Wan())


def family_of(model: Any) -> Family:
    """The family of a ComfyUI model (``ModelPatcher.model``), by its exact class: subclasses differ in what matters.

    Raises ``ValueError`` that names the model's class and what is supported.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    for family in FAMILIES:
        if kind in family.model_classes:
            family.check(model)
            return family
    supported = "; ".join(family.title for family in FAMILIES)
    raise ValueError(
        f"VSF: models of class {type(model).__qualname__} are not supported. Supported: {supported}. "
        "Connect one of these, or remove VSF Model Patch from this workflow."
    )


__all__ = ["FAMILIES", "Family", "Released", "family_of"]
