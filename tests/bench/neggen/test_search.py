"""The search ends at the best setting that keeps enough, and goes on where it was killed."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from hosting.errors import HostError
from PIL import Image

from neggen import pairs, templates
from neggen.search import Search, search
from neggen.store import Store
from neggen.test_draw import drawn, wait_until

BENCH = Path(__file__).resolve().parents[1]


def judged_by_scale(store, spoils_at):
    """Draws grey; the element goes as the scale grows, and from ``spoils_at`` on the object too."""

    def measure():
        png = io.BytesIO()
        Image.new("RGB", (8, 8), "grey").save(png, "PNG")
        scales = {run.name: run.settings.get("scale", 0.0) for run in store.runs()}
        for job in store.jobs():
            store.drawn(job.key, png.getvalue(), 0.0)
        for cell in store.to_judge("me"):
            scale = scales[cell.run]
            store.score("me", cell, [1.0 - (scale >= spoils_at), scale / 10, 0.9])

    return measure


@pytest.mark.parametrize(("spoils_at", "kept", "trials"), [(5.0, True, 18), (0.1, False, 3)])
def test_it_finds_the_edge(tmp_path, spoils_at, kept, trials):
    store, template = Store(tmp_path), templates.load("toy_sd3")
    ranges = {"scale": (0.2, 8.0)}
    asked = Search(template, "vsf", {"offset": 0.2}, ranges, pairs.load("toy")[:2], [1], "me")
    answer = search(store, asked, trials, judged_by_scale(store, spoils_at))
    assert answer["keeps_enough"] is kept and answer["trials"] == trials
    assert answer["without_negative"]["positive"] == 1.0 and answer["settings"]["offset"] == 0.2
    if kept:
        assert 4.0 < answer["settings"]["scale"] < 5.0
        assert answer["scores"]["negative"][0] == pytest.approx(answer["settings"]["scale"] / 10)
    assert json.loads((tmp_path / "recommended.json").read_text()) == answer
    runs = len(store.runs())
    assert search(store, asked, trials, judged_by_scale(store, spoils_at)) == answer and len(store.runs()) == runs


def test_what_is_not_drawn_is_no_score(tmp_path):
    store, template = Store(tmp_path), templates.load("toy_sd3")
    asked = Search(template, "vsf", {}, {"scale": (1, 2), "offset": (0, 1)}, pairs.load("toy")[:1], [1], "me")
    with pytest.raises((HostError, ValueError)):
        search(store, asked, 1, lambda: None)


@pytest.mark.long
def test_killed_and_gone_on(server, tmp_path):
    out, env = tmp_path / "out", {**os.environ, "PYTHONPATH": str(BENCH.parent)}
    command = [sys.executable, str(BENCH), "neggen", "search", "--out", str(out), "--server", server.address]
    command += ["--limit", "1", "--seeds", "1", "--fixed", "steps=2", "--trials", "4"]
    before = server.log().count("got prompt")
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: drawn(out) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    told = subprocess.run(command, env=env, check=True, timeout=120, stdout=subprocess.PIPE, text=True).stdout
    answer = json.loads(told[told.index("{") : told.rindex("}") + 1])
    assert answer["trials"] == 4 and set(answer["settings"]) == {"steps", "scale", "offset"}
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{out / 'search.sqlite'}")
    assert {run.settings["steps"] for run in Store(out).runs()} == {2}
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 4 and "RUNNING" not in states
    assert server.log().count("got prompt") - before == drawn(out) <= 6, "drawn twice, or trials lost"
