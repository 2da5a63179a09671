"""What was asked for and what came out: one SQLite file, and a folder of PNGs.

A picture's key is the digest of its whole graph, so that the same graph is drawn once, whoever asks for it. A picture
is there when its row says so: the file is written first, and gets its name when it is whole.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

from hosting.client import Prompt
from hosting.errors import HostError
from hosting.host import try_lock
from PIL import Image

from neggen.pairs import Pair
from neggen.templates import Run, Template
from neggen.words import plain

IMPORTED = "imported"
"""In a template's place, for pictures that were made elsewhere."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS pairs (id TEXT PRIMARY KEY, pair TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (name TEXT PRIMARY KEY, template TEXT NOT NULL, method TEXT NOT NULL,
    settings TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pictures (key TEXT PRIMARY KEY, graph TEXT NOT NULL, sha256 TEXT, seconds REAL,
    memory INTEGER, server TEXT, attempts INTEGER NOT NULL DEFAULT 0, error TEXT);
CREATE TABLE IF NOT EXISTS cells (run TEXT NOT NULL REFERENCES runs, pair TEXT NOT NULL REFERENCES pairs,
    seed INTEGER NOT NULL, key TEXT NOT NULL REFERENCES pictures, PRIMARY KEY (run, pair, seed));
CREATE TABLE IF NOT EXISTS scores (judge TEXT NOT NULL, key TEXT NOT NULL REFERENCES pictures, pair TEXT NOT NULL,
    positive REAL, negative REAL, quality REAL, note TEXT, PRIMARY KEY (judge, key, pair));
"""


@dataclass(frozen=True)
class Job:
    """A picture to draw. server: where it was asked for before, if it was; attempts: how often it failed."""

    key: str
    graph: Prompt
    server: str | None
    attempts: int


@dataclass(frozen=True)
class Cell:
    """A picture of a run for a pair and a seed. seconds: the server's own time; memory: the most bytes in use on its
    devices meanwhile; None before it was drawn, or where nobody looked."""

    run: str
    pair: Pair
    seed: int
    key: str
    seconds: float | None
    memory: int | None


class BadPicture(HostError):
    """A picture that is not there, not whole, or none."""


class Unkept(HostError):
    """Results can't be kept or read: no work makes sense any more."""


def opened(source: Path | bytes) -> Image.Image:
    """A picture's pixels, RGB and read to the end. Raises BadPicture."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow raises many kinds at a file that is broken
        where = "what came" if isinstance(source, bytes) else str(source)
        raise BadPicture(f"{where} is no whole picture ({type(error).__name__}: {plain(error, 200)})") from None


class Store:
    """A folder of results. Safe to use from several threads; a process that dies leaves whole rows and whole files.

    Raises Unkept where the disk or the database does not do its part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.pictures = folder, folder / "pictures"
        self._lock = Lock()
        with self._kept():
            self.pictures.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "results.sqlite", isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(SCHEMA)
            if "machine" not in {row[1] for row in self._db.execute("PRAGMA table_info(pictures)")}:  # an older folder
                self._db.execute("ALTER TABLE pictures ADD COLUMN machine TEXT")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What the disk or the database says goes on as Unkept."""
        try:
            yield
        except sqlite3.Error as error:
            raise Unkept(
                f"{self.folder / 'results.sqlite'} can't be used ({error}); is it damaged, or another program's? "
                f"Put it away, or give another --out"
            ) from None
        except OSError as error:
            raise Unkept(f"{self.folder}: {error}") from None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Refuses a second process that would draw into the same folder; the system frees it if this one dies."""
        with (self.folder / "lock").open("a+") as file:
            if not try_lock(file.fileno()):
                raise HostError(f"another process draws into {self.folder}: wait for it, or give another --out")
            yield

    def _do(self, sql: str, *values: Any) -> list[tuple]:
        fit = [plain(value, len(value)) if isinstance(value, str) else value for value in values]
        with self._lock, self._kept():
            return self._db.execute(sql, fit).fetchall()

    def plan(self, template: Template, runs: Sequence[Run], pairs: Sequence[Pair], seeds: Sequence[int]) -> None:
        """Adds what is not there yet. A run's name stands for one setting of one template in a folder, for good."""
        with self._whole():
            for run in runs:
                self._add_run(template.name, run)
            for pair in pairs:
                self._add_pair(pair)
            for run in runs:
                for pair in pairs:
                    for seed in seeds:
                        self._add_cell(run, pair, seed, template.fill(run, pair.prompt, pair.missing_element, seed))

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """All that is written inside, or nothing."""
        with self._lock, self._kept():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def take_in(self, name: str, pair: Pair, seed: int, file: bytes) -> None:
        """Keeps a picture made elsewhere, as a PNG of its pixels alone, under a run's name. Raises BadPicture."""
        out = BytesIO()
        opened(file).save(out, "PNG")
        source = {IMPORTED: hashlib.sha256(out.getvalue()).hexdigest()}
        run = Run(name, IMPORTED, {})
        with self._whole():
            self._add_run(IMPORTED, run)
            self._add_pair(pair)
            self._add_cell(run, pair, seed, source)
        self.drawn(_key(source), out.getvalue(), None)

    def _add_pair(self, pair: Pair) -> None:
        self._db.execute("INSERT OR IGNORE INTO pairs VALUES (?, ?)", (pair.id, json.dumps(asdict(pair))))

    def _add_run(self, template: str, run: Run) -> None:
        row = (template, run.method, json.dumps(run.settings, sort_keys=True))
        known = self._db.execute("SELECT template, method, settings FROM runs WHERE name = ?", (run.name,)).fetchone()
        if known not in (None, row):
            raise HostError(f"{self.folder} has another run {run.name!r} ({known}, now {row}): rename it, or use --out")
        self._db.execute("INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?)", (run.name, *row))

    def _add_cell(self, run: Run, pair: Pair, seed: int, graph: Prompt | dict[str, str]) -> None:
        text, key = json.dumps(graph, sort_keys=True), _key(graph)
        place = (run.name, pair.id, seed)
        query = "SELECT key FROM cells WHERE run = ? AND pair = ? AND seed = ?"
        known = self._db.execute(query, place).fetchone()
        if known not in (None, (key,)):
            changed = "a picture" if run.method == IMPORTED else "the template"
            raise HostError(f"{self.folder}: {changed} of run {run.name!r} has changed: rename the run, or use --out")
        self._db.execute("INSERT OR IGNORE INTO pictures (key, graph) VALUES (?, ?)", (key, text))
        self._db.execute("INSERT OR IGNORE INTO cells VALUES (?, ?, ?, ?)", (*place, key))

    def jobs(self) -> list[Job]:
        """What is still to be drawn; first what a server has been asked for already."""
        rows = self._do(
            "SELECT key, graph, server, attempts FROM pictures WHERE sha256 IS NULL ORDER BY server IS NULL, rowid"
        )
        return [Job(key, json.loads(graph), server, attempts) for key, graph, server, attempts in rows]

    def asked(self, key: str, server: str) -> None:
        """Notes, before it happens, that a server is asked for a picture."""
        self._do("UPDATE pictures SET server = ? WHERE key = ?", server, key)

    def failed(self, key: str, error: str) -> None:
        """The server could not draw it; the next run tries again."""
        query = "UPDATE pictures SET error = ?, attempts = attempts + 1, server = NULL WHERE key = ?"
        self._do(query, error, key)

    def drawn(
        self, key: str, png: bytes, seconds: float | None, memory: int | None = None, machine: str | None = None
    ) -> None:
        """Keeps a picture: the file, then its row. Raises BadPicture for what is none, or not whole."""
        opened(png)
        path = self.path(key)
        part = path.with_suffix(".part")
        with self._kept():
            with part.open("wb") as file:
                file.write(png)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        query = "UPDATE pictures SET sha256 = ?, seconds = ?, memory = ?, machine = ?, error = NULL WHERE key = ?"
        self._do(query, hashlib.sha256(png).hexdigest(), seconds, memory, machine or None, key)

    def usual_seconds(self) -> float | None:
        """The mean of what pictures took by their servers' clocks; None where none is known."""
        return self._do("SELECT AVG(seconds) FROM pictures WHERE seconds IS NOT NULL")[0][0]

    def machines(self) -> list[tuple[str, int]]:
        """What drew, as servers say it, and how many pictures each."""
        query = "SELECT machine, COUNT(*) FROM pictures WHERE sha256 IS NOT NULL AND machine IS NOT NULL"
        return self._do(f"{query} GROUP BY machine ORDER BY machine")

    def path(self, key: str) -> Path:
        return self.pictures / f"{key}.png"

    def forget_lost(self) -> int:
        """Pictures whose file is gone or damaged are to be drawn again; gives how many. Not those made elsewhere."""
        lost = 0
        for key, graph, digest in self._do("SELECT key, graph, sha256 FROM pictures WHERE sha256 IS NOT NULL"):
            if IMPORTED not in json.loads(graph) and digest != _digest(self.path(key)):
                self._do("UPDATE pictures SET sha256 = NULL, attempts = attempts + 1, server = NULL WHERE key = ?", key)
                lost += 1
        return lost

    def runs(self) -> list[Run]:
        rows = self._do("SELECT name, method, settings FROM runs ORDER BY rowid")
        return [Run(name, method, json.loads(settings)) for name, method, settings in rows]

    def templates(self) -> list[str]:
        return [name for (name,) in self._do("SELECT DISTINCT template FROM runs ORDER BY template")]

    def cells(self, drawn: bool = True) -> list[Cell]:
        """All pictures, or all that were asked for: by run and pair in the order they were planned in, and by seed."""
        rows = self._do(
            "SELECT cells.run, pairs.pair, cells.seed, pictures.key, pictures.seconds, pictures.memory FROM cells"
            " JOIN runs ON runs.name = cells.run JOIN pairs ON pairs.id = cells.pair"
            " JOIN pictures ON pictures.key = cells.key WHERE pictures.sha256 IS NOT NULL OR NOT ?"
            " ORDER BY runs.rowid, pairs.rowid, cells.seed",
            drawn,
        )
        return [Cell(run, Pair(**json.loads(pair)), *rest) for run, pair, *rest in rows]

    def errors(self) -> list[tuple[str, int]]:
        """What servers said of the pictures that they could not draw, and how often."""
        return self._do("SELECT error, COUNT(*) FROM pictures WHERE error IS NOT NULL GROUP BY error ORDER BY error")

    def to_judge(self, judge: str) -> list[Cell]:
        """Drawn pictures without this judge's scores, each once."""
        scored = {(key, pair) for key, pair in self._do("SELECT key, pair FROM scores WHERE judge = ?", judge)}
        todo = {(cell.key, cell.pair.id): cell for cell in self.cells()}
        return [cell for place, cell in todo.items() if place not in scored]

    def score(self, judge: str, cell: Cell, scores: Sequence[float | None], note: str = "") -> None:
        """Keeps positive, negative and quality, each 0..1 or None for not judged."""
        query = "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?)"
        self._do(query, judge, cell.key, cell.pair.id, *scores, note)

    def unscore(self, judge: str, cell: Cell) -> None:
        """Takes a judge's scores back."""
        self._do("DELETE FROM scores WHERE judge = ? AND key = ? AND pair = ?", judge, cell.key, cell.pair.id)

    def scores(self) -> dict[str, dict[tuple[str, str], tuple[float | None, float | None, float | None]]]:
        """By judge, then by (key, pair id): positive, negative, quality."""
        out: dict[str, dict] = {}
        for judge, key, pair, *scores in self._do(
            "SELECT judge, key, pair, positive, negative, quality FROM scores ORDER BY judge, key, pair"
        ):
            out.setdefault(judge, {})[key, pair] = tuple(scores)
        return out


def _key(graph: Any) -> str:
    """A picture's name: the digest of what it is made of."""
    return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
