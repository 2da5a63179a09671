"""Every shipped workflow runs on a real server, with the toy models in place of the big ones."""

import json
import re
import sys
from io import BytesIO
from pathlib import Path

import pytest
from hosting.client import ComfyClient
from hosting.graph import to_prompt
from hosting.server import ComfyServer
from hosting.toy_graphs import with_toys
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FOLDERS = {"CheckpointLoaderSimple": ["checkpoints"], "UNETLoader": ["diffusion_models"], "VAELoader": ["vae"]}
FOLDERS |= {f"{count}CLIPLoader": ["text_encoders"] for count in ("", "Dual", "Triple")}
FOLDERS |= {"LoraLoaderModelOnly": ["loras"]}


@pytest.fixture(scope="module")
def client(comfyui, tiny_models):
    encoder = ROOT / "tests" / "toy" / "vsf_toy_text_encoder"
    with ComfyServer(comfyui, sys.executable, ROOT, tiny_models, extra_nodes=[encoder]) as server:
        Image.new("RGB", (64, 64), "teal").save(server.base / "input" / "example.png")
        yield ComfyClient(server.address)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_runs(client, path):
    shipped = to_prompt(json.loads(path.read_text(encoding="utf-8")), client.object_info())
    outputs = client.run(with_toys(shipped))
    ends = [key for key, node in shipped.items() if node["class_type"] in ("SaveImage", "PreviewImage", "SaveVideo")]
    assert ends and set(ends) <= set(outputs)
    files = [client.image(outputs[end]["images"][0]) for end in ends]
    assert len(set(files)) == len(ends), "two of its pictures are the same"
    for end, file in zip(ends, files, strict=True):
        if shipped[end]["class_type"] != "SaveVideo":
            assert Image.open(BytesIO(file)).convert("L").getextrema() != (0, 0)


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
