"""A store's results: one HTML file with everything in it, the same as Markdown, and CSV.

The same results give the same bytes; how long things took is left out unless it is asked for.
"""

import base64
import csv
import json
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from hosting.errors import HostError
from intervals import bootstrap
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from neggen.forms import SCORES
from neggen.store import BadPicture, Cell, Store, opened
from neggen.templates import Run
from neggen.words import plain, slug

HERE = Path(__file__).parent
THUMBNAIL = 192
Found = dict[str, dict[tuple[str, str], tuple[float | None, ...]]]
"""By judge, then by (key, pair id): positive, negative, quality."""
LEVELS = {0: "as they were given", 2: "above 0.5 is yes, all else is no", 3: "the nearest of 0, 0.5 and 1"}
"""Rules for positive and negative scores; the paper's Tables 1, 2 and 5 have the second, its Table 8 the third."""
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
    """A run's median seconds a picture, by the server's clock, each picture once and none that a model was loaded for;
    their ratio to the first run's; and the most memory in use on the server's devices while it drew, in GiB."""

    run: str
    seconds: float
    ratio: float
    memory: float | None
    pictures: int


class Results:
    """What a store holds, as tables. Runs, pairs and judges keep one order, whenever they came.

    levels: a rule of ``LEVELS``; positive_from: the judge whose positive scores all others' tables have, or "". Both
    change the tables and their plots alone.
    """

    def __init__(self, store: Store, levels: int = 0, positive_from: str = "") -> None:
        self.store, self.runs, self.cells = store, store.runs(), store.cells()
        self.given: Found = store.scores()
        if positive_from and positive_from not in self.given:
            known = ", ".join(self.given) or "nobody"
            raise HostError(f"--positive-from {plain(positive_from)}: no such judge; {known} has judged")
        self.positive_from, self.levels = positive_from, levels
        positive = self.given.get(positive_from)
        self.scores: Found = {
            judge: {
                place: (_level(positive.get(place, (None,))[0] if positive else one, levels), _level(two, levels), q)
                for place, (one, two, q) in found.items()
            }
            for judge, found in self.given.items()
        }
        self.asked, self.errors = len(store.cells(drawn=False)), store.errors()
        self.machines = store.machines()
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
        for one, other in combinations(self.given, 2):
            row: dict[str, Any] = {"judges": (one, other)}
            row["pictures"] = len(self.given[one].keys() & self.given[other].keys())
            out.append({**row, **{name: _agreement(self.both(one, other, name)) for name in SCORES}})
        return out

    def both(self, one: str, other: str, name: str) -> np.ndarray:
        """[n, 2]: two judges' scores of one kind, of what both judged."""
        k, places = SCORES.index(name), sorted(self.given[one].keys() & self.given[other].keys())
        pairs = [(self.given[one][place][k], self.given[other][place][k]) for place in places]
        return np.array([pair for pair in pairs if None not in pair], np.float64).reshape(-1, 2)

    def costs(self) -> list[Cost]:
        """Of each run, in the form of Table 6."""
        out: list[Cost] = []
        for run in self.runs:
            mine = {cell.key: cell for cell in self.cells if cell.run == run.name and cell.seconds}.values()
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


def _level(score: float | None, levels: int) -> float | None:
    if score is None or not levels:
        return score
    return float(score > YES) if levels == 2 else round(2 * score) / 2


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


def write(
    store: Store,
    folder: Path,
    pairs_shown: int = 12,
    times: bool = False,
    paper: bool = True,
    levels: int = 0,
    positive_from: str = "",
) -> list[Path]:
    """Writes report.html, report.md, plots, scores.csv and pictures.csv; gives their paths, the HTML first."""
    results = Results(store, levels, positive_from)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {name: plot for judge in results.tables for name, plot in _plots(results, judge)}
    plots |= dict(_scatters(results))
    sheet, lost = _sheet(results, pairs_shown)
    for name, png in plots.items():
        (folder / f"{name}.png").write_bytes(png)
    data = {
        "results": results,
        "scores": SCORES,
        "rule": LEVELS[levels] if levels else "",
        "lost": lost,
        "plots": plots,
        "costs": results.costs() if times else [],
        "paper": json.loads((HERE / "paper.json").read_text(encoding="utf-8")) if paper else {},
        "sheet": sheet,
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
        env.filters |= {"inline": _inline, "figure": _figure, "cell": _markdown}
        path.write_text(env.get_template(f"{path.name}.j2").render(data), encoding="utf-8")
    out += _tables(results, folder)
    return out


def _inline(png: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(png).decode()}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _markdown(text: object) -> str:
    """Text as Markdown shows it, in one line of a table: nothing in it is a link, a picture, a tag or a cell's end."""
    return re.sub(r"([\\`*_\[\]|<>&!#~$])", r"\\\1", " ".join(str(text).split()))


def _csv(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and re.match(r"[\t\r]|\s*[=+\-@]", value) else value


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
                writer.writerow(map(_csv, [judge, row.run.name, row.run.method, settings, row.pictures, *numbers]))
    with (folder / "pictures.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["judge", "run", "kind", "prompt", "missing_element", "seed", "file", *SCORES])
        for judge in results.scores:
            for cell in results.cells:
                if (scores := results.of(judge, cell)) is not None:
                    place = (cell.run, cell.pair.kind, cell.pair.prompt, cell.pair.missing_element, cell.seed)
                    told = ["" if score is None else score for score in scores]
                    writer.writerow(map(_csv, [judge, *place, f"{cell.key}.png", *told]))
    return folder / "scores.csv", folder / "pictures.csv"


def _sheet(results: Results, pairs_shown: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Each pair's pictures of the first seed, one a run, evenly taken from all pairs; and what could not be read."""
    first = {(cell.pair, cell.run): cell for cell in reversed(results.cells)}
    step = max(1, len(results.pairs) // pairs_shown) if pairs_shown else 1
    judge = next(iter(results.scores), None)
    paths = dict.fromkeys(results.store.path(cell.key) for cell in results.cells)
    out, lost = [], [f"{path} is no whole picture (it is gone)" for path in paths if not path.exists()]
    for pair in results.pairs[::step][:pairs_shown]:
        shown = []
        for run in results.runs:
            cell = first.get((pair, run.name))
            try:
                picture = _thumbnail(results.store.path(cell.key)) if cell else None
            except BadPicture as error:
                picture = None
                lost += [str(error)] if results.store.path(cell.key).exists() else []
            scores = results.of(judge, cell) if cell and judge else None
            shown.append({"run": run.name, "picture": picture, "scores": scores})
        out.append({"pair": pair, "shown": shown})
    return out, lost


def _thumbnail(path: Path) -> bytes:
    image = opened(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = BytesIO()
    image.save(out, "WEBP", quality=88)
    return out.getvalue()


def _plots(results: Results, judge: str) -> Iterable[tuple[str, bytes]]:
    """Trade-offs (Fig. 7) and sweeps (Fig. 19), as (name, PNG)."""
    name_of_judge, shown_judge = slug(judge), plain(judge, 60)
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
                    right = px > 0.7
                    style = {"textcoords": "offset points", "fontsize": 7, "ha": "right" if right else "left"}
                    axes.annotate(plain(row.run.name, 40), (px, py), (-4 if right else 4, 4), **style)
            axes.set(xlabel="negative score (the element is missing)", ylabel=f"{name} score", xlim=(-0.02, 1.02))
            axes.set(ylim=(-0.02, 1.05), title=f"{name} against negative, {shown_judge}")

        if shown:
            yield f"trade-off-{name}-{name_of_judge}", _drawn(trade_off)
    for k, (title, points) in enumerate(results.sweeps(judge).items()):

        def sweep(axes: Any, title: str = title, points: list[tuple[float, Row]] = points) -> None:
            for name in SCORES:
                found = [(x, row.scores[name]) for x, row in points if row.scores[name]]
                if found:
                    at = [x for x, _ in found]
                    axes.plot(at, [m.value for _, m in found], marker="o", label=name)
                    axes.fill_between(at, [m.low for _, m in found], [m.high for _, m in found], alpha=0.15)
            axes.set(xlabel=plain(title, 90), ylabel="score", ylim=(-0.02, 1.05), title=shown_judge)

        yield f"sweep-{k + 1}-{name_of_judge}", _drawn(sweep)


def _scatters(results: Results) -> Iterable[tuple[str, bytes]]:
    """Fig. 10 for every two judges, where their scores vary."""
    for one, other in combinations(results.given, 2):
        values = results.both(one, other, "quality")
        if len(values) >= 3 and all(len(set(column)) > 1 for column in values.T):
            yield f"quality-{slug(one)}-{slug(other)}", _drawn(partial(_scatter, values=values, one=one, other=other))


def _scatter(axes: Any, values: np.ndarray, one: str, other: str) -> None:
    """values [n, 2]: quality scores of two judges, a dot a picture, larger where several are; and the line of least
    squares."""
    from scipy import stats

    fit = stats.linregress(*values.T)
    places, counts = np.unique(values, axis=0, return_counts=True)
    axes.scatter(*places.T, s=16 + 12 * np.sqrt(counts - 1), alpha=0.6, label=f"{len(values)} pictures")
    ends = np.array([values[:, 0].min(), values[:, 0].max()])
    words = f"y = {fit.slope:.2f}x {fit.intercept:+.2f}; r = {fit.rvalue:.2f}, p = {fit.pvalue:.2g}"
    axes.plot(ends, fit.slope * ends + fit.intercept, color="tab:red", label=words)
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":", label="the same score")
    axes.set(xlabel=f"quality by {plain(one, 60)}", ylabel=f"quality by {plain(other, 60)}")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.05), title="quality: how far two judges agree")


def _drawn(fill: Callable[[Any], None]) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # names in scripts that the font lacks
        figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        fill(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="best")
        out = BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()
