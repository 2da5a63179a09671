"""The command runs, and its figures are of the right things. What they are is not tested: times are no tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WAYS = ("VSF", "VSF, row mask (no log-sum-exp)", "VSF, dense mask (the paper's way)", "NAG, one pass", "NASA, one pass")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")
    command = [sys.executable, str(HERE), "speed", "--shape", "tiny", "--dtype", "bf16", "--part", "forward"]
    command += ["--repeats", "2", "--json", str(out / "rows.json"), "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)}, timeout=300)
    assert (out / "speed.png").stat().st_size > 1000 and "| tiny |" in (out / "table.md").read_text()
    return {row["method"]: row for row in json.loads((out / "rows.json").read_text())}


def test_a_row_for_each_method(rows):
    assert set(rows) == {"plain", *WAYS, "NAG, ComfyUI's", "CFG"}
    for row in rows.values():
        assert {"shape", "dtype", "ratio", "interval", "extra_bytes", "runs"} <= set(row)
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
    assert rows["plain"]["ratio"] == 1.0 and rows["VSF"]["runs"] == 2 and rows["CFG"]["runs"] == 1


def test_memory_shows_what_each_method_holds(rows):
    """A doubled batch holds about twice as much, the dense mask its square, and VSF little more than its tokens."""
    plain = rows["plain"]["plain_bytes"]
    assert rows["CFG"]["extra_bytes"] > 0.7 * plain and rows["NAG, ComfyUI's"]["extra_bytes"] > 0.7 * plain
    length = 16 + 20 + 256
    assert rows[WAYS[2]]["extra_bytes"] >= 2 * length**2
    assert abs(rows["VSF"]["extra_bytes"]) < 0.08 * plain  # 16 of 292 tokens
