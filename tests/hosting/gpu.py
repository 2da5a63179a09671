"""`dev.py gpu`: VSF on this machine's GPU, checked and timed in processes of their own. Standard library alone.

An error may take the GPU from its process, or end the process. So each part runs in a process (``gpu_worker.py``) that
tells of every check as it goes; when one dies, the next goes on behind the unit (a model in a precision) that it lost.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from hosting.errors import HostError
from hosting.host import ROOT, print_progress

WORKER = ROOT / "tests" / "bench" / "gpu_worker.py"
SECONDS = 180.0
"""All together, from the first process on."""
CHECKS_SHARE = 0.45
GRACE = 8.0
"""How many seconds late a process may be before it is ended: at most once, since the second part ends earlier."""
PATIENCE = 5.0
"""How many seconds a process that has told everything may take to end."""
LAST_LINES = 5
Unit = list[str]


@dataclass
class Found:
    """What the processes told. results: dicts with part, unit, check, state ("ok", "failed", "skipped"), text, more."""

    facts: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def states(self, state: str) -> list[dict[str, Any]]:
        """The results of that state."""
        return [one for one in self.results if one["state"] == state]


class Worker:
    """A process that tells what it does, a JSON object a line."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        self.lines: Queue[str | None] = Queue()
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read_out, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read_out(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        for line in self.process.stderr or ():
            if line.strip():
                self.last.append(line.strip())

    def next(self, until: float) -> dict[str, Any] | None:
        """What it tells next; None at its end. Raises ``Empty`` when ``until`` (of ``time.time``) comes first."""
        while (line := self.lines.get(timeout=max(0.0, until - time.time()))) is not None:
            try:
                return json.loads(line)
            except ValueError:  # half a line: it died
                continue
        return None

    def end(self, patience: float) -> str:
        """How it ended, and its last words. After so many seconds it is made to."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
        status = self.process.wait()
        for thread in self._threads:
            thread.join(5)
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"the process ended ({how}): {' / '.join(self.last)[-600:] or 'it said nothing'}"


class Part:
    """The checks, or the times: processes one after another until every unit had its turn or time is over."""

    def __init__(self, name: str, task: Mapping[str, Any], until: float, found: Found) -> None:
        self.name, self.found, self.until = name, found, until
        self.task = {**task, "part": name, "until": until}
        self.units: list[Unit] = []
        self.done: list[Unit] = []
        self.unit: Unit | None = None
        self.waiting: list[str] = []
        """Checks of the unit that nothing was told of yet."""
        self.check = "start"

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Starts processes as long as there is something to do. Raises ``HostError`` where there is no GPU."""
        while True:
            before = len(self.done)
            worker = Worker([*command, json.dumps({**self.task, "done": self.done})], env)
            try:
                late = self._follow(worker)
            except BaseException:
                worker.end(0.0)
                raise
            how = worker.end(0.0 if late else PATIENCE)
            if late is None:
                return
            if not self.found.facts:
                raise HostError(f"the checks did not start: {how}")
            self._lost(f"no answer within {GRACE:.0f} s after its time was over" if late else how)
            left = [unit for unit in self.units if unit not in self.done]
            if not left or len(self.done) == before:
                return
            if time.time() >= self.until:
                for unit in left:
                    self._add({"unit": unit, "check": "", "state": "skipped", "text": "time"})
                return

    def _follow(self, worker: Worker) -> bool | None:
        """Reads what a process tells. None: it did all; else whether it was late, instead of dead."""
        self.unit, self.waiting, self.check = None, [], "start"
        try:
            while (told := worker.next(self.until + GRACE)) is not None:
                if "no_gpu" in told:
                    raise HostError(told["no_gpu"])
                if "done" in told:
                    return None
                self._hear(told)
        except Empty:
            return True
        return False

    def _hear(self, told: dict[str, Any]) -> None:
        if "facts" in told:
            self.found.facts = told["facts"]
        elif "units" in told:
            self.units = told["units"]
        elif "checks" in told:
            self.unit, self.waiting = told["unit"], told["checks"]
        elif "begin" in told:
            self.check = told["begin"]
        elif "result" in told:
            self._add(told["result"])
        elif "end" in told:
            self._end_unit()

    def _add(self, result: dict[str, Any]) -> None:
        self.found.results.append({"part": self.name, **result})
        self.waiting = [check for check in self.waiting if check != result["check"]]
        if result["check"] == "":
            self.done.append(result["unit"])

    def _end_unit(self) -> None:
        assert self.unit is not None
        states = [one["state"] for one in self.found.results if (one["part"], one["unit"]) == (self.name, self.unit)]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("ok", "failed", "skipped") if s in states)
        print_progress(f"{self.name}: {', '.join(self.unit)}: {counts}")
        self.done.append(self.unit)
        self.unit, self.waiting = None, []

    def _lost(self, why: str) -> None:
        """The check at work failed, and those of its unit that waited are lost with it."""
        print_progress(f"{self.name}: {', '.join(self.unit or ['start'])}: {self.check}: {why}")
        if self.unit is None:
            self._add({"unit": [self.name], "check": self.check, "state": "failed", "text": why})
            return
        check, unit = self.check, self.unit
        if check in self.waiting or not self.waiting:
            self._add({"unit": unit, "check": check, "state": "failed", "text": why})
        for other in self.waiting:
            self._add({"unit": unit, "check": other, "state": "failed", "text": f"lost with {check}: {why}"})
        self.done.append(unit)


def run(python: Path, env: Mapping[str, str], device: str, only: list[str] | None, seconds: float) -> Found:
    """Both parts in the time that there is. device: "gpu", or "cpu" to try this out without one; only: some models."""
    found, start = Found(), time.time()
    task = {"device": device, "only": only}
    for name, share in (("checks", CHECKS_SHARE), ("times", 1.0)):
        until = start + max(share * seconds - GRACE, 0.0)
        Part(name, task, until, found).run([str(python), str(WORKER)], env)
        found.seconds = time.time() - start
    return found
