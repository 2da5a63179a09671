"""Hundreds of graphs, valid and broken, queued at a real server: each broken one fails with an error that says why, the
queue goes on, and at the end a stock graph gives the picture that it gave at the start."""

import json
import random
import re
import sys
import time
from pathlib import Path

import pytest
from hosting.client import ComfyClient
from hosting.errors import PromptFailed
from hosting.server import ComfyServer
from hosting.toy_graphs import node, picture, stock, with_vsf

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
GRAPHS = 100
BLOCKS = {
    "sd3": ["", "all", "double:0-1", "double:-0"],
    "flux": ["", "single", "double:0,single:1-"],
    "wan": ["", "double:1-"],
}
FAMILIES = ["sd3", "flux", "wan", "wan"]
WORDS = ["a roof", "wheels (red:1.4)", "屋根 roof 🏠", "", "no \u0000 \u202e", "roof " * 100]


@pytest.fixture(scope="module")
def server(comfyui, tiny_models):
    with ComfyServer(comfyui, sys.executable, ROOT, tiny_models, extra_nodes=[TOY / "vsf_toy_text_encoder"]) as server:
        yield server


def valid(rng, family):
    """A graph with VSF Model Patch and VSF Negative Conditioning, whose settings are anything they may be."""
    graph = stock(family, rng.randrange(3), rng.randint(1, 2))
    window = rng.choice([(0.0, 1.0), (0.0, 0.2), (0.5, 1.0)])
    graph["patch"] = node(
        "VSFModelPatch",
        model=["model", 0],
        scale=rng.uniform(-20, 20),
        offset=rng.uniform(-20, 100),
        start_percent=window[0],
        end_percent=window[1],
        blocks=rng.choice(BLOCKS[family]),
        layout=rng.choice(["paper", "released"]),
        affect_references=rng.random() < 0.5,
    )
    graph["negative"] = node("VSFNegativeConditioning", positive=["prompt", 0], strength=rng.uniform(0, 10))
    inputs = graph["negative"]["inputs"]
    if rng.random() < (0.2 if family == "wan" else 0.7):  # the others' CLIP-L is a full one: half a second a text
        inputs["negative"] = ["prompt", 0]
    else:
        inputs.update(clip=["clip", 0], text=rng.choice(WORDS), extrapolation=rng.choice([0.0, 8.0]))
    if rng.random() < 0.4:
        size = {"width": rng.randint(1, 99), "height": rng.randint(1, 99)}
        graph["mask"] = node("SolidMask", value=rng.choice([0.0, 0.5, 1.0]), **size)
        inputs["mask"] = ["mask", 0]
    graph["sample"]["inputs"].update(model=["patch", 0], positive=["negative", 0])
    return graph


def setting(name, value, error):
    """A graph whose ``name`` ("patch.scale") is ``value``, and the error that must follow."""
    which, key = name.split(".")
    return lambda graph, family: graph[which]["inputs"].update({key: value}) or error


def of_another_family(graph, family):
    graph["other"] = node("VSFToyTextEncoder", family="sd3" if family == "wan" else "wan")
    graph["negative"]["inputs"].update(clip=["other", 0], text="a roof")
    graph["negative"]["inputs"].pop("negative", None)
    return 'VSF: the negative was made by a text encoder of type "'


def patched_twice(graph, family):
    graph["again"] = node("VSFModelPatch", model=["patch", 0], scale=1.0, offset=0.2)
    graph["sample"]["inputs"]["model"] = ["again", 0]
    return "VSF: this model is patched by VSF Model Patch already"


def combined_negative(graph, family):
    graph["both"] = node("ConditioningCombine", conditioning_1=["prompt", 0], conditioning_2=["prompt", 0])
    graph["negative"]["inputs"].update(negative=["both", 0], text="", extrapolation=0.0)
    return "VSF: negative has 2 entries"


def mask_of_another_batch(graph, family):
    """Three pictures, of which each gives a mask, for a latent of two."""
    graph["three"] = node("EmptyImage", width=8, height=8, batch_size=3, color=0xFF0000)
    graph["mask"] = node("ImageToMask", image=["three", 0], channel="red")
    graph["latent"]["inputs"]["batch_size"] = 2
    graph["negative"]["inputs"].update(mask=["mask", 0], clip=["clip", 0], text="a roof")
    graph["negative"]["inputs"].pop("negative", None)
    return None if family == "wan" else "VSF: the negative's mask is a batch of 3, but 2 pictures"


def text_and_negative(graph, family):
    graph["negative"]["inputs"].update(negative=["empty", 0], clip=["clip", 0], text="a roof")
    return "VSF: both text and negative are given"


def with_text(value, error, **inputs):
    def change(graph, family):
        graph["negative"]["inputs"].pop("negative", None)
        graph["negative"]["inputs"].update(clip=["clip", 0], text=value, **inputs)
        return error

    return change


def without_clip(graph, family):
    graph["negative"]["inputs"].pop("clip", None)
    graph["negative"]["inputs"].pop("negative", None)
    graph["negative"]["inputs"]["text"] = "a roof"
    return "VSF: text needs clip"


def extrapolated_negative(graph, family):
    graph["negative"]["inputs"].update(negative=["prompt", 0], text="", extrapolation=8.0)
    return "VSF: extrapolation needs text and clip"


def without(name):
    which, key = name.split(".")
    return lambda graph, family: graph[which]["inputs"].pop(key) and rf"Required input is missing: {key}"


NAN, INF = float("nan"), float("inf")
BROKEN = [
    setting("patch.scale", NAN, "VSF: scale must be a number from .*, got nan"),
    setting("patch.scale", INF, r"VSFModelPatch .*bigger than max.*: scale"),
    setting("patch.scale", 21, r"VSFModelPatch .*bigger than max.*: scale"),
    setting("patch.scale", "much", r"VSFModelPatch .*: scale"),
    setting("patch.scale", None, r"VSFModelPatch .*: scale"),
    setting("patch.scale", ["clip", 0], r"VSFModelPatch .*: scale"),
    setting("patch.offset", NAN, "VSF: offset must be a number from .*, got nan"),
    setting("patch.offset", -21, r"VSFModelPatch .*smaller than min.*: offset"),
    setting("patch.start_percent", NAN, "VSF: start_percent must be a number from"),
    setting("patch.start_percent", 1.0, "VSF: start_percent .* must lie before"),
    setting("patch.end_percent", 0.0, "VSF: start_percent .* must lie before"),
    setting("patch.layout", "other", r"VSFModelPatch .*: layout"),
    setting("patch.blocks", "double:99", 'VSF: blocks: "double:99" is out of range'),
    setting("patch.blocks", "tripel", 'VSF: blocks: cannot read "tripel"'),
    setting("patch.blocks", "\ud800", "VSF: character 1 of blocks is not valid Unicode"),
    setting("patch.blocks", "double:" + "9" * 9999, "VSF: blocks: cannot read"),
    setting("patch.model", ["clip", 0], r"VSFModelPatch .*: model"),
    setting("negative.positive", ["model", 0], r"VSFNegativeConditioning .*: positive"),
    setting("negative.strength", NAN, "VSF: strength must be a number from"),
    setting("negative.strength", -1, r"VSFNegativeConditioning .*: strength"),
    setting("negative.from_frame", 1.0, "VSF: from_frame .* must lie before"),
    setting("negative.to_frame", NAN, "VSF: to_frame must be a number from"),
    setting("negative.mask", ["prompt", 0], r"VSFNegativeConditioning .*: mask"),
    with_text("half \ud83c", "VSF: character 6 of text is not valid Unicode"),
    with_text("(roof:1e39)", "VSF: the negative's embedding has values that are NaN or infinite"),
    with_text("a roof", r"VSFNegativeConditioning .*: extrapolation", extrapolation=99),
    with_text("(" * 2000 + "a" + ")" * 2000, "VSF: the text.s parentheses are nested too deep"),
    without("patch.model"),
    without("negative.positive"),
    of_another_family,
    patched_twice,
    combined_negative,
    mask_of_another_batch,
    text_and_negative,
    without_clip,
    extrapolated_negative,
]


def outcome(client, prompt_id):
    """What became of a queued graph: None, or the error's text with its node."""
    status = client.history(prompt_id)["status"]
    errors = [data for kind, data in status["messages"] if kind == "execution_error"]
    assert bool(errors) == (status["status_str"] == "error")
    return f"{errors[0]['node_type']}: {errors[0]['exception_message']}" if errors else None


def wait_until_idle(client, patience=60.0):
    """Returns when the queue is empty; fails when nothing in it has changed for ``patience`` seconds."""
    before, since = None, time.monotonic()
    while time.monotonic() < since + patience:
        queue = json.loads(client._request("/queue"))
        left = len(queue["queue_running"]) + len(queue["queue_pending"])
        if not left:
            return
        if left != before:
            before, since = left, time.monotonic()
        time.sleep(0.1)
    raise AssertionError(f"the queue does not go on: {queue}"[:2000])


@pytest.mark.timeout(3600)
def test_broken_graphs_among_valid_ones_harm_nothing(server, times, tally):
    rng, client = random.Random(0), ComfyClient(server.address)
    before = {family: picture(client, stock(family)) for family in BLOCKS}
    queued, refused = {}, 0
    for i in range(GRAPHS * times):
        family = FAMILIES[len(FAMILIES) * i // (GRAPHS * times)]  # one after the other: what is loaded is cached
        graph = valid(rng, family)
        change = BROKEN[i // 2 % len(BROKEN)] if i % 2 else lambda *_: None
        error = change(graph, family)
        try:
            queued[client.queue(graph)] = i, graph, error
        except PromptFailed as answer:
            assert error and re.search(error, str(answer), re.DOTALL), (i, error, str(answer))
            refused += 1
    wait_until_idle(client)
    failed = 0
    for prompt_id, (i, graph, error) in queued.items():
        message = outcome(client, prompt_id)
        if error is None:
            assert message is None, (i, graph, message)
        else:
            assert message and re.search(error, message, re.DOTALL), (i, error, message)
            failed += 1
    assert min(refused, failed) >= 15 * times and len(queued) - failed >= 45 * times
    assert "on_prompt_handler" not in server.log(), "looking at a prompt failed"
    assert {family: picture(client, stock(family)) for family in BLOCKS} == before
    client._request("/free", b'{"unload_models": true, "free_memory": true}')  # nothing may come from a cache now
    assert {family: picture(client, stock(family)) for family in BLOCKS} == before
    tally["graphs"] += GRAPHS * times


def test_a_conditioning_with_a_picture_in_it(server):
    """Nodes of edit models encode a picture with the words: as a negative it would be pushed away itself."""
    client, graph = ComfyClient(server.address), with_vsf(stock("flux"))
    for class_type, inputs in (
        ("TextEncodeQwenImageEditPlus", {"clip": ["clip", 0], "prompt": "a roof", "image1": ["picture", 0]}),
        ("TextEncodeQwenImageEdit", {"clip": ["clip", 0], "prompt": "a roof", "image": ["picture", 0]}),
    ):
        graph["picture"] = node("EmptyImage", width=32, height=32, batch_size=1, color=0)
        graph["words"] = node(class_type, **inputs)
        graph["shown"] = node("ConditioningSetTimestepRange", conditioning=["words", 0], start=0.0, end=1.0)
        graph["negative"]["inputs"] |= {"text": "", "negative": ["shown", 0]}
        with pytest.raises(PromptFailed, match=f"negative comes from {class_type}, which encodes a picture"):
            client.run(graph)
    # of a node with two conditionings, only the one of that name counts: here the positive's has the picture
    graph["mask"] = node("SolidMask", value=1.0, width=32, height=32)
    around = {"vae": ["vae", 0], "pixels": ["picture", 0], "mask": ["mask", 0], "noise_mask": False}
    graph["shown"] = node("InpaintModelConditioning", positive=["words", 0], negative=["empty", 0], **around)
    graph["negative"]["inputs"]["negative"] = ["shown", 1]
    client.run(graph)
    graph["negative"]["inputs"]["negative"] = ["shown", 0]
    with pytest.raises(PromptFailed, match="which encodes a picture"):
        client.run(graph)
    graph["negative"]["inputs"]["negative"] = ["words", 0]
    del graph["words"]["inputs"]["image"]
    client.run(graph)
