"""The four places where VSF touches ComfyUI. Nothing is monkeypatched; all state lives in copies made for one call.

1. ``Negative``s travel in the CONDITIONING (``negative.py``).
2. ``CALC_COND_BATCH``: in a step inside the window, every entry's ``model_conds`` gains the negative's tokens.
3. ``APPLY_MODEL``: they leave the conds, join the text stream, and wrap each block's entry in ``patches_replace``.
4. ``optimized_attention_override``, installed inside a block only: the attention call that is joint becomes VSF
   (``in_block.py``).

``OUTER_SAMPLE`` around it all refuses what cannot work before the first step, and reports.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor

from ..vsf_core import LAYERS, Guidance, layer_of
from .blocks import all_blocks, parse_blocks
from .compiled import is_compiled, told_apart, unwrapped
from .families import Family, Released
from .forward import Forward, Run, make_forward
from .host_attention import OVERRIDE, Backend, choose_backend
from .host_check import changed_host
from .in_block import patched_options
from .negative import (
    KEY,
    PREFIX,
    Negative,
    count_tokens,
    lengthened,
    negatives_of,
    picture_of,
    step_conds,
    unmistakable,
)
from .run_check import check_guided, check_negatives
from .text_modules import text_kept_apart

log = logging.getLogger(__name__)

WRAPPER_KEY = "vsf"
RUN_KEY = "vsf_run"
RECORD_KEY = "vsf_record"
"""In ``transformer_options``, while VSF Record is in the graph: the ``Recorder`` of this run."""
SCALES_KEY = "vsf_scales"
"""In ``transformer_options``, while VSF Scale Sweep is in the graph: a scale for each picture of the batch."""
COMPILED_MULTIPLE = 16
"""Under torch.compile N is padded to a multiple of this, so that another negative seldom means another graph."""
LAYOUTS = ("paper", "released")
METHODS = ("vsf", "nag", "nasa")


@dataclass(frozen=True)
class Settings:
    """What ``VSFModelPatch`` was set to. scale: alpha; offset: beta; start, end: the window in percent (0..1).

    method: by name; guide: None is VSF, anything else takes phi for alpha and no beta.
    """

    scale: float
    offset: float
    start: float
    end: float
    blocks: str
    layout: str
    affect_references: bool
    method: str = "vsf"
    guide: Guidance | None = None

    @property
    def scale_name(self) -> str:
        """Which input ``scale`` was."""
        return "scale" if self.method == "vsf" else f"{self.method}_scale"

    def push(self, scale: float) -> float:
        """Alpha, or the phi that people set as NAG's scale: 1 + phi."""
        return scale - 1 if self.method == "nag" else scale


class VSFPatch:
    """The wrappers that ``VSFModelPatch`` adds to a model."""

    def __init__(self, settings: Settings, family: Family) -> None:
        self.settings = settings
        self.family = family

    def install(self, patcher: Any) -> None:
        """Add the wrappers to a cloned ``ModelPatcher``. Raises ``ValueError`` if it is patched already, or if this
        family has no such layout."""
        if self.settings.layout == "released" and self.family.released is None:
            raise ValueError(
                f"VSF: layout released does what the authors' own pipeline does, and they have none for "
                f"{self.family.title}. Set layout to paper."
            )
        if self.settings.layout == "released" and self.settings.guide is not None:
            raise ValueError(
                f"VSF: layout released works only with method vsf, and method is {self.settings.method}. Set layout "
                "to paper, or method to vsf."
            )
        kinds = comfy.patcher_extension.WrappersMP
        if patcher.get_wrappers(kinds.CALC_COND_BATCH, WRAPPER_KEY):
            raise ValueError(
                "VSF: this model is patched by VSF Model Patch already. Remove one of the two nodes; to push several "
                "things away, chain VSF Negative Conditioning nodes instead."
            )
        patcher.add_wrapper_with_key(kinds.OUTER_SAMPLE, WRAPPER_KEY, self.outer_sample)
        patcher.add_wrapper_with_key(kinds.CALC_COND_BATCH, WRAPPER_KEY, self.calc_cond_batch)
        patcher.add_wrapper_with_key(kinds.APPLY_MODEL, WRAPPER_KEY, self.apply_model)

    # -- before and after a run ---------------------------------------------------------------------------------------

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        try:
            entries = [(branch, entry) for branch, entries in guider.conds.items() for entry in entries]
            options = guider.model_options["transformer_options"]  # this run's own copy
            noise = kwargs["noise"] if "noise" in kwargs else args[0]
            sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        except (AttributeError, KeyError, IndexError) as error:
            raise changed_host(f"the sampler hands its runs over without {error}") from error
        latent = picture_of(noise, kwargs.get("latent_shapes"))
        longest = max((count_tokens(negatives_of(entry)) for _, entry in entries), default=0)
        if longest == 0:
            log.warning(
                "VSF: this model is patched, but no conditioning carries a negative: the picture is stock ComfyUI's. "
                "Put VSF Negative Conditioning (with some text) between the prompt and the sampler's positive input."
            )
            return executor(*args, **kwargs)
        if all(branch == "negative" for branch, entry in entries if negatives_of(entry)):
            log.warning(
                "VSF: the negative is attached to the sampler's negative input only. At cfg 1 that input is not used "
                "at all. Attach VSF Negative Conditioning to the positive."
            )
        diffusion_model = unwrapped(guider.model_patcher.model.diffusion_model)
        patcher = guider.model_patcher  # which has not put its object patches in place yet
        dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
        check_negatives(self.family, self._mixes_pooled(), [e for _, e in entries], diffusion_model, latent, dtype)
        if self.settings.guide is not None:
            check_guided(self.settings.method, [e for _, e in entries])
        counts = self.family.block_counts(diffusion_model)
        scales = options.get(SCALES_KEY, (self.settings.scale,))
        if SCALES_KEY in options and len(scales) != latent.shape[0]:
            raise ValueError(
                f"VSF: VSF Scale Sweep has {len(scales)} scales, but {latent.shape[0]} pictures are sampled. Connect "
                "its latent output to the sampler."
            )
        run = Run(
            blocks=tuple(sorted(all_blocks(counts))),
            selected=parse_blocks(self.settings.blocks, counts),
            tokens=longest,
            scales=scales,
            latent_frames=latent.shape[2] if latent.ndim == 5 else None,
        )
        for _, entry in entries:
            entry["model_conds"] = {**entry["model_conds"], KEY: _Carried(negatives_of(entry))}
        options[RUN_KEY] = run
        try:
            result = executor(*args, **kwargs)
        finally:
            options.pop(RUN_KEY, None)
        if run.steps == 0 and len(sigmas) > 1:
            raise _unwrapped_step()
        if not run.reported and run.missed is not None:
            raise run.missed
        if not run.reported:
            s = self.settings
            log.warning(
                f"VSF: no step of this run fell inside start_percent {s.start:g} to end_percent {s.end:g} with a "
                "negative active: the picture is stock ComfyUI's."
            )
        elif not torch.isfinite(result).all():
            name, used = self.settings.scale_name, ", ".join(f"{scale:g}" for scale in scales)
            raise RuntimeError(
                f"VSF: the sampled latent has values that are NaN or infinite, at {name} {used} in {dtype}. If it is "
                "so without VSF Model Patch too, the model or its settings are the reason; otherwise lower "
                f"{name} and strength, or load the model in bf16 or fp32."
            )
        return result

    @property
    def _released(self) -> Released | None:
        return self.family.released if self.settings.layout == "released" else None

    def _mixes_pooled(self) -> bool:
        return self._released is not None and self._released.pooled is not None

    # -- one step -----------------------------------------------------------------------------------------------------

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> Any:
        run: Run | None = model_options.get("transformer_options", {}).get(RUN_KEY)
        if run is None:
            if any(negatives_of(entry) for branch in conds if branch for entry in branch):
                raise changed_host("this run began past the wrappers of OUTER_SAMPLE, or lost its transformer_options")
            return executor(model, conds, x_in, timestep, model_options)
        run.steps += 1
        in_window = self._in_window(model, timestep)
        added = self._additions(run, model, conds, x_in, timestep, model_options) if in_window else {}
        conds = [branch and [_with_model_conds(entry, added) for entry in branch] for branch in conds]
        result = executor(model, conds, x_in, timestep, model_options)
        if added and not run.applied:
            self._missed(run, changed_host("this run called the model past the wrappers of APPLY_MODEL"))
        return result

    def _missed(self, run: Run, error: RuntimeError) -> None:
        """A negative got nowhere: an error at once in a run's first step; later a cache (TeaCache) may have skipped the
        step, so only if the whole run ends like this."""
        if run.steps == 1:
            raise error
        run.missed = error

    def _in_window(self, model: Any, timestep: Tensor) -> bool:
        """The bounds are computed here since a later ModelSampling node may change them; 0 and 1 are no bounds."""
        start, end, sampling = self.settings.start, self.settings.end, model.model_sampling
        sigma = float(timestep[0])
        return not (
            (start > 0 and sigma > sampling.percent_to_sigma(start))
            or (end < 1 and sigma < sampling.percent_to_sigma(end))
        )

    def _additions(
        self, run: Run, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> dict[int, dict]:
        """What each entry (by id) that runs in this step gains in ``model_conds``; nothing if none has a negative."""
        entries = [entry for branch in conds if branch for entry in branch if _is_active(entry, timestep)]
        groups: list[tuple[Negative, ...]] = [entry["model_conds"].get(KEY, ()) for entry in entries]
        if not any(groups):
            return {}
        shapes = entries[0]["model_conds"].get("latent_shapes")
        x_in = picture_of(x_in, shapes and shapes.cond)
        window = _context_window(run, x_in, model_options)
        key = (tuple(map(id, groups)), x_in.shape, x_in.device, window)
        if key not in run.cache:  # groups are kept with the result, so that their ids stay theirs
            offset, pooled = self.settings.offset, self._mixes_pooled()
            ready = [tuple(self.family.embedded(n, model, x_in.device) for n in group) for group in groups]
            run.tokens = max(map(count_tokens, ready))
            pushes = [self.settings.push(scale) for scale in run.scales]
            run.cache[key] = groups, step_conds(ready, pushes, offset, x_in, pooled, window)
        return {
            id(entry): {**added, **_length_of(entry)} for entry, added in zip(entries, run.cache[key][1], strict=True)
        }

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict = {},  # noqa: B006 (ComfyUI's own signature; never written to)
        **kwargs: Any,
    ) -> Tensor:
        ours = {key.removeprefix(PREFIX): kwargs.pop(key) for key in list(kwargs) if key.startswith(PREFIX)}
        if not ours:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        run: Run | None = transformer_options.get(RUN_KEY)
        if run is None or c_crossattn is None:
            lost = "the text (c_crossattn)" if c_crossattn is None else "this run's transformer_options"
            raise changed_host(f"the model was called without {lost}")
        run.applied = True
        latent = picture_of(x, kwargs.get("latent_shapes"))
        diffusion_model = unwrapped(executor.class_obj.diffusion_model)
        compiled = is_compiled(executor.class_obj.diffusion_model, transformer_options)
        if compiled and not self.family.compiles:
            raise RuntimeError(
                f"VSF: torch.compile breaks {self.family.title} into pieces, and graphs of these made with and without "
                "VSF cannot be told apart. Remove the node that compiles the model."
            )
        if compiled:
            ours = lengthened(ours, -ours["tokens"].shape[1] % COMPILED_MULTIPLE)
        if self.family.cross or self.family.marker is None:
            taken = self.family.other_keys(latent, kwargs, diffusion_model)
            ours = unmistakable(ours, c_crossattn.shape[1], taken, self.family.text_multiple(diffusion_model))
        dtype = executor.class_obj.get_dtype_inference()  # ComfyUI's own next step is this cast; here it halves a copy
        tokens = ours["tokens"].to(c_crossattn.device, dtype)
        backend = self._backend(run, transformer_options, x.device, executor.class_obj)
        # N0 goes before P: text has no order here, and what is left of the sequence is then one contiguous view.
        copy = [tokens] if self._released is not None and self._released.copy else []
        context = torch.cat([tokens, c_crossattn.to(dtype), *copy], dim=1)
        references = self.family.reference_tokens(kwargs, diffusion_model)
        padding = self.family.image_padding(latent, diffusion_model)
        text = context.shape[1] + -context.shape[1] % self.family.text_multiple(diffusion_model)
        recorded = RECORD_KEY in transformer_options
        if recorded and self.settings.guide is not None:
            raise ValueError(
                "VSF: VSF Record shows how much of the attention falls on the negative (1 - W), and method "
                f"{self.settings.method} has no such part. Remove VSF Record, or set method to vsf on VSF Model Patch."
            )
        forward = make_forward(
            self.family,
            run,
            ours,
            latent,
            (*references, padding),
            text=text,
            width=self.family.attention_width(diffusion_model),
            backend=backend,
            released=self._released,
            guide=self.settings.guide,
            affect_references=self.settings.affect_references,
            recorded=recorded,
        )
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = _grown_mask(kwargs["attention_mask"], tokens.shape[1], c_crossattn.shape[1])
        # where the text has no pooled embedding, no negative came with it either
        if self._released is not None and self._released.pooled is not None and "pooled" in ours and "y" in kwargs:
            kwargs["y"] = _mixed_pooled(kwargs["y"], ours["pooled"][:, 0], self._released.pooled)
        options = patched_options(transformer_options, forward)
        if compiled:
            marked, kwargs = told_apart(PREFIX + forward.signature(), len(run.blocks), control, kwargs)
            control = control if self.family.cross else marked  # cross-attention models all pass the name on
        with text_kept_apart(forward, diffusion_model, compiled):
            result = executor(x, t, c_concat, context, control, options, **kwargs)
        self._check_reached(run, forward, compiled)
        if forward.shares is not None:
            self._hand_over(forward, forward.shares, latent, references[0], transformer_options)
        return result

    def _backend(self, run: Run, options: dict, device: torch.device, model: Any) -> Backend:
        """Chosen once a run for each override that it meets, on each device."""
        key = options.get(OVERRIDE), device
        if key not in run.backends:
            head_dim = self.family.head_dim(unwrapped(model.diffusion_model))
            chosen = choose_backend(options, device, model.get_dtype_inference(), head_dim)
            warned = any(backend.deaf is not None for backend in run.backends.values())
            run.backends[key] = chosen
            if chosen.deaf is not None and not warned:  # some nodes make an override for every call
                log.warning(
                    f"VSF: the attention in use ({chosen.deaf}) ignores masks and returns no log-sum-exp, so VSF "
                    "would not be exact on it. Where the image attends to text, PyTorch's runs instead."
                )
        return run.backends[key]

    def _hand_over(self, forward: Forward, shares: Tensor, latent: Tensor, before: int, options: dict) -> None:
        """After a forward pass: the image's own shares, without those of reference tokens, to VSF Record."""
        run, counts = forward.run, torch.zeros(len(LAYERS))
        for position, block in enumerate(run.blocks):
            reached, noted = forward.reached[1:, position].tolist()
            if forward.acts_in(block):
                counts[layer_of(position, len(run.blocks))] += noted
                if noted < reached:
                    raise RuntimeError(
                        f"VSF: VSF Record saw nothing of {block[0]} block {block[1]}: torch.compile took a graph of "
                        "this block alone that it made without VSF Record. Compile the whole model instead, or remove "
                        "VSF Record."
                    )
        window = _context_window(run, latent, {"transformer_options": options})
        shares = shares[:, :, before : before + self.family.grid(latent)]
        options[RECORD_KEY].add(shares, counts, latent.shape, window and window[1], options)

    def _check_reached(self, run: Run, forward: Forward, compiled: bool) -> None:
        """After a forward pass: fail if the negative reached nothing, and say once a run what is going on.

        A compiled model that runs no block used a graph from a run without VSF.
        """
        ran, reached, _ = forward.reached
        if self.family.marker is None:  # nothing tells of a block but its attention: all ran, or none
            ran = torch.ones_like(ran) * reached.any()
        if not ran.any():
            error = RuntimeError(
                "VSF: no block of this model ran through ComfyUI's block patches, so the negative had no effect. "
                "Another node probably replaces the model's forward pass, or torch.compile reused a graph compiled "
                "without VSF; remove that node, or put it on a model without VSF."
            )
            if compiled:
                raise error
            return self._missed(run, error)
        if missed := [block for block, a, b in zip(run.blocks, ran, reached, strict=True) if a > b]:
            raise RuntimeError(
                f"VSF: {missed[0][0]} block {missed[0][1]} ran without the attention call over text that VSF expects "
                "there, so the negative had no effect. This ComfyUI, or another node, computes this block's attention "
                "in a way that this version of ComfyUI-VSF does not know; or torch.compile took a graph of this block "
                "alone that it made without VSF: compile the whole model instead. Otherwise please report it."
            )
        if not run.reported:
            run.reported = True
            s = self.settings
            log.info(
                f"VSF: {self.family.title}: {run.tokens} negative tokens, scale "
                f"{', '.join(f'{scale:g}' for scale in run.scales)}, offset {s.offset:g}, "
                f"layout {s.layout}, {len(run.selected)} of {len(run.blocks)} blocks, "
                f"reached {int(reached.count_nonzero())}, method {s.guide or s.method}, attention: "
                f"{', '.join(sorted(run.paths)) or 'compiled'}"
            )


class _Carried(tuple[Negative, ...]):
    """Negatives on their way through ``model_conds``, of which ``calc_cond_batch`` takes them out again."""

    def process_cond(self, **_: Any) -> None:
        """What ComfyUI asks of whatever it finds there."""
        raise _unwrapped_step()


def _unwrapped_step() -> RuntimeError:
    return changed_host("this run took its steps past the wrappers of CALC_COND_BATCH")


def _length_of(entry: dict) -> dict:
    """The length of an entry's own text as a constant: ComfyUI repeats shorter texts of UNets to let them share a batch
    with longer ones, which changes nothing in their attention alone, but counts P's keys several times beside N's."""
    text = entry["model_conds"].get("c_crossattn")
    return {} if text is None else {PREFIX + "length": comfy.conds.CONDConstant(text.cond.shape[1])}


def _with_model_conds(entry: dict, added: Mapping[int, dict]) -> dict:
    """A copy of a conds entry with its additions and without our key, which the model must not see."""
    model_conds = {key: value for key, value in entry["model_conds"].items() if key != KEY}
    return {**entry, "model_conds": {**model_conds, **added.get(id(entry), {})}}


def _context_window(run: Run, x_in: Tensor, model_options: dict) -> tuple[int, tuple[int, ...]] | None:
    """(frames of the whole latent, the frames that ``x_in`` shows) where ComfyUI samples in context windows."""
    if run.latent_frames is None or x_in.shape[2] == run.latent_frames:
        return None
    window = model_options["transformer_options"].get("context_window")
    frames = torch.arange(run.latent_frames).view(1, 1, -1, 1, 1)
    shown = [] if window is None else window.get_tensor(frames, dim=2).flatten().tolist()  # its anchor frame included
    if len(shown) != x_in.shape[2]:
        raise RuntimeError(
            f"VSF: this run shows {x_in.shape[2]} of {run.latent_frames} latent frames at a time without saying which. "
            "VSF works with ComfyUI's own context windows; please report which node made these."
        )
    return run.latent_frames, tuple(shown)


def _is_active(entry: dict, timestep: Tensor) -> bool:
    """Whether ComfyUI will use this entry at this timestep (ConditioningSetTimestepRange)."""
    sigma = timestep[0]
    return not (
        ("timestep_start" in entry and sigma > entry["timestep_start"])
        or ("timestep_end" in entry and sigma < entry["timestep_end"])
    )


def _grown_mask(mask: Tensor, negative: int, text: int) -> Tensor:
    """The user's attention mask over [P, I], made one over [N, P, I]; N's part is left to VSF.

    [..., 1 or L, L], or [B, P] over a ``text`` of P tokens alone: there, numbers of 0 and 1 are as good as bools.
    """
    over_text = mask.ndim == 2 and mask.shape[-1] == text
    if over_text and not mask.is_floating_point():
        return F.pad(mask, (negative, 0), value=1)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    rows = negative if mask.shape[-2] > 1 and not over_text else 0
    return F.pad(mask, (negative, 0, rows, 0))


def _mixed_pooled(positive: Tensor, negative: Tensor, weight: float) -> Tensor:
    """The released pipeline's pooled embedding, neg + w (pos - neg); the positive's where the negative's is NaN."""
    negative = negative.to(positive)
    return torch.where(torch.isnan(negative), positive, negative + weight * (positive - negative))
