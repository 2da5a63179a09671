"""The ``blocks`` input: which of a model's blocks let the image see the negative."""

import re
from collections.abc import Mapping

from .checks import shown

Block = tuple[str, int]
"""A block's type ("double", "single", ...) and index."""

# at most four digits: int() refuses more than a few thousand with a message of its own
_ITEM = re.compile(r"(?P<type>[a-z_]+)(?::(?:(?P<one>\d{1,4})|(?P<first>\d{,4})-(?P<last>\d{,4})))?", re.ASCII)


def all_blocks(counts: Mapping[str, int]) -> frozenset[Block]:
    return frozenset((kind, i) for kind, count in counts.items() for i in range(count))


def parse_blocks(text: str | None, counts: Mapping[str, int]) -> frozenset[Block]:
    """The blocks that ``text`` names, e.g. "double:0-11,single:5-", "double", "all"; empty means all.

    ``counts``: how many blocks of each type the model has. Ranges include both ends; an end left out is the model's
    own. Raises ``ValueError`` that names the bad item and the valid ones.
    """
    valid = ", ".join(f"{kind}:0-{count - 1}" for kind, count in counts.items())
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
        kind, count = match["type"], counts[match["type"]]
        first = int(match["one"] or match["first"] or 0)
        last = int(match["one"] or match["last"] or count - 1)
        if not first <= last < count:
            raise ValueError(f'VSF: blocks: "{item}" is out of range. This model has {valid}.')
        selected.update((kind, i) for i in range(first, last + 1))
    return frozenset(selected)
