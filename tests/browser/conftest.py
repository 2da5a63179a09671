"""The real frontend: a ComfyUI server with the pack in its custom_nodes, and headless Chromium on it."""

import os
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from hosting.server import ComfyServer  # noqa: E402

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def server():
    tree, models = Path(os.environ["VSF_COMFYUI"]), Path(os.environ["VSF_MODELS"])
    with ComfyServer(tree, sys.executable, ROOT, models) as running:
        yield running


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=os.environ["VSF_CHROMIUM"], args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def new_page(browser):
    """Opens a fresh frontend, its templates dialog closed; ``page.problems`` collects errors and warnings.

    It closes with its module: an open frontend keeps drawing, and takes a tenth of a core from all later tests.
    """
    contexts = []

    def opened(address):
        contexts.append(browser.new_context(viewport={"width": 1600, "height": 900}))
        tab = contexts[-1].new_page()
        tab.problems = []
        tab.on("console", lambda m: tab.problems.append(f"{m.text} {m.location.get('url')}") if is_problem(m) else None)
        tab.on("pageerror", lambda e: tab.problems.append(f"{e} {e.stack}"))
        tab.goto(address)
        tab.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=60_000)
        tab.wait_for_timeout(1500)
        tab.keyboard.press("Escape")
        return tab

    yield opened
    for context in contexts:
        context.close()


def is_problem(message):
    return message.type in ("error", "warning")


@pytest.fixture
def page(server, new_page):
    """A frontend for one test."""
    tab = new_page(server.address)
    yield tab
    tab.context.close()
