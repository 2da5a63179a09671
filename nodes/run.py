"""One sampling run of a patched model: from before its first step to its end, never longer."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from ..vsf_core import Method
from .blocks import Block, all_blocks, parse_blocks
from .checks import no_effect
from .compiled import is_compiled, unwrapped
from .families import Family, Released, check_network
from .forward_context import ForwardContext
from .host_attention import OVERRIDE, Backend, choose_backend
from .host_check import changed_host
from .known_overrides import log_preferred
from .latent_map import LatentMap, View, first_latent
from .methods import MethodChoice
from .negative import KEY, Negative, count_tokens, negatives_of
from .negative_batch import PREFIX, NegativeBatch
from .reach import Reach
from .recordings import has_graphs, without_graphs
from .run_check import check_negatives, check_pooled, warn_of_idle
from .text_stream import Known
from .tiles import check_tiles

log = logging.getLogger(__name__)

SCALES_KEY = "vsf_scales"
"""In ``transformer_options``, while VSF Scale Sweep is in the graph: a scale for each picture of the batch."""
MOST_KEPT = 16
"""Of how many predictions the negatives, and the tokens that the model keeps, are ready on the device: context windows
come again every step."""


@dataclass(frozen=True)
class Settings:
    """What ``VSFModelPatch`` was set to. scale: that of ``method``; offset: beta; start, end: the window in percent
    (0..1); arithmetic: what ``method`` makes of its inputs."""

    scale: float
    offset: float
    start: float
    end: float
    blocks: str
    layout: str
    affect_references: bool
    method: MethodChoice = field(default_factory=MethodChoice)
    arithmetic: Method = field(default_factory=Method)

    def released_by(self, family: Family) -> Released | None:
        """How the authors' pipeline differs, if that is what was asked for."""
        return family.released if self.layout == "released" else None

    def mixes_pooled(self, family: Family) -> bool:
        released = self.released_by(family)
        return released is not None and released.pooled is not None


@dataclass(eq=False)
class Run:
    """Who gets the negative in each step of a run, what their attention runs on, and whether it acted."""

    settings: Settings
    family: Family
    blocks: tuple[Block, ...]
    selected: frozenset[Block]
    scales: tuple[float, ...]
    latent_map: LatentMap
    dtype: torch.dtype
    tokens: int
    """Of the longest of the negatives."""
    head_dim: int
    """Channels of one attention head; read before the run, in which other nodes may put blocks of theirs in place."""
    reach: Reach
    known: Known = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)
    ready: OrderedDict[tuple, tuple[list, list[NegativeBatch]]] = field(default_factory=OrderedDict)
    embeddings: dict[tuple, tuple[Negative, Negative]] = field(default_factory=dict)
    backends: dict[tuple[Callable | None, torch.device], Backend] = field(default_factory=dict)
    methods: dict[torch.device, Method] = field(default_factory=dict)
    extremes: dict[torch.device, Tensor] = field(default_factory=dict)
    kept: dict[tuple, Tensor | None] = field(default_factory=dict)
    window: tuple[float, float] | None = None
    """The noise levels at which the settings' window begins and ends."""
    compiled: bool | None = None
    """Whether the model came compiled, or a part of it; None before the first pass."""
    steps: int = 0
    """How often ComfyUI asked for a prediction."""
    expected: bool = False
    """Whether some entry of the prediction at work has a negative."""
    applied: bool = False
    """Whether a negative ever reached the model."""
    missed: RuntimeError | None = None
    """Why a negative did not reach the blocks, in a step that a cache may have skipped."""
    reported: bool = False
    declined: bool = False
    """Whether CUDA graphs of ComfyUI's were there to be replayed."""

    # -- before the first step ----------------------------------------------------------------------------------------

    @classmethod
    def begin(
        cls,
        settings: Settings,
        family: Family,
        patcher: Any,
        entries: list[tuple[str, dict]],
        latent: Tensor,
        options: Mapping[str, Any],
    ) -> "Run | None":
        """The run that is about to sample ``latent`` with the conds ``entries``, (branch, entry) each, which from then
        on know whose negatives are whose; None where there are none. Raises ``ValueError`` for what cannot work.

        patcher: the model, which has not put its object patches in place yet; options: its ``transformer_options``."""
        if not _are_used(entries):
            return None
        check_network(patcher)
        diffusion_model = unwrapped(patcher.model.diffusion_model)
        others = [family.other_frames(entry, latent) for _, entry in entries]
        latent_map = LatentMap(latent.shape, *map(max, zip(*others, strict=True)))
        dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
        own = [entry for _, entry in entries]
        check_tiles(own, latent_map)
        taken = cache(settings.method.taken)
        groups = [tuple(map(taken, negatives_of(entry))) for entry in own]
        check_negatives(family, [n for group in groups for n in group], diffusion_model, latent_map, dtype)
        if settings.mixes_pooled(family):  # last: a negative of another encoder has a wrong one too
            check_pooled(groups, [entry.get("pooled_output") for entry in own], dtype)
        settings.method.check(groups)
        counts = family.block_counts(diffusion_model)
        blocks, selected = tuple(sorted(all_blocks(counts))), parse_blocks(settings.blocks, counts)
        run = cls(
            settings,
            family,
            blocks=blocks,
            selected=selected,
            scales=_scales(options, settings.scale, latent_map.batch),
            latent_map=latent_map,
            dtype=dtype,
            tokens=max(map(count_tokens, groups)),
            head_dim=family.head_dim(diffusion_model),
            reach=Reach(family, blocks, selected, diffusion_model),
        )
        warn_of_idle(settings, run.scales, [n for group in groups for n in group], latent_map)
        for entry, group in zip(own, groups, strict=True):
            entry["model_conds"] = {**entry["model_conds"], KEY: _Carried(group)}
        return run

    # -- a step -------------------------------------------------------------------------------------------------------

    def with_negatives(self, conds: list, model: Any, x: Tensor, timestep: Tensor, model_options: dict) -> list:
        """The conds of a prediction of ``x``, those that run with what the model gets of the negatives in its
        ``model_conds``; none inside the window, or none at all, and ComfyUI's own code runs."""
        self.steps += 1
        level = cache(lambda: timestep[0].cpu())  # who asks waits for the device: once a step, if at all
        added = self._added(conds, model, x, level, model_options) if self._in_window(model, level) else {}
        self.expected = bool(added)
        return [branch and [_with_model_conds(entry, added) for entry in branch] for branch in conds]

    def check_applied(self) -> None:
        """After a prediction: the negative must have reached the model."""
        if self.expected and not self.applied:
            self.miss(changed_host("this run called the model past the wrappers of APPLY_MODEL"))

    def miss(self, error: RuntimeError) -> None:
        """A negative got nowhere: an error at once in a run's first step; later a cache (TeaCache) may have skipped the
        step, so only if the whole run ends like this."""
        if self.steps == 1:
            raise error
        self.missed = error

    def _in_window(self, model: Any, level: Callable[[], Tensor]) -> bool:
        """Whether the noise ``level`` of a step is inside; 0 and 1 are no bounds.

        The bounds are not computed before the first step: a later ModelSampling node may change them. A level that is
        none of the schedule's, as samplers have that look twice a step, can only be read: once a step, as ComfyUI does
        for ConditioningSetTimestepRange."""
        start, end, sampling = self.settings.start, self.settings.end, model.model_sampling
        if start <= 0 and end >= 1:
            return True
        if self.window is None:
            self.window = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
        sigma, (first, last) = float(level()), self.window
        return not ((start > 0 and sigma > first) or (end < 1 and sigma < last))

    def _added(
        self, conds: list, model: Any, x: Tensor, level: Callable[[], Tensor], model_options: dict
    ) -> dict[int, dict[str, Any]]:
        """What each entry (by id) that runs in this step gains in ``model_conds``; nothing if none has a negative."""
        entries = [entry for branch in conds if branch for entry in branch if _is_active(entry, level)]
        groups: list[tuple[Negative, ...]] = [entry["model_conds"].get(KEY, ()) for entry in entries]
        if not any(groups):
            return {}
        shapes = entries[0]["model_conds"].get("latent_shapes")
        x = first_latent(x, shapes and shapes.cond)
        view = self.latent_map.view(x, model_options)
        key = tuple(map(id, groups)), view, x.device
        if key not in self.ready:  # groups are kept with the result, so that their ids stay theirs
            self.ready[key] = groups, self._batches(groups, model, x, view)
        self.ready.move_to_end(key)
        while len(self.ready) > MOST_KEPT:
            self.ready.popitem(last=False)
        batches = self.ready[key][1]
        return {
            id(entry): {**batch.to_conds(), **_length_of(entry)} for entry, batch in zip(entries, batches, strict=True)
        }

    def _batches(self, groups: list, model: Any, x: Tensor, view: View) -> list[NegativeBatch]:
        embedded = [tuple(self._embedded(n, model, x.device) for n in group) for group in groups]
        self.tokens = max(map(count_tokens, embedded))
        return NegativeBatch.collate(
            embedded,
            [self.settings.method.alpha(scale) for scale in self.scales],
            self.settings.offset,
            self.latent_map,
            view,
            x,
            pooled=self.settings.mixes_pooled(self.family),
            affect_references=self.settings.affect_references,
        )

    def _embedded(self, negative: Negative, model: Any, device: torch.device) -> Negative:
        """``negative`` as the model's own text, made once a run and device."""
        key = id(negative), device
        if key not in self.embeddings:
            self.embeddings[key] = negative, self.family.embedded(negative, model, device)
        return self.embeddings[key][1]

    # -- a forward pass -----------------------------------------------------------------------------------------------

    def has_compiled_parts(self, model: Any) -> bool:
        """Whether ``model`` came compiled, or a part of it; looked at once a run."""
        if self.compiled is None:
            self.compiled = is_compiled(model.diffusion_model)
        return self.compiled

    def method(self, device: torch.device) -> Method:
        """The method with its numbers on ``device``, where they are put once a run."""
        if device not in self.methods:
            self.methods[device] = self.settings.arithmetic.on(device)
        return self.methods[device]

    def largest(self, device: torch.device) -> Tensor:
        """The largest value that an attention over text gave on ``device``, in fp16; read after the run."""
        if device not in self.extremes:
            self.extremes[device] = torch.zeros((), device=device)
        return self.extremes[device]

    def kept_tokens(
        self, latent: Tensor, conds: Mapping[str, Any], view: View, options: Mapping[str, Any]
    ) -> Tensor | None:
        """``Family.kept_tokens``: they are the same in all steps, for the same entries and view."""
        key = view, tuple(options.get("uuids", ())), latent.device
        if key not in self.kept:
            if len(self.kept) == MOST_KEPT:
                self.kept.clear()
            self.kept[key] = self.family.kept_tokens(latent, conds)
        return self.kept[key]

    def backend(self, options: Mapping[str, Any], device: torch.device, *, model: Any, keys: int) -> Backend:
        """Chosen once a run for each override that it meets, on each device. ``keys``: the most that an attention over
        text has."""
        key = options.get(OVERRIDE), device
        if key not in self.backends:
            chosen = choose_backend(options, device, model.get_dtype_inference(), self.head_dim, keys)
            joint = not self.family.cross_attention
            if not self.backends and key[0] is None:
                log_preferred(model.diffusion_model)
            said = {backend.warning(joint) for backend in self.backends.values()}
            self.backends[key] = chosen
            if chosen.warning(joint) not in {None, *said}:  # some nodes make an override for every call
                log.warning(chosen.warning(joint))
        return self.backends[key]

    def graphs_declined(self, diffusion_model: Any) -> AbstractContextManager:
        """While open, ComfyUI replays no CUDA graphs of this model's blocks; said once a run."""
        if not has_graphs(diffusion_model):
            return nullcontext()
        if not self.declined:
            self.declined = True
            log.warning(
                "VSF: ComfyUI would replay CUDA graphs of this model's blocks, in which the negative would not change "
                "with the step. Steps with a negative run without them, and may be slower."
            )
        return without_graphs(diffusion_model)

    def verify(self, forward: ForwardContext, compiled: bool) -> None:
        """After a forward pass: fail if the negative reached nothing, and say once a run what is going on.

        A compiled model that runs no block used a graph from a run without VSF, as before PyTorch compared the
        ambient state (``compiled.py``).
        """
        ran, reached, _ = forward.reached
        if self.family.block_hook is None:  # nothing tells of a block but its attention: all ran, or none
            ran = torch.full_like(ran, max(1, forward.text.begun)) * reached.any()
        if not ran.any():
            error = RuntimeError(
                "VSF: no block of this model ran through ComfyUI's block patches, so the negative had no effect. "
                "Another node probably replaces the model's forward pass, or torch.compile reused a graph compiled "
                "without VSF; remove that node, or put it on a model without VSF."
            )
            if compiled:
                raise error
            return self.miss(error)
        if missed := [block for block, a, b in zip(self.blocks, ran, reached, strict=True) if a > b]:
            raise RuntimeError(
                f"VSF: {missed[0][0]} block {missed[0][1]} ran without the attention call over text that VSF expects "
                "there, so the negative had no effect. This ComfyUI, or another node, computes this block's attention "
                "in a way that this version of ComfyUI-VSF does not know; or something spreads the picture over "
                "several GPUs (sequence parallelism, as Raylight's): turn that off; or torch.compile took a graph that "
                "it made without VSF, as an old PyTorch may: remove the node that compiles. Otherwise please report it."
            )
        self.reach.note(ran, reached, forward.attention_mass is not None, forward.text.leading)
        if not self.reported:
            self._report(forward, int(reached.count_nonzero()))

    def _report(self, forward: ForwardContext, reached: int) -> None:
        """Once a run: what is going on."""
        if forward.text.moved.any():
            raise RuntimeError(
                "VSF: a patch of another node moves the tokens of the text, and torch.compile hides where to. Remove "
                "that node, or the one that compiles the model."
            )
        self.reported, s = True, self.settings
        log.info(
            f"VSF: {self.family.title}: {self.tokens} negative tokens, scale "
            f"{', '.join(f'{scale:g}' for scale in self.scales)}, offset {s.offset:g}, "
            f"layout {s.layout}, {len(self.selected)} of {len(self.blocks)} blocks, "
            f"reached {reached}, method {s.method.name}{_numbers(s.arithmetic)}, attention: "
            f"{', '.join(sorted(self.paths)) or 'compiled'}"
        )

    # -- after the last step ------------------------------------------------------------------------------------------

    def finish(self, result: Tensor, sigmas: Tensor) -> None:
        """Fail if the negative never reached the model, or made the ``result`` NaN; warn if its window had no step."""
        if self.steps == 0 and len(sigmas) > 1:
            raise _unwrapped_step()
        s = self.settings
        if not self.reported:
            if self.missed is not None:
                raise self.missed
            no_effect(
                f"VSF: no step of this run fell inside start_percent {s.start:g} to end_percent {s.end:g} with a "
                "negative active: the picture is stock ComfyUI's."
            )
        elif not all(bool(torch.isfinite(values).all()) for values in (result, *self.extremes.values())):
            name, used = s.method.scale_input, ", ".join(f"{scale:g}" for scale in self.scales)
            raise RuntimeError(
                "VSF: the sampled latent, or an attention on the way to it, has values that are NaN or infinite, at "
                f"{name} {used} in {self.dtype}. If the picture is broken without VSF Model Patch too, the model or "
                f"its settings are the reason; otherwise lower {name} and strength, or load the model in bf16 or fp32."
            )
        else:
            self.reach.finish()


class _Carried(tuple[Negative, ...]):
    """Negatives on their way through ``model_conds``, of which ``with_negatives`` takes them out again."""

    def process_cond(self, **_: Any) -> None:
        """What ComfyUI asks of whatever it finds there."""
        raise _unwrapped_step()


def _unwrapped_step() -> RuntimeError:
    return changed_host("this run took its steps past the wrappers of CALC_COND_BATCH")


def _are_used(entries: list[tuple[str, dict]]) -> bool:
    """Whether any of the conds' (branch, entry) has a negative; a warning where that is none, or has no effect."""
    branches = [branch for branch, entry in entries if count_tokens(negatives_of(entry))]
    if not branches:
        no_effect(
            "VSF: this model is patched, but no conditioning carries a negative: the picture is stock ComfyUI's. "
            "Put VSF Negative Conditioning (with some text) between the prompt and the sampler's positive input."
        )
    elif set(branches) == {"negative"}:
        no_effect(
            "VSF: the negative is attached to the sampler's negative input only. At cfg 1 that input is not used "
            "at all. Attach VSF Negative Conditioning to the positive."
        )
    return bool(branches)


def _scales(options: Mapping[str, Any], scale: float, batch: int) -> tuple[float, ...]:
    """One scale for all of a ``batch`` of pictures, or VSF Scale Sweep's, one for each."""
    scales = options.get(SCALES_KEY, (scale,))
    if SCALES_KEY in options and len(scales) != batch:
        raise ValueError(
            f"VSF: VSF Scale Sweep has {len(scales)} scales, but {batch} pictures are sampled. Connect "
            "its latent output to the sampler."
        )
    return scales


def _numbers(method: Method) -> str:
    """A method's own numbers, for the log."""
    numbers = [f"{name} {value:g}" for name, value in vars(method).items()]
    return f" ({', '.join(numbers)})" if numbers else ""


def _length_of(entry: dict) -> dict:
    """The length of an entry's own text as a constant: ComfyUI repeats shorter texts of UNets to let them share a batch
    with longer ones, which changes nothing in their attention alone, but counts P's keys several times beside N's."""
    text = entry["model_conds"].get("c_crossattn")
    return {} if text is None else {PREFIX + "length": comfy.conds.CONDConstant(text.cond.shape[1])}


def _with_model_conds(entry: dict, added: Mapping[int, dict]) -> dict:
    """A copy of a conds entry with its additions and without our key, which the model must not see."""
    model_conds = {key: value for key, value in entry["model_conds"].items() if key != KEY}
    return {**entry, "model_conds": {**model_conds, **added.get(id(entry), {})}}


def _is_active(entry: dict, level: Callable[[], Tensor]) -> bool:
    """Whether ComfyUI will use this entry at this noise ``level`` (ConditioningSetTimestepRange)."""
    return not (
        ("timestep_start" in entry and level() > entry["timestep_start"])
        or ("timestep_end" in entry and level() < entry["timestep_end"])
    )
