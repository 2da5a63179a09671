"""A real ComfyUI in this process: its tree first on sys.path, on the CPU, with the pack loaded by its own loader."""

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, os.environ["VSF_COMFYUI"])
sys.path.insert(1, str(ROOT / "tests" / "toy"))
sys.path.insert(2, str(ROOT / "tests" / "host"))
sys.path.append(str(ROOT / "tests"))

from hosting.interpreter import triton_interpreted  # noqa: E402

with triton_interpreted():  # before ComfyUI imports Triton
    from comfy.cli_args import args

args.cpu = True
args.use_pytorch_cross_attention = True

import comfy.model_management  # noqa: E402, F401
from hosting.client import ComfyClient, run_in_thread  # noqa: E402
from hosting.server import ComfyServer  # noqa: E402
from kernel_rules import watch  # noqa: E402

import nodes  # noqa: E402


@pytest.fixture(scope="session", name="pack")
def pack_fixture() -> SimpleNamespace:
    """The pack's nodes, as ComfyUI registered them."""
    return load_pack()


def load_pack() -> SimpleNamespace:
    """Has ComfyUI load the pack, and holds its attention to the rules of CUDA's kernels; fails where it can't."""
    logging.getLogger().setLevel(logging.INFO)
    # in a thread of its own: the browser tests' driver may keep an event loop running in this one
    assert run_in_thread(nodes.load_custom_node(str(ROOT)))
    mapping = nodes.NODE_CLASS_MAPPINGS
    module = sys.modules[mapping["VSFModelPatch"].__module__.rsplit(".nodes", 1)[0]]
    watch(module.__name__)
    return SimpleNamespace(
        module=module,
        patch=lambda model, **kw: mapping["VSFModelPatch"].execute(model=model, **kw).result[0],
        negative=lambda positive, **kw: mapping["VSFNegativeConditioning"].execute(positive=positive, **kw).result[0],
        mapping=mapping,
    )


@pytest.fixture(scope="session")
def client():
    """A real ComfyUI server with the pack and the tiny models, that keeps whatever it has computed."""
    tree, models = Path(os.environ["VSF_COMFYUI"]), Path(os.environ["VSF_MODELS"])
    with ComfyServer(tree, sys.executable, ROOT, models, extra_args=("--cache-lru", "100")) as running:
        yield ComfyClient(running.address)


@pytest.fixture
def case(name):
    """What the table says of the tiny model that a test file calls ``name``."""
    from cases import CASES

    return CASES[name]


@pytest.fixture
def model(name):
    """The model itself."""
    from cases import model_of

    return model_of(name)
