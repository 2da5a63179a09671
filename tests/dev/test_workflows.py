"""Every shipped workflow runs on a real server, with the toy models in place of the big ones."""

import importlib.util
import json
import re
import sys
from io import BytesIO
from pathlib import Path

import av
import pytest
from hosting.client import ComfyClient
from hosting.graph import to_prompt
from hosting.server import ComfyServer
from hosting.toy_graphs import with_toys
from PIL import Image
from release import anti_aesthetic, workflows

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FOLDERS = {"CheckpointLoaderSimple": ["checkpoints"], "UNETLoader": ["diffusion_models"], "VAELoader": ["vae"]}
FOLDERS |= {f"{count}CLIPLoader": ["text_encoders"] for count in ("", "Dual", "Triple")}
FOLDERS |= {"LoraLoaderModelOnly": ["loras"]}
CELL, GAP = 64, 8
"""Side of the smallest picture, and the distance between pictures of a contact sheet."""
LTXV = "Lightricks/LTX-Video/resolve/main/ltxv-2b-0.9.8-distilled.safetensors"
DMD2 = "tianweiy/DMD2/resolve/main/dmd2_sdxl_4step_lora_fp16.safetensors"


@pytest.fixture(scope="module")
def server(comfyui, tiny_models):
    nodes = [ROOT / "tests" / "toy" / name for name in ("vsf_toy_text_encoder", "vsf_tiny_models")]
    with ComfyServer(comfyui, sys.executable, ROOT, tiny_models, extra_nodes=nodes) as server:
        Image.new("RGB", (CELL, CELL), "teal").save(server.base / "input" / "example.png")
        yield server


@pytest.fixture(scope="module")
def client(server):
    return ComfyClient(server.address)


def picture_of(file):
    """A picture, or the first frame of a video."""
    if not file.startswith(b"\x89PNG"):
        with av.open(BytesIO(file)) as video:
            return next(video.decode(video=0)).to_image()
    return Image.open(BytesIO(file))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_runs(server, client, path):
    shipped, before = to_prompt(json.loads(path.read_text(encoding="utf-8")), client.object_info()), len(server.log())
    outputs = client.run(with_toys(shipped))
    assert "negative tokens, scale" in server.log()[before:]  # VSF's report of a run in which it acted
    ends = [key for key, node in shipped.items() if node["class_type"] in ("SaveImage", "PreviewImage", "SaveVideo")]
    assert ends and set(ends) <= set(outputs)
    files = [client.image(outputs[end]["images"][0]) for end in ends]
    assert len(set(files)) == len(ends), "two of its pictures are the same"
    for end, file in zip(ends, files, strict=True):
        if shipped[end]["class_type"] != "SaveVideo":
            assert Image.open(BytesIO(file)).convert("L").getextrema() != (0, 0)
    for sweep in (node["inputs"]["scales"] for node in shipped.values() if node["class_type"] == "VSFScaleSweep"):
        sheet, count = picture_of(files[0]), len(sweep.split(","))
        assert sheet.width == GAP + count * (CELL + GAP)
        corners = [(GAP + (CELL + GAP) * i, GAP) for i in range(count)]
        cells = {sheet.crop((x, y, x + CELL, y + CELL)).tobytes() for x, y in corners}
        assert len(cells) == count, "some scales give the same picture"


@pytest.mark.parametrize("path", [*WORKFLOWS, *(ROOT / "subgraphs").glob("*.json")], ids=lambda path: path.stem)
def test_names_its_model_files_and_explains_itself(path):
    """What ComfyUI's dialog about missing models reads: name, address and folder, on the node that loads the file."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    inside = graph.get("definitions", {"subgraphs": []})["subgraphs"]
    for node in [node for one in (graph, *inside) for node in one["nodes"]]:
        files = [value for value in node["widgets_values"] if str(value).endswith(".safetensors")]
        listed = node["properties"].get("models", [])
        assert [model["name"] for model in listed] == [name for name in files if not name.startswith("vsf_tiny")]
        for model in listed:
            assert re.fullmatch(rf"https://huggingface\.co/\S+/{re.escape(model['name'])}", model["url"])
            assert model["directory"] in FOLDERS[node["type"]]
    for one in inside or [graph]:
        assert one["groups"] and all(group["title"] for group in one["groups"])
    if not inside:
        assert any(node["type"] == "MarkdownNote" for node in graph["nodes"])
        assert Image.open(path.with_suffix(".jpg")).size == (448, 256)


def test_those_made_by_the_script_are_as_it_writes_them():
    made = dict(workflows.workflows())
    assert len(made) == sum(1 if model.single else 2 for model in workflows.MODELS)
    for name, content in made.items():
        assert (workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8") == workflows.text_of(content), name
    ten_pairs = workflows.FOLDER / f"{anti_aesthetic.NAME}.json"
    assert ten_pairs.read_text(encoding="utf-8") == workflows.text_of(anti_aesthetic.workflow())


def test_their_model_files_are_those_of_comfyui_s_own_templates():
    found = importlib.util.find_spec("comfyui_workflow_templates_json")
    if found is None:
        pytest.skip("this ComfyUI has its templates in another package")
    files = Path(found.submodule_search_locations[0], "templates").glob("*.json")
    templates = "".join(path.read_text(encoding="utf-8") for path in files)
    listed = {
        model["url"]
        for _, content in workflows.workflows()
        for node in content["nodes"]
        for model in node["properties"].get("models", ())
    }
    # no template of ComfyUI has these
    assert {url for url in listed if url not in templates} == {workflows.HUB + file for file in (DMD2, LTXV)}
