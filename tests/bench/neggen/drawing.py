"""Draws what a store lacks on one or more running ComfyUIs, a few threads of HTTP for each."""

import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Condition, Event, Thread
from typing import Any

from hosting.client import ComfyClient
from hosting.errors import PromptFailed, ServerDied
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed
from tqdm import tqdm

from neggen.fitness import estimate, fit
from neggen.store import BadPicture, Job, Store, Unkept
from neggen.threads import each
from neggen.words import plain

IDS = uuid.UUID("6f0c1a0e-6d4e-4c43-9d0b-0c6b1e6f9a51")
CRASHES = 3
"""A picture during which servers die this often is given up for this run."""
ROW = 3
"""So many failures in a row pause a server."""
LOOK = 0.25
"""Seconds between two looks at a server's memory while it draws."""
BREATH = 5.0
"""Seconds that a picture waits for a server that is gone, before another server may have it."""
NODES = "tests/bench/neggen/vsf_bench_methods"

Outcome = tuple[str, str, str]
"""What became of a picture (drawn, failed, gone), the server, and the server's words."""


def draw(
    store: Store,
    servers: Sequence[str],
    depth: int = 2,
    patience: float = 600,
    timeout: float = 3600,
    mixed: bool = False,
) -> int:
    """Draws all that is missing; gives the number of pictures that servers refused or failed at.

    depth: how many graphs a server has at a time, the running one included; patience: seconds after which a server that
    is gone is given up; timeout: seconds for one graph; mixed: whether servers may differ. Raises ServerDied when all
    servers are given up, and HostError when none can draw this.
    """
    servers = list(dict.fromkeys(address.rstrip("/") for address in servers))
    with store.alone():
        if lost := store.forget_lost():
            print(f"{lost} pictures are gone or damaged, and are drawn again", flush=True)
        if not (jobs := store.jobs()):
            return 0
        machines = fit(servers, jobs, mixed)
        print(estimate(len(jobs), machines, store.usual_seconds()), flush=True)
        servers = list(machines)
        waiting = Waiting(jobs, servers)
        watch, failed, crashes = Watch(servers, patience), 0, Counter[str]()

        def one(server: str, job: Job) -> Outcome:
            return _draw(store, server, job, timeout, machines[server])

        work = each(servers * depth, waiting.take, one)
        try:
            with tqdm(total=waiting.left, desc="drawing", unit="picture", smoothing=0.1) as bar:
                for job, outcome in work:
                    if isinstance(outcome, Exception):
                        raise outcome
                    what, server, words = outcome
                    watch.note(server, what == "gone", bar)
                    if what != "gone" and watch.fails(server, what == "failed", bar):
                        waiting.pause(server)
                    waiting.servers = watch.servers
                    crashes[job.key] += what == "gone" and words != ""
                    if what == "gone" and crashes[job.key] < CRASHES:
                        waiting.again(job)
                        continue
                    if what == "failed" and waiting.elsewhere(job, server):
                        watch.say(words, bar)
                        continue
                    waiting.done()
                    if what != "drawn":
                        failed += 1
                        store.failed(job.key, words)
                        watch.say(words, bar)
                    bar.update()
        finally:
            waiting.end()
            work.close()
        return failed


class Waiting:
    """Pictures that no server has yet. Each goes to the server that was asked for it before, or else to any."""

    def __init__(self, jobs: Sequence[Job], servers: Sequence[str]) -> None:
        self.servers, self.left = list(servers), len(jobs)
        self.paused: set[str] = set()
        self._jobs, self._changed = list(jobs), Condition()
        self._failed: dict[str, str] = {}

    def take(self, server: str) -> Job | None:
        """The next picture for a server, once there is one; None when there will be none."""
        with self._changed:
            while self.left and server in self.servers and server not in self.paused:
                for job in self._jobs:
                    if self._may(server, job):
                        self._jobs.remove(job)
                        return job
                self._changed.wait(1.0)
        return None

    def _may(self, server: str, job: Job) -> bool:
        free = self._free()
        if failed := self._failed.get(job.key):
            return server != failed or free == [failed]
        return job.server not in free or job.server == server

    def _free(self) -> list[str]:
        return [server for server in self.servers if server not in self.paused]

    def pause(self, server: str) -> None:
        """It gets no more; what waits for it may go elsewhere."""
        with self._changed:
            self.paused.add(server)
            self._changed.notify_all()

    def elsewhere(self, job: Job, server: str) -> bool:
        """Whether another server may try what one has failed at: once for each picture."""
        with self._changed:
            if job.key in self._failed or not [other for other in self._free() if other != server]:
                return False
            self._failed[job.key] = server
            self._jobs.insert(0, job)
            self._changed.notify_all()
            return True

    def again(self, job: Job) -> None:
        """Somebody has to draw it after all."""
        with self._changed:
            self._jobs.insert(0, job)
            self._changed.notify_all()

    def done(self) -> None:
        """One is off the list."""
        with self._changed:
            self.left -= 1
            self._changed.notify_all()

    def end(self) -> None:
        """Nobody is to take any more."""
        with self._changed:
            self.left = 0
            self._changed.notify_all()


class Watch:
    """Which servers answer. One that is gone for longer than ``patience`` seconds is given up."""

    def __init__(self, servers: Sequence[str], patience: float) -> None:
        self.servers, self.patience = list(servers), patience
        self._gone: dict[str, float] = {}
        self._row = Counter[str]()
        self._paused: set[str] = set()
        self._said: set[str] = set()

    def note(self, server: str, gone: bool, bar: tqdm) -> None:
        """Hears of a server; raises ServerDied when it was the last one."""
        if not gone:
            if self._gone.pop(server, None):
                bar.write(f"{server} is back")
        elif server not in self._gone:
            self._gone[server] = time.monotonic()
            bar.write(f"{server} does not answer; waiting for it for {self.patience:.0f} s")
        elif server in self.servers and time.monotonic() - self._gone[server] > self.patience:
            self.servers.remove(server)
            bar.write(f"{server} is given up")
        if not self.servers:
            raise ServerDied("no server answers any more; start one and run the same command again, nothing is lost")

    def fails(self, server: str, failed: bool, bar: tqdm) -> bool:
        """Hears whether a server failed at a picture; whether it gets no more, after three in a row."""
        self._row[server] = self._row[server] + 1 if failed else 0
        others = [other for other in self.servers if other != server and other not in self._paused]
        if self._row[server] < ROW or not others or server in self._paused:
            return False
        self._paused.add(server)
        bar.write(f"{server} failed at {ROW} pictures in a row and gets no more in this run; others draw them")
        return True

    def say(self, words: str, bar: tqdm) -> None:
        """Shows an error once, however many pictures have it."""
        if words not in self._said:
            self._said.add(words)
            bar.write(words)


def _draw(store: Store, address: str, job: Job, timeout: float, machine: str) -> Outcome:
    """In a server's thread: draws one picture on it, and keeps it. An odd answer costs this picture alone."""
    client, posted = ComfyClient(address, timeout), False
    try:
        if not _answers(client):
            return "gone", address, ""
        posted = True
        store.drawn(job.key, *_fetch(client, store, job), machine=machine)
    except ServerDied as error:
        return "gone", address, plain(error) if posted and not _answers(client) else ""
    except Unkept:
        raise
    except (PromptFailed, BadPicture) as error:
        hint = f"; the node is in {NODES}, see docs/neggen.md" if "VSFBench" in str(error) else ""
        return "failed", address, plain(error) + hint
    except Exception as error:
        return "failed", address, f"{address} gives an odd answer: {type(error).__name__}: {plain(error, 200)}"
    return "drawn", address, ""


def _answers(client: ComfyClient) -> bool:
    """Whether a server answers, now or in a moment."""
    brief = ComfyClient(client.address, BREATH)
    try:
        tries = Retrying(retry=retry_if_exception_type(ServerDied), wait=wait_fixed(0.5), stop=stop_after_delay(BREATH))
        tries(brief.is_queued, "")
    except RetryError:
        return False
    return True


@contextmanager
def _memory(client: ComfyClient, runs: Event) -> Iterator[list[int]]:
    """While open, and once the graph ``runs``, appends the bytes in use on the server's devices, 4 times a second."""
    seen: list[int] = []
    done = Event()

    def look() -> None:
        while not runs.wait(LOOK):
            if done.is_set():
                return
        over = False
        while not over:
            with suppress(ServerDied, PromptFailed):  # a busy server misses a look
                seen.append(client.memory())
            over = done.wait(LOOK)

    watcher = Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def _fetch(client: ComfyClient, store: Store, job: Job) -> tuple[bytes, float | None, int | None]:
    """The picture, the seconds that the server took (None if it loaded a model), and the most bytes in use meanwhile.

    What an earlier process asked for is not asked for again; nobody looked at the memory then.
    """
    prompt_id = str(uuid.uuid5(IDS, f"{job.key} {job.attempts}"))
    done: dict[str, Any] = {}
    seen: list[int] = []
    if job.server == client.address:
        while client.is_queued(prompt_id):
            time.sleep(0.3)
        done = client.history(prompt_id)
    if not done:
        store.asked(job.key, client.address)
        runs = Event()
        with _memory(client, runs) as seen:
            client.run(job.graph, lambda *_: runs.set(), prompt_id=prompt_id)
        done = client.history(prompt_id)
    status = done.get("status", {})
    if status.get("status_str") != "success":
        told = [
            data for kind, data in status.get("messages", ()) if kind in ("execution_error", "execution_interrupted")
        ]
        raise PromptFailed(f"{told[-1].get('node_type')}: {told[-1].get('exception_message')}" if told else "it failed")
    refs = [ref for output in done["outputs"].values() for ref in output.get("images", ())]
    if not refs:
        raise PromptFailed("the graph saved no picture; a template ends in SaveImage")
    return client.image(refs[0]), _seconds(job, status["messages"]), max(seen, default=None)


def _seconds(job: Job, messages: Sequence[tuple[str, dict]]) -> float | None:
    """How long a graph ran by the server's clock; None if a loader ran with it: that is no part of a picture's time."""
    times = [data["timestamp"] for _, data in messages if "timestamp" in data]
    kept = {node for kind, data in messages if kind == "execution_cached" for node in data["nodes"]}
    loaders = {key for key, node in job.graph.items() if "Loader" in node["class_type"]}
    return (max(times) - min(times)) / 1000 if times and loaders <= kept else None
