"""What a judge is asked, and which fields of its answer are which score.

A file is JSON: ``system`` and ``user`` (texts with {prompt}, {missing_element}, {question_1} and {question_2} in them),
``fields`` (by score: ``field``, its name in the answer, and either ``values``, what each answer counts as, or ``most``,
the number that counts as 1), ``reasons`` (the name of a text before them) and ``side`` (of the square that pictures are
resized to).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosting.errors import HostError
from PIL import Image

from neggen.pairs import FIELDS, Pair

SHIPPED = Path(__file__).with_name("forms")
SCORES = ("positive", "negative", "quality")
SLOT = re.compile(rf"\{{({'|'.join(FIELDS)})\}}")
KNOWN = {"system", "user", "fields", "reasons", "side"}
DEEPEST = 1000
"""So many opening braces of an answer are looked at, from its end."""


@dataclass(frozen=True)
class Field:
    """A score's place in an answer. values: what each answer counts as; without them a number, ``most`` counts as 1."""

    name: str
    values: Mapping[str, float]
    most: float = 1.0

    def score(self, answer: Any) -> float:
        """In 0..1; raises ValueError for an answer that the form does not know."""
        if self.values:
            word = answer.strip().lower() if isinstance(answer, str) else _word(answer)
            if word not in self.values:
                raise ValueError(f"{self.name!r} is {answer!r}, not one of {', '.join(self.values)}")
            return self.values[word]
        if not isinstance(answer, (int, float)) or not 0 <= answer <= self.most:  # NaN too
            raise ValueError(f"{self.name!r} is {answer!r}, not a number from 0 to {self.most:g}")
        return answer / self.most

    def answer(self, score: float) -> Any:
        """The answer that says a score: the nearest there is; of two as near the lower, as half counts as no."""
        if not self.values:
            return round(score * self.most, 3)
        word = min(self.values, key=lambda one: (abs(self.values[one] - score), self.values[one]))
        return json.loads(word) if word in ("true", "false") or _is_number(word) else word

    def schema(self) -> dict[str, Any]:
        """For a server that holds a model to a JSON schema."""
        if self.values and set(self.values) <= {"true", "false"}:
            return {"type": "boolean"}
        if self.values:
            return {"enum": [self.answer(score) for score in dict.fromkeys(self.values.values())]}
        return {"type": "number", "minimum": 0, "maximum": self.most}


@dataclass(frozen=True)
class Form:
    """fields: by score; a score that it does not have is never judged."""

    name: str
    system: str
    user: str
    fields: Mapping[str, Field]
    reasons: str = ""
    side: int | None = None

    def texts(self, pair: Pair) -> tuple[str, str]:
        """What the system and the user say of a pair."""
        system, user = (SLOT.sub(lambda found: getattr(pair, found[1]), text) for text in (self.system, self.user))
        return system, user

    def seen(self, picture: Image.Image) -> Image.Image:
        """The picture as the judge gets it; in a square it may be out of proportion, as the paper's were."""
        return picture.resize((self.side, self.side), Image.Resampling.LANCZOS) if self.side else picture

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size that a judge gets a picture in."""
        return (self.side, self.side) if self.side else (width, height)

    def schema(self) -> dict[str, Any]:
        """The answer's JSON schema; reasons come first."""
        reasons = {self.reasons: {"type": "string"}} if self.reasons else {}
        named = {**reasons, **{field.name: field.schema() for field in self.fields.values()}}
        return {"type": "object", "properties": named, "required": [*named], "additionalProperties": False}

    def read(self, words: str) -> tuple[float | None, ...]:
        """Positive, negative and quality from a model's words; None for a score that the form lacks.

        The last object with all fields counts: models think aloud first. Raises ValueError that says what is wrong.
        """
        problem = "no JSON object in it"
        for found in _objects(words):
            try:
                missing = [field.name for field in self.fields.values() if field.name not in found]
                if missing:
                    raise ValueError(f"{missing[0]!r} is missing")
                scores = {name: field.score(found[field.name]) for name, field in self.fields.items()}
                return tuple(scores.get(name) for name in SCORES)
            except ValueError as error:
                problem = str(error)
        raise ValueError(problem)

    def answer(self, scores: Mapping[str, float]) -> str:
        """What a model should answer, to give these scores."""
        return json.dumps({field.name: field.answer(scores[name]) for name, field in self.fields.items()})

    def file(self) -> dict[str, Any]:
        """What ``load`` reads."""
        fields = {
            score: {"field": field.name, **({"values": dict(field.values)} if field.values else {"most": field.most})}
            for score, field in self.fields.items()
        }
        told = {key: getattr(self, key) for key in ("system", "user", "reasons", "side") if getattr(self, key)}
        return {**told, "fields": fields}


def load(source: str) -> Form:
    """``ours``, ``paper`` or a file. Raises HostError that says what is wrong with it."""
    path = SHIPPED / f"{source}.json" if source in _shipped() else Path(source)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(data, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise HostError(f"--prompt {source}: {error}; it takes {', '.join(_shipped())} or a JSON file") from None
    try:
        return _form(path.stem, data)
    except (ValueError, TypeError, AttributeError) as error:
        raise HostError(f"--prompt {path}: {error}; docs/neggen.md has the form of such a file") from None


def _shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def _form(name: str, data: Any) -> Form:
    if not isinstance(data, dict) or set(data) - KNOWN or not {"user", "fields"} <= set(data):
        raise ValueError(
            f"expected an object with user, fields and maybe {', '.join(sorted(KNOWN - {'user', 'fields'}))}"
        )
    texts = [data.get(key, "") for key in ("system", "user", "reasons")]
    if not all(isinstance(text, str) for text in texts) or not SLOT.search(texts[0] + texts[1]):
        raise ValueError("system, user and reasons are texts, and one of them asks {question_1} or {question_2}")
    side = data.get("side")
    if side is not None and (not isinstance(side, int) or not 16 <= side <= 8192):
        raise ValueError(f"side is {side!r}; expected 16 to 8192 pixels")
    unknown = sorted(set(data["fields"]) - set(SCORES))
    if unknown or not data["fields"]:
        raise ValueError(f"fields has {', '.join(unknown) or 'nothing'}; expected some of {', '.join(SCORES)}")
    fields = {score: _field(score, data["fields"][score]) for score in SCORES if score in data["fields"]}
    names = [field.name for field in fields.values()] + [texts[2]]
    if len(set(names)) < len(names):
        raise ValueError(f"a field's name is there twice: {', '.join(names)}")
    return Form(name, texts[0], texts[1], fields, texts[2], side)


def _field(score: str, data: Any) -> Field:
    if not isinstance(data, dict) or set(data) - {"field", "values", "most"} or not data.get("field"):
        raise ValueError(f"fields: {score}: expected an object with field, and values or most")
    values, most = data.get("values", {}), data.get("most", 1)
    for value in (*values.values(), most):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"fields: {score}: {value!r} is no number")
    if most <= 0 or any(not 0 <= value <= 1 for value in values.values()):
        raise ValueError(f"fields: {score}: values are from 0 to 1, and most is above 0")
    words = {_word(float(key)) if _is_number(key) else key.strip().lower(): float(v) for key, v in values.items()}
    return Field(str(data["field"]), words, float(most))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) is not None


def _word(answer: Any) -> str:
    """How an answer that is no text is written in ``values``: true, false, or a number."""
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return json.dumps(answer)
    return f"{answer:g}"


def _objects(words: str) -> Iterator[dict]:
    """JSON objects in a text, the last one first."""
    decoder, end = json.JSONDecoder(strict=False), len(words)
    for _ in range(DEEPEST):
        end = words.rfind("{", 0, end)
        if end < 0:
            return
        try:
            found, _ = decoder.raw_decode(words, end)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found
