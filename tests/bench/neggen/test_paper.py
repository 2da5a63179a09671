"""The paper's way of judging, end to end: pictures made elsewhere, a judge in the paper's form, its rules, and labels
to train a judge on."""

import base64
import csv
import io
import json

import numpy as np
import pytest
from hosting.errors import HostError
from PIL import Image

from neggen import __main__ as command
from neggen import forms, pairs, report, training
from neggen.store import Store, opened
from neggen.test_judge import completion, endpoint

PAIRS = [
    {
        "prompt": f"a thing {k}",
        "missing_element": f"part {k}",
        "question_1": f"A thing {k}?",
        "question_2": f"No part {k}?",
    }
    for k in range(6)
]
GRADED = {
    "user": "{missing_element} in {prompt}? {question_2}",
    "fields": {
        "negative": {"field": "adherence", "values": {"followed": 1, "partial": 0.5, "ignored": 0}},
        "quality": {"field": "score", "most": 100},
    },
}


def shade(picture):
    """A picture's brightness, 0 to 255: what the stub judges go by."""
    return int(np.asarray(picture.convert("L"), np.float32).mean().round())


def seen_by(body):
    """What a judge was given: its picture and all words."""
    *system, user = body["messages"]
    text, image = user["content"]
    picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].split(",")[1])))
    return picture, "".join(one["content"] for one in system), text["text"]


def paper_judge(body):
    """Answers in the paper's form, true for bright pictures; and only to what has that form."""
    picture, system, user = seen_by(body)
    schema = body["response_format"]["json_schema"]
    assert picture.size == (448, 448) and "missing" in system and schema["strict"] and not picture.info.get("prompt")
    assert [*schema["schema"]["properties"]] == ["reasoning", "answer_1", "answer_2", "quality"]
    assert schema["schema"]["properties"]["answer_2"] == {"type": "boolean"} and "Question 1: A thing" in user
    bright = shade(picture)
    verdict = {"reasoning": 'It is {"so": true}.', "answer_1": bright > 60, "answer_2": bright > 120}
    return 200, {}, completion(json.dumps({**verdict, "quality": round(bright / 255, 1)}))


def graded_judge(body):
    """Answers in ``GRADED``'s form."""
    picture, _, user = seen_by(body)
    assert user.startswith("part ") and picture.size != (448, 448)
    bright = shade(picture)
    word = "Followed" if bright > 160 else "partial" if bright > 120 else "ignored"
    return 200, {}, completion(json.dumps({"adherence": word, "score": bright // 3}))


@pytest.fixture
def made(tmp_path):
    """A folder of pictures of six pairs and two seeds, as others name and save them, and what they show."""
    (tmp_path / "pairs.json").write_text(json.dumps({"prompts": PAIRS}))
    shades, folder = {}, tmp_path / "made" / "deep"
    folder.mkdir(parents=True)
    for k in range(6):
        for seed in (1, 2):
            shades[k, seed] = 30 + 20 * k + 7 * seed
            picture = Image.new("RGB", (120, 80), (shades[k, seed],) * 3)
            picture.save(
                folder / f"{k:03d}_{seed}{'.JPG' if k % 2 else '.png'}", "JPEG" if k % 2 else "PNG", quality=95
            )
    (folder / "notes.txt").write_text("not a picture")
    return folder.parent, shades


def neggen(name, out, *more):
    return command.main([name, *more[:1] * (name == "import"), "--out", str(out), *more[name == "import" :]])


def taken_in(made, tmp_path):
    asked = ["--name", "GPT-4o", "--files", "*/{index}_{seed}.*", "--pairs", str(tmp_path / "pairs.json")]
    assert neggen("import", tmp_path / "out", str(made[0]), *asked) == 0
    return tmp_path / "out"


def test_from_pictures_to_tables(made, tmp_path, capsys):
    out, shades = taken_in(made, tmp_path), made[1]
    (tmp_path / "graded.json").write_text(json.dumps(GRADED))
    with endpoint(paper_judge) as (address, seen):
        asked = ["--endpoint", address, "--model", "llama", "--yes"]
        assert neggen("judge", out, *asked, "--prompt", "paper") == 0 and len(seen) == 12
    with endpoint(graded_judge) as (address, seen):
        asked = ["--endpoint", address, "--model", "qwen", "--yes", "--prices", "1", "1"]
        assert neggen("judge", out, *asked, "--prompt", str(tmp_path / "graded.json")) == 0 and len(seen) == 12
    capsys.readouterr()
    assert neggen("report", out, "--positive-from", "llama, prompt paper", "--levels", "2") == 0
    as_given, _ = report._tables(report.Results(Store(out), 0, "llama, prompt paper"), tmp_path)
    for path, no in ((as_given, 0.5), (out / "report" / "scores.csv", 0)):
        rows = {row["judge"]: row for row in csv.DictReader(path.open())}
        told = np.array([*shades.values()])
        paper, graded = rows["llama, prompt paper"], rows["qwen, prompt graded"]
        for row in (paper, graded):
            assert row["run"] == "GPT-4o" and row["pictures"] == "12"
            assert float(row["positive"]) == pytest.approx((told > 60).mean())
        assert float(paper["negative"]) == pytest.approx((told > 120).mean())
        assert float(paper["quality"]) == pytest.approx(np.mean([round(one / 255, 1) for one in told]))
        expected = np.where(told > 160, 1, np.where(told > 120, no, 0)).mean()
        assert float(graded["negative"]) == pytest.approx(expected)
        assert float(graded["quality"]) == pytest.approx((told // 3 / 100).mean())
    html = (out / "report" / "report.html").read_text()
    assert "Judged by qwen, prompt graded (positive: llama, prompt paper)" in html and "above 0.5 is yes" in html


def test_a_judge_that_was_asked_in_the_wrong_form(made, tmp_path, capsys, monkeypatch):
    out = taken_in(made, tmp_path)
    monkeypatch.setattr("neggen.endpoint.Endpoint._pause", lambda *_: 0.0)
    with endpoint(lambda body: (200, {}, completion('{"reasoning": "", "answer_1": true}'))) as (address, seen):
        assert neggen("judge", out, "--endpoint", address, "--model", "llama", "--yes", "--at-once", "1") == 1
    told = capsys.readouterr().err
    assert "see --prompt" in told and "'positive' is missing" in told and "answer_1" in told and len(seen) == 6


def test_what_is_taken_in_twice_or_not_at_all(made, tmp_path, capsys):
    folder, _ = made
    out, asked = tmp_path / "out", ["--files", "*/{index}_{seed}.*", "--pairs", str(tmp_path / "pairs.json"), "--name"]
    bad = folder / "deep" / "000_1.png"
    bad.write_bytes(bad.read_bytes()[:50])
    assert neggen("import", out, str(folder), *asked, "Janus") == 1, "one is broken"
    told = capsys.readouterr().out
    assert "000_1.png: what came is no whole picture" in told and "11 of 12 pictures are in as 'Janus'" in told
    Image.new("RGB", (9, 9)).save(bad)
    assert neggen("import", out, str(folder), *asked, "Janus") == 0
    store = Store(out)
    assert len(store.cells()) == 12 and not store.jobs() and store.forget_lost() == 0
    Image.new("RGB", (9, 9), "red").save(bad)
    assert neggen("import", out, str(folder), *asked, "Janus") == 1
    assert "a picture of run 'Janus' has changed" in capsys.readouterr().err
    Image.new("RGB", (9, 9), "red").save(folder / "deep" / "0_1.webp")
    assert neggen("import", out, str(folder), *asked, "x") == 1 and "both of pair 1, seed 1" in capsys.readouterr().err
    assert neggen("import", out, str(tmp_path / "made" / "deep"), *asked, "x") == 1
    assert "no picture named as --files" in capsys.readouterr().err
    asked[1] = "{index}.png"
    assert neggen("import", out, str(folder), *asked, "x") == 1 and "{seed} once (or not" in capsys.readouterr().err


def test_a_sample_is_the_same_for_the_same_seed_and_keeps_numbers(made, tmp_path):
    loaded = pairs.load(str(tmp_path / "pairs.json"))
    chosen = pairs.some(loaded, 3, 7)
    assert chosen == pairs.some(loaded, 3, 7) and len(set(chosen)) == 3
    assert chosen == [pair for pair in loaded if pair in chosen], "in their order"
    assert len({tuple(pairs.some(loaded, 3, seed)) for seed in range(9)}) > 3
    with pytest.raises(HostError, match="there are 6 pairs"):
        pairs.some(loaded, 7, 1)
    asked = ["--name", "a", "--files", "*/{index}_{seed}.*", "--pairs", str(tmp_path / "pairs.json")]
    assert neggen("import", tmp_path / "out", str(made[0]), *asked, "--sample", "3", "--seed", "7") == 0
    cells = Store(tmp_path / "out").cells()
    assert [cell.pair for cell in cells[::2]] == chosen
    shown = [shade(opened(Store(tmp_path / "out").path(cell.key))) for cell in cells]
    assert shown == [made[1][loaded.index(cell.pair), cell.seed] for cell in cells]


@pytest.mark.parametrize("form", ["ours", "graded"])
def test_labels_to_train_a_judge_on(made, tmp_path, form, capsys):
    out = taken_in(made, tmp_path)
    (tmp_path / "graded.json").write_text(json.dumps(GRADED))
    store = Store(out)
    for k, cell in enumerate(store.cells()[:-1]):
        store.score("human me", cell, [1.0, (0.0, 0.5, 1.0)[k % 3], k / 20])
    prompt = form if form == "ours" else str(tmp_path / "graded.json")
    told = ["--judge", "human me", "--prompt", prompt, "--validation", "0.34", "--to", str(tmp_path / "to")]
    assert neggen("export", out, *told) == 0
    lines = {
        name: [json.loads(line) for line in (tmp_path / "to" / f"{name}.jsonl").open()]
        for name in ("train", "validation")
    }
    assert (len(lines["train"]), len(lines["validation"])) in ((7, 4), (8, 3)), "two of six prompts are held out"
    asked = {name: {line["messages"][-2]["content"] for line in found} for name, found in lines.items()}
    assert not asked["train"] & asked["validation"], "a prompt on both sides"
    learned = forms.load(str(tmp_path / "to" / "form.json"))
    scores = {(store.path(cell.key).name, cell.pair.id): cell for cell in store.cells()}
    given = store.scores()["human me"]
    for line in lines["train"] + lines["validation"]:
        (picture,) = line["images"]
        user, assistant = line["messages"][-2:]
        assert (user["role"], assistant["role"]) == ("user", "assistant") and user["content"].startswith("<image>")
        assert opened(tmp_path / "to" / picture).size == (120, 80)
        (cell,) = (cell for (name, _), cell in scores.items() if name == picture.split("/")[1])
        expected = given[cell.key, cell.pair.id]
        read = learned.read(assistant["content"])
        assert read == pytest.approx(expected if form == "ours" else (None, *expected[1:]), nan_ok=True), assistant
        assert learned.texts(cell.pair)[1] == user["content"].removeprefix("<image>")
    assert neggen("export", out, "--judge", "human me", "--prompt", "paper") == 1
    assert "labels have no reasons" in capsys.readouterr().err
    assert neggen("export", out, "--judge", "you") == 1
    assert "no such judge; human me has judged" in capsys.readouterr().err


def test_prompts_are_held_out_so_that_both_sides_are_alike(made, tmp_path):
    out = taken_in(made, tmp_path)
    store = Store(out)
    for cell in store.cells():
        store.score("me", cell, [1.0, float(cell.pair.prompt in ("a thing 0", "a thing 1")), 0.5])
    asked = training.Asked("me", forms.load("ours"), 0.5, 1)
    held = training._held_out(training._labels(store, asked)[0], asked)
    assert len(held) == 3 and len(held & {"a thing 0", "a thing 1"}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fields": {}}, "fields has nothing"),
        ({"fields": {"beauty": {"field": "a"}}}, "fields has beauty; expected some of positive, negative, quality"),
        ({"fields": {"quality": "a"}}, "quality: expected an object with field"),
        ({"fields": {"quality": {"field": "a", "most": 0}}}, "most is above 0"),
        ({"fields": {"quality": {"field": "a", "values": {"x": 2}}}}, "values are from 0 to 1"),
        ({"fields": {"quality": {"field": "a", "values": {"x": "y"}}}}, "'y' is no number"),
        ({"fields": {"quality": {"field": "a"}, "negative": {"field": "a"}}}, "twice"),
        ({"user": "Is it good?"}, "one of them asks"),
        ({"user": 3}, "are texts"),
        ({"side": 3}, "side is 3; expected 16 to 8192"),
        ({"more": 1}, "expected an object with user, fields"),
    ],
)
def test_forms_that_are_none(tmp_path, change, words):
    (tmp_path / "form.json").write_text(json.dumps({**GRADED, **change}))
    with pytest.raises(HostError, match=words):
        forms.load(str(tmp_path / "form.json"))


def test_forms_are_found_or_said_to_be_missing(tmp_path):
    with pytest.raises(HostError, match="nowhere.*it takes ours, paper or a JSON file"):
        forms.load("nowhere")
    assert forms.load("paper").side == 448 and forms.load("paper").reasons == "reasoning"
    (tmp_path / "again.json").write_text(json.dumps(forms.load("paper").file()))
    again = forms.load(str(tmp_path / "again.json"))
    assert again.fields == forms.load("paper").fields and again.system == forms.load("paper").system


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ({"answer_1": True, "answer_2": False, "quality": 1}, (1.0, 0.0, 1.0)),
        ({"answer_1": "True", "answer_2": " false", "quality": 0.3}, (1.0, 0.0, 0.3)),
        ({"answer_1": 1, "answer_2": False, "quality": 0.3}, None),
        ({"answer_1": "yes", "answer_2": False, "quality": 0.3}, None),
        ({"answer_1": True, "answer_2": None, "quality": 0.3}, None),
        ({"answer_1": True, "answer_2": [], "quality": 0.3}, None),
        ({"answer_1": True, "answer_2": False, "quality": float("nan")}, None),
        ({"answer_1": True, "answer_2": False, "quality": "0.3"}, None),
    ],
)
def test_answers_in_the_papers_form(answer, scores):
    if scores is None:
        with pytest.raises(ValueError, match="answer_|quality"):
            forms.load("paper").read(json.dumps(answer))
    else:
        assert forms.load("paper").read(json.dumps(answer)) == scores
