"""Has a store's pictures judged, several at a time; each verdict is kept as it comes."""

from collections.abc import Callable
from threading import Lock

from hosting.errors import HostError
from tqdm import tqdm

from neggen.endpoint import Broken, Scores, Unreadable
from neggen.store import Cell, Store, Unkept
from neggen.threads import each
from neggen.words import plain

Judge = Callable[[Cell], tuple[Scores, str]]
IN_A_ROW = 5
"""So many failures without a success between them end the work."""
NONE_READ = 3
"""So many pictures whose answers can't be read, and none before them that could, end it too."""


def judge_all(store: Store, name: str, judge: Judge, at_once: int = 1, enough: Callable[[], str] = lambda: "") -> int:
    """Gives the number of pictures that could not be judged; the next run tries them again.

    enough: a reason to stop, asked before each picture. Raises HostError for that, or when nothing works any more.
    """

    def work(_: int, cell: Cell) -> None:
        if reason := enough():
            raise Broken(f"stopped: {reason}; run it again to go on")
        scores, note = judge(cell)
        store.score(name, cell, scores, note)

    waiting = store.to_judge(name)
    todo, lock = iter(waiting), Lock()

    def take(_: int) -> Cell | None:
        with lock:
            return next(todo, None)

    failed, row, read = 0, 0, False
    done = each(range(min(at_once, len(waiting))), take, work)
    try:
        with tqdm(total=len(waiting), desc=f"judging: {plain(name, 60)}", unit="picture", smoothing=0.1) as bar:
            for cell, error in done:
                if isinstance(error, (Broken, Unkept)):
                    raise error
                failed, row, read = (failed + 1, row + 1, read) if error else (failed, 0, True)
                if error:
                    words = str(error) if isinstance(error, HostError) else f"{type(error).__name__}: {error}"
                    bar.write(f"{cell.key}: {plain(words)}")
                if isinstance(error, Unreadable) and not read and row == NONE_READ:
                    raise HostError(f"no answer about {row} pictures has the form asked for, see --prompt; {error}")
                if row == IN_A_ROW:
                    raise HostError(f"{row} pictures in a row could not be judged; run it again to go on")
                bar.update()
    finally:
        done.close()
    return failed
