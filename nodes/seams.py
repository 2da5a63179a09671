"""The four places where VSF touches ComfyUI. Nothing is monkeypatched; all state lives in copies made for one call.

1. ``Negative``s travel in the CONDITIONING (``negative.py``).
2. ``CALC_COND_BATCH``: in a step inside the window, every entry's ``model_conds`` gains the negative's tokens.
3. ``APPLY_MODEL``: they leave the conds, join the text stream, and wrap each block's entry in ``patches_replace``.
4. ``optimized_attention_override``, installed inside a block only: the attention call that is joint becomes VSF.

``OUTER_SAMPLE`` around it all refuses what cannot work before the first step, and reports.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.conds
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor

from ..vsf_core import (
    LAYERS,
    Guidance,
    LSEAttention,
    TokenLayout,
    cross_attention,
    cross_attention_guided,
    cross_attention_masked,
    joint_attention,
    joint_attention_guided,
    joint_attention_guided_masked,
    joint_attention_masked,
    layer_of,
    unless_all,
)
from .blocks import Block, all_blocks, parse_blocks
from .compiled import is_compiled, told_apart, unwrapped
from .families import Family, Released
from .host_attention import OVERRIDE, Backend, HostAttention, choose_backend
from .host_check import changed_host
from .negative import KEY, PREFIX, Negative, count_tokens, negatives_of, picture_of, step_conds
from .run_check import check_guided, check_negatives

log = logging.getLogger(__name__)

WRAPPER_KEY = "vsf"
RUN_KEY = "vsf_run"
FORWARD_KEY = "vsf_forward"
PLACE_KEY = "vsf_place"
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


@dataclass(eq=False)
class Run:
    """One sampling run: from before its first step to its end, never longer."""

    blocks: tuple[Block, ...]
    selected: frozenset[Block]
    tokens: int
    scales: tuple[float, ...]
    latent_frames: int | None
    paths: set[str] = field(default_factory=set)
    cache: dict = field(default_factory=dict)
    backends: dict[tuple[Callable | None, torch.device], Backend] = field(default_factory=dict)
    steps: int = 0
    """How often ComfyUI asked for a prediction through ``calc_cond_batch``."""
    applied: bool = False
    """Whether a negative reached ``apply_model``."""
    missed: RuntimeError | None = None
    """Why a negative did not reach the blocks, in a step that a cache may have skipped."""
    reported: bool = False


@dataclass(eq=False)
class Forward:
    """What the attention needs to know during one forward pass; travels in ``transformer_options``.

    Under torch.compile the guards on those are dropped (TorchCompileModel), so whatever may change between runs and is
    not in ``signature`` is a tensor here, read from the options of the call at hand and never from a closure.
    """

    family: Family
    run: Run
    tokens: int
    alpha: Tensor
    bias: Tensor
    nowhere: Tensor
    """Like ``bias``, but +inf: that of blocks which are not selected."""
    padding: Tensor | None
    released: Released | None
    """Set where the layout is that of the authors' released pipeline."""
    guide: Guidance | None
    """NAG or NASA; None is VSF."""
    hidden: Tensor | None
    """bool [B, N]: which tokens of N, where the released layout shows it as ordinary text, are padding."""
    backend: Backend
    text: int
    """Length of the whole text stream, N included."""
    width: int | None
    """Channels of the picture's attention over text; None where nothing else attends to it."""
    rows: Mapping[int, slice]
    """The rows of ``bias`` for each number of image tokens that blocks attend from; empty where there is but one."""
    reached: Tensor
    """int [3, blocks]: how often each block ran, how often its attention over text did, and how often that was noted in
    ``shares``. On the CPU: read without waiting for a device."""
    shares: Tensor | None
    """[layer groups, B, image tokens]: 1 - W, summed over blocks; None without VSF Record."""
    calls: int = 0
    """Attentions over text so far that no block patch enclosed."""

    def place(self, block: Block, seen: Tensor, note: tuple[Tensor, Tensor] | None = None) -> "Place":
        """What the attention inside a block gets to know of where it is; ``seen`` counts its calls."""
        selected = block in self.run.selected
        return Place(block[0], selected, self.bias if selected else self.nowhere, seen, note)

    def place_outside(self, options: Mapping[str, Any]) -> "Place":
        """The same for an attention over text that no block patch encloses. Beside those that are (VACE's blocks), it
        does not count."""
        block = self.family.block_of(options, self.calls)
        if block not in self.run.blocks:
            raise changed_host(f"an attention over text runs in {block[0]} block {block[1]}, which this model lacks")
        self.calls += 1
        if self.family.marker == "dit":
            return self.place(block, torch.zeros_like(self.reached[1, 0]))
        position = self.run.blocks.index(block)
        return self.place(block, self.reached[1, position], self.note(position))

    def bias_for(self, place: "Place", tokens: int) -> Tensor:
        """``place.bias`` for a call with so many image tokens."""
        if place.bias.shape[1] == 1:
            return place.bias
        rows = self.rows or {place.bias.shape[1]: slice(None)}
        if tokens in rows:
            return place.bias[:, rows[tokens]]
        known = ", ".join(map(str, rows))
        raise RuntimeError(
            f"VSF: a block of this model attends from {tokens} image tokens, where masks of negatives know {known}: "
            "another node changes the size of the picture inside the model, or leaves out or adds some of its tokens. "
            "Remove that node, or the mask."
        )

    def note(self, position: int) -> tuple[Tensor, Tensor] | None:
        """Where the block at ``position`` adds its share, and counts that it did."""
        if self.shares is None:
            return None
        return self.shares[layer_of(position, len(self.run.blocks))], self.reached[2, position]

    def acts_in(self, block: Block) -> bool:
        """Whether the image sees N1 in this block."""
        return block in self.run.selected and (self.released is None or block[0] in self.released.kinds)

    @property
    def phi(self) -> Tensor:
        """What ``guide`` takes for alpha, [B or 1, 1, 1]: all tokens of a negative have the first one's."""
        return self.alpha[:, :1]

    def real_tokens(self) -> Tensor:
        """int [B or 1]: how many of N's tokens are no padding."""
        if self.padding is None:
            return torch.full((1,), self.tokens, device=self.bias.device)
        return (~self.padding).sum(dim=1)

    def signature(self) -> str:
        """All that a graph compiled for this pass takes for granted and torch.compile does not guard: no values."""
        shapes = (self.tokens, *self.alpha.shape, *self.bias.shape)
        kinds = (self.padding is None, self.hidden is None, self.released is None, self.shares is None)
        blocks = "".join(str(int(block in self.run.selected)) for block in self.run.blocks)
        b = self.backend
        attention = (b.library, b.attend and b.attend.__name__, b.deaf is None)
        return "_".join(map(str, (*shapes, *map(int, kinds), *attention, blocks, type(self.guide).__name__)))


@dataclass(frozen=True, eq=False)
class Place:
    """One block of a forward pass. bias: the pass's, or +inf where the block is not selected; seen: counts its calls.

    Blocks that torch.compile takes one by one share a graph: there, only the tensors differ from block to block.
    """

    kind: str
    selected: bool
    bias: Tensor
    seen: Tensor
    note: tuple[Tensor, Tensor] | None = None
    """``Forward.note`` of this block."""

    def share(self, tokens: int) -> Tensor | None:
        """Where this block's 1 - W goes, [B, image tokens], counting that it does; None without VSF Record."""
        if self.note is None:
            return None
        if tokens != self.note[0].shape[1]:
            raise RuntimeError(
                f"VSF: VSF Record expects {self.note[0].shape[1]} image tokens (the picture's and its references'), "
                f"but this model attends from {tokens}: another node adds some. Remove that node or VSF Record."
            )
        self.note[1].add_(1)
        return self.note[0]

    def enter(self, run: Run, path: str) -> bool:
        """Note that the attention over text is running, and how; whether N must be attended to."""
        self.seen.add_(1)
        if torch.compiler.is_compiling():
            return True
        run.paths.add(path if self.selected else "not selected")
        return self.selected


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
            ours = _lengthened(ours, -ours["tokens"].shape[1] % COMPILED_MULTIPLE)
        if self.family.cross or self.family.marker is None:
            taken = self.family.other_keys(latent, kwargs, diffusion_model)
            ours = _unmistakable(ours, c_crossattn.shape[1], taken, self.family.text_multiple(diffusion_model))
        dtype = executor.class_obj.get_dtype_inference()  # ComfyUI's own next step is this cast; here it halves a copy
        tokens = ours["tokens"].to(c_crossattn.device, dtype)
        backend = self._backend(run, transformer_options, x.device, executor.class_obj)
        # N0 goes before P: text has no order here, and what is left of the sequence is then one contiguous view.
        copy = [tokens] if self._released is not None and self._released.copy else []
        context = torch.cat([tokens, c_crossattn.to(dtype), *copy], dim=1)
        references = self.family.reference_tokens(kwargs, diffusion_model)
        padding = self.family.image_padding(latent, diffusion_model)
        text = context.shape[1] + -context.shape[1] % self.family.text_multiple(diffusion_model)
        width = self.family.attention_width(diffusion_model)
        others, recorded = (*references, padding), RECORD_KEY in transformer_options
        if recorded and self.settings.guide is not None:
            raise ValueError(
                "VSF: VSF Record shows how much of the attention falls on the negative (1 - W), and method "
                f"{self.settings.method} has no such part. Remove VSF Record, or set method to vsf on VSF Model Patch."
            )
        forward = self._forward(run, ours, text, latent, others, backend, width, recorded)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = _grown_mask(kwargs["attention_mask"], tokens.shape[1], c_crossattn.shape[1])
        # where the text has no pooled embedding, no negative came with it either
        if self._released is not None and self._released.pooled is not None and "pooled" in ours and "y" in kwargs:
            kwargs["y"] = _mixed_pooled(kwargs["y"], ours["pooled"][:, 0], self._released.pooled)
        options = self._patched_options(transformer_options, forward)
        if compiled:
            marked, kwargs = told_apart(PREFIX + forward.signature(), len(run.blocks), control, kwargs)
            control = control if self.family.cross else marked  # cross-attention models all pass the name on
        with self._positions(forward, diffusion_model, compiled), self._refined(diffusion_model):
            result = executor(x, t, c_concat, context, control, options, **kwargs)
        self._check_reached(run, forward, compiled)
        if forward.shares is not None:
            self._hand_over(forward, forward.shares, latent, references[0], transformer_options)
        return result

    @contextmanager
    def _positions(self, forward: Forward, diffusion_model: Any, compiled: bool) -> Iterator[None]:
        """While open, N shifts no rotary position. ComfyUI has no hook for those: torch's own is on the module that
        makes them, for the length of one call."""
        if self.family.rotary is None:
            yield
            return
        seen, counts = [], (forward.tokens, forward.real_tokens(), forward.text)

        def place(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(True)
            return self.family.positions(given[0], *counts, diffusion_model), *given[1:]

        handle = getattr(diffusion_model, self.family.rotary).register_forward_pre_hook(place)
        try:
            yield
        finally:
            handle.remove()
        if not seen and not compiled and forward.reached.any():
            raise changed_host(f"this model made its rotary positions without {self.family.rotary}")

    @contextmanager
    def _refined(self, diffusion_model: Any) -> Iterator[None]:
        """While open, N and P go through the family's ``refiner`` one by one, by torch's own hooks."""
        if self.family.refiner is None:
            yield
            return
        refined = []

        def without_n(module: Any, given: tuple, options: dict) -> tuple[tuple, dict]:
            forward: Forward = options["transformer_options"][FORWARD_KEY]
            text, timesteps, mask = given
            n, text = text[:, : forward.tokens], text[:, forward.tokens :]
            n, hidden = _without_padding(n, forward.padding)
            refined.append(module.forward(n, timesteps, hidden, **options))
            return (text, timesteps, None if mask is None else mask[:, forward.tokens :]), options

        def with_n(_module: Any, _given: tuple, _options: dict, text: Tensor) -> Tensor:
            return torch.cat([refined.pop(), text], dim=1)

        module = getattr(diffusion_model, self.family.refiner)
        handles = [
            module.register_forward_pre_hook(without_n, with_kwargs=True),
            module.register_forward_hook(with_n, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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

    def _forward(
        self,
        run: Run,
        ours: dict,
        text: int,
        latent: Tensor,
        references: tuple[int, int, int],
        backend: Backend,
        width: int | None,
        recorded: bool,
    ) -> Forward:
        bias, length = ours["bias"].float(), ours["tokens"].shape[1]
        is_padding = torch.isinf(bias[:, 0])
        image_bias = self._image_bias(bias, ours.get("mask"), latent, references)
        all_selected = len(run.selected) == len(run.blocks)
        shape = len(LAYERS), latent.shape[0], self.family.grid(latent) + sum(references)
        return Forward(
            family=self.family,
            run=run,
            tokens=length,
            alpha=ours["alpha"].float(),
            bias=image_bias,
            nowhere=image_bias if all_selected else torch.full_like(image_bias, torch.inf),
            padding=is_padding if is_padding.shape[1] > 1 else None,
            released=self._released,
            guide=self.settings.guide and self.settings.guide.on(latent.device),
            hidden=is_padding.expand(-1, length) if self._released is not None and ours["mixed"] else None,
            backend=backend,
            text=text,
            width=width,
            rows=_rows(self.family.grids(latent)),
            reached=torch.zeros(3, len(run.blocks), dtype=torch.int32),
            shares=torch.zeros(shape, device=latent.device) if recorded else None,
        )

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

    def _image_bias(self, bias: Tensor, mask: Tensor | None, latent: Tensor, others: tuple[int, int, int]) -> Tensor:
        """Beta per token [B, 1, n or 1], plus masks and what reference images may see: [B, I or 1, n or 1].

        ``others``: tokens of reference images before and after the image's, and padding behind them.
        """
        shown = (self.settings.affect_references, self.settings.affect_references, False)
        if mask is None and all(see for count, see in zip(others, shown, strict=True) if count):
            return bias
        if mask is None:
            mask = torch.ones(1, 1, *latent.shape[2:], device=latent.device)
        inside = self.family.image_tokens(mask.float())
        size = inside.shape[0], inside.shape[2]
        before, after, padding = (
            inside.new_full((size[0], count, size[1]), float(see)) for count, see in zip(others, shown, strict=True)
        )
        # -log m: a soft mask scales the negative's attention weight by m; outside (m = 0) it is +inf, exactly
        return bias - torch.log(torch.cat([before, inside, after, padding], dim=1))

    def _patched_options(self, options: dict, forward: Forward) -> dict:
        """A copy of ``transformer_options`` in which each block's patch is wrapped, so that we know where we are."""
        options = {**options, FORWARD_KEY: forward}
        if self.family.cross:  # for the whole forward: VACE's blocks run outside the block patches
            options[OVERRIDE] = partial(_cross_override, options.get(OVERRIDE))
        elif self.family.marker is None:
            options.pop("block_index", None)
            options[OVERRIDE] = partial(_unmarked_override, options.get(OVERRIDE))
        if self.family.marker == "attn2":  # the last one, next to the attention itself
            patches = options.get("patches", {})
            options["patches"] = {**patches, "attn2_patch": [*patches.get("attn2_patch", ()), _mark_block]}
        if self.family.marker != "dit":
            return options
        replace = options.get("patches_replace", {})
        dit, result = dict(replace.get("dit", {})), {}
        for position, block in enumerate(forward.run.blocks):
            key = (f"{block[0]}_block", block[1])
            dit[key] = partial(_run_block, block, position, dit.get(key), result)
        return {**options, "patches_replace": {**replace, "dit": dit}}

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


def _rows(grids: list[int]) -> dict[int, slice]:
    """Where in a mask's rows each of several grids has its own; of equal ones (one pixel) either serves."""
    ends = list(itertools.accumulate(grids))
    return {n: slice(end - n, end) for n, end in zip(grids, ends, strict=True)} if len(grids) > 1 else {}


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


def _unmistakable(ours: dict, positive: int, taken: set[int], multiple: int) -> dict:
    """``ours`` with N padded until no other attention of the model has as many keys as the text stream.

    Where a call is known by its number of keys alone, the picture's own tokens (self-attention) and CLIP-vision tokens
    must not count the same. ``taken``: how many keys those have; ``multiple``: to what the model fills its text up.
    """
    n = ours["tokens"].shape[1]
    positive += -positive % multiple  # the model goes on filling up P alone if N before it comes out even
    extra = next(e for e in itertools.count(-n % multiple, multiple) if positive + n + e not in taken)
    return _lengthened(ours, extra) if extra else ours


def _lengthened(ours: dict, extra: int) -> dict:
    """``ours`` with ``extra`` tokens of padding at the end of N, and a bias per token."""
    length = ours["tokens"].shape[1]
    bias = ours["bias"].expand(-1, -1, length)
    ours = {
        **ours,
        "tokens": F.pad(ours["tokens"], (0, 0, 0, extra)),
        "alpha": F.pad(ours["alpha"], (0, 0, 0, extra)),
        "bias": F.pad(bias, (0, extra), value=torch.inf),
        "mixed": True,
    }
    if "mask" in ours:
        mask = ours["mask"].expand(-1, length, *(-1,) * (ours["mask"].ndim - 2))
        ours["mask"] = torch.cat([mask, mask[:, -1:].expand(-1, extra, *(-1,) * (mask.ndim - 2))], dim=1)
    return ours


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


def _run_block(
    block: Block, position: int, previous: Callable | None, result: dict, args: dict, extra: Mapping
) -> dict:
    """An entry of ``patches_replace["dit"]``: the block with VSF's attention, inside whatever was there before.

    ``result`` is returned from every block of a pass: ComfyUI's loop holds what a block returned while the next one
    runs, which in Flux's first single block would be an image more than without patches.
    """

    def original(inner: dict) -> dict:
        try:
            options, stock = inner["transformer_options"], extra["original_block"]
            forward: Forward = options[FORWARD_KEY]
            # where there is no joint sequence, the override is in force already
            inner = forward.family.arguments(block, inner, forward.tokens, forward.text)
            layout = None if forward.family.cross else forward.family.layout(block[0], inner, forward.tokens)
        except KeyError as missing:
            raise changed_host(f"{block[0]} blocks hand their patches no {missing}") from missing
        here: dict[str, Any] = {PLACE_KEY: forward.place(block, forward.reached[1, position], forward.note(position))}
        if layout is not None:
            here[OVERRIDE] = partial(_joint_override, layout, options.get(OVERRIDE))
        forward.reached[0, position].add_(1)
        return stock({**inner, "transformer_options": {**options, **here}})

    result.clear()
    made = original(args) if previous is None else previous(args, {**extra, "original_block": original})
    if torch.compiler.is_compiling():
        return made
    result.update(made)
    return result


def _mark_block(n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """An ``attn2_patch`` that changes nothing: it tells that a block's attention over text is about to run."""
    forward: Forward = options[FORWARD_KEY]
    block = forward.family.block_of(options, forward.calls)
    if block in forward.run.blocks:
        forward.reached[0, forward.run.blocks.index(block)].add_(1)
    return n, context, value


def _cross_override(previous: Callable | None, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's attention call in a cross-attention model: VSF where its keys are the text stream [N, P]."""
    host = HostAttention(previous, func, *args, **kwargs)
    forward: Forward = host.options[FORWARD_KEY]
    if host.keys != forward.text:
        return host.unchanged()
    if host.queries == host.keys or (host.mask is not None and not forward.family.masked):
        raise RuntimeError(
            f"VSF: cannot tell which attention this is ({host.queries} queries, {host.keys} keys, "
            f"{'a' if host.mask is not None else 'no'} mask). Change the negative by a word, and please report which "
            "model this was."
        )
    q, k, v = host.split()
    n = forward.tokens
    positive, negative = (k[:, :, n:], v[:, :, n:]), (k[:, :, :n], v[:, :, :n])
    mask = None if host.mask is None else host.mask[..., n:]
    if forward.width not in (None, host.heads * q.shape[-1]):  # that of sound
        return host.join(host.black_box(q, *positive, mask))
    place: Place | None = host.options.get(PLACE_KEY)
    if place is None:
        place = forward.place_outside(host.options)
    bias = forward.bias_for(place, host.queries)
    shared = (q, *positive, *negative, forward.alpha, bias)
    attend = forward.backend.attention(host) if mask is None else None
    path = _path(forward.backend, host, attend) if forward.guide is None else "two cross-attentions"
    if not place.enter(forward.run, path):
        out = host.black_box(q, *positive, mask)
    elif forward.guide is not None:
        steering = (forward.guide, forward.phi, _presence(bias), forward.backend.masked(host))
        out = cross_attention_guided(q, *positive, *negative, *steering, forward.padding, mask)
    elif attend is not None:
        out = cross_attention(*shared, attend, host.scale, place.share(host.queries))
    else:
        out = cross_attention_masked(*shared, forward.backend.masked(host), place.share(host.queries), mask)
    return host.join(out)


def _unmarked_override(previous: Callable | None, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's attention call in a joint model without block patches: inside its blocks the sequence is [N, P, I];
    before them, where text attends to text, N and P are kept apart."""
    host = HostAttention(previous, func, *args, **kwargs)
    forward: Forward = host.options[FORWARD_KEY]
    if "block_index" not in host.options:
        return _kept_apart(host, forward) if host.keys == forward.text else host.unchanged()
    place = forward.place_outside(host.options)
    layout = TokenLayout(host.keys - forward.text, forward.text - forward.tokens, forward.tokens)
    return _joint(host, layout, place)


def _kept_apart(host: HostAttention, forward: Forward) -> Tensor:
    """Attention of the text [N, P] to itself, as of two texts."""
    (q, k, v), n, padding = host.split(), forward.tokens, forward.padding
    hidden = None
    if padding is not None:  # where all of N is padding it sees itself: nothing sees it
        hidden = unless_all(padding)
        hidden = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -torch.inf)[:, None, None]
    own = forward.backend.masked(host)(q[:, :, :n], k[:, :, :n], v[:, :, :n], hidden)
    rest = host.black_box(q[:, :, n:], k[:, :, n:], v[:, :, n:], host.mask)
    return host.join(torch.cat([own, rest], dim=2))


def _without_padding(n: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """N [B, n, C] with its padding [B or 1, n] filled by the mean of the rest, so that the mean of all is that too; and
    the additive mask [B, n] over the padding, if there is any."""
    if padding is None:
        return n, None
    padding = unless_all(padding)
    real = ~padding[..., None]
    mean = (n.float() * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
    hidden = torch.zeros_like(padding, dtype=n.dtype).masked_fill(padding, torch.finfo(n.dtype).min)
    return torch.where(real, n, mean.to(n)), hidden.expand(n.shape[0], -1)


def _joint_override(
    layout: TokenLayout, previous: Callable | None, func: Callable, *args: Any, **kwargs: Any
) -> Tensor:
    """ComfyUI's attention call inside a joint block: VSF where its keys are the joint sequence."""
    host = HostAttention(previous, func, *args, **kwargs)
    if host.keys != layout.length:
        return host.unchanged()
    return _joint(host, layout, host.options[PLACE_KEY])


def _joint(host: HostAttention, layout: TokenLayout, place: Place) -> Tensor:
    """VSF's attention over a joint sequence."""
    forward: Forward = host.options[FORWARD_KEY]
    q, k, v = host.split()
    mask = _total_mask(host.mask, layout, place.kind, forward, q.dtype)
    attend = forward.backend.attention(host) if mask is None else None
    masked = forward.backend.masked(host)
    ordinary = forward.released is not None and place.kind not in forward.released.kinds
    path = "ordinary text" if ordinary else _path(forward.backend, host, attend)
    bias = place.bias if place.enter(forward.run, path) else None
    shared = (q, k, v, layout, forward.alpha, bias)
    share = place.share(layout.image)
    if ordinary:
        out = masked(q, k, v, mask)
    elif bias is not None and forward.guide is not None:
        guided = (q, k, v, layout, forward.guide, forward.phi, _presence(bias))
        if attend is not None:
            out = joint_attention_guided(*guided, attend, forward.padding, host.scale)
        else:
            out = joint_attention_guided_masked(*guided, masked, forward.padding, mask)
    elif attend is not None:
        out = joint_attention(*shared, attend, forward.padding, host.scale, share)
    else:
        out = joint_attention_masked(*shared, masked, forward.padding, mask, share)
    return host.join(out)


def _presence(bias: Tensor) -> Tensor:
    """[B or 1, I or 1, 1]: how much of NAG's or NASA's steering an image token takes, from a beta that knows of masks,
    of blocks that are not selected and of padding, and is 0 elsewhere."""
    return torch.exp(-bias.amin(dim=-1, keepdim=True))


def _path(backend: Backend, host: HostAttention, attend: LSEAttention | None) -> str:
    """For the log: how VSF's attention is computed."""
    if attend is not None:
        return f"log-sum-exp merge ({attend.__name__})"
    return f"row mask ({host.name if backend.deaf is None else 'PyTorch'})"


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


def _total_mask(
    mask: Tensor | None, layout: TokenLayout, kind: str, forward: Forward, dtype: torch.dtype
) -> Tensor | None:
    """What besides VSF's own rules keeps queries from keys: additive [B or 1, 1, 1 or L, L] or None.

    That is the caller's mask, and the padding of N where the released layout shows it as ordinary text.
    """
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(dtype)
    if forward.hidden is None or forward.released is None:
        return mask
    end = layout.span("N").stop if kind not in forward.released.kinds else layout.span("P").stop
    if end == layout.span("P").stop and not forward.released.copy:
        return mask
    hidden = torch.zeros(forward.hidden.shape[0], 1, 1, layout.length, device=forward.bias.device, dtype=dtype)
    hidden[:, 0, 0, end - forward.tokens : end].masked_fill_(forward.hidden, -torch.inf)
    return hidden if mask is None else mask + hidden


def _mixed_pooled(positive: Tensor, negative: Tensor, weight: float) -> Tensor:
    """The released pipeline's pooled embedding, neg + w (pos - neg); the positive's where the negative's is NaN."""
    negative = negative.to(positive)
    return torch.where(torch.isnan(negative), positive, negative + weight * (positive - negative))
