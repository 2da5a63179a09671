"""Graphs: the UI's workflow format turned into the API format, and nodes taken out of an API graph.

The frontend does this when someone presses Run. This is the part of it that shipped workflows need: widgets, links,
muted and bypassed nodes, notes. Subgraphs, Reroute and PrimitiveNode are refused, not guessed.
"""

from __future__ import annotations

from typing import Any

from hosting.errors import HostError

Prompt = dict[str, dict[str, Any]]
Source = tuple[dict[str, Any], int]

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
"""Of a dynamic combo only choices that bring no further inputs are understood."""
SEED_NAMES = ("seed", "noise_seed")
NOTES = ("MarkdownNote", "Note")
MUTED, BYPASSED = 2, 4


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """The API-format graph of a UI-format workflow; `object_info` is the server's own."""
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt: Prompt = {}
    for node in nodes.values():
        if node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise HostError(f"the server has no node {node['type']} (node {node['id']} of the workflow)")
        inputs = widget_values(node, object_info[node["type"]])
        for slot in node.get("inputs") or []:
            source = find_source(slot.get("link"), nodes, links)
            if source is not None:
                inputs[slot["name"]] = [str(source[0]["id"]), source[1]]
        title = node.get("title") or object_info[node["type"]].get("display_name") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def find_source(
    link_id: int | None, nodes: dict[int, dict[str, Any]], links: dict[int, tuple[int, int]]
) -> Source | None:
    """The node and output that a link gets its value from, looking through bypassed nodes."""
    while link_id is not None:
        node_id, slot = links[link_id]
        node = nodes[node_id]
        mode = node.get("mode", 0)
        if mode == MUTED:
            return None
        if mode != BYPASSED:
            return node, slot
        link_id = bypassed_link(node, slot)
    return None


def bypassed_link(node: dict[str, Any], slot: int) -> int | None:
    """The link that stands in for a bypassed node's output: of the same slot, else of the first input of its type."""
    wanted = node["outputs"][slot]["type"]
    inputs = node.get("inputs") or []
    for candidate in inputs[slot : slot + 1] + inputs:
        if candidate["type"] == wanted:
            return candidate.get("link")
    return None


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A node's widget values by name. A seed brings a second value that belongs to the UI alone."""
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return dict(values)
    result: dict[str, Any] = {}
    remaining = iter(values)
    for name, kind, options in declared_inputs(info):
        if not is_widget(kind, options):
            continue
        result[name] = next(remaining, options.get("default"))
        if has_seed_control(name, kind, options):
            next(remaining, None)
    return {name: value for name, value in result.items() if value is not None}


def declared_inputs(info: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, type and options of a node's required and optional inputs, in order."""
    declared = []
    for group in ("required", "optional"):
        for name, spec in (info["input"].get(group) or {}).items():
            declared.append((name, spec[0], spec[1] if len(spec) > 1 else {}))
    return declared


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    """Whether the UI shows an input as a widget; a list of choices is the old way to write COMBO."""
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def has_seed_control(name: str, kind: Any, options: dict[str, Any]) -> bool:
    """Whether the UI stores what happens to this number after a run ("randomize") right behind it."""
    return kind == "INT" and bool(options.get("control_after_generate", name in SEED_NAMES))


def without_nodes(prompt: Prompt, passed_through: dict[str, str]) -> Prompt:
    """A copy without the nodes of the given classes: what used their first output gets what their named input had.

    Whatever used another output of theirs has nothing to show any more and is left out too.
    """
    classes = {node_id: node["class_type"] for node_id, node in prompt.items()}
    taken = {node_id: passed_through[name] for node_id, name in classes.items() if name in passed_through}
    result: Prompt = {}
    for node_id, node in prompt.items():
        inputs = {name: relinked(value, prompt, taken) for name, value in node["inputs"].items()}
        if node_id not in taken and None not in inputs.values():
            result[node_id] = {**node, "inputs": inputs}
    return result


def relinked(value: Any, prompt: Prompt, taken: dict[str, str]) -> Any:
    """An input's value once the taken nodes are gone; None when nothing can stand in for it."""
    while is_link(value) and value[0] in taken:
        value = prompt[value[0]]["inputs"].get(taken[value[0]]) if value[1] == 0 else None
    return value


def is_link(value: Any) -> bool:
    """Whether an API input refers to another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def only_node(prompt: Prompt, class_type: str) -> str:
    """The id of the graph's one node of a class."""
    found = [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]
    if len(found) != 1:
        raise HostError(f"the graph has {len(found)} {class_type} nodes where one is expected")
    return found[0]


def upstream_text(prompt: Prompt, value: Any) -> str:
    """The first non-empty `text` met when walking up from a link; "" when there is none."""
    if not is_link(value):
        return ""
    inputs = prompt[value[0]]["inputs"]
    if isinstance(inputs.get("text"), str):
        return inputs["text"]
    return next((text for text in (upstream_text(prompt, source) for source in inputs.values()) if text), "")
