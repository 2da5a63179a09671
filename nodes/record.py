"""The node "VSF Record": keeps which parts of the picture attended to the negative, for VSF Attention Map."""

from typing import Any

import comfy.patcher_extension
from comfy_api.latest import io
from comfy_execution.utils import ExecutionContext, get_executing_context
from torch import Tensor

from ..vsf_core import AttentionRecord
from .checks import limited
from .families import Family, family_of
from .latent_map import LatentMap, View, first_latent
from .negative import negatives_of
from .sealed import Sealed
from .wrappers import RECORD_KEY

MapType = io.Custom("VSF_MAP")
WRAPPER_KEY = "vsf_record"


class Holder:
    """What travels as VSF_MAP: the records of the latest queue of the model it was made for, and whose runs these were.

    It belongs to the graph: ComfyUI caches it with VSF Record, and VSF Attention Map finds it again in a later queue in
    which the sampler did not run. A node that works through a list (RebatchLatents) has a run, and a record, for each
    of its items. For the bound of one in memory see ``AttentionRecord``.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.records = {0: AttentionRecord()}
        """By the place in the list that a node works through; the first is of the first run."""
        self.by: ExecutionContext | None = None
        """What sampled first in the latest queue; None outside a server."""
        self.queues = 0
        """How many queues recorded anything here, ever."""
        self.is_mixed = False
        """Whether more than one run of this queue was recorded for the same item, or by another node."""
        self.picture: str | None = None
        """What made the picture of this run, once a VSF Attention Map has shown it."""

    def belongs_to(self, picture: str | None) -> bool:
        """Whether the latest run is that of ``picture`` (all nodes that lead to it, as text).

        ComfyUI's cache may bring back an older picture without sampling it again, when a later run has recorded over
        its map. The run is the picture's if it is of this very prompt, or if it was shown with the picture before, or
        if there was no other run.
        """
        shown_before = picture is not None and picture == self.picture
        ours = _prompt_of(get_executing_context()) == _prompt_of(self.by) or shown_before or self.queues == 1
        if ours:
            self.picture = picture
        return ours

    @property
    def record(self) -> AttentionRecord:
        """That of the first run of the latest queue."""
        return next(iter(self.records.values()))

    def begin(self) -> AttentionRecord:
        """The record of a run that begins."""
        now = get_executing_context()
        item = (now.list_index if now else None) or 0
        if now is not None and self.by is not None and now.prompt_id == self.by.prompt_id:
            self.is_mixed = self.is_mixed or item in self.records or now.node_id != self.by.node_id
        else:
            self.records, self.by, self.is_mixed, self.picture = {item: self.record}, now, False, None
            self.queues += 1
        return self.records.setdefault(item, AttentionRecord())

    def record_here(self) -> AttentionRecord | None:
        """The record of the run that made the list item at which ComfyUI is at work; None if there is none."""
        now = get_executing_context()
        found = self.records.get((now.list_index if now else None) or 0) if len(self.records) > 1 else self.record
        return found if found and found.runs else None

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
        guider, latent = executor.class_obj, first_latent(noise, kwargs.get("latent_shapes"))
        entries = [e for branch, entries in guider.conds.items() if branch != "negative" for e in entries]
        others = [self.family.other_frames(entry, latent) for entry in entries] or [(0, 0)]
        frames = LatentMap(latent.shape, *map(max, zip(*others, strict=True))).frames
        record, wanted = self.begin(), frozenset(e["uuid"] for e in entries if negatives_of(e))
        shape = latent.shape[0], frames, latent.shape[-2], latent.shape[-1]
        record.begin(shape, len(sigmas) - 1, self.family.patch_size)
        options = guider.model_options["transformer_options"]  # this run's own copy
        options[RECORD_KEY] = Sealed(Recorder(record, wanted, sigmas))
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(RECORD_KEY, None)
            record.finish()


def _prompt_of(context: ExecutionContext | None) -> str | None:
    return context and context.prompt_id


class Recorder:
    """One sampling run: from the patched model's forward passes into its record, without waiting for the device."""

    def __init__(self, record: AttentionRecord, entries: frozenset, sigmas: Tensor) -> None:
        self.record, self.entries, self.sigmas = record, entries, {sigmas.device: sigmas}

    def add(
        self, mass: Tensor, counts: list[float], latent: Tensor, view: View, latent_map: LatentMap, options: dict
    ) -> None:
        """A forward pass on ``latent``, a ``view`` of the run's: ``mass`` [layer groups, B, tokens], summed over
        ``counts`` [layer groups] blocks.

        B are the chunks that ComfyUI batched, of which those of the positive's entries with a negative are kept.
        """
        if latent.shape[-2:] != (len(view.rows), len(view.columns)) or view.size != self.record.shape[2:]:
            raise RuntimeError(
                f"VSF: VSF Record works on whole pictures, but this step samples a part ({latent.shape[-1]} x "
                f"{latent.shape[-2]} of {self.record.shape[3]} x {self.record.shape[2]} latent pixels): for a "
                "conditioning with an area (use ConditioningSetMask instead), or by a node that samples in tiles or in "
                "several sizes. Remove VSF Record there."
            )
        if mass.device not in self.sigmas:
            self.sigmas[mass.device] = next(iter(self.sigmas.values())).to(mass.device)
        sigma = options["sigmas"][0].to(mass.device)
        # samplers with several evaluations a step look between two noise levels of the schedule
        step = (self.sigmas[mass.device] >= sigma * (1 - 1e-5)).sum() - 1
        step = step.clamp(0, self.record.steps - 1)
        places, frames = latent_map.own(view)
        grid = (len(view.frames), *(-(-len(side) // self.record.patch) for side in (view.rows, view.columns)))
        own = _at(mass.unflatten(2, grid), places)
        at = view.pictures, frames, view.rows, view.columns
        for part, uuid in zip(own.chunk(len(options["uuids"]), dim=1), options["uuids"], strict=True):
            if uuid in self.entries:
                try:
                    self.record.add(step, part, counts, at)
                except ValueError as error:
                    raise RuntimeError(f"VSF: VSF Record cannot place a step: {error}. Remove VSF Record.") from error


def _at(mass: Tensor, frames: list[int]) -> Tensor:
    """Those ``frames`` of ``mass`` [layer groups, B, frames, ...]: a view if they follow one another, as they do but
    where a patch shows others; a list of indices would have to go to the device first."""
    whole = range(frames[0], frames[0] + len(frames)) if frames else range(0)
    return mass[:, :, whole.start : whole.stop] if list(whole) == frames else mass[:, :, frames]


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
    @limited
    def execute(cls, model: io.Model.Type) -> io.NodeOutput:
        family = family_of(model)
        if len(family.grid_factors) > 1:
            raise ValueError(
                f"VSF: VSF Record cannot serve {family.title}: the picture's grid differs from block to block of a "
                "UNet, so there is no one map. Remove VSF Record; VSF Model Patch works without it."
            )
        kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
        if model.get_wrappers(kind, WRAPPER_KEY):
            raise ValueError("VSF: this model has a VSF Record already. Remove one of the two nodes.")
        holder, recorded = Holder(family), model.clone()
        recorded.add_wrapper_with_key(kind, WRAPPER_KEY, holder.outer_sample)
        return io.NodeOutput(recorded, holder)
