"""Every shipped workflow in the real frontend; the demo one runs to a picture there."""

import json
from pathlib import Path

import pytest
from release import shipped

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

LOAD = """async (workflow) => {
    await window.app.loadGraphData(workflow);
    const known = window.LiteGraph.registered_node_types;
    return window.app.graph._nodes.map(n => ({type: n.type, known: n.type in known, missing: !!n.has_errors}));
}"""


MEET = """const meet = ([ax, ay, aw, ah], [bx, by, bw, bh]) =>
        ax < bx + bw && bx < ax + aw && ay < by + bh && by < ay + ah;
    return boxes.flatMap(([a, box], i) =>
        boxes.slice(0, i).filter(([, other]) => meet(box, other)).map(([b]) => [a, b]));"""
OVERLAPS = f"""() => {{ const boxes = app.graph.nodes.map(n =>
    [n.type, [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]]); {MEET} }}"""
OVERLAPS_OF_NODES_2 = f"""() => {{ const boxes = [...document.querySelectorAll("[data-node-id]")].map(e => {{
    const r = e.getBoundingClientRect(); return [e.dataset.nodeId, [r.x, r.y, r.width, r.height]] }}); {MEET} }}"""


@pytest.fixture(scope="module")
def tab(server, new_page):
    """One page for all workflows: each takes the place of the one before."""
    return new_page(server.address)


def load(page, path):
    nodes = page.evaluate(LOAD, json.loads(path.read_text(encoding="utf-8")))
    page.wait_for_timeout(500)
    return nodes


def values_lost(page, workflow):
    """Where the API prompt that Run would send has not the values that the file has, by the names of their inputs."""
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    lost = {}
    for node in shipped.vsf_nodes(workflow):
        sent = prompt[str(node["id"])]["inputs"]
        for name, value in shipped.widget_values(node).items():
            if sent.get(name) != value:
                lost[node["type"], name] = (value, sent.get(name))
    return lost


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_opens_with_no_missing_node(tab, path, times, tmp_path_factory):
    tab.problems.clear()
    nodes = load(tab, path)
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert len(nodes) == len(workflow["nodes"])
    notes = ("MarkdownNote", "Note")
    assert [n for n in nodes if not n["known"] and n["type"] not in notes] == []
    assert {"VSFNegativeConditioning", "VSFModelPatch"} <= {n["type"] for n in nodes}
    assert values_lost(tab, workflow) == {}
    assert not [p for p in tab.problems if "vsf" in p.lower()]
    assert tab.evaluate(OVERLAPS) == []
    tab.keyboard.press("Escape")  # a dialog about model files that are not here
    if times > 1:  # --long: a picture for a person to look at
        tab.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        tab.wait_for_timeout(600)  # the view glides there
        tab.screenshot(path=str(tmp_path_factory.getbasetemp() / f"{path.stem}.png"))


def test_nothing_is_over_another_in_nodes_2(page, times):
    page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    for path in WORKFLOWS if times > 1 else WORKFLOWS[::5]:
        load(page, path)
        page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        page.wait_for_timeout(1000)  # the view glides there
        assert page.evaluate("() => document.querySelectorAll('[data-node-id]').length") > 8
        assert page.evaluate(OVERLAPS_OF_NODES_2) == [], path.name
    page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


@pytest.mark.skipif(not shipped.HAS_HISTORY, reason="not a git clone: no history to look into")
def test_older_ones_open_with_the_values_that_they_were_saved_with(tab):
    tab.problems.clear()
    texts = {where: text for where, text in shipped.ever().items() if ":workflows/" in where}
    assert len(texts) >= 8
    for where, text in texts.items():
        workflow = json.loads(text)
        nodes = tab.evaluate(LOAD, workflow)
        assert [node["type"] for node in nodes if node["type"].startswith("VSF") and not node["known"]] == [], where
        assert values_lost(tab, workflow) == {}, where
    assert not [p for p in tab.problems if "vsf" in p.lower()]
    tab.keyboard.press("Escape")


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
