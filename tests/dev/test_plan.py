"""Which tests `dev.py test` runs on which ComfyUI."""

import pytest


@pytest.fixture(scope="module")
def plan(dev):
    return dev.plan


def test_usually_the_newest_runs_all_and_two_older_ones_the_smoke_tests(plan):
    smoke = ["tests/host", "-m", "smoke"]
    assert plan(None, False, False) == [(None, []), ("0.16.3", smoke)]


def test_all_versions(plan):
    newest, *older = plan("all", False, False)
    assert newest == ("0.30.0", [])
    assert [version for version, _ in older] == ["0.16.3", "0.18.2", "0.20.1", "0.24.1", "0.27.0"]
    assert all(folders == ["tests/host"] for _, folders in older)


def test_what_was_asked_for_is_what_runs(plan):
    assert plan("0.18.2", False, False) == [("0.18.2", [])]
    assert plan(None, True, False) == [(None, [])]
    assert plan(None, False, True) == [(None, [])]
    assert all(chosen == [] for _, chosen in plan("all", True, False))
