"""The subgraph blueprint in the real frontend: it is listed and found, goes into a graph, and runs as it is sent."""

import json
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

from hosting.client import ComfyClient
from hosting.graph import only_node
from hosting.toy_graphs import with_toys
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
(BLUEPRINT,) = (ROOT / "subgraphs").glob("*.json")
WIDGETS = ["prompt", "negative", "scale", "offset", "width", "height", "seed", "ckpt_name"]
WIDGETS += ["clip_name1", "clip_name2", "clip_name3"]


def test_the_server_lists_it(server):
    with urlopen(f"{server.address}/global_subgraphs") as answer:
        listed = json.load(answer).values()
    mine = [entry["name"] for entry in listed if entry["info"]["node_pack"] == "custom_nodes.ComfyUI-VSF"]
    assert mine == [BLUEPRINT.stem] == ["Text to image with negative, VSF"]


def test_it_is_found_inserted_and_runs(page, server, tmp_path_factory):
    shot = lambda name: page.screenshot(path=str(tmp_path_factory.getbasetemp() / f"blueprint_{name}.png"))  # noqa: E731
    page.evaluate("() => app.graph.clear()")  # any but the first page of a server opens with the default workflow
    page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for_function("() => document.activeElement?.tagName === 'INPUT'")
    page.keyboard.type("image with negative")
    page.get_by_text(BLUEPRINT.stem).first.wait_for(timeout=20_000)
    shot("search")
    page.get_by_text(BLUEPRINT.stem).first.click()
    page.wait_for_timeout(500)
    page.mouse.click(800, 300)  # where it goes
    page.wait_for_function("() => app.graph.nodes.length === 1", timeout=5000)
    page.wait_for_timeout(500)
    shot("inserted")
    node = page.evaluate("""() => { const [n] = app.graph.nodes; return {
        title: n.title, widgets: n.widgets.map(w => w.name), inner: n.subgraph.nodes.map(m => m.type),
        unknown: n.subgraph.nodes.filter(m => !(m.type in LiteGraph.registered_node_types)).length,
    }}""")
    assert (node["title"], node["widgets"], node["unknown"]) == (BLUEPRINT.stem, WIDGETS, 0)
    assert {"VSFModelPatch", "VSFNegativeConditioning"} <= set(node["inner"])
    sent = page.evaluate("""async () => {
        const [n] = app.graph.nodes, set = (name, value) => { n.widgets.find(w => w.name === name).value = value };
        set("prompt", "a house"); set("negative", "a roof"); set("scale", 2.5); set("seed", 7);
        const save = LiteGraph.createNode("SaveImage"); app.graph.add(save); n.connect(0, save, 0);
        return (await app.graphToPrompt()).output;
    }""")
    patch, negative = (sent[only_node(sent, kind)]["inputs"] for kind in ("VSFModelPatch", "VSFNegativeConditioning"))
    assert (patch["scale"], patch["offset"], patch["layout"], negative["text"]) == (2.5, 0.2, "released", "a roof")
    assert sent[only_node(sent, "CLIPTextEncode")]["inputs"]["text"] == "a house"
    assert sent[only_node(sent, "KSampler")]["inputs"]["cfg"] == 1
    client = ComfyClient(server.address)
    (saved,) = client.run(with_toys(sent))[only_node(sent, "SaveImage")]["images"]
    assert Image.open(BytesIO(client.image(saved))).size == (64, 64)
    assert not [text for text in page.problems if "vsf" in text.lower()]
