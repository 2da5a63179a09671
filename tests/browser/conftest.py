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


@pytest.fixture
def page(server, browser):
    """A fresh frontend, its templates dialog closed; ``page.console`` collects errors and warnings."""
    context = browser.new_context(viewport={"width": 1600, "height": 900})
    tab = context.new_page()
    tab.problems = []
    tab.on("console", lambda m: tab.problems.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: tab.problems.append(str(e)))
    tab.goto(server.address)
    tab.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=60_000)
    tab.wait_for_timeout(1500)
    tab.keyboard.press("Escape")
    yield tab
    context.close()
