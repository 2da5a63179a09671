"""Pictures that were made elsewhere, found by their names: a pair's number and a seed."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hosting.errors import HostError

from neggen.pairs import Pair

NAMES = "{pair}-{seed}.*"
SLOTS = {"pair": r"(?P<pair>[0-9]+)", "index": r"(?P<index>[0-9]+)", "seed": r"(?P<seed>-?[0-9]+)"}
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def found(folder: Path, pattern: str, pairs: Mapping[Pair, int], seeds: Sequence[int]) -> list[tuple[Pair, int, Path]]:
    """Each picture with its pair and seed, by pair and seed.

    pattern: a path in the folder with {pair} (counted from 1, in the whole of --pairs) or {index} (counted from 0),
    {seed} unless there is one seed alone, and * for anything. pairs: the wanted ones and their numbers. Raises
    HostError when there is none, or when two files are of the same pair and seed.
    """
    name = _pattern(pattern, len(seeds))
    wanted = {number: pair for pair, number in pairs.items()}
    out: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        told = name.fullmatch(path.relative_to(folder).as_posix())
        if told is None or path.suffix.lower() not in ENDINGS:
            continue
        parts = told.groupdict()
        number = int(parts["pair"]) if "pair" in parts else int(parts["index"]) + 1
        place = number, int(parts.get("seed", seeds[0]))
        if place in out:
            raise HostError(f"{out[place]} and {path} are both of pair {number}, seed {place[1]}")
        if number in wanted and place[1] in seeds:
            out[place] = path
    if not out:
        raise HostError(
            f"{folder} has no picture named as --files {pattern} says, of pairs 1 to {max(wanted)} and seeds "
            f"{min(seeds)} to {max(seeds)}; {{pair}} counts from 1, {{index}} from 0"
        )
    return [(wanted[number], seed, out[number, seed]) for number, seed in sorted(out)]


def _pattern(pattern: str, seeds: int) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\}|\*)", pattern)
    slots = [part[1:-1] for part in parts if part.startswith("{")]
    numbers = [slot for slot in slots if slot in ("pair", "index")]
    if set(slots) - set(SLOTS) or len(numbers) != 1 or slots.count("seed") > 1 or (seeds > 1 and "seed" not in slots):
        raise HostError(
            f"--files {pattern}: expected {{pair}} or {{index}} once, and {{seed}} once (or not, with --seeds 1)"
        )
    made = [SLOTS[part[1:-1]] if part[:1] == "{" else "[^/]*" if part == "*" else re.escape(part) for part in parts]
    return re.compile("".join(made))
