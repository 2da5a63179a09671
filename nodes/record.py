"""The node "VSF Record": keeps which parts of the picture attended to the negative, for VSF Attention Map."""

import sys
from collections.abc import Sequence
from typing import Any

import comfy.patcher_extension
import torch
from comfy_api.latest import io
from torch import Tensor

from ..vsf_core import AttentionRecord
from .families import family_of
from .negative import negatives_of, picture_of
from .seams import RECORD_KEY

MapType = io.Custom("VSF_MAP")
WRAPPER_KEY = "vsf_record"


class Holder:
    """What travels as VSF_MAP: the record of the latest run of the model it was made for, and whose run that was.

    It belongs to the graph: ComfyUI caches it with VSF Record, and VSF Attention Map finds it again in a later queue in
    which the sampler did not run. For its bound in memory see ``AttentionRecord``.
    """

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size
        self.record = AttentionRecord()
        self.prompt: str | None = None
        """Id of the queued prompt that the run was part of; None outside a server."""
        self.picture: str | None = None
        """What made the picture of this run, once a VSF Attention Map has shown it."""

    def belongs_to(self, picture: str | None) -> bool:
        """Whether the latest run is that of ``picture`` (all nodes that lead to it, as text).

        ComfyUI's cache may bring back an older picture without sampling it again, when a later run has recorded over
        its map. The run is the picture's if it is of this very prompt, or if it was shown with the picture before, or
        if there was no other run.
        """
        shown_before = picture is not None and picture == self.picture
        ours = self.prompt == current_prompt() or shown_before or self.record.runs == 1
        if ours:
            self.picture = picture
        return ours

    def outer_sample(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The wrapper around a sampling run."""
        guider, picture = executor.class_obj, picture_of(noise, kwargs.get("latent_shapes"))
        frames = picture.shape[2] if picture.ndim == 5 else 1
        shape = (picture.shape[0], frames, picture.shape[-2], picture.shape[-1])
        self.record.begin(shape, len(sigmas) - 1, self.patch_size)
        self.prompt, self.picture = current_prompt(), None
        entries = [e for branch, entries in guider.conds.items() if branch != "negative" for e in entries]
        wanted = frozenset(e["uuid"] for e in entries if negatives_of(e))
        options = guider.model_options["transformer_options"]  # this run's own copy
        options[RECORD_KEY] = Recorder(self.record, wanted, sigmas)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(RECORD_KEY, None)


def current_prompt() -> str | None:
    """The id of the prompt that ComfyUI's server is at work on; None outside a server."""
    module = sys.modules.get("server")
    return getattr(getattr(getattr(module, "PromptServer", None), "instance", None), "last_prompt_id", None)


class Recorder:
    """One sampling run: from the patched model's forward passes into the holder."""

    def __init__(self, record: AttentionRecord, entries: frozenset, sigmas: Tensor) -> None:
        self.record, self.entries, self.sigmas = record, entries, sigmas.cpu()

    def add(
        self, shares: Tensor, counts: Tensor, latent: torch.Size, frames: Sequence[int] | None, options: dict
    ) -> None:
        """A forward pass: ``shares`` [layer groups, B, tokens], summed over ``counts`` [layer groups] blocks.

        B are the chunks that ComfyUI batched, of which those of the positive's entries with a negative are kept.
        """
        if latent[-2:] != self.record.shape[2:]:
            raise RuntimeError(
                f"VSF: VSF Record works on whole pictures, but this step samples a part ({latent[-1]} x {latent[-2]} "
                f"of {self.record.shape[3]} x {self.record.shape[2]} latent pixels), for a conditioning with an area. "
                "Use ConditioningSetMask instead of an area, or remove VSF Record."
            )
        sigma = options["sigmas"][0].item()
        # samplers with several evaluations a step look between two noise levels of the schedule
        step = int((self.sigmas >= sigma * (1 - 1e-5)).sum()) - 1
        step = min(max(step, 0), self.record.steps - 1)
        for part, uuid in zip(shares.cpu().chunk(len(options["uuids"]), dim=1), options["uuids"], strict=True):
            if uuid in self.entries:
                self.record.add(step, part, counts, frames)


class VSFRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSFRecord",
            display_name="VSF Record",
            category="conditioning/VSF",
            description="Keeps which parts of the picture attended to the negative while it was sampled, for VSF "
            "Attention Map. Put it before the sampler, one for each sampler. It changes no picture.",
            search_aliases=["attention map", "heat map", "what did it do", "debug", "VSF"],
            inputs=[
                io.Model.Input("model", tooltip="The model on its way to the sampler, with VSF Model Patch."),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model, whose next sampling is recorded."),
                MapType.Output(display_name="map", tooltip="The record: connect it to VSF Attention Map."),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type) -> io.NodeOutput:
        family = family_of(model.model)
        if len(family.depths) > 1:
            raise ValueError(
                f"VSF: VSF Record cannot serve {family.title}: the picture's grid differs from block to block of a "
                "UNet, so there is no one map. Remove VSF Record; VSF Model Patch works without it."
            )
        kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
        if model.get_wrappers(kind, WRAPPER_KEY):
            raise ValueError("VSF: this model has a VSF Record already. Remove one of the two nodes.")
        holder, recorded = Holder(family.patch_size), model.clone()
        recorded.add_wrapper_with_key(kind, WRAPPER_KEY, holder.outer_sample)
        return io.NodeOutput(recorded, holder)
