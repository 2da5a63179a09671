"""Badges, splicing and presets in both renderers of the real frontend: the classic canvas and Nodes 2.0."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "workflows" / "vsf_tiny_demo.json"
TWO_SAMPLERS = ROOT / "workflows" / "vsf_wan22_t2v_14b_lightx2v.json"

HELPERS = """
window.t = {
    all: function* (graph) { for (const n of graph.nodes) { yield n; if (n.subgraph) yield* t.all(n.subgraph); } },
    one: type => [...t.all(app.rootGraph)].find(n => n.type === type),
    widget: (type, name) => t.one(type).widgets.find(w => w.name === name),
    link: (from, output, to, input) =>
        t.one(from).connect(output, t.one(to), t.one(to).inputs.findIndex(i => i.name === input)),
    add: (type, x) => { const n = LiteGraph.createNode(type); n.pos = [x ?? 0, -400]; app.graph.add(n); return n; },
    // what a press or a key of the user's ends with: the undo history looks whether anything changed
    told: () => app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState(),
    badges: () => Object.fromEntries([...t.all(app.rootGraph)].flatMap(n =>
        n.badges.map(b => typeof b === "function" ? b() : b).filter(b => b.text.startsWith("VSF:"))
            .map(b => [n.type, b.text]))),
    undos: () => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length,
    saved: () => { const w = app.rootGraph.serialize(); delete w.extra; return JSON.stringify(w); },
    prompt: async () => (await app.graphToPrompt()).output,
};
"""

UNPATCHED = "VSF: model not patched, add VSF Model Patch"
NO_NEGATIVE = "VSF: no negative here, add one"
EMPTY = "VSF: empty negative, write one"
CFG_7 = "VSF: cfg 7 burns few-step models, set 1"


@pytest.fixture(scope="module", params=["classic", "vue"])
def frontend(request, server, new_page):
    """One page for all tests of a renderer; each loads the workflow that it needs."""
    tab = new_page(server.address)
    tab.renderer = request.param
    tab.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", request.param == "vue")
    tab.evaluate(HELPERS)
    yield tab
    tab.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    assert pack_problems(tab) == []


@pytest.fixture
def demo(frontend):
    load(frontend, json.loads(DEMO.read_text(encoding="utf-8")))
    # a name that says that the model is distilled
    frontend.evaluate("() => { t.widget('UNETLoader', 'unet_name').value = 'toy_turbo.safetensors'; t.told(); }")
    return frontend


@pytest.fixture
def shot(frontend, tmp_path_factory):
    """Saves a screenshot for a person to look at."""
    folder = tmp_path_factory.getbasetemp()
    return lambda name: frontend.screenshot(path=str(folder / f"{name}_{frontend.renderer}.png"))


def pack_problems(tab):
    """Errors and warnings that come from this pack's files or speak of it, or of something deprecated that it uses."""
    return [text for text in tab.problems if "vsf" in text.lower()]


def load(tab, workflow):
    tab.evaluate("async w => { await app.loadGraphData(w); app.canvas.ds.reset(); }", workflow)
    tab.wait_for_timeout(300)
    tab.keyboard.press("Escape")  # a dialog about model files that are not here


def without_vsf(tab):
    """The demo as somebody has it who never heard of VSF."""
    tab.evaluate("""() => {
        t.link("UNETLoader", 0, "KSampler", "model");
        t.link("CLIPTextEncode", 0, "KSampler", "positive");
        for (const type of ["VSFModelPatch", "VSFNegativeConditioning"]) app.graph.remove(t.one(type));
        t.told();
    }""")


def badges_become(tab, expected):
    """Waits for exactly these badges, and for Nodes 2.0 to show them."""
    wanted = json.dumps(expected, sort_keys=True)
    same = f"() => JSON.stringify(Object.fromEntries(Object.entries(t.badges()).sort())) === JSON.stringify({wanted})"
    try:
        tab.wait_for_function(same, timeout=4000)
    except Exception:
        pytest.fail(f"badges are {tab.evaluate('() => t.badges()')}, not {expected}")
    if tab.renderer == "vue":
        shown = "() => [...document.querySelectorAll('[data-node-id] *')].filter(e => !e.children.length)"
        texts = f"{shown}.map(e => e.textContent.trim()).filter(x => x.startsWith('VSF: ')).sort().join()"
        # Vue renders in a later task
        inner = json.dumps(",".join(sorted(expected.values())))
        tab.wait_for_function(f"() => ({texts[6:]}) === {inner}", timeout=4000)


def edit(tab, script):
    tab.evaluate(f"() => {{ {script}; t.told(); }}")


def test_badges_appear_and_go(demo, shot):
    badges_become(demo, {})
    edit(demo, "t.one('VSFModelPatch').mode = 4")
    badges_become(demo, {"VSFNegativeConditioning": UNPATCHED})
    edit(demo, "t.one('VSFModelPatch').mode = 0; t.one('VSFNegativeConditioning').mode = 4")
    badges_become(demo, {"VSFModelPatch": NO_NEGATIVE})
    edit(demo, "t.one('VSFNegativeConditioning').mode = 0")
    badges_become(demo, {})
    edit(demo, "t.one('VSFNegativeConditioning').mode = 2")  # muted: the sampler gets nothing at all
    badges_become(demo, {"VSFModelPatch": NO_NEGATIVE})
    edit(demo, "t.one('VSFNegativeConditioning').mode = 0; t.widget('VSFNegativeConditioning', 'text').value = ' '")
    badges_become(demo, {"VSFNegativeConditioning": EMPTY})
    edit(demo, "t.widget('KSampler', 'cfg').value = 7")
    badges_become(demo, {"VSFNegativeConditioning": EMPTY, "KSampler": CFG_7})
    shot("badges")
    demo.evaluate("() => app.extensionManager.setting.set('VSF.ShowBadges', false)")
    badges_become(demo, {})
    demo.evaluate("() => app.extensionManager.setting.set('VSF.ShowBadges', true)")
    badges_become(demo, {"VSFNegativeConditioning": EMPTY, "KSampler": CFG_7})
    edit(demo, "t.widget('KSampler', 'cfg').value = 2; t.widget('VSFNegativeConditioning', 'text').value = 'roof'")
    badges_become(demo, {})


def test_badges_see_through_links_and_subgraphs(demo, shot):
    """A reroute, values over links, and the sampler two subgraphs deep, where its cfg comes in from outside."""
    edit(
        demo,
        """const r = t.add("Reroute"); t.link("VSFModelPatch", 0, "Reroute", ""); r.connect(0, t.one("KSampler"), 0);
        t.add("PrimitiveFloat", 900).widgets[0].value = 7;
        const v = t.add("Reroute", 1200); t.one("PrimitiveFloat").connect(0, v, 0);
        v.connect(0, t.one("KSampler"), t.one("KSampler").inputs.findIndex(i => i.name === "cfg"))""",
    )
    badges_become(demo, {"KSampler": CFG_7})
    edit(
        demo,
        "t.add('PrimitiveString', 400).widgets[0].value = ''; "
        "t.link('PrimitiveString', 0, 'VSFNegativeConditioning', 'text')",
    )
    badges_become(demo, {"KSampler": CFG_7, "VSFNegativeConditioning": EMPTY})
    edit(demo, "app.graph.remove(t.one('PrimitiveString')); t.widget('VSFNegativeConditioning', 'text').value = 'roof'")
    for _ in range(2):
        edit(
            demo,
            """const inner = app.graph.nodes.find(n => n.subgraph) ?? t.one("KSampler");
            app.graph.convertToSubgraph(new Set([inner]))""",
        )
    deep = "() => app.rootGraph.nodes.find(n => n.subgraph)?.subgraph.nodes[0].subgraph?.nodes[0].type"
    assert demo.evaluate(deep) == "KSampler"
    demo.evaluate("() => t.told()")
    demo.wait_for_timeout(400)
    assert demo.evaluate("() => t.badges()") == {"KSampler": CFG_7}
    edit(demo, "t.one('VSFModelPatch').mode = 4")
    demo.wait_for_timeout(400)
    assert demo.evaluate("() => t.badges()") == {"VSFNegativeConditioning": UNPATCHED}
    edit(demo, "t.one('VSFModelPatch').mode = 0; t.widget('PrimitiveFloat', 'value').value = 1")
    badges_become(demo, {})
    # the patch inside of a subgraph patches the sampler inside of the other
    edit(demo, "app.graph.convertToSubgraph(new Set([t.one('VSFModelPatch'), t.one('UNETLoader')]))")
    demo.wait_for_timeout(400)
    assert demo.evaluate("() => t.badges()") == {}
    shot("subgraphs")


def test_badges_on_what_loses_or_refuses_a_negative(demo):
    edit(
        demo,
        """const a = t.add("ConditioningConcat"); t.link("VSFNegativeConditioning", 0, a.type, "conditioning_from");
        t.link("CLIPTextEncode", 0, a.type, "conditioning_to"); t.link(a.type, 0, "KSampler", "positive")""",
    )
    wanted = {"ConditioningConcat": "VSF: negative lost here, attach it after", "VSFModelPatch": NO_NEGATIVE}
    demo.wait_for_timeout(400)
    assert demo.evaluate("() => t.badges()") == wanted
    edit(
        demo,
        """t.link("VSFNegativeConditioning", 0, "ConditioningConcat", "conditioning_to");
        t.link("CLIPTextEncode", 0, "ConditioningConcat", "conditioning_from")""",
    )
    badges_become(demo, {})
    edit(demo, "t.widget('CLIPLoader', 'type').value = 'mochi'")
    badges_become(demo, {"CLIPLoader": "VSF: encoder type mochi is not supported"})
    edit(demo, "t.widget('CLIPLoader', 'type').value = 'sd3'")
    edit(demo, "t.add('ImageOnlyCheckpointLoader'); t.link('ImageOnlyCheckpointLoader', 0, 'VSFModelPatch', 'model')")
    badges_become(demo, {"ImageOnlyCheckpointLoader": "VSF: this model is not supported"})


def pick_from_menu(tab, on, text):
    """Right-click a node's title, or where nothing is, and choose an entry."""
    spot = tab.evaluate(
        """on => { const n = on && t.one(on); const c = app.canvas;
        if (n) c.selectItems([n]); else c.deselectAll();
        c.ds.offset = n ? [600 - n.pos[0], 300 - n.pos[1]] : [4000, 4000]; c.ds.scale = 1; c.setDirty(true, true);
        const r = c.canvas.getBoundingClientRect();
        return n ? [r.left + 680, r.top + 285] : [r.left + 700, r.top + 350] }""",
        on,
    )
    tab.wait_for_timeout(300)
    tab.mouse.click(*spot, button="right")
    tab.wait_for_timeout(300)
    tab.get_by_text(text, exact=True).last.click()
    tab.wait_for_timeout(300)


@pytest.mark.parametrize("on", ["KSampler", None], ids=["node menu", "canvas menu"])
def test_splice_and_undo_in_one_step(demo, shot, on):
    without_vsf(demo)
    demo.wait_for_timeout(300)
    demo.evaluate("() => t.told()")
    before, undos = demo.evaluate("() => [t.saved(), t.undos()]")
    pick_from_menu(demo, on, "Add VSF to this workflow")
    prompt = {node["class_type"]: (key, node["inputs"]) for key, node in demo.evaluate("() => t.prompt()").items()}
    patch, negative = prompt["VSFModelPatch"], prompt["VSFNegativeConditioning"]
    assert prompt["KSampler"][1]["model"] == [patch[0], 0]
    assert prompt["KSampler"][1]["positive"] == [negative[0], 0]
    assert patch[1]["model"] == [prompt["UNETLoader"][0], 0]
    assert negative[1]["positive"] == [prompt["CLIPTextEncode"][0], 0]
    assert negative[1]["clip"] == [prompt["CLIPLoader"][0], 0]
    badges_become(demo, {"VSFNegativeConditioning": EMPTY})
    shot(f"spliced_{on}")
    assert demo.evaluate("() => t.undos()") == undos + 1
    demo.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    demo.wait_for_timeout(500)
    assert same_graph(demo.evaluate("() => t.saved()"), before)
    badges_become(demo, {})


def same_graph(a, b):
    """Whether two saved workflows say the same, but for counters that only grow and the order of nodes."""

    def plain(text):
        graph = {
            key: value for key, value in json.loads(text).items() if not key.startswith("last_") and key != "state"
        }
        return {**graph, "nodes": sorted(graph["nodes"], key=lambda node: node["id"])}

    return plain(a) == plain(b)


def test_samplers_that_share_a_positive_share_the_negative(frontend):
    load(frontend, json.loads(TWO_SAMPLERS.read_text(encoding="utf-8")))
    frontend.evaluate("""() => {
        const all = type => app.graph.nodes.filter(n => n.type === type);
        const samplings = all("ModelSamplingSD3");
        const prompt = t.one("CLIPTextEncode");
        all("KSamplerAdvanced").forEach((k, i) => { samplings[i].connect(0, k, 0); prompt.connect(0, k, 1) });
        for (const n of [...all("VSFModelPatch"), ...all("VSFNegativeConditioning")]) app.graph.remove(n);
        t.told();
        return app.extensionManager.command.execute("VSF.AddToWorkflow");
    }""")
    count = (
        "() => ['VSFModelPatch', 'VSFNegativeConditioning'].map(x => app.graph.nodes.filter(n => n.type === x).length)"
    )
    assert frontend.evaluate(count) == [2, 1]
    frontend.evaluate("() => app.extensionManager.command.execute('VSF.AddToWorkflow')")
    assert frontend.evaluate(count) == [2, 1], "nothing is left to add"
    badges_become(frontend, {"VSFNegativeConditioning": EMPTY})


def test_splice_from_inside_a_subgraph_goes_where_the_prompt_is(demo):
    without_vsf(demo)
    edit(demo, "app.graph.convertToSubgraph(new Set([t.one('KSampler')]))")
    demo.evaluate("() => app.canvas.setGraph(app.rootGraph.nodes.find(n => n.subgraph).subgraph)")
    demo.wait_for_timeout(200)
    demo.evaluate("() => app.extensionManager.command.execute('VSF.AddToWorkflow')")
    demo.evaluate("() => app.canvas.setGraph(app.rootGraph)")
    types = demo.evaluate("() => app.rootGraph.nodes.map(n => n.type)")
    assert {"VSFModelPatch", "VSFNegativeConditioning"} <= set(types)
    prompt = {node["class_type"]: node["inputs"] for node in demo.evaluate("() => t.prompt()").values()}
    assert {"positive", "clip"} <= set(prompt["VSFNegativeConditioning"])
    badges_become(demo, {"VSFNegativeConditioning": EMPTY})


def numbers(tab):
    sent = next(n for n in tab.evaluate("() => t.prompt()").values() if n["class_type"] == "VSFModelPatch")["inputs"]
    assert "preset" not in sent
    return sent["scale"], sent["offset"], sent["layout"]


def choose(tab, preset):
    """As a click in the list does."""
    tab.evaluate(
        """p => { const w = t.widget("VSFModelPatch", "preset"); w.value = p; w.callback(p); t.told() }""", preset
    )
    tab.wait_for_timeout(300)


def test_presets_set_the_numbers_that_are_sent(demo, shot):
    preset = "() => t.widget('VSFModelPatch', 'preset').value"
    wanted = {
        "harder": (3.8, 0.2, "paper"),
        "strong": (3.8, 0.2, "released"),
        "quality": (3.3, 0.2, "released"),
        "schnellLow": (3.5, 0, "released"),
        "schnellHigh": (6, 0, "released"),
        "wanLow": (0.8, 0.2, "paper"),
        "wanHigh": (1.9, 0.1, "paper"),
        "wan": (1.5, 0.1, "paper"),
        "ltx23": (1.5, 0, "paper"),
        "start": (1, 0.2, "paper"),
        "hard": (3.3, 0.2, "paper"),
    }
    assert demo.evaluate(preset) == "hard"
    for name, values in wanted.items():
        choose(demo, name)
        assert (numbers(demo), demo.evaluate(preset)) == (values, name)
    shot("preset")
    edit(demo, "const w = t.widget('VSFModelPatch', 'scale'); w.value = 2; w.callback(2)")
    assert demo.evaluate(preset) == "custom"
    assert numbers(demo) == (2, 0.2, "paper")
    labels = demo.evaluate(
        "() => { const o = t.widget('VSFModelPatch', 'preset').options; return o.values.map(v => o.getOptionLabel(v)) }"
    )
    assert labels[0] == "Quality (SD3.5): 3.3 / 0.2, released (the paper's)" and labels[-1] == "Custom"
    saved = demo.evaluate("() => t.one('VSFModelPatch').serialize().widgets_values")
    assert saved == [2, 0.2, 0, 1, "", "paper", True, "vsf", 5, 0.25, 2.5, 0.25, 3]


def test_presets_are_of_one_method(demo):
    state = "() => [t.widget('VSFModelPatch', 'preset').value, t.widget('VSFModelPatch', 'method').value]"
    assert demo.evaluate(state) == ["hard", "vsf"]
    edit(demo, "const w = t.widget('VSFModelPatch', 'method'); w.value = 'nag'; w.callback('nag')")
    assert demo.evaluate(state) == ["custom", "nag"]
    choose(demo, "hard")
    assert demo.evaluate(state) == ["hard", "vsf"]


def test_preset_is_chosen_with_the_mouse(demo):
    """In the widget that each renderer draws."""
    demo.evaluate(
        "() => { const n = t.one('VSFModelPatch'); app.canvas.ds.offset = [500 - n.pos[0], 150 - n.pos[1]]; "
        "app.canvas.ds.scale = 1; app.canvas.setDirty(true, true) }"
    )
    demo.wait_for_timeout(400)
    if demo.renderer == "vue":
        demo.get_by_text("Hard: 3.3 / 0.2", exact=False).first.click()
    else:
        x, y = demo.evaluate(
            "() => { const n = t.one('VSFModelPatch'), w = t.widget('VSFModelPatch', 'preset'),"
            " r = app.canvas.canvas.getBoundingClientRect(), o = app.canvas.ds.offset;"
            " return [r.left + n.pos[0] + o[0] + n.size[0] / 2, r.top + n.pos[1] + o[1] + w.last_y + 10] }"
        )
        demo.mouse.click(x, y)
    demo.wait_for_timeout(400)
    demo.get_by_text("Strong (SD3.5): 3.8 / 0.2, released (the paper's)", exact=True).last.click()
    demo.wait_for_timeout(400)
    assert numbers(demo) == (3.8, 0.2, "released")
    assert demo.evaluate("() => t.widget('VSFModelPatch', 'preset').value") == "strong"


def stable(nodes):
    """Nodes as saved, without what must differ between a node and its copy."""
    drop = ("id", "pos", "order", "inputs", "outputs")
    return [{key: value for key, value in node.items() if key not in drop} for node in nodes]


def test_save_reload_copy_and_subgraph_keep_every_value(demo):
    edit(
        demo, "t.widget('VSFModelPatch', 'scale').value = 1.25; t.widget('VSFModelPatch', 'layout').value = 'released'"
    )
    first = demo.evaluate("() => t.saved()")
    load(demo, json.loads(first))
    second = demo.evaluate("() => t.saved()")
    assert second == first
    assert demo.evaluate("() => t.widget('VSFModelPatch', 'preset').value") == "custom"
    ours = "n => n.type.startsWith('VSF')"
    original = demo.evaluate(f"() => app.graph.nodes.filter({ours}).map(n => n.serialize())")
    demo.evaluate(
        f"() => {{ app.canvas.copyToClipboard(app.graph.nodes.filter({ours})); app.canvas.pasteFromClipboard() }}"
    )
    copies = demo.evaluate(f"() => app.graph.nodes.filter({ours}).map(n => n.serialize())")[len(original) :]
    assert stable(copies) == stable(original)
    load(demo, json.loads(first))
    before = demo.evaluate("() => t.prompt()")
    demo.evaluate(f"() => {{ app.graph.convertToSubgraph(new Set(app.graph.nodes.filter({ours}))); t.told() }}")
    load(demo, json.loads(demo.evaluate("() => t.saved()")))  # the frontend numbers the order of nodes anew
    wrapped = demo.evaluate("() => t.saved()")
    load(demo, json.loads(wrapped))
    assert demo.evaluate("() => t.saved()") == wrapped
    demo.evaluate("() => app.graph.unpackSubgraph(app.graph.nodes.find(n => n.subgraph))")
    after = demo.evaluate("() => t.prompt()")
    kinds = [sorted((n["class_type"], settings(n)) for n in p.values()) for p in (before, after)]
    assert kinds[0] == kinds[1]


def settings(node):
    """A prompt node's values; of its links only their names."""
    return json.dumps({key: value if not isinstance(value, list) else "link" for key, value in node["inputs"].items()})
