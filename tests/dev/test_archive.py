"""The registry's archive: what is in it, and that a real ComfyUI needs nothing else. VSF_ARCHIVE names a ready one."""

import json
import os
import re
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from hosting.client import ComfyClient
from hosting.graph import declared_inputs, is_widget, to_prompt
from hosting.server import ComfyServer
from PIL import Image
from release import archive

ROOT = Path(__file__).resolve().parents[2]
LANGUAGE = r"(de|en|es|fr|ja|ko|ru|zh)"
NEEDED = (
    r"__init__\.py",
    r"pyproject\.toml",
    r"README\.md",
    r"CHANGELOG\.md",
    r"LICENSE",
    r"nodes/\w+\.py",
    r"nodes/families/\w+\.py",
    r"vsf_core/\w+\.py",
    r"js/\w+\.js",
    r"js/docs/VSF\w+(/en)?\.md",
    r"js/docs/presets\.png",
    rf"locales/{LANGUAGE}/(commands|main|nodeDefs|settings)\.json",
    r"workflows/vsf_\w+\.(json|jpg)",
)
"""Every file of the archive is one of these, and each of these is there."""
OPTIONAL = (r"subgraphs/[\w ,]+\.json",)
MOST_BYTES = 2_000_000
VSF = "VSF"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    if os.environ.get("VSF_ARCHIVE"):
        return Path(os.environ["VSF_ARCHIVE"])
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    archive.write(path)
    return path


@pytest.fixture(scope="module")
def unpacked(packed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked") / "ComfyUI-VSF"
    zipfile.ZipFile(packed).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def server(comfyui, tiny_models, unpacked):
    with ComfyServer(comfyui, sys.executable, unpacked, tiny_models) as server:
        yield server


@pytest.fixture(scope="module")
def object_info(server):
    return ComfyClient(server.address).object_info()


def test_every_file_is_there_on_purpose(packed):
    names = zipfile.ZipFile(packed).namelist()
    patterns = (*NEEDED, *OPTIONAL)
    assert [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    assert [pattern for pattern in NEEDED if not any(re.fullmatch(pattern, name) for name in names)] == []
    for folder in ("nodes", "vsf_core", "js", "locales", "workflows", "subgraphs"):
        below = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert {name for name in below if "__pycache__" not in name} <= set(names), f"{folder}: files not in git?"
    assert len(names) == len(set(names))


def test_is_small_and_has_no_large_file(packed):
    assert packed.stat().st_size < MOST_BYTES
    assert max(entry.file_size for entry in zipfile.ZipFile(packed).infolist()) < 200_000


def test_nothing_that_the_registry_flags(unpacked):
    """The rules that `comfy node validate` checks, on what is packed, without this repository's settings."""
    rules = ["check", ".", "--isolated", "--select", "S102,S307,E702", "--output-format", "concise", "--no-cache"]
    done = subprocess.run([sys.executable, "-m", "ruff", *rules], cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = [path.read_text(encoding="utf-8") for path in unpacked.rglob("*.py")]
    assert not [found for text in scripts for found in re.findall(r"pip install|subprocess|base64|marshal|zlib", text)]


def test_the_server_shows_all_of_it(server, object_info):
    client, log = ComfyClient(server.address), server.log()
    assert "IMPORT FAILED" not in log and "Traceback" not in log
    named = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {name for name in object_info if name.startswith(VSF)} == set(named) and len(named) >= 6
    served = json.loads(client._request("/extensions"))
    assert {f"/extensions/ComfyUI-VSF/{path.name}" for path in (ROOT / "js").glob("*.js")} <= set(served)
    for name in named:
        assert client._request(f"/extensions/ComfyUI-VSF/docs/{name}.md").startswith(b"#")
    shown = json.loads(client._request("/workflow_templates"))["ComfyUI-VSF"]
    assert set(shown) == {path.stem for path in (ROOT / "workflows").glob("*.json")}
    words = json.loads(client._request("/i18n"))
    assert all(set(named) <= set(words[path.name]["nodeDefs"]) for path in (ROOT / "locales").iterdir())
    blueprints = json.loads(client._request("/global_subgraphs")).values()
    assert {path.stem for path in (ROOT / "subgraphs").glob("*.json")} <= {one["name"] for one in blueprints}


def test_the_demo_makes_a_picture(server, object_info, unpacked):
    client = ComfyClient(server.address)
    workflow = json.loads((unpacked / "workflows" / "vsf_tiny_demo.json").read_text(encoding="utf-8"))
    outputs = client.run(to_prompt(workflow, object_info))
    (picture,) = [ref for output in outputs.values() for ref in output.get("images", [])]
    image = Image.open(BytesIO(client.image(picture))).convert("RGB")
    assert any(low != high for low, high in image.getextrema())


def shipped_ever() -> dict[str, str]:
    """Every workflow and subgraph in the folders now and in git's history, as far as this clone has it, by revision and
    name; each text once."""
    folders = ("workflows/*.json", "subgraphs/*.json")
    texts = {path.read_text(encoding="utf-8"): path.name for folder in folders for path in ROOT.glob(folder)}
    for commit in archive.git("log", "--format=%H", "--", *folders).split():
        for path in archive.git("ls-tree", "-z", "-r", "--name-only", commit, "workflows", "subgraphs").split("\0"):
            if path.endswith(".json"):
                texts.setdefault(archive.git("show", f"{commit}:{path}"), f"{commit[:9]}:{path}")
    return {where: text for text, where in texts.items()}


def complaints(node: dict, info: dict) -> list[str]:
    """What keeps a saved node from meaning today what it meant when it was saved."""
    inputs = {name: (kind, options) for name, kind, options in declared_inputs(info)}
    widgets = [name for name, spec in inputs.items() if is_widget(*spec)]
    saved = [value for value in node.get("widgets_values") or [] if not isinstance(value, dict)]
    found = [f"no input {slot['name']}" for slot in node.get("inputs") or [] if slot["name"] not in inputs]
    found += [f"{len(saved)} values for {len(widgets)} widgets"] if len(saved) > len(widgets) else []
    for name, value in zip(widgets, saved, strict=False):
        kind, options = inputs[name]
        types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}.get(str(kind))
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices:
            found += [] if value in choices else [f"{name}: {value!r} is no choice"]
        elif types and not isinstance(value, types):
            found.append(f"{name}: {value!r} is no {kind}")
        elif kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
            found.append(f"{name}: {value!r} is out of range")
    outputs = list(info["output"])
    kept = [slot["type"] for slot in node.get("outputs") or []]
    return found + ([] if outputs[: len(kept)] == kept else [f"outputs {kept} are {outputs} now"])


def vsf_nodes(text: str) -> list[dict]:
    graph = json.loads(text)
    graphs = [graph, *graph.get("definitions", {}).get("subgraphs", [])]
    return [node for one in graphs for node in one["nodes"] if node["type"].startswith(VSF)]


def test_every_workflow_ever_shipped_still_works(server, object_info):
    """Its nodes are here or replaced, and its values and links mean what they did."""
    replaced = set(json.loads(ComfyClient(server.address)._request("/node_replacements")))
    shipped = shipped_ever()
    assert len(shipped) >= 12
    for where, text in shipped.items():
        assert vsf_nodes(text), where
        for node in vsf_nodes(text):
            assert node["type"] in object_info.keys() | replaced, f"{where}: register a replacement of {node['type']}"
            if node["type"] in object_info:
                assert complaints(node, object_info[node["type"]]) == [], (where, node["type"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"widgets_values": ["3.3"]}, "scale: '3.3' is no FLOAT"),
        ({"widgets_values": [1e6]}, "scale: 1000000.0 is out of range"),
        ({"widgets_values": [3.3, 0.2, 0, 1, "", "old"]}, "layout: 'old' is no choice"),
        ({"inputs": [{"name": "gone"}]}, "no input gone"),
        ({"outputs": [{"type": "LATENT"}]}, "outputs ['LATENT'] are ['MODEL'] now"),
    ],
)
def test_complaints_are_found(object_info, change, complaint):
    assert complaints(change, object_info["VSFModelPatch"]) == [complaint]
