"""Pairs to draw and to judge: a prompt, what must not be in the picture, and a question about each."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hosting.errors import HostError

from neggen.words import plain

SHIPPED = Path(__file__).with_name("pairs.json")
FIELDS = ("prompt", "missing_element", "question_1", "question_2")


@dataclass(frozen=True)
class Pair:
    """``question_1``: is the main object there, with or without the element? ``question_2``: is the element missing?

    Yes to both is what a negative prompt wants.
    """

    prompt: str
    missing_element: str
    question_1: str
    question_2: str
    kind: str = "object"

    @property
    def id(self) -> str:
        """The same for the same prompt, element and questions, wherever they were loaded from."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


def load(source: str) -> list[Pair]:
    """``ours`` (60 pairs), ``toy`` (those of the toy world), or a file.

    A file is JSONL (.jsonl, a pair a line), or JSON: a list, or the published shape ``{"prompts": [pair ...]}``.
    Raises HostError that names the file and the entry.
    """
    if source == "toy":
        return toy()
    path = SHIPPED if source == "ours" else Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(f"{path} can't be read ({error}); --pairs takes ours, toy or a JSON or JSONL file") from None
    pairs: dict[Pair, str] = {}
    for place, entry in _entries(path, text):
        pair = _pair(place, entry)
        if pair in pairs:
            raise HostError(f"{place} repeats {pairs[pair]}: {pair.prompt!r} without {pair.missing_element!r}")
        pairs[pair] = place
    if not pairs:
        raise HostError(f"{path} holds no pairs; expected a pair a line, a list, or an object with a list 'prompts'")
    return list(pairs)


def some(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """``count`` of them by chance, in their order; the same seed chooses the same."""
    if count > len(pairs):
        raise HostError(f"--sample {count}: there are {len(pairs)} pairs")
    chosen = set(random.Random(seed).sample(range(len(pairs)), count))
    return [pair for k, pair in enumerate(pairs) if k in chosen]


def _entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Each entry with where it stands."""
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{path}, line {number}", _parsed(f"{path}, line {number}", line)
        return
    data = _parsed(str(path), text)
    entries = data.get("prompts") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        given = f"an object with {', '.join(data) or 'nothing'}" if isinstance(data, dict) else type(data).__name__
        raise HostError(f"{path} holds {given}; expected a list of pairs or an object with a list 'prompts'")
    for number, entry in enumerate(entries, 1):
        yield f"{path}, pair {number}", entry


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HostError(f"{place} is no JSON: {error}") from None


def _pair(place: str, entry: Any) -> Pair:
    if not isinstance(entry, dict):
        raise HostError(f"{place} is {type(entry).__name__}; expected an object with {', '.join(FIELDS)}")
    for name in FIELDS:
        if name not in entry:
            raise HostError(f"{place} lacks {name!r}; it has {', '.join(map(repr, entry)) or 'nothing'}")
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise HostError(f"{place}: {name!r} is {entry[name]!r}; expected a text")
        if plain(entry[name], len(entry[name])) != entry[name].replace("\r", " "):
            raise HostError(f"{place}: {name!r} has characters that are no text: {plain(ascii(entry[name]), 80)}")
    return Pair(*(entry[name].strip() for name in FIELDS), kind=plain(entry.get("kind", "object"), 60))


def toy() -> list[Pair]:
    """Each (object, part) of the toy world."""
    from neggen.toy_world import world

    return [
        Pair(f"a {thing.name}", part.phrase, f"Does it show a {thing.name}?", f"Is {part.phrase} missing?")
        for thing in world.THINGS
        for part in thing.parts
    ]
