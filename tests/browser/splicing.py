""" "Add VSF to this workflow" in the real frontend, and what to check after it."""

from __future__ import annotations

import json
from typing import Any

HELPERS = """
window.s = {
    all: function* (graph) { for (const n of graph.nodes) { yield n; if (n.subgraph) yield* s.all(n.subgraph); } },
    told: () => app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState(),
    undos: () => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length,
    said: [],
    saved: () => { const w = app.rootGraph.serialize(); delete w.extra; return JSON.stringify(w); },
    prompt: async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).output)),
    ours: () => [...new Set(s.all(app.rootGraph))].filter(n => n.type.startsWith("VSF")),
    box: n => [n.pos[0], n.pos[1] - 30, n.size[0], (n.flags?.collapsed ? 0 : n.size[1]) + 30],
    meet: ([ax, ay, aw, ah], [bx, by, bw, bh]) => ax < bx + bw && bx < ax + aw && ay < by + bh && by < ay + ah,
    overlaps: () => s.ours().flatMap(n => n.graph.nodes.filter(m => m !== n && s.meet(s.box(n), s.box(m)))
        .map(m => [n.type, m.type])),
    badges: () => Object.fromEntries([...s.all(app.rootGraph)].flatMap(n =>
        (n.badges ?? []).map(b => typeof b === "function" ? b() : b).filter(b => b.text?.startsWith("VSF:"))
            .map(b => [n.type, b.text]))),
    far: had => { // how many of ours in the shown graph are out of the window
        const c = app.canvas, [x, y] = c.ds.offset, k = c.ds.scale, w = c.canvas.clientWidth, h = c.canvas.clientHeight;
        return s.ours().filter(n => n.graph === c.graph && !had.includes(n)).map(s.box).filter(([l, t, v, u]) =>
            (l + x) * k < -1 || (t + y) * k < -1 || (l + v + x) * k > w + 1 || (t + u + y) * k > h + 1).length; },
    command: () => app.extensionManager.command.execute("VSF.AddToWorkflow"),
};
const toast = app.extensionManager.toast, add = toast.add.bind(toast);
toast.add = message => { s.said.push(message); return add(message); };
"""

LOAD = """async w => { await app.loadGraphData(w); app.canvas.ds.reset(); s.told(); s.said.length = 0; }"""

TRY = """async () => {
    const before = await s.prompt(), saved = s.saved(), had = s.ours(), undos = s.undos();
    await s.command(); s.told();
    const after = await s.prompt(), said = s.said.map(m => m.detail), lives = s.said.map(m => m.life ?? 0);
    const mine = s.ours().map(n => n.type), steps = s.undos() - undos, overlaps = s.overlaps(), once = s.saved();
    await new Promise(resolve => setTimeout(resolve, mine.length > had.length ? 450 : 0));
    const far = s.far(had);
    await s.command(); s.told();
    const again = s.saved() === once;
    while (s.undos() > undos) await app.extensionManager.command.execute("Comfy.Undo"); // making a prompt numbers nodes
    const added = mine.length - had.length, undone = s.saved();
    return { before, after, saved, undone, said, lives, mine, added, steps, overlaps, far, again };
}"""

Prompt = dict[str, dict[str, Any]]
ALWAYS = {"VSFModelPatch": "model", "VSFNegativeConditioning": "positive"}


def without_ours(prompt: Prompt, kept: Prompt) -> Prompt:
    """A prompt in which every added node of ours is a wire."""
    ours = {key: node for key, node in prompt.items() if node.get("class_type") in ALWAYS and key not in kept}

    def origin(value: Any) -> Any:
        while isinstance(value, list) and len(value) == 2 and value[0] in ours:
            node = ours[value[0]]
            value = node["inputs"].get(ALWAYS[node["class_type"]])
        return value

    rest = {key: node for key, node in prompt.items() if key not in ours}
    wired = {key: {name: origin(value) for name, value in node["inputs"].items()} for key, node in rest.items()}
    return {
        key: {**rest[key], "inputs": {name: value for name, value in inputs.items() if value is not None}}
        for key, inputs in wired.items()
    }


def links_of(prompt: Prompt) -> Prompt:
    """A prompt as what runs: classes and inputs."""
    return {key: {"class_type": node.get("class_type"), "inputs": node["inputs"]} for key, node in prompt.items()}


def chain(prompt: Prompt, value: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The nodes that a value comes through, back along the inputs called `name`, or along the only link."""
    found = []
    while isinstance(value, list) and len(value) == 2 and value[0] in prompt and len(found) < 100:
        key, node = value[0], prompt[value[0]]
        found.append((key, node))
        links = {one: linked for one, linked in node["inputs"].items() if isinstance(linked, list)}
        value = next((links[one] for one in (name, f"{name}1", "conditioning", "conditioning_1") if one in links), None)
        if value is None and len(links) == 1:
            value = next(iter(links.values()))
    return found


def plain(text: str) -> Any:
    """A saved workflow without counters that only grow, the order of nodes, and sizes that a renderer measures."""

    def of(graph: dict[str, Any]) -> dict[str, Any]:
        kept = {
            key: value for key, value in graph.items() if not key.startswith("last_") and key not in ("state", "id")
        }
        nodes = sorted(
            ({k: v for k, v in n.items() if k not in ("order", "size")} for n in graph["nodes"]),
            key=lambda n: str(n["id"]),
        )
        if "definitions" in kept:
            kept["definitions"] = [of(one) for one in kept["definitions"].get("subgraphs", ())]
        links = sorted(json.dumps(link, sort_keys=True) for link in graph.get("links") or ())
        return {**kept, "nodes": nodes, "links": links}

    return of(json.loads(text))
