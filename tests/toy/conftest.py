"""A real ComfyUI in this process, as in tests/host, and the toy world's modules by their plain names."""

import os
import sys
from pathlib import Path

import pytest
import torch

TOY = Path(__file__).resolve().parent
sys.path.insert(0, os.environ["VSF_COMFYUI"])
sys.path.insert(1, str(TOY))
sys.path.insert(2, str(TOY.parent / "bench"))

from comfy.cli_args import args  # noqa: E402

args.cpu = True
args.use_pytorch_cross_attention = True

import comfy.model_management  # noqa: E402, F401


@pytest.fixture(autouse=True)
def _one_thread():
    """Two of them wait for each other in a loop where as many processes as cores run: forty times slower."""
    torch.set_num_threads(1)
