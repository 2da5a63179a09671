"""The values of VSF Model Patch's input ``method``: which inputs each reads, and what these are to the attention."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..vsf_core import NAG, NASA, ONG, VSF, Method
from .negative import Negative, same_mask


class MethodChoice:
    """Value sign flip: ``scale`` is alpha, ``offset`` beta."""

    name = "vsf"
    scale_input = "scale"
    has_offset = True
    takes_layouts = True
    """Whether layout ``released`` means anything to it."""

    def core(self, inputs: Mapping[str, float]) -> Method:
        """The arithmetic."""
        return VSF()

    def alpha(self, scale: float) -> float:
        """What a value of ``scale_input`` is to the arithmetic."""
        return scale

    def taken(self, negative: Negative) -> Negative:
        """``negative`` with the tokens that the method takes of it."""
        return negative

    def check(self, groups: Sequence[Sequence[Negative]]) -> None:
        """Raises ``ValueError`` where the method cannot take the negatives of an entry, one of ``groups``, together."""


class _Guided(MethodChoice):
    """A method to which several negatives are one."""

    has_offset = False
    takes_layouts = False

    def taken(self, negative: Negative) -> Negative:
        """As published: N is a prompt like P, with its padding."""
        return negative if negative.padded is None else replace(negative, tokens=negative.padded, padded=None)

    def check(self, groups: Sequence[Sequence[Negative]]) -> None:
        for negatives in groups:
            first = negatives[:1]
            if not all(
                (n.strength, n.frames) == (one.strength, one.frames) and same_mask(n.mask, one.mask)
                for one in first
                for n in negatives
            ):
                raise ValueError(
                    f"VSF: method {self.name} takes several negatives as one, but {len(negatives)} here differ in "
                    "strength, mask or frames. Make these the same, or set method to vsf on VSF Model Patch."
                )


class _NAG(_Guided):
    name = "nag"
    scale_input = "nag_scale"

    def core(self, inputs: Mapping[str, float]) -> Method:
        return NAG(inputs["nag_alpha"], inputs["nag_tau"])

    def alpha(self, scale: float) -> float:
        """phi, where people set 1 + phi."""
        return scale - 1


class _NASA(_Guided):
    name = "nasa"
    scale_input = "nasa_scale"

    def core(self, inputs: Mapping[str, float]) -> Method:
        return NASA()


class _ONG(_Guided):
    name = "ong"
    scale_input = "ong_scale"

    def core(self, inputs: Mapping[str, float]) -> Method:
        return ONG()


METHODS: dict[str, MethodChoice] = {choice.name: choice for choice in (MethodChoice(), _NAG(), _NASA(), _ONG())}
