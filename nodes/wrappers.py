"""The places where VSF touches ComfyUI. Nothing is monkeypatched; all state lives in copies made for one call.

1. ``Negative``s travel in the CONDITIONING (``negative.py``).
2. ``CALC_COND_BATCH``: in a step inside the window, every entry's ``model_conds`` gains the negative's tokens.
3. ``APPLY_MODEL``: they leave the conds, join the text stream, and wrap each block's entry in ``patches_replace``.
4. ``optimized_attention_override``, installed inside a block only: the attention call that is joint becomes VSF
   (``attention_override.py``).

``OUTER_SAMPLE`` around it all refuses what cannot work before the first step, and reports. What is done in these places
is the run's (``run.py``); here is what ComfyUI hands over, and how it gets it back.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor

from ..vsf_core import aligned
from .attention_override import blocks_told, patched_options
from .compiled import compiled_pass, unwrapped, will_compile
from .families import Family
from .forward_context import ForwardContext, make_forward_context
from .host_check import OUTER_SAMPLE, by_name, changed_host
from .latent_map import first_latent
from .negative import negatives_of
from .negative_batch import NegativeBatch
from .parts import parts_told
from .run import Run, Settings
from .run_check import check_guider
from .sealed import Sealed, opened
from .text_modules import text_kept_apart
from .text_stream import TextStream
from .tiles import check_tiler
from .watch import note_sampled

WRAPPER_KEY = "vsf"
RUN_KEY = "vsf_run"
RECORD_KEY = "vsf_record"
"""In ``transformer_options``, while VSF Record is in the graph: the ``Recorder`` of this run."""
COMPILED_MULTIPLE = 16
"""Under torch.compile N is padded to a multiple of this, so that another negative seldom means another graph."""
LAYOUTS = ("paper", "released")


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
                f"{self.family.title}. Set layout to paper, in which a scale of about 1 is a gentle start."
            )
        if self.settings.layout == "released" and not self.settings.method.takes_layouts:
            raise ValueError(
                f"VSF: layout released works only with method vsf, and method is {self.settings.method.name}. Set "
                "layout to paper, or method to vsf."
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

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A whole run: (noise, latent_image, sampler, sigmas, ..., latent_shapes) -> the sampled latent."""
        note_sampled()
        guider = executor.class_obj
        try:
            entries = [(branch, entry) for branch, entries in guider.conds.items() for entry in entries]
            options = guider.model_options["transformer_options"]  # this run's own copy
            given = by_name(OUTER_SAMPLE, args, kwargs)
            noise, sigmas = given["noise"], given["sigmas"]
        except (AttributeError, KeyError) as error:
            raise changed_host(f"the sampler hands its runs over without {error}") from error
        latent = first_latent(noise, given.get("latent_shapes"))
        if any(negatives_of(entry) for _, entry in entries):
            check_guider(guider)
            check_tiler(guider.model_options, [entry for _, entry in entries])
        run = Run.begin(self.settings, self.family, guider.model_patcher, entries, latent, options)
        if run is None:
            return executor(*args, **kwargs)
        options[RUN_KEY] = Sealed(run)
        try:
            result = executor(*args, **kwargs)
        finally:
            options.pop(RUN_KEY, None)
        run.finish(result, sigmas)
        return result

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> Any:
        """A prediction: the conds of each branch for ``x_in`` at ``timestep`` -> one tensor a branch. In context
        windows ComfyUI asks once for each."""
        run: Run | None = opened(model_options.get("transformer_options", {}), RUN_KEY)
        if run is None:
            if any(negatives_of(entry) for branch in conds if branch for entry in branch):
                raise changed_host("this run began past the wrappers of OUTER_SAMPLE, or lost its transformer_options")
            return executor(model, conds, x_in, timestep, model_options)
        conds = run.with_negatives(conds, model, x_in, timestep, model_options)
        result = executor(model, conds, x_in, timestep, model_options)
        run.check_applied()
        return result

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
        """A forward pass of the model on the entries that ComfyUI runs as one batch; ``kwargs``: their other conds."""
        batch = NegativeBatch.taken_from(kwargs)
        if batch is None:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        run: Run | None = opened(transformer_options, RUN_KEY)
        if run is None or c_crossattn is None:
            lost = "the text (c_crossattn)" if c_crossattn is None else "this run's transformer_options"
            raise changed_host(f"the model was called without {lost}")
        batch.check_rows(c_crossattn.shape[0])
        run.applied = True
        run.reach.look(unwrapped(executor.class_obj.diffusion_model))
        model, latent = executor.class_obj, first_latent(x, kwargs.get("latent_shapes"))
        compiled = will_compile(transformer_options) or run.has_compiled_parts(model)
        if compiled:
            batch = batch.padded(-batch.length % COMPILED_MULTIPLE)
        context, forward = self._joined(run, batch, model, latent, c_crossattn, transformer_options, kwargs)
        kwargs = self._grown(kwargs, batch, forward, c_crossattn)
        options = patched_options(transformer_options, forward)
        diffusion_model = unwrapped(model.diffusion_model)
        if compiled:
            options = blocks_told(options, forward)
        alone = compiled_pass(forward.kind()) if compiled else nullcontext()
        if not compiled:
            forward.network, forward.whole, alone = diffusion_model, (context,), parts_told(forward, diffusion_model)
        with text_kept_apart(forward, diffusion_model, compiled), run.graphs_declined(diffusion_model), alone:
            result = executor(x, t, c_concat, context, control, options, **kwargs)
        run.verify(forward, compiled)
        if forward.attention_mass is not None:
            seen = forward.recorded(forward.attention_mass, self.family.grid(latent))
            opened(transformer_options, RECORD_KEY).add(*seen, latent, batch.view, run.latent_map, transformer_options)
        return result

    def _joined(
        self, run: Run, batch: NegativeBatch, model: Any, latent: Tensor, positive: Tensor, options: dict, conds: dict
    ) -> tuple[Tensor, ForwardContext]:
        """The text [N, P] that the model gets, and the context of its pass."""
        family, diffusion_model = self.family, unwrapped(model.diffusion_model)
        multiple, kept = family.text_multiple(diffusion_model), run.kept_tokens(latent, conds, batch.view, options)
        taken = family.lengths_to_avoid(latent, conds, diffusion_model, kept)
        batch = batch.padded_to_unique_length(positive.shape[1], taken, multiple) if taken else batch
        # ComfyUI's own next step is this cast; here it halves a copy
        dtype, released = model.get_dtype_inference(), self.settings.released_by(family)
        n = batch.tokens.to(positive.device, dtype).expand(positive.shape[0], -1, -1)
        # N0 goes before P: text has no order here, and what is left of the sequence is then one contiguous view
        text = torch.cat([n, positive.to(dtype), *([n] if released is not None and released.copy else [])], dim=1)
        stream = TextStream(batch.length, text.shape[1] + -text.shape[1] % multiple, run.known, latent.device)
        picture = family.grid(latent) + sum(family.reference_tokens(conds, diffusion_model))
        keys = text.shape[1] + (0 if family.cross_attention else picture)
        backend_on = partial(run.backend, options, model=model, keys=keys)
        recorded = RECORD_KEY in options
        if recorded and not self.settings.arithmetic.records:
            raise ValueError(
                "VSF: VSF Record shows how much of the attention falls on the negative (1 - W), and method "
                f"{self.settings.method.name} has no such part. Remove VSF Record, or set method to vsf on VSF Model "
                "Patch."
            )
        return text, make_forward_context(
            run, batch, latent, conds, diffusion_model, stream, taken, kept, backend_on, recorded
        )

    def _grown(self, conds: dict, batch: NegativeBatch, forward: ForwardContext, positive: Tensor) -> dict:
        """The conds besides the text, as they fit [N, P]: a mask over it, and the released pipeline's pooled text."""
        conds = dict(conds)
        if conds.get("attention_mask") is not None:
            conds["attention_mask"] = _grown_mask(conds["attention_mask"], forward.tokens, positive.shape[1])
        released = forward.released
        # where the text has no pooled embedding, no negative came with it either
        if released is not None and released.pooled is not None and batch.pooled is not None and "y" in conds:
            conds["y"] = _mixed_pooled(conds["y"], batch.pooled[:, 0], released.pooled)
        return conds


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
    return aligned(F.pad(mask, (negative, 0, rows, 0)))


def _mixed_pooled(positive: Tensor, negative: Tensor, weight: float) -> Tensor:
    """The released pipeline's pooled embedding, neg + w (pos - neg); the positive's where the negative's is NaN."""
    negative = negative.to(positive)
    return torch.where(torch.isnan(negative), positive, negative + weight * (positive - negative))
