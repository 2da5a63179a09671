"""Every shipped workflow in the real frontend; the demo one runs to a picture there."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

WIDGETS = {
    "VSFModelPatch": ("scale", "offset", "start_percent", "end_percent", "blocks", "layout", "affect_references"),
    "VSFNegativeConditioning": ("text", "strength", "extrapolation", "from_frame", "to_frame"),
    "VSFScaleSweep": ("scales",),
    "VSFContactSheet": ("columns",),
}

LOAD = """async (workflow) => {
    await window.app.loadGraphData(workflow);
    const known = window.LiteGraph.registered_node_types;
    return window.app.graph._nodes.map(n => ({type: n.type, known: n.type in known, missing: !!n.has_errors}));
}"""


@pytest.fixture(scope="module")
def tab(server, new_page):
    """One page for all workflows: each takes the place of the one before."""
    return new_page(server.address)


def load(page, path):
    nodes = page.evaluate(LOAD, json.loads(path.read_text(encoding="utf-8")))
    page.wait_for_timeout(500)
    return nodes


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_opens_with_no_missing_node(tab, path, tmp_path_factory):
    tab.problems.clear()
    nodes = load(tab, path)
    shipped = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    assert len(nodes) == len(shipped)
    notes = ("MarkdownNote", "Note")
    assert [n for n in nodes if not n["known"] and n["type"] not in notes] == []
    assert {"VSFNegativeConditioning", "VSFModelPatch"} <= {n["type"] for n in nodes}
    # widget values arrive under their own names: the API prompt that Run would send says what the file says
    prompt = tab.evaluate("async () => (await window.app.graphToPrompt()).output")
    for node in (n for n in shipped if n["type"] in WIDGETS):
        sent = prompt[str(node["id"])]["inputs"]
        assert {name: sent[name] for name in WIDGETS[node["type"]]} == dict(
            zip(WIDGETS[node["type"]], node["widgets_values"], strict=True)
        )
    assert not [p for p in tab.problems if "vsf" in p.lower()]
    tab.keyboard.press("Escape")  # a dialog about model files that are not here
    tab.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    tab.wait_for_timeout(600)  # the view glides there
    tab.screenshot(path=str(tmp_path_factory.getbasetemp() / f"{path.stem}.png"))


def test_demo_runs_to_a_picture_and_shows_its_tokens(page, tmp_path_factory):
    load(page, ROOT / "workflows" / "vsf_tiny_demo.json")
    page.evaluate(
        """() => { window.done = new Promise(resolve => {
            window.app.api.addEventListener("execution_success", () => resolve("ok"));
            window.app.api.addEventListener("execution_error", e => resolve(JSON.stringify(e.detail)));
        }); return window.app.queuePrompt(0); }"""
    )
    late = "new Promise(resolve => setTimeout(() => resolve('late'), 120000))"
    assert page.evaluate(f"() => Promise.race([window.done, {late}])") == "ok"
    page.wait_for_timeout(1000)
    view = page.evaluate(
        """() => window.app.graph._nodes.find(n => n.type === "VSFNegativeConditioning")
               .widgets.find(w => w.name === "vsf_tokens").element.textContent"""
    )
    assert view.splitlines() == ["pushes away 4 tokens", "CLIP: a · roof"]
    saved = page.evaluate("() => JSON.stringify(window.app.graph.serialize())")
    assert "pushes away" not in saved
    assert not [p for p in page.problems if "vsf" in p.lower()]
    page.screenshot(path=str(tmp_path_factory.getbasetemp() / "demo_after_run.png"))
