"""Moves nodes of a workflow down until none is over another in either renderer of ComfyUI's frontend."""

from __future__ import annotations

from typing import Any

TITLE, GAP = 30, 20
HEIGHTS = {
    **{"CheckpointLoaderSimple": 126, "UNETLoader": 120, "VAELoader": 90, "LoraLoaderModelOnly": 116},
    **{"CLIPLoader": 136, "DualCLIPLoader": 160, "TripleCLIPLoader": 160, "LoadImage": 360, "CreateVideo": 132},
    **{"VSFModelPatch": 420, "VSFNegativeConditioning": 420, "ModelSamplingSD3": 66, "ModelSamplingAuraFlow": 66},
    **{"FluxGuidance": 66, "WanImageToVideo": 290, "KSampler": 330, "KSamplerAdvanced": 400},
}
"""Without the title, as measured: the taller of both renderers, where that is more than the saved size."""
GROWTH, WIDTH = 40, 225


def height(node: dict[str, Any]) -> float:
    return max(node["size"][1] + GROWTH, HEIGHTS.get(node["type"], 0))


def spread(workflow: dict[str, Any]) -> None:
    """In place. Groups grow with what is inside of them."""
    nodes = workflow["nodes"]
    inside = {
        i: [n for n in nodes if holds(group["bounding"], n["pos"])]
        for i, group in enumerate(workflow.get("groups", ()))
    }
    placed: list[dict[str, Any]] = []
    for node in sorted(nodes, key=lambda one: one["pos"][1]):
        while hit := next((other for other in placed if meets(node, other)), None):
            node["pos"][1] = int(hit["pos"][1] + height(hit) + GAP + TITLE)
        placed.append(node)
    for i, group in enumerate(workflow.get("groups", ())):
        left, top, width, tall = group["bounding"]
        bottom = max([top + tall, *(one["pos"][1] + height(one) + GAP for one in inside[i])])
        group["bounding"] = [left, top, width, int(bottom - top)]


def holds(box: list[float], pos: list[float]) -> bool:
    return box[0] <= pos[0] <= box[0] + box[2] and box[1] <= pos[1] <= box[1] + box[3]


def meets(a: dict[str, Any], b: dict[str, Any]) -> bool:
    (ax, ay), (bx, by) = a["pos"], b["pos"]
    aw, bw = (max(one["size"][0], WIDTH) for one in (a, b))
    return ax < bx + bw and bx < ax + aw and ay - TITLE < by + height(b) + GAP and by - TITLE < ay + height(a) + GAP
