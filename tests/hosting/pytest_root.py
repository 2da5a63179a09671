"""A pytest plugin: the repository's root is a plain folder to pytest, although it has an `__init__.py`.

That file is the node pack's and can be imported by ComfyUI alone; pytest would import it before the first test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Takes the root out of pytest's own handling of packages."""
    return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None
