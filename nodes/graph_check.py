"""A word in the log when a queued graph has a negative that no patched model will ever meet."""

import logging
import sys

from .checks import shown

log = logging.getLogger(__name__)


def watch_prompts() -> None:
    """Look at every prompt as it is queued. Only looks: the prompt goes on as it came."""
    module = sys.modules.get("server")  # not imported: without ComfyUI's server there is nothing to watch
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is not None:
        server.add_on_prompt_handler(_on_prompt)


def _on_prompt(json_data: dict) -> dict:
    prompt = json_data.get("prompt")
    for node_id in unmet_negatives(prompt) if isinstance(prompt, dict) else ():
        log.warning(
            f"VSF: the negative of node {shown(node_id)} (VSF Negative Conditioning) meets no patched model and does "
            "nothing. Put VSF Model Patch between the model loader and the sampler."
        )
    return json_data


def unmet_negatives(prompt: dict) -> list[str]:
    """Ids of the VSFNegativeConditioning nodes of an API-format prompt that lead to no node fed by a VSFModelPatch."""
    sources = {node: _sources(prompt[node]) & prompt.keys() for node in prompt}
    patched = {node for node in prompt if "VSFModelPatch" in {_class(prompt[n]) for n in _closure(node, sources)}}
    consumers = {node: {other for other in prompt if node in sources[other]} for node in prompt}
    negatives = [node for node in prompt if _class(prompt[node]) == "VSFNegativeConditioning"]
    return [node for node in negatives if not _closure(node, consumers) & patched]


def ancestors(prompt: dict, node: str) -> set[str]:
    """Ids of the nodes of an API-format prompt that lead to ``node``, itself included."""
    return _closure(node, {n: _sources(prompt[n]) & prompt.keys() for n in prompt})


def _class(node: object) -> str | None:
    kind = node.get("class_type") if isinstance(node, dict) else None
    return kind if isinstance(kind, str) else None


def _sources(node: object) -> set[str]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    values = inputs.values() if isinstance(inputs, dict) else ()
    return {str(v[0]) for v in values if isinstance(v, list) and len(v) == 2}


def _closure(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(edges[node])
    return seen
