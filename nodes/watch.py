"""What only a prompt at work shows: a patched model that went to a node which made a picture without sampling it."""

import logging
from typing import Any

from comfy_execution.progress import ProgressHandler, add_progress_handler, get_progress_state
from comfy_execution.utils import get_executing_context

from .checks import is_strict, no_effect, shown
from .graph_check import UNMET, ancestors, is_output, model_takers, unmet_negatives

log = logging.getLogger(__name__)

NAME = "vsf"


class Watch(ProgressHandler):
    """Sees every node of one prompt begin and end. ComfyUI lets go of it with the prompt."""

    def __init__(self, dynamic_prompt: Any) -> None:
        super().__init__(NAME)
        self.dynamic_prompt, self.prompt = dynamic_prompt, dynamic_prompt.original_prompt
        self.takers = model_takers(self.prompt)
        """By VSF Model Patch's id, the nodes that make pictures of its model."""
        self.unmet = unmet_negatives(self.prompt) if is_strict() else []
        self.began: set[str] = set()
        self.sampled: set[str] = set()
        """The nodes that sampled a patched model; those of an expansion are the one that expanded."""
        self.said: set[str] = set()

    def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """Before a node runs, where an error is that node's. Raises ``RuntimeError`` with ``VSF_STRICT`` alone."""
        self.began.add(node_id)
        before = ancestors(self.prompt, node_id) - {node_id} if node_id in self.prompt else set()
        for negative in self.unmet:
            if negative in before:
                no_effect(UNMET.format(shown(negative)))
        if is_output(self.prompt, node_id):
            self._look(before)

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """After a node has run: one that samples and saves by itself. It is too late for an error."""
        if is_output(self.prompt, node_id):
            try:
                self._look({node_id})
            except RuntimeError as error:
                log.error(error)

    def _look(self, nodes: set[str]) -> None:
        """Whether one of ``nodes`` made a picture of a patched model without sampling it. Those that did not run came
        from ComfyUI's cache, and were looked at when they ran."""
        for patch, takers in self.takers.items():
            here = takers & nodes
            if patch not in self.said and here and here <= self.began and not here & self.sampled:
                self.said.add(patch)
                taker = min(here)
                no_effect(
                    f"VSF: node {shown(taker)} ({shown(self.prompt[taker]['class_type'])}) took the model of node "
                    f"{shown(patch)} (VSF Model Patch) and made its picture without sampling it as ComfyUI does, so "
                    "the negative had no effect. Use one of ComfyUI's own sampler nodes there."
                )

    def note_sampled(self, node_id: str | None) -> None:
        """``node_id`` samples a patched model; None: nobody knows which node does, so nothing more can be said."""
        if node_id is None:
            self.takers = {}
        else:
            self.sampled.add(self.dynamic_prompt.get_real_node_id(node_id))


def watch_prompt() -> None:
    """Look at the prompt that begins, or is at work, unless that is done already."""
    registry = get_progress_state()
    if NAME not in registry.handlers:
        add_progress_handler(Watch(registry.dynprompt))


def note_sampled() -> None:
    """The node at work samples a patched model."""
    context, watch = get_executing_context(), get_progress_state().handlers.get(NAME)
    if isinstance(watch, Watch):
        watch.note_sampled(context and context.node_id)
