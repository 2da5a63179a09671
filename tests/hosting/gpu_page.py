"""The page that `dev.py gpu` writes: Markdown, to be pasted into an issue. Standard library alone."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Iterable
from typing import Any

from hosting.gpu import Found
from hosting.host import ROOT

MOST_LINES = 40
"""Of a list: the page stays one that people read, and that an issue takes."""
PATHS = ("VSF", "fused", "merge", "mask", "reference")


def page(found: Found, version: str | None) -> str:
    """All of it. version: the pack's."""
    checks, times = ([one for one in found.results if one["part"] == part] for part in ("checks", "times"))
    failed, ok = found.states("failed"), found.states("ok")
    verdict = f"**{len(failed)} failed**, {len(ok)} are right." if failed else f"**All {len(ok)} are right.**"
    facts = {**found.facts, "ComfyUI-VSF": f"{version}{commit()}", "date": datetime.date.today().isoformat()}
    parts = [
        f"# ComfyUI-VSF on {facts.get('GPU', 'an unknown GPU')}",
        "\n".join(f"- {name}: {text}" for name, text in facts.items()),
        f"{verdict} `python3 dev.py gpu` took {found.seconds:.0f} s.",
        "## Is it right?",
        "Tiny models of each family. 1.1 (5e-03): VSF's result is 5e-03 of the largest value off what the CPU makes in "
        "fp32, 1.1 times as much as stock ComfyUI's own; the worst of all paths and settings. Off: equal to it to the "
        "last bit.",
        checks_table(checks),
        paths_list(checks),
        "## What does it cost?",
        "Whole models of random weights, 16 negative tokens. A method's time where the plain model's is 1 (medians of "
        "interleaved ratios), and by how much it raises the peak of memory beside the weights.",
        times_table(times) or "None was timed: see below.",
        section("## What failed", failures(failed)),
        section("## Notes", notes(ok)),
        section("## Not run", left_out(found.states("skipped"))),
        "## What to do with this page",
        f"Paste it into an issue, also if all is right: {issues_page()}",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text.encode("ascii", "backslashreplace").decode()


def commit() -> str:
    """The commit of a git clone, and whether its files were changed."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return ""
    if head.returncode or not (ROOT / ".git").exists():
        return ""
    return f", commit {head.stdout.strip()}{' with changes' if changed.stdout.strip() else ''}"


def issues_page() -> str:
    """Where issues are opened, as pyproject.toml says."""
    found = re.search(r'^Issues = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{found[1]}/new" if found else "the repository's issues"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown; nothing without rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""


def first_seen(values: Iterable[Any]) -> list[Any]:
    """Each once, in the order in which they come."""
    return list(dict.fromkeys(values))


def checks_table(results: list[dict[str, Any]]) -> str:
    """A row a model, a column a precision: how far VSF is off in the worst case, beside stock."""
    units = [one["unit"] for one in results if len(one["unit"]) == 2]
    models, precisions = (first_seen(unit[k] for unit in units) for k in (0, 1))

    def cell(model: str, precision: str) -> str:
        own = [one for one in results if one["unit"] == [model, precision]]
        failed = sum(one["state"] == "failed" for one in own)
        words = [f"**{failed} failed**"] if failed else []
        errors = [(one["error"] / one["stock"] if one["stock"] else 0.0, one["error"]) for one in own if "error" in one]
        if errors:
            ratio, error = max(errors)
            words.append(f"{ratio:.1f} ({error:.0e})")
        return ", ".join(words) or "not run"

    def off(model: str) -> str:
        found = [one["state"] for one in results if one["unit"][0] == model and one["check"] == "off"]
        return "no" if "failed" in found else "yes" if "ok" in found else "not run"

    rows = ([model, off(model), *(cell(model, precision) for precision in precisions)] for model in models)
    return table(["model", "off", *precisions], rows)


def paths_list(results: list[dict[str, Any]]) -> str:
    """In the log's words, how each path computed: whether one that was forced really ran."""
    lines = []
    for path in PATHS:
        words = first_seen(one["path"] for one in results if one["check"] == path and one.get("path"))
        if words:
            lines.append(f"- {'left to VSF' if path == 'VSF' else f'VSF_ATTENTION={path}'}: {'; '.join(words)}")
    return "\n".join(lines)


def times_table(results: list[dict[str, Any]]) -> str:
    """A row a shape, a column a method."""
    methods = first_seen(one["check"] for one in results if one["state"] == "ok" and one["check"] != "plain")
    told = {(*one["unit"], one["check"]): one for one in results if one["state"] == "ok"}
    rows = []
    for shape, precision in first_seen((one["unit"][0], one["unit"][-1]) for one in results if "ratio" in one):
        plain = told.get((shape, precision, "plain"))
        cells = [told.get((shape, precision, method)) for method in methods]
        first = f"{plain['seconds']:.3f} s ({plain['runs']} rounds)" if plain else "-"
        rows.append([f"{shape}, {precision}", first, *(time_cell(one) for one in cells)])
    return table(["model", "plain, a step", *methods], rows)


def time_cell(one: dict[str, Any] | None) -> str:
    """1.034, +0.4%."""
    if one is None:
        return "-"
    memory = "" if one.get("memory") is None else f", {100 * (one['memory'] - 1):+.1f}%"
    return f"{one['ratio']:.3f}{memory}"


def section(title: str, lines: list[str]) -> str:
    """A heading over a list; nothing without lines."""
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"- and {len(lines) - MOST_LINES} more"]
    return "\n\n".join([title, "\n".join(lines)]) if lines else ""


def grouped(results: list[dict[str, Any]], *keys: str) -> list[tuple[tuple, list[dict[str, Any]]]]:
    """Results that say the same, together."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for one in results:
        groups.setdefault(tuple(str(one[key]) for key in keys), []).append(one)
    return list(groups.items())


def code(text: str) -> str:
    """An error's text, as it stands."""
    return f"`{text.replace('`', chr(39))}`"


def failures(results: list[dict[str, Any]]) -> list[str]:
    """A line an error: where, and its text."""
    return [
        f"- {', '.join(same[0]['unit'])}: {'; '.join(first_seen(one['check'] for one in same))}: {code(text)}"
        for (_, text), same in grouped(results, "unit", "text")
    ]


def notes(results: list[dict[str, Any]]) -> list[str]:
    """What is worth a word, although it is no failure."""
    told = grouped([one for one in results if one["text"]], "check", "text")
    return [f"- {check}: {text}: {'; '.join(', '.join(one['unit']) for one in same)}" for (check, text), same in told]


def left_out(results: list[dict[str, Any]]) -> list[str]:
    """What there was no time, memory or software for. Where a whole unit was left out, its checks are not listed."""
    lines = []
    for (part, check, text), same in grouped(results, "part", "check", "text"):
        units = first_seen(", ".join(one["unit"]) for one in same)
        named = "; ".join(units) if len(units) <= 4 or not check else f"{len(units)} of the {part}"
        lines.append(f"- {text}: {f'{check}: ' if check and check != 'model' else ''}{named}")
    return lines
