"""Keeps the repository's root off sys.path (its ``nodes`` would shadow ComfyUI's) and makes ``vsf_core`` importable.

``--long`` multiplies how much the randomised tests try; the end of the output says how much that was.
"""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


def _import_package(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_import_package("vsf_core", ROOT / "vsf_core")

TALLY = pytest.StashKey[Counter]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="ten times the random inputs, graphs, faults and runs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long; --long runs it"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[TALLY]
    if counts:
        terminalreporter.write_line("tried: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Counter:
    """What the tests tried, and how often."""
    return request.config.stash[TALLY]


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> int:
    """How many times the usual number of random cases is asked for."""
    return 10 if request.config.getoption("--long") else 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In one of several processes: hand over what it counted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = dict(session.config.stash[TALLY])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[TALLY].update(getattr(node, "workeroutput", {}).get("tally", {}))
