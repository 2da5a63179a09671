"""Has a store's pictures judged, several at a time; each verdict is kept as it comes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from hosting.errors import HostError
from tqdm import tqdm

from neggen.endpoint import Broken
from neggen.store import Cell, Store

Judge = Callable[[Cell], tuple[tuple[float, float, float], str]]
IN_A_ROW = 5
"""So many failures without a success between them end the work."""


def judge_all(store: Store, name: str, judge: Judge, at_once: int = 1, enough: Callable[[], str] = lambda: "") -> int:
    """Gives the number of pictures that could not be judged; the next run tries them again.

    enough: a reason to stop, asked before each picture. Raises HostError for that, or when nothing works any more.
    """

    def work(cell: Cell) -> None:
        if reason := enough():
            raise Broken(f"stopped: {reason}; run it again to go on")
        scores, note = judge(cell)
        store.score(name, cell, scores, note)

    failed, row, waiting = 0, 0, store.to_judge(name)
    with (
        ThreadPoolExecutor(at_once) as pool,
        tqdm(total=len(waiting), desc=f"judging: {name}", unit="picture", smoothing=0.1) as bar,
    ):
        running = {pool.submit(work, cell): cell for cell in waiting}
        try:
            for future in as_completed(running):
                try:
                    future.result()
                    row = 0
                except Broken:
                    raise
                except HostError as error:
                    failed, row = failed + 1, row + 1
                    bar.write(f"{running[future].key}: {error}")
                    if row == IN_A_ROW:
                        raise HostError(f"{row} pictures in a row could not be judged; run it again to go on") from None
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed
