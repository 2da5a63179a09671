"""What was ever shipped: every workflow in git's history, and the order in which nodes' widgets have been saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hosting.errors import HostError
from hosting.host import ROOT

from release.archive import git

WIDGETS = {
    "VSFNegativeConditioning": ("text", "strength", "extrapolation", "from_frame", "to_frame"),
    "VSFModelPatch": (
        *("scale", "offset", "start_percent", "end_percent", "blocks", "layout", "affect_references"),
        *("method", "nag_scale", "nag_alpha", "nag_tau", "nasa_scale", "ong_scale"),
    ),
    "VSFRecord": (),
    "VSFAttentionMap": ("steps", "layers", "opacity", "normalize"),
    "VSFScaleSweep": ("scales",),
    "VSFContactSheet": ("columns", "videos"),
}
"""Each node's widgets in the order in which a workflow keeps their values, which it keeps without names. New ones come
at the end, and nothing else ever changes here: a workflow saved when there were fewer has the first of them."""
FOLDERS = ("workflows", "subgraphs")
HAS_HISTORY = (ROOT / ".git").exists()
"""Not so where someone unpacked an archive of the repository."""


def ever(folder: Path = ROOT) -> dict[str, str]:
    """Every workflow and subgraph in the folders now and in git's history, by revision and name; each text once."""
    if git("rev-parse", "--is-shallow-repository", folder=folder).strip() == "true":
        raise HostError("this clone is shallow and hides what was shipped: git fetch --unshallow")
    present = [path for name in FOLDERS for path in sorted((folder / name).glob("*.json"))]
    texts = {path.read_text(encoding="utf-8"): path.name for path in present}
    for commit in git("log", "--format=%H", "--", *FOLDERS, folder=folder).split():
        for path in git("ls-tree", "-z", "-r", "--name-only", commit, *FOLDERS, folder=folder).split("\0"):
            if path.endswith(".json"):
                texts.setdefault(git("show", f"{commit}:{path}", folder=folder), f"{commit[:9]}:{path}")
    return {where: text for text, where in texts.items()}


def vsf_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The pack's nodes in a workflow and in its subgraphs."""
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    return [node for one in graphs for node in one["nodes"] if node["type"].startswith("VSF")]


def widget_values(node: dict[str, Any]) -> dict[str, Any]:
    """A saved node's values by the names of the widgets that they were saved from."""
    return dict(zip(WIDGETS[node["type"]], node["widgets_values"], strict=False))
