""" "Add VSF to this workflow" and the badges on smallest graphs of what people have, each of which once went wrong.

Node types of other packs are not installed: the frontend shows them as missing, and keeps their links."""

import json
import re
from pathlib import Path

import pytest
from browser.splicing import HELPERS, LOAD, TRY, chain, links_of, plain, without_ours

CASES = Path(__file__).parent / "cases"
NOT_SUPPORTED = "not supported"

ADDED = {  # patches and negatives that are added, and what is said besides
    "01-all-in-a-subgraph": (1, 1, "inside"),
    "02-one-subgraph-used-twice": (1, 2, ""),
    "03-chain-sampler": (1, 1, "ExampleChainSampler has no model"),
    "04-two-models": (2, 1, ""),
    "05-sampler-that-returns-its-model": (1, 1, ""),
    "06-model-of-another-pack": (0, 0, "WanVideoSampler and its pack run their model themselves"),
    "07-nunchaku-loader": (0, 0, NOT_SUPPORTED),
    "08-hidream": (0, 0, NOT_SUPPORTED),
    "09-context-clip": (1, 1, ""),
    "10-broadcast-by-hand": (0, 0, "Nothing to add"),
    "11-broadcast": (1, 1, ""),
    "12-get-without-set": (0, 0, "has no model"),
    "13-cfg-of-an-ordinary-model": (1, 1, ""),
    "14-crowded": (1, 1, ""),
    "15-wrong-side": (0, 1, ""),
}
HALF = {"ExampleChainSampler", "WanVideoSampler"}  # left alone


@pytest.fixture(scope="module")
def opened(server, new_page):
    """One page for all cases."""
    page = new_page(server.address)
    page.evaluate(HELPERS)
    yield page
    page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    assert [text for text in page.problems if "vsf" in text.lower()] == []


@pytest.fixture
def tab(opened):
    """In the classic renderer."""
    opened.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    return opened


@pytest.fixture
def vue(opened):
    """In Nodes 2.0."""
    opened.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    return opened


def case(name):
    return json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))


def load(tab, workflow):
    tab.evaluate(LOAD, workflow)
    tab.wait_for_timeout(250)
    tab.keyboard.press("Escape")  # a dialog about what is missing


def of(prompt, kind):
    return {key: node["inputs"] for key, node in prompt.items() if node.get("class_type") == kind}


def badges(tab):
    tab.evaluate("() => s.told()")
    tab.wait_for_timeout(300)
    return tab.evaluate("() => s.badges()")


def check(result):
    """What is right whatever was added."""
    assert links_of(without_ours(result["after"], result["before"])) == links_of(result["before"])
    assert plain(result["undone"]) == plain(result["saved"])
    assert result["again"], "the second click changed something"
    assert result["steps"] == (1 if result["added"] else 0)
    assert result["overlaps"] == []
    assert not result["added"] or result["far"] == 0
    assert len(result["said"]) == 1 and all(life > 0 for life in result["lives"])
    assert "{" not in result["said"][0]


@pytest.mark.parametrize("name", ADDED)
def test_each_comes_out_right(tab, name, tmp_path_factory):
    load(tab, case(name))
    result = tab.evaluate(TRY)
    patches, negatives, words = ADDED[name]
    new = [n for n in of(result["after"], "VSFModelPatch") if n not in result["before"]]
    new_negatives = [n for n in of(result["after"], "VSFNegativeConditioning") if n not in result["before"]]
    assert (len(new), len(new_negatives)) == (patches, negatives)
    assert words in result["said"][0]
    assert "not found" not in result["said"][0]
    check(result)
    for node in result["after"].values():
        if "ampler" in str(node.get("class_type")) and patches + negatives and node["class_type"] not in HALF:
            for name_of_model in ("model", "model_high", "model_low"):
                if name_of_model in node["inputs"]:
                    assert of(dict(chain(result["after"], node["inputs"][name_of_model], "model")), "VSFModelPatch")
            assert of(dict(chain(result["after"], node["inputs"]["positive"], "positive")), "VSFNegativeConditioning")
    for key in new:
        assert "broadcast" in name or "model" in result["after"][key]["inputs"]
    for key in new_negatives:
        inputs = result["after"][key]["inputs"]
        assert "positive" in inputs and ("broadcast" in name or "clip" in inputs)
        if name == "09-context-clip":
            assert inputs["clip"] == ["2", 2]  # the Context's own CLIP output


def test_two_prompts_have_a_negative_each_and_the_definition_stays(tab):
    load(tab, case("02-one-subgraph-used-twice"))
    result = tab.evaluate(TRY)
    before, after = json.loads(result["saved"]), result["after"]
    assert before["definitions"] == json.loads(result["undone"])["definitions"]
    prompts = {
        after[inputs["positive"][0]]["inputs"]["text"] for inputs in of(after, "VSFNegativeConditioning").values()
    }
    assert prompts == {"a red boat", "a blue boat"}
    assert len(of(after, "KSampler")) == 2 and not [key for key in of(after, "VSFModelPatch") if ":" in key]


@pytest.mark.parametrize("renderer", ["tab", "vue"])
def test_a_crowded_graph_gets_them_beside_the_sampler_or_into_view(request, renderer, tmp_path_factory):
    page = request.getfixturevalue(renderer)
    load(page, case("14-crowded"))
    page.evaluate("() => s.command()")
    page.wait_for_timeout(800)
    page.screenshot(path=str(tmp_path_factory.getbasetemp() / f"crowded_{renderer}.png"))
    assert page.evaluate("() => s.far([])") == 0
    assert page.evaluate("() => app.canvas.selectedItems.size") == 2
    assert page.evaluate("() => s.overlaps()") == []
    boxes = "() => [...document.querySelectorAll('[data-node-id]')].map(e => e.getBoundingClientRect())"
    rects = page.evaluate(f"() => ({boxes})().map(r => [r.x, r.y, r.width, r.height])")  # Nodes 2.0's own
    assert [(a, b) for i, a in enumerate(rects) for b in rects[:i] if overlap(a, b)] == []


def overlap(a, b):
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def test_badges_of_each(tab):
    load(tab, case("10-broadcast-by-hand"))
    assert badges(tab) == {}
    load(tab, case("15-wrong-side"))
    assert badges(tab) == {"VSFNegativeConditioning": "VSF: on the negative side, move it to the positive"}
    load(tab, case("13-cfg-of-an-ordinary-model"))
    tab.evaluate("() => s.command()")
    assert badges(tab) == {"VSFNegativeConditioning": "VSF: empty negative, write one"}
    tab.evaluate("() => { app.graph.getNodeById(1).widgets[0].value = 'sd_xl_turbo_1.0.safetensors' }")
    assert badges(tab)["KSampler"] == "VSF: cfg 7 burns few-step models, set 1"


PATCH_IT = """([before, input]) => { const p = LiteGraph.createNode("VSFModelPatch"); app.graph.add(p);
    const n = app.graph.getNodeById(before), i = n.inputs.findIndex(x => x.name === input),
        l = app.graph.getLink(n.inputs[i].link);
    app.graph.getNodeById(l.origin_id).connect(l.origin_slot, p, 0); p.connect(0, n, i); s.told(); }"""


def test_one_cause_has_one_badge(tab):
    load(tab, case("07-nunchaku-loader"))
    tab.evaluate(PATCH_IT, [7, "model"])
    shown = tab.evaluate("""async () => { const {findings} = await import("/extensions/ComfyUI-VSF/rules.js");
        return findings(app.rootGraph).filter(f => f.key === "loader").map(f => f.node.type) }""")
    assert set(shown) == {"NunchakuFluxDiTLoader"}


def test_of_merged_models_the_first_keeps_its_patch(tab):
    load(tab, case("13-cfg-of-an-ordinary-model"))
    tab.evaluate("() => s.command()")
    assert badges(tab) == {"VSFNegativeConditioning": "VSF: empty negative, write one"}
    tab.evaluate("""() => { const m = LiteGraph.createNode("ModelMergeSimple"); app.graph.add(m); window.m = m;
        const of = type => app.graph.nodes.find(n => n.type === type);
        of("CheckpointLoaderSimple").connect(0, m, 0); of("VSFModelPatch").connect(0, m, 1);
        m.connect(0, of("KSampler"), 0); }""")
    assert badges(tab) == {"VSFNegativeConditioning": "VSF: model not patched, add VSF Model Patch"}
    tab.evaluate("""() => { const of = type => app.graph.nodes.find(n => n.type === type);
        of("CheckpointLoaderSimple").connect(0, m, 1); of("VSFModelPatch").connect(0, m, 0); }""")
    assert badges(tab) == {"VSFNegativeConditioning": "VSF: empty negative, write one"}


def test_a_sampler_that_lacks_its_half_says_so(tab):
    load(tab, case("02-one-subgraph-used-twice"))
    tab.evaluate("() => s.command()")
    tab.evaluate("""() => { const blue = app.graph.nodes.filter(n => n.type === "VSFNegativeConditioning")[1];
        app.graph.remove(blue); const text = app.graph.getNodeById(4); text.connect(0, app.graph.getNodeById(7), 1);
        s.said.length = 0; }""")
    assert badges(tab)["KSampler"] == "VSF: this sampler gets no negative"
    result = tab.evaluate(TRY)
    assert result["added"] == 1
    check(result)


STAND_INS = """() => {
    const virtual = (type, inputs, outputs) => LiteGraph.registerNodeType(type, Object.assign(class extends LGraphNode {
        constructor() { super(type); this.isVirtualNode = true; this.serialize_widgets = true;
            inputs.forEach(t => this.addInput(t, t)); outputs.forEach(t => this.addOutput(t, t));
            this.addWidget("text", "name", "", () => {}); }
        getInputLink() { window.asked = (window.asked ?? 0) + 1; return null; }
        resolveVirtualOutput() { window.asked = (window.asked ?? 0) + 1; }
    }, { title: type }));
    virtual("SetNode", ["MODEL"], ["MODEL"]); virtual("GetNode", [], ["MODEL"]);
}"""


def test_get_and_set_are_followed_and_never_asked(tab):
    """Also from inside a subgraph to the Set outside."""
    tab.evaluate(STAND_INS)
    load(tab, case("12-get-without-set"))
    tab.evaluate("() => { window.asked = 0; s.command(); s.told(); }")
    tab.wait_for_timeout(400)
    assert tab.evaluate("() => [asked, s.ours().length]") == [0, 0]
    tab.evaluate("""() => { const set = LiteGraph.createNode("SetNode"); app.graph.add(set);
        set.widgets[0].value = "gone";
        app.graph.getNodeById(1).connect(0, set, 0);
        app.graph.convertToSubgraph(new Set([app.graph.getNodeById(5), app.graph.getNodeById(8)])); s.told();
        window.asked = 0; s.command(); }""")
    tab.wait_for_timeout(400)
    assert tab.evaluate("() => [asked, s.ours().map(n => n.type).sort()]") == [
        0,
        ["VSFModelPatch", "VSFNegativeConditioning"],
    ]
    assert badges(tab) == {"VSFNegativeConditioning": "VSF: empty negative, write one"}


@pytest.mark.parametrize("unlinked", ["model", "positive"])
def test_a_sampler_with_one_half_unlinked_gets_neither(tab, unlinked):
    workflow = case("14-crowded")
    load(tab, workflow)
    tab.evaluate(
        """name => { const n = app.graph.getNodeById(5); s.said.length = 0;
        n.disconnectInput(n.inputs.findIndex(i => i.name === name)); s.told(); }""",
        unlinked,
    )
    result = tab.evaluate(TRY)
    assert result["added"] == 0 and "KSampler has no model or no positive prompt" in result["said"][0]
    check(result)


def test_an_unsupported_model_beside_a_supported_one_is_left_alone(tab):
    workflow = case("03-chain-sampler")
    text = json.dumps(workflow).replace("ExampleChainSampler", "KSampler")
    load(tab, json.loads(text))
    tab.evaluate("""() => { const l = LiteGraph.createNode("CheckpointLoaderSimple"); app.graph.add(l);
        l.widgets[0].value = "sd_xl_refiner_1.0.safetensors"; const n = app.graph.getNodeById(8);
        l.connect(0, n, 0); app.graph.getNodeById(2).connect(0, n, 1); s.told(); s.said.length = 0; }""")
    result = tab.evaluate(TRY)
    assert result["added"] == 2 and "sd_xl_refiner_1.0.safetensors is not supported" in result["said"][0]
    check(result)
    refiner = result["after"]["8"]["inputs"]
    assert result["after"][refiner["model"][0]]["class_type"] == "CheckpointLoaderSimple"


def test_what_only_looks_like_a_sampler_is_left_alone(tab):
    load(tab, case("13-cfg-of-an-ordinary-model"))
    kinds = ["SAM3_Detect", "SAM3_VideoTrack", "TrainLoraNode", "WanInfiniteTalkToVideo", "LTXVReferenceAudio"]
    found = tab.evaluate(
        """async kinds => { const {isSampler} = await import("/extensions/ComfyUI-VSF/rules.js");
        return kinds.map(k => LiteGraph.createNode(k)).filter(n => n && isSampler(n)).map(n => n.type) }""",
        [*kinds, "KSampler", "CFGGuider", "SamplerCustom"],
    )
    assert found == ["KSampler", "CFGGuider", "SamplerCustom"]


def test_where_the_prompt_comes_into_a_subgraph_the_negative_is_outside(tab):
    """A node inside stands between the input and the sampler, as in ComfyUI's template of Wan S2V."""
    load(tab, case("13-cfg-of-an-ordinary-model"))
    tab.evaluate("""() => { const g = LiteGraph.createNode("FluxGuidance"); app.graph.add(g);
        app.graph.getNodeById(2).connect(0, g, 0); g.connect(0, app.graph.getNodeById(5), 1);
        app.graph.convertToSubgraph(new Set([app.graph.getNodeById(5), g])); s.told(); s.said.length = 0; }""")
    result = tab.evaluate(TRY)
    check(result)
    ((key, inputs),) = of(result["after"], "VSFNegativeConditioning").items()
    assert ":" not in key and "clip" in inputs


def test_an_unknown_model_gets_both_and_a_word_of_what_may_happen(tab):
    text = json.dumps(case("13-cfg-of-an-ordinary-model")).replace("sd_xl_base_1.0", "my_own_mix")
    load(tab, json.loads(text))
    result = tab.evaluate(TRY)
    assert result["added"] == 2 and re.search("Which model my_own_mix.* the run stops with an error", result["said"][0])
