"""What this pack keeps in ``transformer_options``, sealed."""

from collections.abc import Mapping
from typing import Any


class Sealed:
    """A value that other packs neither walk into, nor copy, nor move to a device: they see no dict, no tensor and no
    dataclass, and what copies it gets this very one, so that whatever it counts is counted once."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __copy__(self) -> "Sealed":
        return self

    def __deepcopy__(self, memo: dict) -> "Sealed":
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "VSF: another node sends a forward pass of this run to another process, where the negative would be lost. "
            "Remove that node, or VSF Model Patch; nodes that start a whole run in each process are fine."
        )


def opened(options: Mapping[str, Any], key: str) -> Any:
    """What is sealed there; None where nothing is."""
    found = options.get(key)
    return found.value if isinstance(found, Sealed) else None
