"""The benchmark's modules as ``neggen``, and a real ComfyUI with the toy models and the benchmark's nodes."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT / "tests")]

from hosting.server import ComfyServer, free_port  # noqa: E402

from neggen import pairs, templates  # noqa: E402
from neggen.store import Store  # noqa: E402

RUNS = ("none:steps=2", "cfg:steps=2:cfg=3", "nag:steps=2:phi=11:blend=0.5:tau=5", "nasa:steps=2:phi=0.4")
RUNS = (*RUNS, "VSF=vsf:steps=2:scale=3.3:offset=0.2")


def new_server() -> ComfyServer:
    """Starts where it was after it was killed: its port stays."""
    folders = ("bench/neggen/vsf_bench_methods", "toy/vsf_toy_text_encoder", "toy/vsf_tiny_models")
    extra = [ROOT / "tests" / folder for folder in folders]
    tree, models = os.environ["VSF_COMFYUI"], os.environ["VSF_MODELS"]
    return ComfyServer(tree, sys.executable, ROOT, models, free_port(), extra_nodes=extra)


@pytest.fixture(scope="session")
def server():
    with new_server() as running:
        yield running


@pytest.fixture
def planned(tmp_path):
    """A store that has nothing yet of two toy pairs, one seed and five methods: nine graphs, two cells share one."""
    store, template = Store(tmp_path / "out"), templates.load("toy_sd3")
    runs = [template.check(run) for text in RUNS for run in templates.parse_run(text)]
    store.plan(template, runs, pairs.load("toy")[:2], [1])
    yield store
    store.close()
