"""What each server is, and whether it can draw what is asked for: looked at before the first picture."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hosting.client import ComfyClient
from hosting.errors import HostError, PromptFailed, ServerDied

from neggen.store import Job
from neggen.words import plain

LOOK = 20.0
"""Seconds that a server has to say what it is; one that does not answer is waited for, as one that goes away."""


@dataclass(frozen=True)
class Machine:
    """What a server says of itself: ComfyUI's and PyTorch's versions, and its devices; empty where it says nothing."""

    about: str
    lacks: tuple[str, ...] = ()
    """What it has not of what the graphs need."""


def look(address: str, graphs: Iterable[dict]) -> Machine | None:
    """A server's answer; None where it gives none."""
    client = ComfyClient(address, LOOK)
    try:
        nodes = client.object_info()
    except (ServerDied, PromptFailed, ValueError):
        return None
    about = ""
    with contextlib.suppress(ServerDied, PromptFailed, ValueError, KeyError, TypeError, AttributeError):
        said = json.loads(client._request("/system_stats"))
        names = ", ".join(plain(device["name"], 60) for device in said["devices"])
        versions = (f"{name} {said['system'][key]}" for name, key in VERSIONS if said["system"].get(key))
        about = ", ".join([*versions, names])
    return Machine(about, tuple(dict.fromkeys(one for graph in graphs for one in lacking(graph, nodes))))


VERSIONS = (("ComfyUI", "comfyui_version"), ("PyTorch", "pytorch_version"))


def lacking(graph: dict, nodes: dict[str, Any]) -> list[str]:
    """The nodes of a graph that a server has not, and the files and other choices that its nodes do not offer."""
    missing = []
    for node in graph.values():
        kind = node["class_type"]
        if kind not in nodes:
            missing.append(f"the node {kind}")
            continue
        known = {**nodes[kind].get("input", {}).get("optional", {}), **nodes[kind].get("input", {}).get("required", {})}
        for name, value in node["inputs"].items():
            offered = choices(known.get(name))
            if offered is not None and isinstance(value, str) and value not in offered:
                missing.append(f"{value} ({kind}, {name})")
    return missing


def choices(spec: Any) -> list | None:
    """What an input may be, where it is chosen from a list; an empty list is none that could be known."""
    kind, *more = spec if isinstance(spec, (list, tuple)) and spec else (None,)
    if kind == "COMBO" and more and isinstance(more[0], dict):
        kind = more[0].get("options")
    return kind if isinstance(kind, list) and kind else None


def fit(servers: Sequence[str], jobs: Sequence[Job], mixed: bool) -> dict[str, str]:
    """The servers that can draw, and what each is. Prints which are left out, and why. Raises ``HostError`` where none
    is left, or where they differ and were not meant to (``mixed``)."""
    graphs = list({json.dumps(_shape(job.graph), sort_keys=True): job.graph for job in jobs}.values())
    found = {address: look(address, graphs) for address in servers}
    for address, machine in found.items():
        if machine is not None and machine.lacks:
            some = "; ".join(plain(one, 120) for one in machine.lacks[:3])
            print(f"{address} is left out: it has not {some}{', ...' if len(machine.lacks) > 3 else ''}", flush=True)
    fitting = {address: machine for address, machine in found.items() if machine is None or not machine.lacks}
    if not fitting:
        raise HostError("no server has what these pictures need; see above. Put it there, or name another --server")
    kinds = {machine.about for machine in fitting.values() if machine is not None}
    if len(kinds) > 1 and not mixed:
        each = "; ".join(f"{address}: {machine.about}" for address, machine in fitting.items() if machine is not None)
        raise HostError(
            f"these servers are not alike, and draw differently ({each}). Name alike ones, or give --mixed: each "
            "picture's machine is in the report"
        )
    return {address: "" if machine is None else machine.about for address, machine in fitting.items()}


def _shape(graph: dict) -> dict:
    """A graph's nodes and texts, without what differs from picture to picture."""
    kept = {}
    for key, node in graph.items():
        named = {name: value for name, value in node["inputs"].items() if "." in str(value) and " " not in str(value)}
        kept[key] = node["class_type"], {name: value for name, value in named.items() if isinstance(value, str)}
    return kept


def estimate(pictures: int, machines: dict[str, str], seconds: float | None) -> str:
    """What is about to happen, in a line."""
    plan = f"{pictures} pictures on {len(machines)} servers"
    if seconds is None:
        return f"{plan}, no time known yet"
    minutes = pictures * seconds / max(1, len(machines)) / 60
    return f"{plan}, about {minutes:.0f} min, at the {seconds:.1f} s that one took before"
