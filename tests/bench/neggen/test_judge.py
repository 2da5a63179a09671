"""Judges: an endpoint that misbehaves in every way, a person at the page, and the toy's detectors."""

import _thread
import json
import math
import os
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from hosting.errors import HostError
from PIL import Image, PngImagePlugin

from neggen import __main__ as command
from neggen import forms, human, judging, pairs
from neggen.endpoint import Broken, Endpoint, Unreadable

KEY = "sk-test/0123456789"
GOOD = {"positive": 1, "negative": 0.5, "quality": 0.8}
SCORES = (1.0, 0.5, 0.8)


def completion(content, **more):
    usage = {"prompt_tokens": 1000, "completion_tokens": 10}
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage, **more}).encode()


ANSWERS = {
    "good": (200, {}, completion(json.dumps(GOOD))),
    "in parts": (200, {}, completion([{"type": "text", "text": json.dumps(GOOD)}])),
    "talks": (200, {}, completion('<think>{"positive": 0}</think>Sure!\n```json\n' + json.dumps(GOOD) + "\n```\nBye")),
    "no usage": (200, {}, completion(json.dumps(GOOD), usage=None)),
    "no scores": (200, {}, completion("I can not see the picture.")),
    "a score missing": (200, {}, completion('{"positive": 1, "negative": 1}')),
    "out of range": (200, {}, completion(json.dumps({**GOOD, "quality": 80}))),
    "words for numbers": (200, {}, completion(json.dumps({**GOOD, "positive": "yes"}))),
    "not finite": (200, {}, completion('{"positive": 1, "negative": 0, "quality": NaN}')),
    "null": (200, {}, completion(None)),
    "a list": (200, {}, b"[]"),
    "half": (200, {}, b'{"choices": [{"mess'),
    "html": (200, {}, b"<html>Welcome</html>"),
    "empty": (200, {}, b""),
    "binary": (200, {}, b"\xff\xfe\x00" * 10),
    "huge": (200, {}, b" " * 3_000_000),
    "500": (500, {}, b"boom"),
    "503": (503, {"Retry-After": "1"}, b""),
    "429": (429, {"Retry-After": "1"}, b"slow down"),
    "odd Retry-After": (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""),
    "redirect": (307, {"Location": "/elsewhere"}, b""),
    "400": (400, {}, b"response_format is not supported"),
    "401": (401, {}, f"wrong key {KEY}".encode()),
    "404": (404, {}, b"no such model"),
    "an odd digit for Retry-After": (429, {"Retry-After": "\u00b2".encode().decode("latin-1")}, b""),
    "endless tokens": (200, {}, completion(json.dumps(GOOD), usage={"prompt_tokens": math.inf})),
    "negative tokens": (200, {}, completion(json.dumps(GOOD), usage={"prompt_tokens": -9e9, "completion_tokens": -9})),
    "words for tokens": (
        200,
        {},
        completion(json.dumps(GOOD), usage={"prompt_tokens": "many", "completion_tokens": {}}),
    ),
    "half a character": (200, {}, completion("\ud83d \x1b[2J " + json.dumps(GOOD))),
    "deep": (200, {}, b'{"choices": ' + b"[" * 200_000),
    "deep inside": (200, {}, completion('{"a": ' * 3000 + json.dumps(GOOD))),
    "braces": (200, {}, completion('{"why": "{it} {is}"} ' + json.dumps(GOOD) + " {}")),
    "echo": (500, {}, (" " * 290 + f"you sent Bearer {KEY}").encode()),
}


@contextmanager
def endpoint(*behaviours):
    """A local server that behaves as listed, one behaviour a request, the last one for ever; ``seen``: the requests.

    A behaviour is one of ``ANSWERS``, of the few below, or a function of the request's body.
    """
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((time.monotonic(), self.path, dict(self.headers), body))
                how = behaviours[min(len(seen), len(behaviours)) - 1]
            if how == "hang up":
                self.connection.close()
                return
            if how == "silent":
                time.sleep(3)
                return
            if how == "drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(30):
                    self.wfile.write(b" " * 8192)
                    time.sleep(0.1)
                return
            status, headers, text = how(body) if callable(how) else ANSWERS[how]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text) + 9 * (how == "half"))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *words):
            pass

        def handle(self):
            with suppress(OSError):
                super().handle()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
        server.shutdown()


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("NEGGEN_API_KEY", KEY)


@pytest.fixture
def judged(planned, tmp_path):
    """A store whose pictures are grey; with ComfyUI's metadata, which says how each was made."""
    told = PngImagePlugin.PngInfo()
    told.add_text("prompt", "VSFModelPatch")
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "grey.png", pnginfo=told)
    for job in planned.jobs():
        planned.drawn(job.key, (tmp_path / "grey.png").read_bytes(), 0.0)
    return planned


def ask(address, store, **options):
    cell = store.cells()[0]
    one = Endpoint(address, "a-model", **{"first_wait": 0.01, "timeout": 1.0, "tries": 3, **options})
    return one, one.judge(store.path(cell.key), cell.pair)


COUNTED = ("good", "in parts", "talks", "half a character", "deep inside", "braces")
GUESSED = ("no usage", "endless tokens", "negative tokens", "words for tokens")


@pytest.mark.parametrize("how", [*COUNTED, *GUESSED])
def test_valid_answers(judged, how):
    with endpoint(how) as (address, seen):
        one, (scores, words) = ask(address, judged, prices=(2.0, 100.0))
    assert scores == SCORES and "\x1b" not in words and words.encode()
    guess = len(forms.load("ours").texts(judged.cells()[0].pair)[1]) // 4 + 9  # 64 pixels are three patches a side
    assert one.tokens_in == (guess if how in GUESSED else 1000)
    assert one.cost == pytest.approx(
        (2 * guess + 100 * (len(json.dumps(GOOD)) // 4)) / 1e6 if how in GUESSED else 0.003
    )
    ((_, path, headers, body),) = seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    text, image = body["messages"][0]["content"]
    pair = judged.cells()[0].pair
    assert pair.question_1 in text["text"] and pair.question_2 in text["text"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["positive", "negative", "quality"]


BAD = [
    *("no scores", "a score missing", "out of range", "words for numbers", "not finite", "null", "a list", "half"),
    *("html", "empty", "binary", "huge", "500", "redirect", "hang up", "silent", "drip", "odd Retry-After"),
    *("an odd digit for Retry-After", "deep"),
]


@pytest.mark.parametrize("how", BAD)
def test_another_try(judged, how):
    with endpoint(how, "good") as (address, seen):
        assert ask(address, judged)[1][0] == SCORES
    assert [path for _, path, *_ in seen] == ["/v1/chat/completions"] * 2
    assert seen[1][0] - seen[0][0] < 2.5, "an answer has a second"


def test_no_endless_tries(judged):
    with (
        endpoint("no scores") as (address, seen),
        pytest.raises(Unreadable, match="in 2 tries; the last: .*not see the"),
    ):
        ask(address, judged)
    assert len(seen) == 2


@pytest.mark.parametrize("how", ["429", "503"])
def test_waits_as_long_as_it_is_told(judged, how):
    with endpoint(how, "good") as (address, seen):
        ask(address, judged)
    assert 1.0 <= seen[1][0] - seen[0][0] < 3.0


def test_waits_longer_and_longer(judged):
    with endpoint("500", "500", "500", "good") as (address, seen):
        ask(address, judged, tries=4, first_wait=0.15)
    pauses = [b[0] - a[0] for a, b in zip(seen, seen[1:], strict=False)]
    assert pauses[2] > pauses[0] and pauses[2] >= 0.6


def test_a_server_that_knows_no_schema(judged):
    with endpoint("400", "good") as (address, seen):
        one, _ = ask(address, judged)
        one.judge(judged.path(judged.cells()[1].key), judged.cells()[1].pair)
    assert ["response_format" in body for *_, body in seen] == [True, False, False]


@pytest.mark.parametrize("how", ["401", "404"])
def test_what_no_try_can_better(judged, how):
    with endpoint(how) as (address, seen), pytest.raises(Broken, match=f"answers {how} .*NEGGEN_API_KEY"):
        ask(address, judged)
    assert len(seen) == 1


def test_addresses():
    for address in ("127.0.0.1:80", "ftp://x/v1", "https://me:secret@host/v1"):
        with pytest.raises(HostError, match="takes http") as error:
            Endpoint(address, "m")
        assert "secret" not in str(error.value)


def run(store, address, *more):
    words = ["judge", "--out", str(store.folder), "--endpoint", address, "--model", "a-model", "--at-once", "2"]
    return command.main([*words, *more])


def test_the_command_estimates_and_asks_first(judged, capsys):
    with endpoint("good") as (address, seen):
        assert run(judged, address, "--prices", "2", "10") == 1
        shown = capsys.readouterr()
        assert (
            "10 pictures to a-model: about " in shown.out and "cost: 0.0" in shown.out and "time: 0.3 min" in shown.out
        )
        assert "nothing was sent; --yes goes on" in shown.err and not seen
        assert run(judged, address, "--yes", "--prices", "2", "10") == 0
        assert len(seen) == 10 and set(judged.scores()["a-model"].values()) == {SCORES}
        assert "10,000 tokens in, 100 out; cost 0.02 " in capsys.readouterr().out
        assert run(judged, address, "--yes") == 0 and len(seen) == 10, "asked twice"


def test_a_search_estimates_its_most_before_it_draws(tmp_path, capsys):
    words = ["search", "--out", str(tmp_path), "--limit", "3", "--trials", "4", "--prices", "1000000", "0"]
    with endpoint("good") as (address, seen):
        assert command.main([*words, "--endpoint", address, "--model", "a-model"]) == 1
    shown = capsys.readouterr()
    assert "at most 30 pictures to a-model: about " in shown.out and "nothing was sent" in shown.err and not seen
    cost = float(shown.out.split("cost: ")[1].split()[0])
    ask = len(forms.load("ours").texts(pairs.load("toy")[0])[1]) / 4
    assert cost == pytest.approx(30 * (ask + 100), rel=0.1), "256 pixels are ten patches a side"


def test_the_command_stops_and_goes_on(judged, capsys):
    with endpoint("good") as (address, seen):
        assert run(judged, address, "--yes", "--prices", "1000", "0", "--max-cost", "3", "--at-once", "1") == 1
        assert "stopped: 3.0" in capsys.readouterr().err and len(judged.scores()["a-model"]) == len(seen) == 3
        assert run(judged, address, "--yes") == 0 and len(seen) == len(judged.scores()["a-model"]) == 10


def test_the_key_is_nowhere(judged, capfd, monkeypatch, caplog):
    caplog.set_level(0)
    monkeypatch.setattr(judging, "IN_A_ROW", 2)
    monkeypatch.setattr(Endpoint, "_pause", lambda *_: 0.0)
    for how in ("echo", "401", "redirect"):
        with endpoint(how) as (address, seen):
            assert run(judged, address, "--yes") == 1
            assert seen[0][2]["Authorization"].endswith(KEY)
    told = capfd.readouterr()
    assert "you sent B" in told.out and "wrong key ***" in told.err
    assert KEY[:8] not in told.out + told.err + caplog.text
    judged.close()
    assert not any(KEY.encode() in path.read_bytes() for path in judged.folder.rglob("*") if path.is_file())


LEAKS = [KEY, *(KEY.replace("/", how) for how in (r"\/", r"\\/", "%2F", "&#47;"))]
LEAKS += ["".join(rf"\u{ord(c):04x}" for c in KEY), KEY.replace("k", r"\u006B"), KEY.replace("k", r"\\x6b")]


@pytest.mark.parametrize("leak", LEAKS)
def test_no_spelling_of_the_key_is_kept(judged, leak, monkeypatch):
    """In the model's words; as JSON text, where the server's JSON undoes one layer more, and raw, where it does not."""
    raw = json.dumps(GOOD)[:-1] + f', "why": "Bearer {leak}"}}'
    for body in (completion(raw), completion("KEY " + json.dumps(GOOD)).replace(b"KEY", leak.encode())):
        monkeypatch.setitem(ANSWERS, "leak", (200, {}, body))
        with endpoint("leak") as (address, _):
            try:
                words = ask(address, judged, tries=1)[1][1]
            except HostError as error:
                words = str(error)
        assert "***" in words and "0123" not in words and "30\\u0031" not in words, words


def test_one_picture_that_can_not_be_read_costs_that_one(judged, capsys):
    cells = judged.cells()
    judged.path(cells[0].key).unlink()
    whole = judged.path(cells[-1].key).read_bytes()
    judged.path(cells[-1].key).write_bytes(whole[: len(whole) // 2])
    with endpoint("good") as (address, seen):
        assert run(judged, address, "--yes") == 1
    spoiled = {cells[0].key, cells[-1].key}
    assert {key for key, _ in judged.scores()["a-model"]} == {cell.key for cell in cells} - spoiled
    shown = capsys.readouterr()
    assert all(f"{key}.png is no whole picture" in shown.out for key in spoiled)
    assert "Traceback" not in shown.out + shown.err


def test_one_odd_first_answer_costs_one_picture(judged, monkeypatch):
    monkeypatch.setattr(Endpoint, "_pause", lambda *_: 0.0)
    with endpoint("no scores", "no scores", "good") as (address, _):
        assert run(judged, address, "--yes", "--at-once", "1") == 1
    assert len(judged.scores()["a-model"]) == 9


@pytest.mark.parametrize("how", ["no scores", "null", "a list", "a score missing"])
def test_a_judge_that_never_answers_in_form_is_stopped_early(judged, how, capsys, monkeypatch):
    monkeypatch.setattr(Endpoint, "_pause", lambda *_: 0.0)
    with endpoint(how) as (address, seen):
        assert run(judged, address, "--yes", "--at-once", "1") == 1
    told = capsys.readouterr().err
    assert "no answer about 3 pictures has the form asked for, see --prompt" in told and len(seen) == 6, told
    assert {"no scores": "can not see", "a score missing": "'quality' is missing"}.get(how, "not a chat") in told


def test_negative_tokens_do_not_defeat_max_cost(judged, capsys):
    with endpoint("negative tokens") as (address, seen):
        assert run(judged, address, "--yes", "--prices", "1e6", "0", "--max-cost", "500", "--at-once", "1") == 1
    assert "stopped: " in capsys.readouterr().err and 0 < len(seen) < 10


def test_ctrl_c_does_not_wait_for_answers(judged):
    release, start = threading.Event(), time.monotonic()

    def judge(cell):
        release.wait(20)
        return SCORES, ""

    threading.Timer(0.5, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        judging.judge_all(judged, "me", judge, at_once=3)
    assert time.monotonic() - start < 5, "it waited for those that were asked already"
    release.set()


@pytest.fixture
def page_address(judged):
    found, ready = [], threading.Event()
    session = human.Session(judged, "me")
    work = {"session": session, "port": 0, "ready": lambda address: (found.append(address), ready.set())}
    threading.Thread(target=human.serve, kwargs=work, daemon=True).start()
    assert ready.wait(10)
    return found[0], session


def test_a_person_judges_by_keyboard(judged, page_address):
    from playwright.sync_api import sync_playwright

    address, session = page_address
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ["VSF_CHROMIUM"], args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(address)
        count, question = page.locator("#count"), page.locator("#question")
        first = session.cells[session.left()[0]]
        question.filter(has_text=first.pair.question_1).wait_for()
        page.wait_for_function("document.getElementById('picture').naturalWidth == 64")
        assert not [run.name for run in judged.runs() if run.name in page.content()], "not blind"
        for key in ("1", "3", "Backspace", "2", "4"):  # yes; no, or rather partly; good
            page.keyboard.press(key)
        count.filter(has_text="1 of 10 judged").wait_for()
        assert judged.scores() == {"human me": {(first.key, first.pair.id): (1.0, 0.5, 0.75)}}
        page.keyboard.press("Backspace")
        count.filter(has_text="0 of 10 judged").wait_for()
        assert not judged.scores()
        for done in range(1, 11):
            for key in ("1", "1", "5"):
                page.keyboard.press(key)
            count.filter(has_text=f"{done} of 10 judged").wait_for()
        question.filter(has_text="All done").wait_for()
        browser.close()
    assert len(judged.scores()["human me"]) == 10


def test_the_page_is_blind_shuffled_and_resumable(judged, page_address):
    address, session = page_address
    order = [session.cells[token] for token in session.left()]
    assert order != judged.cells() and [c.key for c in human.Session(judged, "me").cells.values()] == [
        c.key for c in order
    ]
    assert [cell.key for cell in human.Session(judged, "you").cells.values()] != [cell.key for cell in order]
    token = session.left()[0]
    picture = requests.get(f"{address}/picture/{token}").content
    assert b"VSF" in judged.path(order[0].key).read_bytes() and b"VSF" not in picture
    send = {"token": token, "scores": [1, 0, 1]}
    assert requests.post(f"{address}/score", data=json.dumps(send)).status_code == 400, "a form of another page"
    assert requests.get(address, headers={"Host": "evil.example"}).status_code == 403
    assert requests.post(f"{address}/score", json=send, headers={"Host": "evil.example"}).status_code == 403
    for wrong in ([1, 0], [1, 0, 2], ["1", 0, 1], None):
        assert requests.post(f"{address}/score", json={**send, "scores": wrong}).status_code == 400
    assert requests.post(f"{address}/score", json={**send, "token": "x"}).status_code == 400
    assert not judged.scores()
    assert requests.post(f"{address}/score", json=send).json()["done"] == 1
    assert human.Session(judged, "me").next()["done"] == 1
