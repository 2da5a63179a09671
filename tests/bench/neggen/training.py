"""A judge's labels as chats: what frameworks train a multimodal model on. docs/judge.md has the recipe."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hosting.errors import HostError

from neggen.forms import SCORES, Form
from neggen.pairs import Pair
from neggen.store import BadPicture, Cell, Store, opened

SPLITS = 200
"""So many ways to hold prompts out are compared."""

Label = tuple[Cell, dict[str, float]]


@dataclass(frozen=True)
class Asked:
    """validation: the share of the prompts that is held out; seed: of the choice."""

    judge: str
    form: Form
    validation: float
    seed: int


def write(store: Store, target: Path, asked: Asked) -> str:
    """Writes train.jsonl, validation.jsonl, pictures/ and form.json; says what is there.

    A line is {"messages": [system, user, assistant], "images": [path from ``target``]}; in the user's text <image>
    stands where the picture comes. The same prompt is never on both sides. Raises HostError without labels.
    """
    if not 0 <= asked.validation < 1:
        raise HostError(f"--validation {asked.validation:g}: expected a share from 0 to below 1")
    if asked.form.reasons:
        raise HostError(
            f"labels have no reasons, and --prompt {asked.form.name} asks for them in {asked.form.reasons!r}"
        )
    labels, left_out = _labels(store, asked)
    held = _held_out(labels, asked)
    (target / "pictures").mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "validation": 0}
    files = {name: (target / f"{name}.jsonl").open("w", encoding="utf-8") for name in counts}
    try:
        for cell, scores in labels:
            try:
                picture = asked.form.seen(opened(store.path(cell.key)))
            except BadPicture:
                left_out += 1
                continue
            picture.save(target / "pictures" / f"{cell.key}.png")
            side = "validation" if cell.pair.prompt in held else "train"
            files[side].write(json.dumps(_chat(asked.form, cell.pair, f"pictures/{cell.key}.png", scores)) + "\n")
            counts[side] += 1
    finally:
        for file in files.values():
            file.close()
    (target / "form.json").write_text(json.dumps(asked.form.file(), indent=1) + "\n", encoding="utf-8")
    return f"{counts['train']} to train on, {counts['validation']} held out, {left_out} left out: {target}"


def _labels(store: Store, asked: Asked) -> tuple[list[Label], int]:
    """What the judge has a score for of all that the form asks; and of how many pictures not."""
    scores = store.scores()
    if asked.judge not in scores:
        raise HostError(f"--judge {asked.judge}: no such judge; {', '.join(scores) or 'nobody'} has judged")
    labels, left_out = {}, set()
    for cell in store.cells():
        place = cell.key, cell.pair.id
        given = dict(zip(SCORES, scores[asked.judge].get(place, ()), strict=False))
        told = {name: score for name, score in given.items() if score is not None}
        if set(asked.form.fields) <= set(told):
            labels[place] = cell, told
        elif told:
            left_out.add(place)
    if not labels:
        raise HostError(f"{asked.judge} has no picture with all of {', '.join(asked.form.fields)}")
    return list(labels.values()), len(left_out)


def _held_out(labels: Sequence[Label], asked: Asked) -> set[str]:
    """Prompts of which no picture is trained on: of many choices the one whose scores are most like the others'."""
    prompts = sorted({cell.pair.prompt for cell, _ in labels})
    count = round(asked.validation * len(prompts))
    if not count:
        return set()
    chance = random.Random(asked.seed)
    choices = [set(chance.sample(prompts, count)) for _ in range(SPLITS)]
    return min(choices, key=lambda held: _unlike(labels, held))


def _unlike(labels: Sequence[Label], held: set[str]) -> float:
    """How far the mean scores of the two sides are apart."""
    apart = 0.0
    for name in labels[0][1]:
        sides: dict[bool, list[float]] = {True: [], False: []}
        for cell, scores in labels:
            sides[cell.pair.prompt in held].append(scores[name])
        if sides[True] and sides[False]:
            apart += abs(sum(sides[True]) / len(sides[True]) - sum(sides[False]) / len(sides[False]))
    return apart


def _chat(form: Form, pair: Pair, picture: str, scores: dict[str, float]) -> dict:
    system, user = form.texts(pair)
    said = [{"role": "system", "content": system}] if system else []
    said.append({"role": "user", "content": f"<image>{user}"})
    said.append({"role": "assistant", "content": form.answer(scores)})
    return {"messages": said, "images": [picture]}
