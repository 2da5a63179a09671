"""What could be better than VSF? Judges the candidates of ``beyond_methods.py`` on the trained toy models.

    python3 dev.py bench beyond [--family sd3 flux wan] [--out DIR] [--json FILE]

Every candidate is swept over scales, at 4 steps and one pass a step. Its own numbers are chosen on validation pairs
(trees, cars, cakes, boats), and what is reported is of test pairs (other objects, other seeds). The score is the area
under the positive-negative and the quality-negative trade-off: of all (negative, positive) points that a sweep reaches,
the area of what one of them dominates. Intervals are 95% bootstraps over pairs and pictures; the difference from VSF's
area is drawn with the same pairs and pictures for both. Results are kept as ``bench quality`` keeps them. The table
has all families that DIR has.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sampling
import torch
from intervals import interval, resampled
from quality import Job, Settings, Work, sample_work, toy_parser
from sampling import Toy, cases, fingerprint, open_comfyui

STEPS = 4
SCALES = (1.0, 2.0, 3.3, 5.0, 8.0, 12.0)
TUNING_SCALES = (2.0, 5.0)
VSF = {"offset": 0.2}
AREAS = ("positive_area", "quality_area", "area")


def candidates(family: str) -> dict[str, tuple[str, list[Settings]]]:
    """name -> (method, the settings of its own among which validation pairs choose). "scale" is what is swept."""
    blocks = {
        "sd3": ("double:0-1", "double:1-2", "double:0,double:2"),
        "flux": ("double", "single", "double:1,single:0"),
        "wan": ("double:0-1", "double:2-3", "double:1-2"),
    }[family]
    grids: dict[str, Sequence[Settings]] = {
        "norm_limit": [
            {"tau": tau, "order": order, "whole": whole}
            for tau, order, whole in ((1.0, 1, True), (1.5, 1, True), (1.0, 2, False), (1.5, 2, False))
        ],
        "norm_kept": [{}],
        "blend": [{"share": 0.5}, {"share": 0.75}],
        "cap": [{"most": most} for most in (0.02, 0.05, 0.1, 0.2)],
        "saturate": [{"most": most} for most in (0.1, 0.25, 0.5, 1.0)],
        "power": [{"exponent": exponent} for exponent in (-0.5, -0.25, 0.25, 0.5)],
        "relative": [{}],
        "instead": [{}],
        "gate": [{"least": least} for least in (0.1, 0.25, 0.4)],
        "louder_positive": [{"factor": factor} for factor in (1.25, 1.5, 2.0)],
        "undiminished": [{}],
        "balance": [{}],
        "difference": [{}],
        "orthogonal": [{}],
        "project": [{}],
        "distinct": [{"part": part} for part in (0.5, 1.0)],
    }
    out = {name: (name, [{**VSF, **own} for own in grid]) for name, grid in grids.items()}
    windows = [{"end_percent": 0.5}, {"end_percent": 0.75}, {"start_percent": 0.25}, {"start_percent": 0.5}]
    return {
        "vsf": ("vsf", [VSF]),
        **out,
        "offset": ("vsf", [{"offset": offset} for offset in (-1.2, -0.6, 1.0, 2.0)]),
        "schedule": ("vsf", [{**VSF, **window} for window in windows]),
        "some blocks": ("vsf", [{**VSF, "blocks": some} for some in blocks]),
        "nag": ("nag words", [{"blend": blend, "tau": tau} for blend in (0.25, 0.5, 1.0) for tau in (1.5, 5.0)]),
        "nasa": ("nasa words", [{}]),
    }


def sweep(method: str, own: Settings, scales: Sequence[float]) -> list[Job]:
    """One candidate with one choice of its own numbers, at every scale; NAG's and NASA's scales are their phi."""
    phi = {"nag words": 1.5, "nasa words": 0.1}
    if method in phi:
        return [Job(method, {"phi": round(phi[method] * scale, 3), **own, "steps": STEPS}) for scale in scales]
    return [Job(method, {"scale": scale, **own, "steps": STEPS}) for scale in scales]


# -- the score --------------------------------------------------------------------------------------------------------


def dominated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The area of the union of the rectangles from the origin to each point, for points [..., points]."""
    order = np.argsort(-x, axis=-1)
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    best = np.maximum.accumulate(y, axis=-1)
    return (best * (x - np.concatenate([x[..., 1:], np.zeros_like(x[..., :1])], -1))).sum(-1)


class Sweep:
    """What a sweep scored: ``scores`` [3, points, pairs, pictures] of positive, negative and quality."""

    def __init__(self, jobs: Sequence[Job], records: Sequence[Mapping[str, Any]]) -> None:
        """``records``: those of the jobs, one after the other, each over the same cases in the same order."""
        self.jobs = jobs
        each = len(records) // len(jobs)
        self.scores = np.array([_by_pair(records[k * each : (k + 1) * each]) for k in range(len(jobs))])
        self.scores = self.scores.transpose(2, 0, 1, 3)

    def means(self) -> np.ndarray:
        """[3, points]."""
        return self.scores.mean((2, 3))

    def draws(self) -> np.ndarray:
        """[draws, 3, points]: the means of bootstrap samples, the same ones for every sweep of this shape."""
        return resampled(self.scores)

    @staticmethod
    def areas(means: np.ndarray) -> np.ndarray:
        """[..., 3]: positive-negative, quality-negative, and the mean of the two. means: [..., 3, points]."""
        positive, negative, quality = means[..., 0, :], means[..., 1, :], means[..., 2, :]
        both = np.stack([dominated(negative, positive), dominated(negative, quality)], -1)
        return np.concatenate([both, both.mean(-1, keepdims=True)], -1)


def _by_pair(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[pairs, 3, pictures]"""
    pairs: dict[tuple[str, str], list[np.ndarray]] = {}
    for record in records:
        three = np.array([record[f"{name}_scores"] for name in ("positive", "negative", "quality")], dtype=np.float64)
        pairs.setdefault((record["thing"], record["part"]), []).append(three)
    return np.array([np.concatenate(three, 1) for three in pairs.values()])


# -- the study --------------------------------------------------------------------------------------------------------


def study(toy: Toy, weights: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a candidate: its settings, chosen on validation pairs, and its areas on test pairs."""
    path = options.out / toy.family / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    def scored(split: str, sweeps: Sequence[list[Job]], prompts: int) -> list[Sweep]:
        asked = cases(toy.world.pairs[split], prompts)
        work: list[Work] = [(split, job, case) for jobs in sweeps for job in jobs for case in asked]
        records = iter(sample_work(toy, weights, path, work, options.seeds))
        return [Sweep(jobs, list(islice(records, len(jobs) * len(asked)))) for jobs in sweeps]

    wanted = {
        name: one
        for name, one in candidates(toy.family).items()
        if not options.candidates or name in ("vsf", *options.candidates)
    }
    tuned = {name: one for name, one in wanted.items() if len(one[1]) > 1}
    tries = [sweep(method, own, TUNING_SCALES) for method, grid in tuned.values() for own in grid]
    areas_tried = iter([float(Sweep.areas(one.means())[2]) for one in scored("validation", tries, 1)])
    chosen = {name: grid[0] for name, (_, grid) in wanted.items()}
    chosen |= {name: grid[int(np.argmax(list(islice(areas_tried, len(grid)))))] for name, (_, grid) in tuned.items()}
    jobs = [sweep(method, chosen[name], SCALES) for name, (method, _) in wanted.items()]
    sweeps = dict(zip(wanted, scored("test", jobs, options.prompts), strict=True))
    base = sweeps["vsf"]
    base_areas, base_drawn = Sweep.areas(base.means()), Sweep.areas(base.draws())
    rows = []
    for name, one in sweeps.items():
        areas, drawn = Sweep.areas(one.means()), Sweep.areas(one.draws())
        row = {"family": toy.family, "candidate": name, "settings": chosen[name]}
        for k, area in enumerate(AREAS):
            row |= {area: float(areas[k]), f"{area}_interval": interval(drawn[:, k])}
            gain = {f"{area}_gain": float(areas[k] - base_areas[k])}
            row |= gain | {f"{area}_gain_interval": interval(drawn[:, k] - base_drawn[:, k])}
        points = [dict(zip(("positive", "negative", "quality"), map(float, m), strict=True)) for m in one.means().T]
        row["points"] = [{"job": job.note, **point} for job, point in zip(one.jobs, points, strict=True)]
        rows.append(row | {"images": int(np.prod(one.scores.shape[1:]))})
    return rows


def wins(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a candidate's rows, one a family, are above VSF's in at least two families and below in none."""
    intervals = [row["area_gain_interval"] for row in rows]
    return sum(low > 0 for low, _ in intervals) >= 2 and all(high >= 0 for _, high in intervals)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a candidate, best mean gain first; for each family the gain in area with its interval."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    by_name: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["candidate"], {})[row["family"]] = row
    head = ["candidate", *(f"{family}: area, gain, own numbers" for family in families), "wins"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, own_rows in sorted(by_name.items(), key=lambda item: -sum(row["area_gain"] for row in item[1].values())):
        cells = [name]
        for family in families:
            if (row := own_rows.get(family)) is None:
                cells.append("-")
                continue
            low, high = row["area_gain_interval"]
            own = {k: v for k, v in row["settings"].items() if (k, v) != ("offset", VSF["offset"])}
            cells.append(
                f"{row['area']:.3f}, {row['area_gain']:+.3f} [{low:+.3f}, {high:+.3f}] {Job('', own).note}".strip()
            )
        lines.append("| " + " | ".join([*cells, "yes" if wins([*own_rows.values()]) else ""]) + " |")
    return "\n".join(lines)


def draw_charts(rows: Sequence[Mapping[str, Any]], out: Path, most: int = 5) -> None:
    """For each family both trade-offs, of VSF, NAG, NASA and the ``most`` candidates with the largest areas."""
    from charts import chart

    for family in dict.fromkeys(row["family"] for row in rows):
        mine = {row["candidate"]: row for row in rows if row["family"] == family}
        others = sorted((n for n in mine if n not in ("vsf", "nag", "nasa")), key=lambda n: -mine[n]["area"])
        shown = [name for name in ("vsf", "nag", "nasa", *others[:most]) if name in mine]
        for y in ("positive", "quality"):
            curves = {n: [(point["negative"], point[y], "") for point in mine[n]["points"]] for n in shown}
            title = f"{family}, {STEPS} steps: {y} against negative"
            chart(out / f"{family}-{y}-negative.png", title, "negative: the part is gone", y, curves)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = toy_parser(__doc__, "beyond", prompts=2, seeds=2)
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="only these, and VSF")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    open_comfyui()
    torch.set_num_threads(options.threads)
    for family in options.family:
        path = options.weights / f"{family}.safetensors"
        rows = study(Toy(family, path), fingerprint(path), options)
        (options.out / family / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    studied = [path for name in sampling.FAMILIES if (path := options.out / name / "rows.json").exists()]
    rows = [row for path in studied for row in json.loads(path.read_text())]
    draw_charts(rows, options.out)
    (options.out / "table.md").write_text(table(rows) + "\n")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
