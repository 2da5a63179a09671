"""Does it remove what it is told to? Samples the trained toy models with every method and counts what comes out.

    python3 dev.py bench quality [--quick] [--json FILE] [--out DIR]

Scores: positive, the object is there; negative, the unwanted part is gone; quality, the share of pixels whose colour
the world's renderer could have drawn. Intervals are 95% bootstraps over (object, part) pairs, and over pictures within
them. Validation pairs choose the settings of VSF, NAG, NASA and ONG; test pairs (other objects, other seeds) measure
them, with 216 pictures a row. Results are appended to DIR/results.jsonl as they come, and what is there already is not
sampled again.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sampling
import torch
from intervals import bootstrap
from sampling import WEIGHTS, Case, Toy, cases, fingerprint, open_comfyui, score

Settings = dict[str, Any]
FIRST_SEED = {"validation": 1000, "test": 2000}
CHOSEN = ("vsf", "nag", "nasa", "ong")
"""Methods whose setting is chosen, each among its own, on the same pairs."""
KEEP_OBJECT, KEEP_QUALITY = 0.90, 0.95
"""The setting chosen is the one that removes most on validation pairs among those that keep the object this often, and
this share of the quality without any negative."""


@dataclass(frozen=True)
class Job:
    """One method with one setting."""

    method: str
    settings: Settings

    @property
    def note(self) -> str:
        """The setting in a few characters."""
        return ", ".join(
            f"{key} {value:g}" if isinstance(value, float | int) else f"{key} {value}"
            for key, value in self.settings.items()
        )


def sweep(method: str, key: str, values: Iterable[float], **fixed: float) -> list[Job]:
    return [Job(method, {key: value, **fixed}) for value in values]


SCALES = (0.5, 1.0, 2.0, 3.3, 5.0, 8.0, 12.0)
OFFSETS = (-1.2, -0.6, 0.0, 0.5, 1.0, 2.0)
ONG = {"joint": (0.5, 1.0, 1.5, 2.0, 3.0, 5.0), "cross": (0.3, 0.4, 0.5, 1.0, 2.0, 3.0, 5.0)}
"""Its scales. In cross-attention no image is in Z+ and Z-: of words alone more of Z- is orthogonal to Z+."""


def all_jobs(family: str, split: str, quick: bool) -> list[Job]:
    """What to run. On validation pairs only what is chosen there."""
    ong = ONG["cross" if family == "wan" else "joint"]
    if quick:
        some = [*sweep("vsf", "scale", SCALES[1::2], offset=0.2), Job("vsf", {"scale": 3.3, "offset": 1.0})]
        others = [Job("cfg", {"cfg": 3.0}), Job("nag", {"phi": 11, "blend": 0.5, "tau": 5}), Job("nasa", {"phi": 0.4})]
        others.append(Job("ong", {"scale": ong[3]}))
        return [Job("none", {}), *some, *others] if split == "test" else []
    ours = [
        Job("none", {}),
        *sweep("vsf", "scale", SCALES, offset=0.2),
        *(Job("vsf", {"scale": 3.3, "offset": offset}) for offset in OFFSETS),
    ]
    rivals = [
        Job("nag", {"phi": 4, "blend": 0.125, "tau": 2.5}),
        Job("nag", {"phi": 4, "blend": 0.25, "tau": 2.5}),
        Job("nag", {"phi": 11, "blend": 0.5, "tau": 5}),
        Job("nag", {"phi": 20, "blend": 0.5, "tau": 5}),
        Job("nag", {"phi": 20, "blend": 1.0, "tau": 5}),
        *sweep("nasa", "phi", (0.15, 0.25, 0.4, 0.5, 0.8)),
        *sweep("ong", "scale", ong),
    ]
    if split == "validation":
        return [*ours, *rivals]
    others = [
        *sweep("cfg", "cfg", (2.0, 3.0, 4.0), steps=8),
        *sweep("cfg", "cfg", (4.0,), steps=28),
        *rivals,
        *(Job(f"{job.method} words", job.settings) for job in rivals),
        *sweep("ong per head", "scale", ong[2:5]),
        *sweep("wef", "scale", (0.5, 1.0, 2.0)),
        *sweep("vsf padded", "scale", (0.5, 1.0, 3.3), offset=0.2),
        *sweep("vsf", "scale", (3.8,), offset=0.2),
    ]
    if family == "wan":  # Eq. 9 has neither a mask nor a duplicate, in the released pipeline too
        return [*ours, *others]
    return [
        *ours,
        *others,
        *sweep("vsf released", "scale", (3.3, 3.8, 5.0, 8.0, 12.0), offset=0.2),
        *sweep("vsf released", "scale", (3.5, 6.0) if family == "flux" else (), offset=0.0),
        *sweep("vsf no mask", "scale", (2.0, 3.3, 8.0), offset=0.2),
        *sweep("vsf no duplication", "scale", (1.0, 3.3, 8.0)),
    ]


Work = tuple[str, Job, Case]
"""A split, and what to sample of it."""

# -- sampling ---------------------------------------------------------------------------------------------------------


def sample_all(toy: Toy, weights: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A family's results: those on disk, and what was missing. One record a job and case."""
    path = options.out / "results.jsonl"
    if options.report:
        return [r for r in on_disk(path).values() if (r["family"], r["weights"]) == (toy.family, weights)]
    prompts, count = (1, 2) if options.quick else (options.prompts, options.seeds)
    wanted: list[Work] = []
    for split, pairs in toy.world.pairs.items():
        if options.split not in (split, "both"):
            continue
        for job in all_jobs(toy.family, split, options.quick):
            if options.methods and job.method not in options.methods:
                continue
            wanted += [(split, job, case) for case in cases(pairs, prompts)]
    return sample_work(toy, weights, path, wanted, count)


def on_disk(path: Path) -> dict[str, dict[str, Any]]:
    """The records in a file of results, by ``key_of``."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {key_of(record): record for record in records}


def sample_work(toy: Toy, weights: str, path: Path, wanted: Sequence[Work], count: int) -> list[dict[str, Any]]:
    """A record for each piece of work, ``count`` pictures: from the file, or sampled and appended to it."""
    from tqdm import tqdm

    done, family, out = on_disk(path), toy.family, []
    with path.open("a") as file:
        for split, job, case in tqdm(wanted, desc=f"{family}: sampling", unit="prompt"):
            seeds = list(range(FIRST_SEED[split], FIRST_SEED[split] + count))
            record = {
                "family": family,
                "weights": weights,
                "split": split,
                **asdict(job),
                **asdict(case),
                "seeds": seeds,
            }
            if key_of(record) not in done:
                scores = asdict(score(toy.pictures(case, job.method, job.settings, seeds), case))
                done[key_of(record)] = {**record, **{f"{name}_scores": values for name, values in scores.items()}}
                file.write(json.dumps(done[key_of(record)]) + "\n")
                file.flush()
            out.append(done[key_of(record)])
    return out


def key_of(record: Mapping[str, Any]) -> str:
    """What makes a record the same piece of work."""
    names = ("family", "weights", "split", "method", "settings", "thing", "part", "caption", "seeds")
    return json.dumps([record[name] for name in names])


# -- figures ----------------------------------------------------------------------------------------------------------


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each family, split and job: means and 95% intervals. Jobs that are not done yet are left out."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        job = [record[name] for name in ("family", "split", "method", "settings")]
        groups.setdefault(json.dumps(job), []).append(record)
    rows = []
    cases_done: dict[str, int] = {}
    for members in groups.values():
        split = members[0]["split"]
        cases_done[split] = max(len(members), cases_done.get(split, 0))
    for key, members in groups.items():
        family, split, method, settings = json.loads(key)
        if len(members) < cases_done[split]:
            continue
        row = {"family": family, "split": split, "method": method, "settings": settings}
        for name in ("positive", "negative", "quality"):
            pairs: dict[tuple[str, str], list[float]] = {}
            for member in members:
                pairs.setdefault((member["thing"], member["part"]), []).extend(member[f"{name}_scores"])
            values = np.array(list(pairs.values()), dtype=np.float64)
            row |= {name: float(values.mean()), f"{name}_interval": bootstrap(values)}
        rows.append(row | {"images": sum(len(member["seeds"]) for member in members)})
    return rows


def choose(rows: Sequence[Mapping[str, Any]], method: str = "vsf") -> Settings | None:
    """A method's setting: decided on validation rows alone."""
    rows = [row for row in rows if row["split"] == "validation"]
    least = max((KEEP_QUALITY * row["quality"] for row in rows if row["method"] == "none"), default=0.0)
    ours = [row for row in rows if row["method"] == method]
    keeping = [row for row in ours if row["positive"] >= KEEP_OBJECT and row["quality"] >= least]
    return max(keeping, key=lambda row: row["negative"])["settings"] if keeping else None


def table(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Settings | None]) -> str:
    """Markdown."""
    lines = [
        "| split | method | settings | positive | negative | quality | images |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = " (chosen)" if row["settings"] == chosen.get(row["method"]) else ""
        cells = [row["split"], row["method"], Job(row["method"], row["settings"]).note + mark]
        for name in ("positive", "negative", "quality"):
            low, high = row[f"{name}_interval"]
            cells.append(f"{row[name]:.3f} [{low:.2f}, {high:.2f}]")
        lines.append("| " + " | ".join([*cells, str(row["images"])]) + " |")
    return "\n".join(lines)


def draw_charts(rows: Sequence[Mapping[str, Any]], out: Path, family: str) -> None:
    from charts import Point, chart

    rows = [row for row in rows if row["split"] == "test"]

    def curve(x: str, y: str, members: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
        return [(row[x], row[y], f"{row['settings'].get(key, '')}") for row in members]

    strength = {"cfg": "cfg", "nag": "phi", "nasa": "phi"}
    rows = [row for row in rows if not row["method"].endswith(" words")]  # a legend can be read with so many
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = f"cfg, {row['settings'].get('steps', 8)} steps" if row["method"] == "cfg" else row["method"]
        if row["method"] not in ("vsf", "vsf released") or row["settings"]["offset"] == 0.2:
            series.setdefault(name, []).append(row)
    for y in ("positive", "quality"):
        curves = {name: curve("negative", y, m, strength.get(m[0]["method"], "scale")) for name, m in series.items()}
        title = f"{family}: {y} against negative"
        chart(out / f"{y}-negative.png", title, "negative: the part is gone", y, curves)
    ours = [row for row in rows if row["method"] == "vsf"]
    for key, other, fixed in (("scale", "offset", 0.2), ("offset", "scale", 3.3)):
        members = sorted((r for r in ours if r["settings"][other] == fixed), key=lambda r: r["settings"][key])
        curves = {y: [(r["settings"][key], r[y], "") for r in members] for y in ("positive", "negative", "quality")}
        chart(out / f"{key}.png", f"{family}: VSF's {key} ({other} {fixed})", key, "score", curves)


def draw_contact_sheet(toy: Toy, chosen: Mapping[str, Settings | None], out: Path, every: int = 1) -> None:
    from charts import contact_sheet

    columns = {
        "nothing": ("none", {}),
        "VSF": ("vsf", chosen["vsf"] or {"scale": 2.0, "offset": 0.2}),
        "NAG": ("nag", chosen["nag"] or {"phi": 11, "blend": 0.5, "tau": 5}),
        "NASA": ("nasa", chosen["nasa"] or {"phi": 0.4}),
        "ONG": ("ong", chosen["ong"] or {"scale": 1.0}),
        "CFG 3": ("cfg", {"cfg": 3.0}),
    }
    seeds = [FIRST_SEED["test"], FIRST_SEED["test"] + 1]
    rows = {}
    for case in cases(toy.world.pairs["test"], 1)[::every]:
        rows[f'"{case.caption}", not "{case.negative}"'] = [
            stills(toy.pictures(case, method, settings, seeds)) for method, settings in columns.values()
        ]
    contact_sheet(out / "contact-sheet.png", list(columns), rows, zoom=3 if toy.world.side == 32 else 1)


def stills(pictures: np.ndarray) -> np.ndarray:
    """Pictures as they are; of each clip its first and last frame."""
    return pictures if pictures.ndim == 4 else np.concatenate([pictures[:1, :, 0], pictures[:1, :, -1]])


def toy_parser(description: str | None, out: str, prompts: int, seeds: int) -> argparse.ArgumentParser:
    """The options of a benchmark that samples the toys."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--out", type=Path, default=Path("bench-output", out), metavar="DIR")
    parser.add_argument("--family", nargs="+", choices=sampling.FAMILIES, default=list(sampling.FAMILIES))
    parser.add_argument("--weights", type=Path, metavar="FOLDER", default=WEIGHTS, help="default: the shipped ones")
    parser.add_argument("--prompts", type=int, default=prompts, help="prompts for each (test) pair")
    parser.add_argument("--seeds", type=int, default=seeds, help="pictures for each prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = toy_parser(__doc__, "quality", prompts=len(sampling.PROMPTS), seeds=6)
    parser.add_argument("--quick", action="store_true", help="a few settings and pictures; under 5 minutes")
    parser.add_argument("--report", action="store_true", help="sample nothing; report on what is on disk")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help='only these, e.g. none vsf "vsf released"')
    parser.add_argument("--split", choices=["validation", "test", "both"], default="both")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    open_comfyui()
    torch.set_num_threads(options.threads)
    rows = []
    for family in options.family:
        out = options.out / family
        out.mkdir(parents=True, exist_ok=True)
        path = options.weights / f"{family}.safetensors"
        toy = Toy(family, path)
        family_rows = summarise(sample_all(toy, fingerprint(path), options))
        chosen = {method: choose(family_rows, method) for method in CHOSEN}
        text = table(family_rows, chosen)
        (out / "table.md").write_text(text + "\n")
        draw_charts(family_rows, out, family)
        draw_contact_sheet(toy, chosen, out, every=4 if options.quick else 1)
        print(f"{text}\n\n{family}: settings chosen on validation pairs: {chosen}; charts: {out}", flush=True)
        rows += family_rows
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
