"""Child processes: visible output, the last lines for error messages, and a Ctrl-C that lets them clean up."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO

TAIL_LINES = 15
CLEAN_UP_SECONDS = 30.0


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: clean up as for Ctrl-C, but the children have not had the signal."""


def _raise_terminated(number: int, frame: object) -> None:
    raise Terminated


def clean_up_on_signals() -> None:
    """Turns SIGTERM and SIGHUP into an exception, so that servers are stopped on the way out."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _raise_terminated)


def _let_end(child: subprocess.Popen, reason: KeyboardInterrupt) -> None:
    """Gives an interrupted child time to stop its own servers; the terminal sent it Ctrl-C too, but not SIGTERM."""
    if isinstance(reason, Terminated):
        child.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
    try:
        child.communicate(timeout=CLEAN_UP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()


def run(command: list[str], env: Mapping[str, str] | None = None, cwd: str | None = None) -> int:
    """Runs a command on this terminal and gives its exit status; says so when a signal ended it."""
    sys.stdout.flush()
    child = subprocess.Popen(command, env=env, cwd=cwd)
    try:
        status = child.wait()
        if status < 0:
            print(f"dev.py: signal {-status} ended {' '.join(command[:3])}", file=sys.stderr)
        return status if status >= 0 else 128 - status
    except KeyboardInterrupt as reason:
        _let_end(child, reason)
        raise


def stream(
    command: list[str],
    out: IO[str],
    keep: Callable[[str], bool] = lambda line: True,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> tuple[int, list[str]]:
    """Runs a command, copies the lines that `keep` wants to `out`, and gives the exit status and the last lines."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    child = subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        for line in child.stdout or ():
            if keep(line):
                tail.append(line.rstrip())
                print(line.rstrip(), file=out, flush=True)
        return child.wait(), list(tail)
    except KeyboardInterrupt as reason:
        _let_end(child, reason)
        raise
