"""What the report says of scores that are known, and that it stands on its own in a browser."""

import csv
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hosting.errors import HostError
from matplotlib.figure import Figure
from PIL import Image

from neggen import pairs, report, templates
from neggen.store import Store

RUNS = ["none", "VSF <best>=vsf:scale=3:offset=0", "vsf:scale=1,2,4:offset=0"]


def filled(folder, order, seconds=1.0):
    """A store of 4 pairs, 2 seeds and 5 runs, drawn and judged in the given order; scores depend on the picture."""
    store, template = Store(folder), templates.load("toy_sd3")
    runs = [run for text in RUNS for run in templates.parse_run(text)]
    store.plan(template, runs, pairs.load("toy")[:4], [1, 2])
    for job in store.jobs()[::order]:
        png = io.BytesIO()
        Image.new("RGB", (256, 256), f"#{job.key[:6]}").save(png, "PNG")
        store.drawn(job.key, png.getvalue(), seconds, int(seconds * 2**30))
    for cell in store.cells()[::order]:
        chance = np.random.default_rng(int(cell.key[:8], 16)).random(4).round(3)
        store.score("person", cell, [1.0, float(chance[1] > 0.5), float(chance[2])])
        if cell.seed == 1:
            store.score("a/model <b>", cell, [1.0, float(chance[3] > 0.5), float(chance[2]) / 2])
    return store


@pytest.fixture
def store(tmp_path):
    made = filled(tmp_path / "store", 1)
    yield made
    made.close()


def opened(path, screenshot):
    """Opens a report in the browser: it asks for nothing else, all its pictures are there, nothing complains.

    In a thread of its own: the browser tests' driver may keep an event loop running in this one.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(look, path, screenshot).result()


def look(path, screenshot):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ["VSF_CHROMIUM"], args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        asked, problems = [], []
        page.on("request", lambda request: asked.append(request.url) if request.url[:5] != "data:" else None)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
        text = page.inner_text("body")
        page.screenshot(path=screenshot, full_page=True)
        browser.close()
    assert asked == [path.as_uri()] and not problems and widths and all(widths)
    return text


def test_tables_are_the_means_of_the_scores(store, tmp_path):
    report.write(store, tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report" / "scores.csv").open()))
    every = list(csv.DictReader((tmp_path / "report" / "pictures.csv").open()))
    assert len(rows) == 2 * 5 and len(every) == 5 * 4 * 2 + 5 * 4
    for row in rows:
        mine = [one for one in every if (one["judge"], one["run"]) == (row["judge"], row["run"])]
        assert int(row["pictures"]) == len(mine) == (8 if row["judge"] == "person" else 4)
        for name in report.SCORES:
            value, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
            assert value == pytest.approx(np.mean([float(one[name]) for one in mine])) and low <= value <= high
    assert any(float(row["quality_low"]) < float(row["quality"]) < float(row["quality_high"]) for row in rows)
    markdown = (tmp_path / "report" / "report.md").read_text()
    best = max((row for row in rows if row["judge"] == "person"), key=lambda row: float(row["quality"]))
    assert f"**{float(best['quality']):.3f} [" in markdown
    assert "| VSF Strong | 0.870 | 0.545 | 0.952 |" in markdown.split("Nothing below was measured here")[1]


def test_agreement(store):
    (row,) = report.Results(store).agreement()
    assert row["judges"] == ("a/model <b>", "person") and row["pictures"] == 20
    assert row["quality"]["r"] == pytest.approx(1.0) and row["quality"]["rho"] == pytest.approx(1.0)
    assert row["positive"] == {"accuracy": 1.0, "f1": 1.0, "r": None, "rho": None}
    values = np.array([[1, 1], [1, 1], [0.5, 1], [1, 0], [0, 0]])
    assert report._agreement(values)["f1"] == pytest.approx(2 / 3)
    assert report._agreement(values)["accuracy"] == pytest.approx(0.6)


def test_sweeps_hold_all_else_equal(store):
    ((title, points),) = report.Results(store).sweeps("person").items()
    assert title == "vsf: scale (offset 0)" and [value for value, _ in points] == [1, 2, 3, 4]


def test_the_order_of_work_does_not_show(store, tmp_path):
    other = filled(tmp_path / "other", -1, seconds=5.0)
    for made, name in ((store, "a"), (other, "b")):
        files = report.write(made, tmp_path / name)
        files += sorted((tmp_path / name).glob("*.png"))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 4 + 2 * 3 + 1
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_unfinished_work_shows(tmp_path):
    store, template = Store(tmp_path / "store"), templates.load("toy_sd3")
    store.plan(template, template.runs[:2], pairs.load("toy")[:2], [1])
    job = store.jobs()[0]
    store.failed(job.key, "no <memory>")
    html = report.write(store, tmp_path / "report")[0].read_text()
    assert "0 of 4 pictures" in html and "1: no &lt;memory&gt;" in html and "Nothing is judged yet" in html


def test_it_opens_in_a_browser(store, tmp_path):
    (html, *_) = report.write(store, tmp_path / "report", pairs_shown=3, times=True)
    text = opened(html, tmp_path / "report.png")
    for words in ("VSF <best>", "Judged by a/model <b>", "40 of 40 pictures", "median seconds", "peak GiB"):
        assert words in text
    assert "not: a window" in text
    assert "Nothing in this box was measured here" in text


def test_costs(store):
    store._do("UPDATE pictures SET seconds = 2.0, memory = 3 * 1024 * 1024 * 1024 WHERE key = ?", store.cells()[-1].key)
    none, *_, last = report.Results(store).costs()
    assert none == report.Cost("none", 1.0, 1.0, 1.0, 4), "two pairs share each of its pictures"
    assert last.ratio == 1.0 and last.memory == 3.0, "the median of the seconds, the most of the memory"


ODD = ["a/b", "a-b", "=1+1", "<img onerror=alert(1)> | ![x](http://x) |", "$\\frac{$ " + 60 * "long "]


def test_names_of_judges_are_theirs_and_do_no_harm(store, tmp_path, monkeypatch):
    """Any name has plots of its own; none is Markdown, HTML or a formula."""
    cells = [cell for cell in store.cells() if cell.run != "none"]
    for k, name in enumerate(ODD):
        for cell in cells:
            store.score(name, cell, [1.0, (k + int(cell.key[:4], 16)) % 7 / 7, 0.5])
    monkeypatch.setattr(report.Results, "sweeps", lambda *_: {})
    files = report.write(store, tmp_path / "report", pairs_shown=1)
    plots = {path.name for path in (tmp_path / "report").glob("trade-off-positive-*.png")}
    assert len({name.lower() for name in plots}) == len(ODD) + 2
    pictures = {name: (tmp_path / "report" / name).read_bytes() for name in plots}
    assert len(set(pictures.values())) == len(plots), "one judge's plot is another's"
    html, markdown = (path.read_text() for path in files[:2])
    assert "<img onerror" not in html + markdown.replace("\\<", "") and "## Judged by \\<img onerror" in markdown
    assert "\\| \\!\\[x\\](http://x) \\|" in markdown
    lines = [line for line in markdown.split("\n## How far")[1].split("\n## ")[0].splitlines() if line[:2] == "| "][1:]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 10 for line in lines) and len(lines) == 7 * 6 / 2
    names = {row[0] for path in files[2:] for row in csv.reader(path.open())}
    assert "'=1+1" in names and not any(name[:1] in "=+-@" for name in names if name)


def test_a_picture_that_is_lost_shows(store, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_plots", lambda *_: [])
    gone, half = store.cells()[-1].key, store.cells()[0].key
    store.path(gone).unlink()
    store.path(half).write_bytes(store.path(half).read_bytes()[:60])
    html, markdown = (path.read_text() for path in report.write(store, tmp_path / "report")[:2])
    for key in (gone, half):
        assert f"{key}.png is no whole picture" in html and key in markdown
    assert "40 of 40" in html


def test_rules_for_scores(store, tmp_path):
    """Half counts as no, or stays a half; one judge's positive scores in another's table, on what both judged."""
    for k, cell in enumerate(store.cells()):
        store.score("halves", cell, [None, (0.5, 0.6, 0.2, 1.0)[k % 4], 0.8])
    given = store.scores()
    for levels, rule in ((2, lambda s: float(s > 0.5)), (3, lambda s: {0.5: 0.5, 0.6: 0.5, 0.2: 0.0, 1.0: 1.0}[s])):
        path, _ = report._tables(report.Results(store, levels, "a/model <b>"), tmp_path)
        rows = [row for row in csv.DictReader(path.open()) if row["judge"] == "halves"]
        assert len(rows) == 5
        for row in rows:
            places = [(cell.key, cell.pair.id) for cell in store.cells() if cell.run == row["run"]]
            told = [given["halves"][place] for place in places]
            positive = [given["a/model <b>"][place][0] for place in places if place in given["a/model <b>"]]
            assert float(row["negative"]) == pytest.approx(np.mean([rule(n) for _, n, _ in told]))
            assert float(row["positive"]) == pytest.approx(np.mean(positive)) and float(row["quality"]) == 0.8
    assert {row["negative"]["r"] for row in report.Results(store, 2).agreement()} == {
        row["negative"]["r"] for row in report.Results(store).agreement()
    }, "agreement is of scores as given"
    with pytest.raises(HostError, match="--positive-from me: no such judge; a/model <b>, halves, person"):
        report.write(store, tmp_path / "report", positive_from="me")


def test_regression_of_quality(store):
    """Fig. 10: what the scatter shows is what both judged, and its line is that of least squares."""
    values = report.Results(store).both("a/model <b>", "person", "quality")
    drawn = Figure().add_subplot()
    report._scatter(drawn, values, "a/model <b>", "person")
    assert len(values) == 20 and {tuple(place) for place in drawn.collections[0].get_offsets()} == {*map(tuple, values)}
    slope, level = np.linalg.lstsq(np.stack([values[:, 0], np.ones(20)], 1), values[:, 1], rcond=None)[0]
    x, y = drawn.lines[0].get_data()
    assert y == pytest.approx(slope * x + level) and [*x] == [values[:, 0].min(), values[:, 0].max()]
    assert f"r = {np.corrcoef(values.T)[0, 1]:.2f}" in drawn.lines[0].get_label()
