"""A store's results: one HTML file with everything in it, the same as Markdown, and CSV.

The same results give the same bytes; how long things took is left out unless it is asked for.
"""

import base64
import csv
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from intervals import bootstrap
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from neggen.store import Cell, Store
from neggen.templates import Run

HERE = Path(__file__).parent
SCORES = ("positive", "negative", "quality")
THUMBNAIL = 192
YES = 0.5
"""Above it a score counts as yes, as in the paper's agreement tables."""


@dataclass(frozen=True)
class Mean:
    """The mean of a score, its 95% interval, and whether none in the table is higher."""

    value: float
    low: float
    high: float
    best: bool = False

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Row:
    """A run's line in a judge's table; a score is None where the judge gave none."""

    run: Run
    pictures: int
    scores: dict[str, Mean | None]


@dataclass(frozen=True)
class Cost:
    """A run's median seconds a picture, by the server's clock; their ratio to the first run's; and the most memory in
    use on the server's devices while it drew, in GiB."""

    run: str
    seconds: float
    ratio: float
    memory: float | None
    pictures: int


class Results:
    """What a store holds, as tables. Runs, pairs and judges keep one order, whenever they came."""

    def __init__(self, store: Store) -> None:
        self.store, self.runs, self.cells = store, store.runs(), store.cells()
        self.scores = store.scores()
        self.asked, self.errors = len(store.cells(drawn=False)), store.errors()
        self.pairs = list(dict.fromkeys(cell.pair for cell in self.cells))
        self.seeds = sorted({cell.seed for cell in self.cells})
        self.tables = {judge: self._table(judge) for judge in self.scores}

    def of(self, judge: str, cell: Cell) -> tuple[float | None, ...] | None:
        """A judge's scores of a picture."""
        return self.scores[judge].get((cell.key, cell.pair.id))

    def _table(self, judge: str) -> list[Row]:
        rows = []
        for run in self.runs:
            found = {(cell.pair, cell.seed): self.of(judge, cell) for cell in self.cells if cell.run == run.name}
            found = {place: scores for place, scores in found.items() if scores is not None}
            if not found:
                continue
            pairs = [pair for pair in self.pairs if any((pair, seed) in found for seed in self.seeds)]
            nothing = (None, None, None)
            grid = [[found.get((pair, seed), nothing) for seed in self.seeds] for pair in pairs]
            values = np.array(grid, dtype=np.float64)
            means = {name: _mean(values[:, :, k]) for k, name in enumerate(SCORES)}
            rows.append(Row(run, len(found), means))
        return [Row(r.run, r.pictures, {n: _marked(m, n, rows) for n, m in r.scores.items()}) for r in rows]

    def agreement(self) -> list[dict[str, Any]]:
        """Of every two judges, on what both judged: the form of the paper's Tables 4 and 7."""
        out = []
        for one, other in combinations(self.scores, 2):
            both = sorted(self.scores[one].keys() & self.scores[other].keys())
            row: dict[str, Any] = {"judges": (one, other), "pictures": len(both)}
            for k, name in enumerate(SCORES):
                pairs = [(self.scores[one][place][k], self.scores[other][place][k]) for place in both]
                values = np.array([pair for pair in pairs if None not in pair], np.float64).reshape(-1, 2)
                row[name] = _agreement(values)
            out.append(row)
        return out

    def costs(self) -> list[Cost]:
        """Of each run, in the form of Table 6."""
        out: list[Cost] = []
        for run in self.runs:
            mine = [cell for cell in self.cells if cell.run == run.name and cell.seconds]
            if mine:
                seconds = statistics.median(cell.seconds for cell in mine)
                most = max((cell.memory for cell in mine if cell.memory), default=None)
                first = out[0].seconds if out else seconds
                out.append(Cost(run.name, seconds, seconds / first, most and most / 2**30, len(mine)))
        return out

    def sweeps(self, judge: str) -> dict[str, list[tuple[float, Row]]]:
        """Runs of one method that differ in one number, by what they share; three or more make a sweep."""
        found: dict[str, list[tuple[float, Row]]] = {}
        for row in self.tables[judge]:
            numbers = {k: v for k, v in row.run.settings.items() if isinstance(v, (int, float))}
            for name, value in numbers.items():
                rest = ", ".join(f"{k} {v}" for k, v in sorted(row.run.settings.items()) if k != name)
                title = f"{row.run.method}: {name}" + (f" ({rest})" if rest else "")
                found.setdefault(title, []).append((value, row))
        ordered = {title: sorted(rows, key=lambda one: one[0]) for title, rows in found.items()}
        return {title: rows for title, rows in ordered.items() if len({value for value, _ in rows}) >= 3}


def _mean(values: np.ndarray) -> Mean | None:
    if np.isnan(values).all():
        return None
    return Mean(float(np.nanmean(values)), *bootstrap(values))


def _marked(mean: Mean | None, name: str, rows: Sequence[Row]) -> Mean | None:
    if mean is None:
        return None
    top = max(found.value for row in rows if (found := row.scores[name]))
    return Mean(mean.value, mean.low, mean.high, best=mean.value == top)


def _agreement(values: np.ndarray) -> dict[str, float | None]:
    """values [n, 2]: accuracy and F1 of yes and no, Pearson's and Spearman's correlation; None where undefined."""
    from scipy import stats

    if not len(values):
        return dict.fromkeys(("accuracy", "f1", "r", "rho"))
    one, other = (values > YES).T
    hits, either = (one & other).sum(), one.sum() + other.sum()
    varied = len(values) > 2 and all(len(set(column)) > 1 for column in values.T)
    return {
        "accuracy": float((one == other).mean()),
        "f1": float(2 * hits / either) if either else None,
        "r": float(stats.pearsonr(*values.T).statistic) if varied else None,
        "rho": float(stats.spearmanr(*values.T).statistic) if varied else None,
    }


def write(store: Store, folder: Path, pairs_shown: int = 12, times: bool = False, paper: bool = True) -> list[Path]:
    """Writes report.html, report.md, plots, scores.csv and pictures.csv; gives their paths, the HTML first."""
    results = Results(store)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {name: plot for judge in results.tables for name, plot in _plots(results, judge)}
    for name, png in plots.items():
        (folder / f"{name}.png").write_bytes(png)
    data = {
        "results": results,
        "scores": SCORES,
        "plots": plots,
        "costs": results.costs() if times else [],
        "paper": json.loads((HERE / "paper.json").read_text(encoding="utf-8")) if paper else {},
        "sheet": _sheet(results, pairs_shown),
        "templates": store.templates(),
    }
    out = [folder / "report.html", folder / "report.md"]
    for path in out:
        env = Environment(
            loader=FileSystemLoader(HERE),
            autoescape=path.suffix == ".html",
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        env.filters |= {"inline": _inline, "figure": _figure}
        path.write_text(env.get_template(f"{path.name}.j2").render(data), encoding="utf-8")
    out += _tables(results, folder)
    return out


def _inline(png: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(png).decode()}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _tables(results: Results, folder: Path) -> Iterable[Path]:
    bounds = [f"{name}{end}" for name in SCORES for end in ("", "_low", "_high")]
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["judge", "run", "method", "settings", "pictures", *bounds])
        for judge, rows in results.tables.items():
            for row in rows:
                means = [row.scores[name] for name in SCORES]
                numbers = [n for m in means for n in ((m.value, m.low, m.high) if m else ("", "", ""))]
                settings = json.dumps(row.run.settings, sort_keys=True)
                writer.writerow([judge, row.run.name, row.run.method, settings, row.pictures, *numbers])
    with (folder / "pictures.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["judge", "run", "kind", "prompt", "missing_element", "seed", "file", *SCORES])
        for judge in results.scores:
            for cell in results.cells:
                if (scores := results.of(judge, cell)) is not None:
                    place = (cell.run, cell.pair.kind, cell.pair.prompt, cell.pair.missing_element, cell.seed)
                    writer.writerow([judge, *place, f"{cell.key}.png", *("" if s is None else s for s in scores)])
    return folder / "scores.csv", folder / "pictures.csv"


def _sheet(results: Results, pairs_shown: int) -> list[dict[str, Any]]:
    """Each pair's pictures of the first seed, one a run, evenly taken from all pairs."""
    first = {(cell.pair, cell.run): cell for cell in reversed(results.cells)}
    step = max(1, len(results.pairs) // pairs_shown) if pairs_shown else 1
    judge = next(iter(results.scores), None)
    out = []
    for pair in results.pairs[::step][:pairs_shown]:
        shown = []
        for run in results.runs:
            cell = first.get((pair, run.name))
            picture = _thumbnail(results.store.path(cell.key)) if cell else None
            scores = results.of(judge, cell) if cell and judge else None
            shown.append({"run": run.name, "picture": picture, "scores": scores})
        out.append({"pair": pair, "shown": shown})
    return out


def _thumbnail(path: Path) -> bytes:
    image = Image.open(path).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = BytesIO()
    image.save(out, "WEBP", quality=88)
    return out.getvalue()


def _plots(results: Results, judge: str) -> Iterable[tuple[str, bytes]]:
    """Trade-offs (Fig. 7) and sweeps (Fig. 19), as (name, PNG)."""
    slug = "".join(c if c.isalnum() else "-" for c in judge)
    rows = results.tables[judge]
    for name in ("positive", "quality"):
        shown = [row for row in rows if row.scores["negative"] and row.scores[name]]

        def trade_off(axes: Any, name: str = name, shown: list[Row] = shown) -> None:
            for method in dict.fromkeys(row.run.method for row in shown):
                mine = [row for row in shown if row.run.method == method]
                mine.sort(key=lambda row: row.scores["negative"].value)  # type: ignore[union-attr]
                x, y = ([row.scores[n] for row in mine] for n in ("negative", name))
                bars = [np.array([[m.value - m.low, m.high - m.value] for m in side]).T.clip(0) for side in (x, y)]
                ends = [m.value for m in x], [m.value for m in y]
                axes.errorbar(*ends, xerr=bars[0], yerr=bars[1], marker="o", lw=1, elinewidth=0.5, label=method)
                for row, px, py in zip(mine, *ends, strict=True):
                    axes.annotate(row.run.name, (px, py), (4, 4), textcoords="offset points", fontsize=7)
            axes.set(xlabel="negative score (the element is missing)", ylabel=f"{name} score", xlim=(-0.02, 1.02))
            axes.set(ylim=(-0.02, 1.05), title=f"{name} against negative, {judge}")

        if shown:
            yield f"trade-off-{name}-{slug}", _drawn(trade_off)
    for k, (title, points) in enumerate(results.sweeps(judge).items()):

        def sweep(axes: Any, title: str = title, points: list[tuple[float, Row]] = points) -> None:
            for name in SCORES:
                found = [(x, row.scores[name]) for x, row in points if row.scores[name]]
                if found:
                    at = [x for x, _ in found]
                    axes.plot(at, [m.value for _, m in found], marker="o", label=name)
                    axes.fill_between(at, [m.low for _, m in found], [m.high for _, m in found], alpha=0.15)
            axes.set(xlabel=title, ylabel="score", ylim=(-0.02, 1.05), title=judge)

        yield f"sweep-{k + 1}-{slug}", _drawn(sweep)


def _drawn(fill: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    fill(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    out = BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
