"""Draws what a store lacks on one or more running ComfyUIs. Dask schedules; each server is one of its workers."""

import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

from hosting.client import ComfyClient
from hosting.errors import PromptFailed, ServerDied
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed
from tqdm import tqdm

from neggen.store import Job, Store

IDS = uuid.UUID("6f0c1a0e-6d4e-4c43-9d0b-0c6b1e6f9a51")
CRASHES = 3
"""A picture during which servers die this often is given up for this run."""
LOOK = 0.25
"""Seconds between two looks at a server's memory while it draws."""
BREATH = 5.0
"""Seconds that a picture waits for a server that is gone, before another server may have it."""

Outcome = tuple[str, str, str]
"""What became of a picture (drawn, failed, gone), the server, and the server's words."""


def draw(store: Store, servers: Sequence[str], depth: int = 2, patience: float = 600, timeout: float = 3600) -> int:
    """Draws all that is missing; gives the number of pictures that servers refused or failed at.

    depth: how many graphs a server has at a time, the running one included; patience: seconds after which a server that
    is gone is given up; timeout: seconds for one graph. Raises ServerDied when all servers are given up.
    """
    import dask
    from distributed import Client, Scheduler, SpecCluster, Worker, as_completed

    servers = list(dict.fromkeys(address.rstrip("/") for address in servers))
    inproc = {"protocol": "inproc://", "dashboard": False}
    workers = {a: {"cls": Worker, "options": {"nthreads": depth, "name": a, **inproc}} for a in servers}
    settings = {"distributed.scheduler.worker-saturation": 1.0, "distributed.admin.tick.limit": "1h"}
    with store.alone():
        jobs = {job.key: job for job in store.jobs()}
        if not jobs:
            return 0
        watch = Watch(servers, patience)
        with (
            dask.config.set(settings),
            SpecCluster(workers, {"cls": Scheduler, "options": inproc}, silence_logs=50) as cluster,
            Client(cluster, set_as_default=False) as client,
            tqdm(total=len(jobs), desc="drawing", unit="picture", smoothing=0.1) as bar,
        ):

            def submit(job: Job) -> Any:
                mine = [job.server] if job.server in watch.servers else watch.servers
                return client.submit(_draw, store.folder, job, timeout, workers=mine, pure=False)

            failed, crashes = 0, Counter[str]()
            running = {(future := submit(job)).key: (future, job) for job in jobs.values()}
            finished = as_completed([future for future, _ in running.values()], loop=client.loop)
            for future in finished:
                _, job = running.pop(future.key)
                what, server, words = future.result()
                watch.note(server, what == "gone", bar)
                crashes[job.key] += what == "gone" and words != ""
                if what == "gone" and crashes[job.key] < CRASHES:
                    if server not in watch.servers:
                        job = replace(job, server=None)
                    again = submit(job)
                    running[again.key] = again, job
                    finished.add(again)
                    continue
                if what != "drawn":
                    failed += 1
                    store.failed(job.key, words)
                    watch.say(words, bar)
                bar.update()
        return failed


class Watch:
    """Which servers answer. One that is gone for longer than ``patience`` seconds is given up."""

    def __init__(self, servers: Sequence[str], patience: float) -> None:
        self.servers, self.patience = list(servers), patience
        self._gone: dict[str, float] = {}
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

    def say(self, words: str, bar: tqdm) -> None:
        """Shows an error once, however many pictures have it."""
        if words not in self._said:
            self._said.add(words)
            bar.write(words)


def _draw(folder: Path, job: Job, timeout: float) -> Outcome:
    """In a worker's thread: draws one picture on the worker's server, and keeps it."""
    from distributed import get_worker

    address = str(get_worker().name)
    client, posted = ComfyClient(address, timeout), False
    try:
        if not _answers(client):
            return "gone", address, ""
        posted = True
        with closing(Store(folder)) as store:
            store.drawn(job.key, *_fetch(client, store, job))
    except ServerDied as error:
        return "gone", address, str(error) if posted and not _answers(client) else ""
    except PromptFailed as error:
        return "failed", address, str(error)
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
def _memory(client: ComfyClient) -> Iterator[list[int]]:
    """While open, appends the bytes in use on the server's devices, four times a second."""
    seen: list[int] = []
    done = Event()

    def look() -> None:
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
    """The picture, the seconds that the server took, and the most bytes in use on it meanwhile.

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
        with _memory(client) as seen:
            client.run(job.graph, prompt_id=prompt_id)
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
    times = [data["timestamp"] for _, data in status["messages"] if "timestamp" in data]
    seconds = (max(times) - min(times)) / 1000 if times else None
    return client.image(refs[0]), seconds, max(seen, default=None)
