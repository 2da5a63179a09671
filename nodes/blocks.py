"""The ``blocks`` input: which of a model's blocks let the image see the negative."""

import re
from collections.abc import Mapping, Sequence

from .checks import shown

Block = tuple[str, int]
"""A block's type ("double", "single", ...) and index."""

Counts = Mapping[str, int | Sequence[int]]
"""How many blocks of each type a model has, or, rising, the numbers of those that count."""

# at most four digits: int() refuses more than a few thousand with a message of its own
_ITEM = re.compile(r"(?P<type>[a-z_]+)(?::(?:(?P<one>\d{1,4})|(?P<first>\d{,4})-(?P<last>\d{,4})))?", re.ASCII)


def _numbers(blocks: int | Sequence[int]) -> Sequence[int]:
    return range(blocks) if isinstance(blocks, int) else blocks


def all_blocks(counts: Counts) -> frozenset[Block]:
    return frozenset((kind, i) for kind, blocks in counts.items() for i in _numbers(blocks))


def _valid(kind: str, numbers: Sequence[int]) -> str:
    """The numbers as ranges without gaps."""
    firsts, lasts = ([i for i in numbers if i + step not in numbers] for step in (-1, 1))
    return ", ".join(f"{kind}:{first}-{last}" for first, last in zip(firsts, lasts, strict=True))


def parse_blocks(text: str | None, counts: Counts) -> frozenset[Block]:
    """The blocks that ``text`` names, e.g. "double:0-11,single:5-", "double", "all"; empty means all.

    Ranges include both ends, and what the model has between them; an end left out is the model's own. Raises
    ``ValueError`` that names the bad item and the valid ones.
    """
    valid = ", ".join(_valid(kind, _numbers(blocks)) for kind, blocks in counts.items())
    selected: set[Block] = set()
    for item in (part.strip().lower() for part in ((text or "").strip() or "all").split(",")):
        if item == "all":
            selected |= all_blocks(counts)
            continue
        match = _ITEM.fullmatch(item)
        if not match or match["type"] not in counts:
            raise ValueError(
                f'VSF: blocks: cannot read "{shown(item)}". This model has {valid}. Write for example '
                f'"{next(iter(counts))}:0-3" (several separated by commas), or leave it empty for all blocks.'
            )
        kind, numbers = match["type"], _numbers(counts[match["type"]])
        first = int(match["one"] or match["first"] or numbers[0])
        last = int(match["one"] or match["last"] or numbers[-1])
        named = [i for i in numbers if first <= i <= last]
        if not named or last > numbers[-1]:
            raise ValueError(f'VSF: blocks: "{item}" is out of range. This model has {valid}.')
        selected.update((kind, i) for i in named)
    return frozenset(selected)
