"""API-format graphs with slots: ``"{{prompt}}"`` in place of an input's value.

A template file is what ComfyUI's "Export (API)" writes, with slots put in (one method, named as the file), or
``{"graph": ..., "methods": {NAME: PATCH}, "slots": {NAME: DEFAULT}, "runs": {...}}``: each method changes the graph by
a JSON merge patch (RFC 7386). ``prompt``, ``negative`` and ``seed`` are filled from the pair and the run, all other
slots from a run's settings.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosting.client import Prompt
from hosting.errors import HostError

from neggen.words import plain

SHIPPED = Path(__file__).with_name("templates")
SLOT = re.compile(r"\{\{\s*(\w+)\s*\}\}")
PAIR_SLOTS = ("prompt", "negative", "seed")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A row of the tables: one method with one setting."""

    name: str
    method: str
    settings: Settings


@dataclass(frozen=True)
class Template:
    """``methods``: each one's whole graph; ``runs``: what is run when nothing else is asked for."""

    name: str
    methods: Mapping[str, Prompt]
    slots: Settings
    runs: Sequence[Run]

    def fill(self, run: Run, prompt: str, negative: str, seed: int) -> Prompt:
        """The graph to queue. A slot that is a whole value keeps the type of what fills it."""
        values = {**self.slots, **run.settings, "prompt": prompt, "negative": negative, "seed": seed}
        return _filled(self.methods[run.method], values, f"template {self.name}, run {run.name}")

    def check(self, run: Run) -> Run:
        """The run, if this template can do it."""
        if run.method not in self.methods:
            raise HostError(f"template {self.name} has no method {run.method!r}; it has {', '.join(self.methods)}")
        own = sorted(slots_of(self.methods[run.method]) - set(PAIR_SLOTS))
        for name in run.settings:
            if name not in own:
                has = ", ".join(own) or "none"
                raise HostError(f"run {run.name!r}: method {run.method} has no slot {name!r}; its slots: {has}")
        self.fill(run, "", "", 0)
        return run


def load(source: str) -> Template:
    """A shipped template by name, or a file."""
    path = Path(source) if source.endswith(".json") else SHIPPED / f"{source}.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # half a character can neither be kept nor sent
    except (OSError, ValueError, RecursionError) as error:
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
        raise HostError(f"template {source}: {error}; --template takes {shipped}, or a .json file") from None
    if not isinstance(data, dict):
        raise HostError(f"template {path} is no object")
    if is_graph(data):
        data = {"graph": data, "methods": {path.stem: {}}}
    methods = {name: merged(data.get("graph", {}), patch) for name, patch in data.get("methods", {}).items()}
    for name, graph in methods.items():
        if not is_graph(graph):
            raise HostError(f"template {path}, method {name}: not a graph in the API's format (use Export (API))")
        if missing := {"prompt", "seed"} - slots_of(graph):
            raise HostError(f"template {path}, method {name}: no slot {', '.join(sorted(missing))}; write {{{{seed}}}}")
    if not methods:
        raise HostError(f"template {path} has no methods")
    runs = data.get("runs") or {name: {"method": name} for name in methods}
    listed = [Run(name, run["method"], {k: v for k, v in run.items() if k != "method"}) for name, run in runs.items()]
    template = Template(path.stem, methods, data.get("slots", {}), listed)
    for run in listed:
        template.check(run)
    return template


def parse_run(text: str) -> list[Run]:
    """``[NAME=]METHOD[:key=v[,v ...]]...``: several values make a run for each combination."""
    head, *settings = plain(text, len(text)).split(":")
    name, _, method = head.rpartition("=")
    choices: dict[str, list[Any]] = {}
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not equals or not values:
            raise HostError(f"--run {text}: {setting!r} is not key=value")
        choices[key] = [_number(value) for value in values.split(",")]
    made = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return [Run(name if name and len(made) == 1 else label(name or method, one), method, one) for one in made]


def label(method: str, settings: Settings) -> str:
    """A run's name from its settings."""
    return " ".join([method, *(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())])


def is_graph(data: Mapping[str, Any]) -> bool:
    """Whether this is a graph in the API's format."""
    return bool(data) and all(isinstance(n, dict) and "class_type" in n and "inputs" in n for n in data.values())


def slots_of(graph: Any) -> set[str]:
    """The names of all slots."""
    return set(SLOT.findall(json.dumps(graph)))


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386: objects merge, null removes, all else replaces."""
    if not isinstance(patch, dict):
        return patch
    out = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key), value)
    return out


def _filled(value: Any, values: Settings, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one, values, where) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, values, where) for one in value]
    if not isinstance(value, str):
        return value
    for name in SLOT.findall(value):
        if name not in values:
            raise HostError(f"{where}: nothing fills the slot {name!r}; give it in the run, or a default in 'slots'")
    whole = SLOT.fullmatch(value)
    return values[whole[1]] if whole else SLOT.sub(lambda found: str(values[found[1]]), value)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
