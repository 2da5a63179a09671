"""What a process of `dev.py gpu` tells of its checks, and which paths it forces."""

import io
import json
import os
import time
from pathlib import Path

import pytest
import torch
from gpu_report import FORCED, NotRun, Report, answers, described, forced, require

CPU = torch.device("cpu")


@pytest.fixture
def out():
    return io.StringIO()


@pytest.fixture
def report(out):
    report = Report(out, time.time() + 60, CPU)
    report.unit = ["a", "bf16"]
    return report


def lines(out):
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_check_that_raises_is_told_and_the_next_one_runs(report, out):
    def broken():
        raise RuntimeError(f"first line\nsecond in {Path.home()}/x")

    assert report.attempt("off", broken) is None and report.attempt("VSF", lambda: 3) == 3
    began, failed, second = lines(out)
    assert began == {"begin": "off"} and second == {"begin": "VSF"}
    told = failed["result"]
    assert (told["unit"], told["check"], told["state"]) == (["a", "bf16"], "off", "failed")
    assert told["text"].startswith("RuntimeError: first line second in ~/x (tests/bench/test_gpu_report.py:")


def test_what_cannot_run_here_is_no_failure(report, out):
    report.attempt("fused", lambda: require("fused", CPU))
    assert lines(out)[1]["result"]["state"] == "skipped" and "Triton" in lines(out)[1]["result"]["text"]
    with pytest.raises(NotRun):
        require("fused", CPU)
    require("merge", CPU)


def test_a_path_that_the_pack_cannot_take_here_is_no_failure(report, out):
    def refused():
        raise RuntimeError("VSF: VSF_ATTENTION=fused needs Triton and a CUDA device")

    assert report.attempt("fused", refused) is None
    assert lines(out)[1]["result"]["state"] == "skipped"


def test_the_time_ends(out):
    assert Report(out, time.time() - 1, CPU).is_late() and not Report(out, time.time() + 9, CPU).is_late()


def test_a_path_is_forced_for_a_while(monkeypatch):
    monkeypatch.setenv(FORCED, "mask")
    with forced("merge"):
        assert os.environ[FORCED] == "merge"
    with pytest.raises(KeyError), forced(None):
        raise KeyError(os.environ.get(FORCED, "none"))
    assert os.environ[FORCED] == "mask"


def test_a_long_error_is_cut():
    assert len(described(ValueError("x" * 5000))) < 600


def test_the_cpu_answers():
    assert answers(CPU)
