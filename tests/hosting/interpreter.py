"""Triton's interpreter: kernels that run on a CPU."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def triton_interpreted() -> Iterator[None]:
    """Kernels that are made here are interpreted, unless there is a GPU to run them. To be entered once before Triton
    is imported, since it is made of kernels too, and again where ours are made."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with contextlib.suppress(ImportError):  # its parts are imported when they are used, maybe too late
            importlib.import_module("triton.experimental.gluon")
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
