"""A word in the log when a queued graph has a negative that no patched model will ever meet."""

import logging
import sys
from collections.abc import Callable, Container, Iterable
from typing import Any

from .checks import shown

log = logging.getLogger(__name__)

UNMET = (
    "VSF: the negative of node {} (VSF Negative Conditioning) meets no patched model and does nothing. Put VSF Model "
    "Patch between the model loader and the sampler, behind nodes that merge models."
)
_PICTURES = frozenset({"LATENT", "IMAGE", "VIDEO"})
_PLAIN = _PICTURES | {"MASK", "AUDIO", "SIGMAS", "CONDITIONING", "STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}
"""Types of outputs that no model travels in."""


def watch_prompts() -> None:
    """Look at every prompt as it is queued. Only looks: the prompt goes on as it came."""
    module = sys.modules.get("server")  # not imported: without ComfyUI's server there is nothing to watch
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is not None:
        server.add_on_prompt_handler(_on_prompt)


def _on_prompt(json_data: dict) -> dict:
    prompt = json_data.get("prompt")
    for node_id in unmet_negatives(prompt) if isinstance(prompt, dict) else ():
        log.warning(UNMET.format(shown(node_id)))
    return json_data


def unmet_negatives(prompt: dict) -> list[str]:
    """Ids of the VSFNegativeConditioning nodes of an API-format prompt that lead to no node fed by a VSFModelPatch."""
    sources = _edges(prompt)
    consumers: dict[str, set[str]] = {node: set() for node in prompt}
    for node, others in _edges(prompt, _is_kept).items():
        for other in others:
            consumers[other].add(node)
    fed_by_patch = _closure(_of_class(prompt, "VSFModelPatch"), consumers)
    met = _closure(fed_by_patch, sources)
    return [node for node in _of_class(prompt, "VSFNegativeConditioning") if node not in met]


def model_takers(prompt: dict) -> dict[str, set[str]]:
    """By the id of each VSFModelPatch node of an API-format prompt, the nodes at the ends of its model's way that make
    pictures: those that take it, alone or in a guider or a pack's own bundle, and pass it on to none."""
    passed_to: dict[str, set[str]] = {node: set() for node in prompt}
    for node in prompt:
        for source, slot in _sources(prompt, node):
            if _output(prompt, source, slot) not in _PLAIN:
                passed_to[source].add(node)
    patches = _of_class(prompt, "VSFModelPatch")
    ways = {patch: _closure([patch], passed_to) - {patch} for patch in patches}
    return {patch: {node for node in way if _makes_pictures(prompt, node)} for patch, way in ways.items()}


def is_output(prompt: dict, node: str) -> bool:
    """Whether ComfyUI runs a node for its own sake, as it does those that save or show pictures."""
    return node in prompt and bool(getattr(_class_of(prompt, node), "OUTPUT_NODE", False))


def _makes_pictures(prompt: dict, node: str) -> bool:
    kinds = {str(kind) for kind in getattr(_class_of(prompt, node), "RETURN_TYPES", ())}
    return kinds <= _PLAIN and bool(kinds & _PICTURES)


def ancestors(prompt: dict, node: str) -> set[str]:
    """Ids of the nodes of an API-format prompt that lead to ``node``, itself included."""
    return _closure([node], _edges(prompt))


def reads_a_picture(prompt: dict, node: str, name: str) -> str | None:
    """The class of a node on the way of conditionings to the input ``name`` of ``node`` that encodes a picture together
    with its text, as those of edit models do; None where there is none."""
    todo, seen = _sources(prompt, node, {name}), set()
    while todo:
        source, slot = todo.pop()
        if (source, slot) in seen:
            continue
        seen.add((source, slot))
        given = {_output(prompt, *other) for other in _sources(prompt, source)}
        if "CLIP" in given and given & {"IMAGE", "CLIP_VISION_OUTPUT"}:
            return prompt[source]["class_type"]
        todo += [one for one in _sources(prompt, source, _of_output(prompt, source, slot)) if _is_text(prompt, *one)]
    return None


def _of_output(prompt: dict, node: str, slot: int) -> set[str] | None:
    """The inputs that an output of a node with several conditionings is made of: those of its name; None: any."""
    known = _class_of(prompt, node)
    kinds, names = getattr(known, "RETURN_TYPES", ()), getattr(known, "RETURN_NAMES", None) or ()
    several = sum(kind == "CONDITIONING" for kind in kinds) > 1
    return {str(names[slot])} if several and slot < len(names) else None


def _is_text(prompt: dict, node: str, slot: int) -> bool:
    return _output(prompt, node, slot) in ("CONDITIONING", "*")


def _sources(prompt: dict, node: str, names: Container[str] | None = None) -> list[tuple[str, int]]:
    """(id, output) of what is linked to the inputs of a node, or to those of ``names``."""
    return [(source, slot) for name, source, slot in _links(prompt, node) if names is None or name in names]


def _links(prompt: dict, node: str) -> list[tuple[str, str, Any]]:
    """(input, id, output) of all that is linked to a node."""
    spec = prompt.get(node)
    inputs = spec.get("inputs") if isinstance(spec, dict) else None
    links = inputs.items() if isinstance(inputs, dict) else ()
    return [(name, str(v[0]), v[1]) for name, v in links if isinstance(v, list) and len(v) == 2 and str(v[0]) in prompt]


def _output(prompt: dict, node: str, slot: int) -> str | None:
    """The type of a node's output."""
    kinds = getattr(_class_of(prompt, node), "RETURN_TYPES", ())
    kind = kinds[slot] if isinstance(slot, int) and slot < len(kinds) else None
    return kind if isinstance(kind, str) else None


def _class_of(prompt: dict, node: str) -> type | None:
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(prompt[node].get("class_type"))


def _of_class(prompt: dict, kind: str) -> list[str]:
    return [node for node, spec in prompt.items() if isinstance(spec, dict) and spec.get("class_type") == kind]


def _is_kept(kind: object, name: str) -> bool:
    """Whether a node of class ``kind`` passes on the patches of a model at its input ``name``: ComfyUI's merging nodes
    take the weights alone of all but the first."""
    return not (str(kind).startswith("ModelMerge") and name == "model2")


def _edges(prompt: dict, follow: Callable[[object, str], bool] = lambda kind, name: True) -> dict[str, set[str]]:
    """The nodes that each node takes something from, by the inputs that ``follow`` takes of its class."""
    edges = {}
    for node, spec in prompt.items():
        kind = spec.get("class_type") if isinstance(spec, dict) else None
        edges[node] = {source for name, source, _ in _links(prompt, node) if follow(kind, name)}
    return edges


def _closure(starts: Iterable[str], edges: dict[str, set[str]]) -> set[str]:
    """``starts`` and all that can be reached from them."""
    seen, todo = set(), list(starts)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(edges[node])
    return seen
