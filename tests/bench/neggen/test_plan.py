"""Pairs, templates and what is to be drawn."""

import json
from io import BytesIO

import pytest
from hosting.client import ComfyClient
from hosting.errors import HostError
from hosting.toy_graphs import with_toys
from PIL import Image

from neggen import pairs, templates, toy_world
from neggen.store import Store

ENTRY = {"prompt": "a bike", "missing_element": "wheels", "question_1": "A bike?", "question_2": "No wheels?"}


def test_our_pairs():
    ours = pairs.load("ours")
    assert len(ours) == 60 == len({pair.id for pair in ours})
    assert {pair.kind for pair in ours} == {"object", "style", "video"}
    for pair in ours:
        told = pair.prompt.lower()
        assert not {"no", "not", "without"} & set(told.split()), "a prompt never says what is missing"
        assert pair.missing_element.lower() not in told, pair
        assert pair.question_1.endswith("?") and pair.question_2.endswith("?")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps({"prompts": [ENTRY]})),
        ("a.json", json.dumps([{**ENTRY, "more": 1}])),
        ("a.jsonl", f"\n{json.dumps(ENTRY)}\n\n"),
        ("a.json", "\ufeff" + json.dumps([{**ENTRY, "prompt": " a bike "}])),
    ],
)
def test_shapes(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert pairs.load(str(tmp_path / name)) == [pairs.Pair(*ENTRY.values())]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.json", "{", "a.json is no JSON: "),
        ("a.json", "3", "a.json holds int; expected a list"),
        (
            "a.json",
            '{"pairs": []}',
            "holds an object with pairs; expected a list of pairs or an object",
        ),
        ("a.json", "[]", "holds no pairs"),
        ("a.json", "[3]", "pair 1 is int; expected an object with prompt, missing_element"),
        ("a.json", '[{"prompt": "x"}]', "pair 1 lacks 'missing_element'; it has 'prompt'"),
        ("a.json", json.dumps([{**ENTRY, "prompt": " "}]), "pair 1: 'prompt' is ' '; expected a text"),
        ("a.json", json.dumps([ENTRY, ENTRY]), "pair 2 repeats .*pair 1: 'a bike' without 'wheels'"),
        ("a.jsonl", f"{json.dumps(ENTRY)}\n{{", "a.jsonl, line 2 is no JSON"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, text, error):
    (tmp_path / name).write_text(text)
    with pytest.raises(HostError, match=error):
        pairs.load(str(tmp_path / name))


def test_a_file_that_is_not_there():
    with pytest.raises(HostError, match="nowhere.json can't be read .*ours, toy or a JSON"):
        pairs.load("nowhere.json")


def test_slots_keep_types_and_methods_are_patches():
    template = templates.load("toy_sd3")
    (run,) = templates.parse_run("vsf:scale=2:offset=-0.5")
    graph = template.fill(template.check(run), 'a "house" {{seed}}', "a roof", 7)
    assert graph["prompt"]["inputs"]["text"] == 'a "house" {{seed}}'
    assert graph["sample"]["inputs"]["seed"] == 7 and graph["sample"]["inputs"]["steps"] == 8
    assert graph["patch"]["inputs"] == {"model": ["model", 0], "scale": 2, "offset": -0.5, "layout": "paper"}
    assert graph["sample"]["inputs"]["model"] == ["patch", 0]
    assert "patch" not in template.methods["none"] and template.methods["none"]["sample"]["inputs"]["cfg"] == "{{cfg}}"
    assert templates.merged({"a": {"b": 1, "c": 2}}, {"a": {"b": None, "d": [3]}}) == {"a": {"c": 2, "d": [3]}}


def test_runs_from_the_command_line():
    runs = templates.parse_run("vsf:scale=1,2:offset=0.2")
    assert [run.name for run in runs] == ["vsf scale 1 offset 0.2", "vsf scale 2 offset 0.2"]
    assert templates.parse_run("Mine=vsf:layout=released")[0] == templates.Run("Mine", "vsf", {"layout": "released"})


@pytest.mark.parametrize(
    ("run", "error"),
    [
        ("vfs", "no method 'vfs'; it has none, cfg, vsf"),
        ("none:scale=2", "method none has no slot 'scale'; its slots: cfg, height, steps, width"),
        ("vsf:scale=2", "nothing fills the slot 'offset'"),
        ("vsf:scale", "'scale' is not key=value"),
    ],
)
def test_runs_that_cannot_be(run, error):
    with pytest.raises(HostError, match=error):
        [templates.load("toy_sd3").check(one) for one in templates.parse_run(run)]


def test_templates_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"1": {"class_type": "A", "inputs": {"text": "{{prompt}}, photo", "seed": "{{seed}}"}}}))
    mine = templates.load(str(path))
    assert mine.fill(mine.runs[0], "a", "b", 3)["1"]["inputs"] == {"text": "a, photo", "seed": 3}
    path.write_text(json.dumps({"nodes": [], "links": []}))
    with pytest.raises(HostError, match="has no methods"):
        templates.load(str(path))
    path.write_text(json.dumps({"1": {"class_type": "A", "inputs": {"text": "{{prompt}}"}}}))
    with pytest.raises(HostError, match="no slot seed"):
        templates.load(str(path))
    with pytest.raises(HostError, match="takes flux_schnell, qwen_image, sd35_large_turbo, toy_sd3, wan21_1_3b"):
        templates.load("sdxl")


SHIPPED = sorted(path.stem for path in templates.SHIPPED.glob("*.json"))
GIVEN = {"scale": 2.0, "offset": 0.1, "phi": 0.4, "blend": 0.5, "tau": 5.0}
GIVEN |= {"nag_scale": 5.0, "nag_alpha": 0.25, "nag_tau": 2.5}


def runs_of(template):
    """Its runs, and one of every method that these leave out."""
    made = []
    for method in set(template.methods) - {run.method for run in template.runs}:
        names = templates.slots_of(template.methods[method]) - {*templates.PAIR_SLOTS, *template.slots}
        settings = {"cfg": 2.0} if method == "cfg" else {name: GIVEN[name] for name in sorted(names)}
        made.append(templates.Run(method, method, settings))
    return [*template.runs, *map(template.check, made)]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_use_nodes_and_inputs_that_exist(server, name):
    """In the real server's own schema; the models that they name are not at hand."""
    known, template = ComfyClient(server.address).object_info(), templates.load(name)
    for run in runs_of(template):
        for node in template.fill(run, "a", "b", 1).values():
            schema = known[node["class_type"]]["input"]
            inputs = {**schema["required"], **schema.get("optional", {})}
            assert set(schema["required"]) <= set(node["inputs"]) <= set(inputs), node


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "toy_sd3"])
def test_shipped_templates_draw(server, name):
    """With toy models, small and in two steps: every run saves one picture, like no other's."""
    client, template = ComfyClient(server.address), templates.load(name)
    seen = {}
    for run in runs_of(template):
        graph = with_toys(template.fill(run, "a house", "a roof", 1))
        (ref,) = client.run(graph)["save"]["images"]
        picture = Image.open(BytesIO(client.image(ref)))
        assert picture.size == ((192, 64) if name.startswith("wan") else (64, 64))
        seen[run.name] = picture.tobytes()
    assert len(set(seen.values())) == len(seen), f"two of {', '.join(seen)} drew the same"


def test_a_name_stands_for_one_setting(tmp_path):
    template, two, store = templates.load("toy_sd3"), pairs.load("toy")[:2], Store(tmp_path)
    run = templates.Run("VSF", "vsf", {"scale": 2, "offset": 0})
    store.plan(template, [run], two[:1], [1])
    store.plan(template, [run], two, [1, 2])
    assert len(store.cells(drawn=False)) == len(store.jobs()) == 4
    with pytest.raises(HostError, match="has another run 'VSF'"):
        store.plan(template, [templates.Run("VSF", "vsf", {"scale": 3, "offset": 0})], two, [1])
    assert len(store.jobs()) == 4


def test_the_toy_judge_counts(tmp_path):
    import numpy as np

    world = toy_world.world
    scenes = world.sample_scenes(np.random.default_rng(0), world.BY_NAME["house"], 1, alone=0.0)
    scenes.style[:], scenes.present[:] = 0, True
    for roof in (1.0, 0.0):
        scenes.present[:, 0] = roof
        picture = (world.draw(scenes)[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)
        Image.fromarray(picture).resize((256, 256), Image.Resampling.NEAREST).save(tmp_path / "a.png")
        assert toy_world.judge(tmp_path / "a.png", "a house", "a roof") == (1.0, 1.0 - roof, 1.0)
    with pytest.raises(HostError, match="the toy judge knows one of house, .* not 'a bike' without 'wheels'"):
        toy_world.judge(tmp_path / "a.png", "a bike", "wheels")
