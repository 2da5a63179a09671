"""Where ComfyUI shows words and pictures of a pack: node search, help panel, template browser, and all in French."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "workflows" / "vsf_tiny_demo.json"
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NO_PAGE_OF_ITS_OWN = re.compile(r"404.*/docs/VSF\w+/en\.md$")
"""The frontend asks for a help page in its language first; a 404 makes it ask for the one that all languages share."""


@pytest.fixture(scope="module")
def tab(server, new_page):
    """One page for all tests here."""
    page = new_page(server.address)
    page.evaluate(
        "async w => { await app.loadGraphData(w); app.canvas.ds.reset(); }", json.loads(DEMO.read_text("utf-8"))
    )
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    yield page
    page.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'en')")
    problems = [text for text in page.problems if "vsf" in text.lower()]
    assert [text for text in problems if not NO_PAGE_OF_ITS_OWN.search(text)] == []


def shot(tab, tmp_path_factory, name):
    tab.screenshot(path=str(tmp_path_factory.getbasetemp() / f"{name}.png"))


@pytest.mark.parametrize("alias", ["cfg 1", "NAG", "value sign flip"])
def test_node_search_finds_patch_and_negative_by_alias(tab, tmp_path_factory, alias):
    tab.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    tab.wait_for_function("() => document.activeElement?.tagName === 'INPUT'")
    tab.keyboard.type(alias)
    for name in ("VSF Model Patch", "VSF Negative Conditioning"):
        tab.get_by_text(name).last.wait_for(timeout=20_000)
    shot(tab, tmp_path_factory, f"search_{alias.replace(' ', '_')}")
    tab.keyboard.press("Escape")
    tab.wait_for_function("() => document.activeElement?.tagName !== 'INPUT'")


@pytest.mark.parametrize(
    "node, words, field",
    [
        ("VSFModelPatch", "nobody published", "affect_references"),
        ("VSFNegativeConditioning", "space bar", "from_frame"),
        ("VSFRecord", "ConditioningSetMask", "model"),
        ("VSFAttentionMap", "Dark everywhere", "normalize"),
        ("VSFScaleSweep", "LatentFromBatch", "scales"),
        ("VSFContactSheet", "play side by side", "columns"),
    ],
)
def test_help_panel_shows_the_page_and_its_pictures(tab, tmp_path_factory, node, words, field):
    tab.evaluate(
        """type => { const n = app.graph.nodes.find(n => n.type === type)
            ?? app.graph.add(LiteGraph.createNode(type)); const c = app.canvas;
        c.selectItems([n]); c.ds.scale = 1;
        c.ds.offset = [400 - n.pos[0], 300 - n.pos[1]]; c.setDirty(true, true); }""",
        node,
    )
    tab.wait_for_timeout(400)
    tab.get_by_test_id("info-button").click(timeout=5000)
    panel = tab.locator(".node-help-content")
    panel.get_by_text(words, exact=False).first.wait_for(timeout=5000)
    assert field in panel.locator("td code").all_inner_texts()
    tab.wait_for_timeout(400)
    widths = panel.locator("img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(widths) == (node == "VSFModelPatch") and all(widths)
    shot(tab, tmp_path_factory, f"help_{node}")


DRAWN = """() => [...document.images].filter(i => i.src.startsWith('blob:') && i.naturalWidth === 448)
    .map(i => i.src)"""


def test_template_browser_lists_every_workflow_with_its_thumbnail(tab, tmp_path_factory):
    fetched = []
    tab.on("response", lambda r: fetched.append((r.url.rsplit("/", 2)[1:], r.ok)))
    tab.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    tab.get_by_text("ComfyUI-VSF").first.click(timeout=10_000)
    tab.mouse.move(900, 600)
    drawn = set()
    for _ in range(60):
        drawn |= set(tab.evaluate(DRAWN))
        if len(drawn) >= len(WORKFLOWS):
            break
        if drawn:  # those further down come when they are seen
            tab.mouse.wheel(0, 150)
        tab.wait_for_timeout(200)
    assert len(drawn) == len(WORKFLOWS)
    for path in WORKFLOWS:
        assert (["ComfyUI-VSF", f"{path.stem}.jpg"], True) in fetched
    shot(tab, tmp_path_factory, "templates")
    tab.keyboard.press("Escape")


def test_another_language_reaches_nodes_badges_menu_and_settings(tab, tmp_path_factory):
    words = json.loads((ROOT / "locales" / "fr" / "main.json").read_text("utf-8"))["vsf"]
    tab.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'fr')")
    tab.reload()
    tab.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=60_000)
    tab.wait_for_timeout(1500)
    tab.keyboard.press("Escape")
    tab.evaluate(
        """async w => { await app.loadGraphData(w); app.canvas.ds.reset();
        app.graph.nodes.find(n => n.type === "VSFModelPatch").mode = 4;
        app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState(); }""",
        json.loads(DEMO.read_text("utf-8")),
    )
    tab.wait_for_timeout(800)
    said = tab.evaluate("""() => {
        const patch = app.graph.nodes.find(n => n.type === "VSFModelPatch");
        const negative = app.graph.nodes.find(n => n.type === "VSFNegativeConditioning");
        const sampler = app.graph.nodes.find(n => n.type === "KSampler");
        return {
            title: patch.title,
            scale: patch.widgets.find(w => w.name === "scale").label,
            preset: patch.widgets.find(w => w.name === "preset").label,
            choice: patch.widgets.find(w => w.name === "preset").options.getOptionLabel("strong"),
            badge: negative.badges.map(b => (typeof b === "function" ? b() : b).text).at(-1),
            menu: app.collectNodeMenuItems(sampler).map(i => i?.content).filter(c => c?.includes("VSF"))[0],
        };
    }""")
    assert said == {
        "title": "VSF Patch du modèle",
        "scale": "force (scale)",
        "preset": words["preset"],
        "choice": "Fort (SD3.5): 3.8 / 0.2, released (de l'article)",
        "badge": words["unpatched"],
        "menu": words["add"],
    }
    shot(tab, tmp_path_factory, "french")
    tab.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    tab.wait_for_timeout(500)
    tab.get_by_text("VSF", exact=True).first.click(timeout=5000)
    tab.get_by_text("Afficher des badges sur les nœuds qui empêchent VSF d'agir").first.wait_for(timeout=5000)
    shot(tab, tmp_path_factory, "settings_french")
    tab.keyboard.press("Escape")
