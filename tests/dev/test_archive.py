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
from hosting import demo
from hosting.client import ComfyClient
from hosting.errors import HostError
from hosting.graph import declared_inputs, is_widget, to_prompt, without_nodes
from hosting.server import ComfyServer
from PIL import Image
from release import archive, manager, shipped

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 2_000_000
VSF = "VSF"
NEEDS_HISTORY = pytest.mark.skipif(not shipped.HAS_HISTORY, reason="not a git clone: no history to look into")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    if os.environ.get("VSF_ARCHIVE"):
        return Path(os.environ["VSF_ARCHIVE"])
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    archive.write(path, archive.files() if shipped.HAS_HISTORY else archive.listed())
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
    names, listed = zipfile.ZipFile(packed).namelist(), archive.listed()
    assert len(names) == len(set(names))
    assert (sorted(set(names) - set(listed)), sorted(set(listed) - set(names))) == ([], []), (
        f"(more, fewer) files than {archive.SNAPSHOT.name} names; if that is meant: python3 tests/release/archive.py"
    )


@NEEDS_HISTORY
def test_no_file_of_the_pack_is_outside_git():
    folders = ("nodes", "vsf_core", "js", "locales", "workflows", "subgraphs")
    assert archive.git("ls-files", "--others", "--exclude-standard", "--", *folders) == ""


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
    assert {*shown, "vsf_tiny_demo"} == {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert "vsf_tiny_demo" not in shown
    words = json.loads(client._request("/i18n"))
    assert all(set(named) <= set(words[path.name]["nodeDefs"]) for path in (ROOT / "locales").iterdir())
    blueprints = json.loads(client._request("/global_subgraphs")).values()
    assert {path.stem for path in (ROOT / "subgraphs").glob("*.json")} <= {one["name"] for one in blueprints}


def test_the_demo_makes_a_picture_and_vsf_acts_in_it(server, object_info):
    client = ComfyClient(server.address)
    workflow = json.loads((ROOT / "workflows" / "vsf_tiny_demo.json").read_text(encoding="utf-8"))
    prompt, images = to_prompt(workflow, object_info), []
    for graph in (prompt, without_nodes(prompt, demo.VSF_NODES)):
        (picture,) = [ref for output in client.run(graph).values() for ref in output.get("images", [])]
        images.append(Image.open(BytesIO(client.image(picture))).convert("RGB"))
    assert all(low != high for image in images for low, high in image.getextrema())
    assert images[0].tobytes() != images[1].tobytes()
    assert server.log().count("negative tokens, scale") == 1  # VSF's report of a run in which it acted


def complaints(node: dict, object_info: dict, replacements: dict) -> list[str]:
    """What keeps a saved node from meaning today what it meant when it was saved."""
    kind, saved = node["type"], [value for value in node.get("widgets_values") or [] if not isinstance(value, dict)]
    slots = [slot["name"] for slot in node.get("inputs") or []]
    outputs = dict(enumerate(slot["type"] for slot in node.get("outputs") or []))
    names, lost = list(shipped.WIDGETS.get(kind, ())), []
    if kind not in object_info:
        rule = replacements.get(kind, [None])[0]
        if rule is None or rule["new_node_id"] not in object_info:
            return [f"register a replacement of {kind} by a node that is there"]
        kind, old = rule["new_node_id"], rule["old_widget_ids"] or []
        moved = {one["old_id"]: one["new_id"] for one in rule["input_mapping"] or [] if "old_id" in one}
        shifted = {one["old_idx"]: one["new_idx"] for one in rule["output_mapping"] or []}
        lost = [f"{name} is lost" for name in (*old[: len(saved)], *slots) if name not in moved]
        lost += [f"output {index} is lost" for index in outputs if index not in shifted]
        names = [moved.get(name, "") for name in old]
        slots = [moved[name] for name in slots if name in moved]
        outputs = {shifted[index]: type_ for index, type_ in outputs.items() if index in shifted}
    return lost + misfits(dict(zip(names, saved, strict=False)), len(saved), slots, outputs, object_info[kind])


def misfits(values: dict, count: int, slots: list[str], outputs: dict, info: dict) -> list[str]:
    """Which of a node's values, inputs and outputs it does not have, by name."""
    inputs = {name: (kind, options) for name, kind, options in declared_inputs(info)}
    found = [f"no input {name}" for name in (*values, *slots) if name and name not in inputs]
    found += [f"{count} values for {len(values)} widgets"] if count > len(values) else []
    for name, value in values.items():
        kind, options = inputs.get(name, ("", {}))
        types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}.get(str(kind))
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices:
            found += [] if value in choices else [f"{name}: {value!r} is no choice"]
        elif types and not isinstance(value, types):
            found.append(f"{name}: {value!r} is no {kind}")
        elif kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
            found.append(f"{name}: {value!r} is out of range")
    now = dict(enumerate(info["output"]))
    return found + [f"output {i} is {now.get(i)}, not {kind}" for i, kind in outputs.items() if now.get(i) != kind]


def test_widgets_keep_their_places(object_info):
    """A saved value has no name but its place: a widget put between others would take the value of its neighbour."""
    for name, info in object_info.items():
        if name.startswith(VSF):
            widgets = tuple(name for name, *spec in declared_inputs(info) if is_widget(*spec))
            assert widgets == shipped.WIDGETS.get(name), f"{name}: add widgets at the end, and in shipped.WIDGETS too"


@NEEDS_HISTORY
def test_every_workflow_ever_shipped_still_works(server, object_info):
    """Its nodes are here or replaced, and its values and links mean what they did."""
    replacements = json.loads(ComfyClient(server.address)._request("/node_replacements"))
    texts = shipped.ever()
    assert len(texts) >= 38
    for where, text in texts.items():
        nodes = shipped.vsf_nodes(json.loads(text))
        assert nodes, where
        for node in nodes:
            assert complaints(node, object_info, replacements) == [], (where, node["type"])


def test_a_shallow_clone_is_refused(tmp_path):
    """It has no old workflows, so that nothing would be wrong with any of them."""
    whole, shallow = tmp_path / "whole", tmp_path / "shallow"
    archive.git("init", "--quiet", "--initial-branch=main", str(whole))
    (whole / "workflows").mkdir()
    for text in ("{}", "[]"):
        (whole / "workflows" / "a.json").write_text(text)
        archive.git("add", ".", folder=whole)
        archive.git(*manager.AUTHOR, "commit", "--quiet", "--message=x", folder=whole)
    assert sorted(shipped.ever(whole).values()) == ["[]", "{}"]
    archive.git("clone", "--quiet", "--depth=1", whole.as_uri(), str(shallow))
    with pytest.raises(HostError, match="this clone is shallow .*: git fetch --unshallow"):
        shipped.ever(shallow)


PATCH = {"type": "VSFModelPatch"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"widgets_values": ["3.3"]}, "scale: '3.3' is no FLOAT"),
        ({"widgets_values": [1e6]}, "scale: 1000000.0 is out of range"),
        ({"widgets_values": [3.3, 0.2, 0, 1, "", "old"]}, "layout: 'old' is no choice"),
        ({"inputs": [{"name": "gone"}]}, "no input gone"),
        ({"outputs": [{"type": "LATENT"}]}, "output 0 is MODEL, not LATENT"),
        ({"type": "VSFGone"}, "register a replacement of VSFGone by a node that is there"),
    ],
)
def test_complaints_are_found(object_info, change, complaint):
    assert complaints({**PATCH, **change}, object_info, {}) == [complaint]


OLD = {
    **{"type": "VSFOld", "widgets_values": [2.0, "double:0-1"]},
    **{"inputs": [{"name": "old_model"}], "outputs": [{"type": "MODEL"}]},
}
RULE = {
    "new_node_id": "VSFModelPatch",
    "old_node_id": "VSFOld",
    "old_widget_ids": ["strength", "layers"],
    "input_mapping": [
        {"old_id": "strength", "new_id": "scale"},
        {"old_id": "layers", "new_id": "blocks"},
        {"old_id": "old_model", "new_id": "model"},
        {"new_id": "layout", "set_value": "paper"},
    ],
    "output_mapping": [{"old_idx": 0, "new_idx": 0}],
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"new_node_id": "VSFNowhere"}, ["register a replacement of VSFOld by a node that is there"]),
        ({"old_widget_ids": ["layers", "strength"]}, ["blocks: 2.0 is no STRING", "scale: 'double:0-1' is no FLOAT"]),
        ({"old_widget_ids": ["strength"]}, ["2 values for 1 widgets"]),
        ({"input_mapping": RULE["input_mapping"][1:]}, ["strength is lost"]),
        ({"output_mapping": None}, ["output 0 is lost"]),
        ({"output_mapping": [{"old_idx": 0, "new_idx": 1}]}, ["output 1 is None, not MODEL"]),
    ],
)
def test_a_wrong_replacement_is_found(object_info, change, found):
    """None is registered yet; this is what the check would say of one."""
    assert complaints(OLD, object_info, {"VSFOld": [{**RULE, **change}]}) == found
