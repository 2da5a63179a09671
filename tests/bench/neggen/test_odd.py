"""What is odd costs one picture, never a run: servers, files, databases, names."""

import _thread
import http.client
import json
import threading
import time
from contextlib import closing
from io import BytesIO

import pytest
from hosting.errors import HostError, PromptFailed
from PIL import Image

from neggen import __main__ as command
from neggen import drawing, pairs, search, templates, threads
from neggen.store import BadPicture, Store, Unkept, opened


def png(side=8):
    out = BytesIO()
    Image.new("RGB", (side, side), "teal").save(out, "PNG")
    return out.getvalue()


class Server:
    """A ComfyUI in the client's place; ``oddities`` are used up one by one, then all is well."""

    oddities: list = []
    cached = True
    wait = None

    def __init__(self, address, timeout=0):
        self.address = address

    def is_queued(self, prompt_id):
        return False

    def memory(self):
        return 1

    def run(self, graph, on_progress, prompt_id):
        on_progress()
        if Server.wait:
            Server.wait.wait(20)
        self.graph, self.oddity = graph, Server.oddities.pop() if Server.oddities else None
        if isinstance(self.oddity, Exception):
            raise self.oddity

    def history(self, prompt_id):
        if isinstance(self.oddity, (dict, list)):
            return self.oddity
        loaders = [*self.graph] if Server.cached else []
        messages = [
            ["execution_start", {"timestamp": 1000}],
            ["execution_cached", {"nodes": loaders, "timestamp": 1500}],
        ]
        messages.append(["execution_success", {"timestamp": 4000}])
        return {"status": {"status_str": "success", "messages": messages}, "outputs": {"save": {"images": [{}]}}}

    def image(self, ref):
        return self.oddity if isinstance(self.oddity, bytes) else png()


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(drawing, "ComfyClient", Server)
    monkeypatch.setattr(Server, "oddities", [])
    monkeypatch.setattr(Server, "cached", True)
    monkeypatch.setattr(Server, "wait", None)
    return Server


ODDITIES = [
    *(b"", b"<html>", png()[:40], png(64)[:-30]),
    *({}, {"status": None}, [], {"status": {"status_str": "success"}, "outputs": {}}),
    *(http.client.IncompleteRead(b"x"), ValueError("Expecting value"), KeyError("queue_running"), RecursionError()),
    *(PromptFailed("half a character \ud800 \x1b[2J"), json.JSONDecodeError("a", "b", 0)),
]


@pytest.mark.parametrize("oddity", ODDITIES, ids=lambda oddity: repr(oddity)[:24])
def test_an_odd_answer_costs_one_picture(planned, fake, oddity):
    fake.oddities = [oddity]
    assert drawing.draw(planned, ["http://here"]) == 1
    ((words, count),) = planned.errors()
    assert count == 1 and words.encode() and "\x1b" not in words and len(planned.jobs()) == 1
    assert drawing.draw(planned, ["http://here"]) == 0, "the next run draws it"


def test_pictures_that_were_lost_are_drawn_again(planned, fake, capsys):
    assert drawing.draw(planned, ["http://here"]) == 0
    gone, changed, *rest = {cell.key for cell in planned.cells()}
    before = {key: planned.path(key).stat().st_mtime_ns for key in rest}
    planned.path(gone).unlink()
    planned.path(changed).write_bytes(planned.path(changed).read_bytes()[:-9])
    assert drawing.draw(planned, ["http://here"]) == 0
    assert "2 pictures are gone or damaged" in capsys.readouterr().out
    assert all(opened(planned.path(cell.key)) for cell in planned.cells())
    assert before == {key: planned.path(key).stat().st_mtime_ns for key in rest}


def test_ctrl_c_ends_it_at_once(planned, fake):
    fake.wait, start = threading.Event(), time.monotonic()
    threading.Timer(0.5, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        drawing.draw(planned, ["http://here", "http://there"])
    assert time.monotonic() - start < 4
    fake.wait.set()


def test_nothing_runs_on_in_the_background(planned, fake):
    """No scheduler and no profiler: the only threads are those that draw, and they end with the work."""
    before = set(threading.enumerate())
    drawing.draw(planned, ["http://here"], depth=3)
    end = time.monotonic() + 3
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end, set(threading.enumerate()) - before
        time.sleep(0.02)


def test_seconds_are_without_the_models_load(planned, fake):
    fake.cached = False
    drawing.draw(planned, ["http://here"])
    assert {cell.seconds for cell in planned.cells()} == {None}
    key = planned.cells()[0].key
    planned.path(key).unlink()
    fake.cached = True
    drawing.draw(planned, ["http://here"])
    assert {cell.seconds for cell in planned.cells() if cell.key == key} == {3.0}


def test_work_that_breaks_down_is_handed_on():
    done = dict(threads.each([0, 1], Lines("abc"), lambda _, item: 1 / (item != "b")))
    assert done["a"] == done["c"] == 1 and isinstance(done["b"], ZeroDivisionError)


class Lines:
    """Hands out letters, one to a caller."""

    def __init__(self, letters):
        self.letters, self.lock = [*letters], threading.Lock()

    def __call__(self, worker):
        with self.lock:
            return self.letters.pop(0) if self.letters else None


@pytest.mark.parametrize("content", [b"SQLite format 3\0" + b"\xff" * 200, b"not a database at all" * 99])
def test_a_broken_database(tmp_path, content, capsys):
    (tmp_path / "results.sqlite").write_bytes(content)
    with pytest.raises(Unkept, match="results.sqlite can't be used .*Put it away, or give another --out"):
        Store(tmp_path)
    assert command.main(["report", "--out", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_another_programs_database(tmp_path):
    with closing(Store(tmp_path)) as store:
        store._do("DROP TABLE scores")
        store._do("CREATE TABLE scores (a)")
        with pytest.raises(Unkept, match="no such column"):
            store.scores()


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Unkept, match="file"):
        Store(tmp_path / "file")


def test_a_searchs_database_is_broken(tmp_path, planned):
    (planned.folder / "search.sqlite").write_bytes(b"no database" * 99)
    asked = search.Search(templates.load("toy_sd3"), "vsf", {"offset": 0.2}, {"scale": (1, 2)}, [], [], "me")
    with pytest.raises(Unkept, match="search.sqlite can't be used"):
        search.search(planned, asked, 1, lambda: None)


def test_a_search_that_can_not_be_draws_nothing(planned):
    asked = search.Search(templates.load("toy_sd3"), "vsf", {}, {"scale": (1, 2)}, pairs.load("toy")[:1], [1], "me")
    before = len(planned.runs())
    with pytest.raises(HostError, match="nothing fills the slot 'offset'"):
        search.search(planned, asked, 1, lambda: pytest.fail("it drew"))
    assert len(planned.runs()) == before


@pytest.mark.parametrize("text", ["scale", "scale=1", "scale=1:a", "scale=2:1", "scale=1:1", "scale=0:inf", "=0:1"])
def test_ranges_that_are_none(text):
    with pytest.raises(HostError, match="expected NAME=LOW:HIGH"):
        search.parse_ranges([text])


def test_half_characters(tmp_path, planned):
    cell = planned.cells(drawn=False)[0]
    planned.drawn(cell.key, png(), None)
    planned.score("judge \ud800", cell, [1.0, 1.0, 1.0], "\udfff said")
    assert [*planned.scores()] == ["judge ?"]
    (run,) = templates.parse_run("a\udcffb=vsf:scale=1")
    assert run.name == "a?b"
    pair = {"prompt": "a \ud800", "missing_element": "b", "question_1": "?", "question_2": "?"}
    (tmp_path / "pairs.json").write_text(json.dumps([pair]))
    with pytest.raises(HostError, match="pair 1: 'prompt' has characters that are no text"):
        pairs.load(str(tmp_path / "pairs.json"))
    (tmp_path / "mine.json").write_text(json.dumps({"1": {"class_type": "\ud800", "inputs": {}}}))
    with pytest.raises(HostError, match="surrogates not allowed"):
        templates.load(str(tmp_path / "mine.json"))


def test_what_is_kept_is_a_whole_picture(planned):
    cell = planned.cells(drawn=False)[0]
    with pytest.raises(BadPicture, match="what came is no whole picture"):
        planned.drawn(cell.key, png(64)[:-30], None)
    assert not planned.cells() and not planned.path(cell.key).exists()
