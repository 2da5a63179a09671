"""The whole benchmark on the tiny SD3: twice killed in the middle, it ends in the report of an unbroken run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neggen.conftest import new_server
from neggen.test_draw import drawn, wait_until
from neggen.test_report import opened

BENCH = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(BENCH.parent)}
FILES = ("report.html", "report.md", "scores.csv", "pictures.csv")


def neggen(name, out, *more):
    return [sys.executable, str(BENCH), "neggen", name, "--out", str(out), *more]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_twice_the_report_is_that_of_an_unbroken_run(tmp_path, tally):
    """20 pairs, 2 seeds, 5 methods, 8 steps: 200 pictures of 174 graphs, in some 8 minutes."""
    reports = {}
    for name, kills in (("broken", (50, 120)), ("unbroken", ())):
        out = tmp_path / name
        with new_server() as server:
            command = neggen("draw", out, "--server", server.address, "--limit", "20", "--seeds", "2")
            for goal in kills:
                process = subprocess.Popen(command, env=ENV, stderr=subprocess.DEVNULL)
                wait_until(lambda out=out, goal=goal: drawn(out) >= goal, 900)
                process.send_signal(signal.SIGKILL)
                process.wait()
                assert drawn(out) < 174
                tally["benchmarks killed"] += 1
            subprocess.run(command, env=ENV, check=True, stderr=subprocess.DEVNULL)
            assert drawn(out) == 174 == server.log().count("got prompt")
        for step in ("judge", "report"):
            subprocess.run(neggen(step, out), env=ENV, check=True, stderr=subprocess.DEVNULL)
        reports[name] = {file: (out / "report" / file).read_bytes() for file in FILES}
    assert reports["broken"] == reports["unbroken"]
    assert "200 of 200 pictures" in reports["broken"]["report.md"].decode()
    opened(tmp_path / "broken" / "report" / "report.html", tmp_path / "report.png")
