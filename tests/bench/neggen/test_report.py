"""What the report says of scores that are known, and that it stands on its own in a browser."""

import csv
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
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
    assert len(names) == 4 + 2 * 3
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
    assert none == report.Cost("none", 1.0, 1.0, 1.0, 8)
    assert last.ratio == 1.0 and last.memory == 3.0, "the median of the seconds, the most of the memory"
