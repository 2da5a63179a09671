"""Makes `hosting` importable and finds the ComfyUI that dev.py names."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The real ComfyUI tree."""
    if "VSF_COMFYUI" not in os.environ:
        pytest.skip("VSF_COMFYUI is not set; run the tests with dev.py test")
    return Path(os.environ["VSF_COMFYUI"])


@pytest.fixture(scope="session")
def tiny_models() -> Path:
    """The folder of the tiny models."""
    models = Path(os.environ.get("VSF_MODELS", ""))
    if not (models / "diffusion_models").is_dir():
        pytest.skip("the tiny models are missing; run the tests with dev.py test")
    return models


@pytest.fixture(scope="session")
def dev():
    """dev.py as a module."""
    spec = importlib.util.spec_from_file_location("vsf_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
