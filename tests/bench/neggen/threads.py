"""Work in a few threads that never keep a program from ending: leave the loop over ``each``, and it is over."""

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

W, T, R = TypeVar("W"), TypeVar("T"), TypeVar("R")
LOOK = 0.2
"""Seconds after which a wait lets Ctrl-C in, where the system does not by itself (Windows)."""


def each(
    workers: Sequence[W], take: Callable[[W], T | None], work: Callable[[W, T], R]
) -> Generator[tuple[T, R | Exception], None, None]:
    """What has been done, as it gets done: (item, result or what was raised). A thread for each worker.

    take: the worker's next item, None when there is no more for it; it may wait, and is called in the worker's thread.
    Whoever leaves this early gets nothing more, starts nothing more, and waits for nothing.
    """
    done: SimpleQueue[Any] = SimpleQueue()
    stopped = Event()

    def run(worker: W) -> None:
        try:
            while not stopped.is_set() and (item := take(worker)) is not None:
                try:
                    result: R | Exception = work(worker, item)
                except Exception as error:
                    result = error
                done.put((item, result))
        finally:
            done.put(None)

    for worker in workers:
        Thread(target=run, args=(worker,), daemon=True).start()
    left = len(workers)
    try:
        while left:
            with suppress(Empty):
                found = done.get(timeout=LOOK)
                if found is None:
                    left -= 1
                else:
                    yield found
    finally:
        stopped.set()
