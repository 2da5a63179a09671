"""Every shipped workflow runs on a real server, with the toy models in place of the big ones."""

import json
import sys
from io import BytesIO
from pathlib import Path

import pytest
from hosting.client import ComfyClient
from hosting.graph import to_prompt, without_nodes
from hosting.server import ComfyServer
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FAMILIES = ("sd3", "flux", "wan")
ENCODERS = {"TripleCLIPLoader": "sd3", "DualCLIPLoader": "flux", "CLIPLoader": None}
SMALL = {"width": 64, "height": 64, "length": 5}
VAES = {"ae.safetensors": "taef1", "wan_2.1_vae.safetensors": "vsf_tiny_wan_vae.safetensors"}


@pytest.fixture(scope="module")
def client(comfyui, tiny_models):
    encoder = ROOT / "tests" / "toy" / "vsf_toy_text_encoder"
    with ComfyServer(comfyui, sys.executable, ROOT, tiny_models, extra_nodes=[encoder]) as server:
        Image.new("RGB", (64, 64), "teal").save(server.base / "input" / "example.png")
        yield ComfyClient(server.address)


def with_toys(prompt):
    """The graph with toy models and the smallest pictures; of a pair of samplers each keeps its steps."""
    prompt = without_nodes(prompt, {"LoraLoaderModelOnly": "model", "FluxKontextImageScale": "image"})
    for key, node in list(prompt.items()):
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CheckpointLoaderSimple":
            prompt[key] = toy_model("sd3")
            prompt[f"{key} vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": "taesd3"}}
        elif kind == "UNETLoader":
            prompt[key] = toy_model(next(family for family in FAMILIES if family in inputs["unet_name"]))
        elif kind in ENCODERS:
            prompt[key] = {"class_type": "VSFToyTextEncoder", "inputs": {"family": ENCODERS[kind] or inputs["type"]}}
        elif kind == "VAELoader":
            inputs["vae_name"] = VAES.get(inputs["vae_name"], inputs["vae_name"])
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({name: value for name, value in SMALL.items() if name in inputs})
        inputs.update({"steps": 2} if node["class_type"] == "KSampler" else {})
        for name, value in inputs.items():
            if isinstance(value, list) and value[1] == 2 and f"{value[0]} vae" in prompt:
                inputs[name] = [f"{value[0]} vae", 0]
    return prompt


def toy_model(family):
    return {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": f"vsf_tiny_{family}.safetensors", "weight_dtype": "default"},
    }


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
