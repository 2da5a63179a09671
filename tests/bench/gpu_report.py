"""What the parts of `dev.py gpu` share: telling of each check, forcing a path, and noticing a GPU that is gone."""

import importlib.util
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from sampling import ROOT
from speed import wait

FORCED = "VSF_ATTENTION"
PATHS = ("merge", "fused", "mask", "reference")
"""What the environment variable forces."""
WORDS = {"fused": ["fused"], "merge": ["log-sum-exp merge"], "mask": ["row mask"], "reference": ["reference"]}
"""How the log's word for it begins."""
GPU_IS_GONE = 3
"""The exit status after an error that took the GPU from this process."""
LONGEST = 500
"""Letters of an error."""
Unit = list[str]
"""A model and a precision, or a shape and a precision: what is lost together when the process dies."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIMES = 3.0
"""As many times stock's own error is allowed."""


class NotRun(Exception):
    """Why something is left out that is no failure."""


class Report:
    """Tells what happens. ``until``: when time is over, in seconds since 1970."""

    def __init__(self, out: IO[str], until: float, device: torch.device) -> None:
        self.out, self.until, self.device = out, until, device
        self.unit: Unit = []

    def tell(self, **what: Any) -> None:
        print(json.dumps(what), file=self.out, flush=True)

    def result(self, check: str, state: str, text: str = "", **facts: Any) -> None:
        """state: "ok", "failed" or "skipped". check: "" for all of the unit."""
        self.tell(result={"unit": self.unit, "check": check, "state": state, "text": text, **facts})

    def attempt(self, check: str, call: Callable[[], Any]) -> Any:
        """What the call gives; None after telling of an error. An error that took the GPU along ends the process."""
        self.tell(begin=check)
        try:
            return call()
        except NotRun as why:
            self.result(check, "skipped", str(why))
        except Exception as error:
            if str(error).startswith(f"VSF: {FORCED}="):  # the pack's word that this path cannot be taken here
                self.result(check, "skipped", str(error))
                return None
            self.result(check, "failed", described(error))
            if not answers(self.device):
                print("the GPU no longer works in this process", file=sys.stderr, flush=True)
                os._exit(GPU_IS_GONE)
        return None

    def is_late(self) -> bool:
        return time.time() >= self.until


def described(error: BaseException) -> str:
    """An error in a line: its kind and text, where in this repository it was raised, and no folder of the user's."""
    inside = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
    where = f" ({Path(inside[-1].filename).relative_to(ROOT).as_posix()}:{inside[-1].lineno})" if inside else ""
    text = " ".join(str(error).replace(str(Path.home()), "~").split())
    return f"{type(error).__name__}: {text[:LONGEST]}{where}"


def answers(device: torch.device) -> bool:
    """Whether the device still computes in this process; after some errors it does not."""
    try:
        torch.ones(8, device=device).add_(1)
        wait(device)
    except Exception:
        return False
    return True


@contextmanager
def forced(path: str | None) -> Iterator[None]:
    """While open, runs of VSF go by that path; None: by the one that VSF chooses."""
    before = os.environ.pop(FORCED, None)
    try:
        if path:
            os.environ[FORCED] = path
        yield
    finally:
        os.environ.pop(FORCED, None)
        if before is not None:
            os.environ[FORCED] = before


def require(path: str | None, device: torch.device) -> None:
    """Raises ``NotRun`` for a path that there cannot be here."""
    if path == "fused" and (device.type == "cpu" or importlib.util.find_spec("triton") is None):
        raise NotRun("needs a GPU and Triton")


class PathWords(logging.Handler):
    """Remembers what the pack's log said last of the way in which attention was computed."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"^VSF: .* attention: (.+)", record.getMessage())
        self.last = found[1] if found else self.last
