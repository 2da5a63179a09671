"""Trains a toy model of ComfyUI's own class by flow matching on the picture world, so that ComfyUI's loader takes it.

    VSF_COMFYUI=... python tests/toy/train.py --family sd3 --out sd3.safetensors

It goes on from the checkpoint beside the output (``.ckpt``, every few minutes; ``.main.ckpt``, where the last phase
began) if there is one. In the last ``--anneal`` of the steps the rate falls to nothing; with more ``--steps`` than were
asked for before, it goes on from where that began. What the model makes of each object's name is drawn beside the
output (``.png``) at every checkpoint. On a GPU: ``--device cuda``, in bf16, with ``--compile`` but for Flux;
``--minutes`` ends it in time. ``train_all.py`` trains all of them.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, os.environ["VSF_COMFYUI"])

import captions  # noqa: E402
import tiny  # noqa: E402
import vector_codec  # noqa: E402
import vector_world as world  # noqa: E402


class Family(Protocol):
    """What differs between model families."""

    shift: float
    """The sampler's sigma shift."""
    menu: tuple[tuple[int, float], ...]
    """(latent frames, share of ``--batch``) of the steps in turn; 0 frames: pictures."""

    def build(self, attention: Any) -> torch.nn.Module:
        """ComfyUI's model class, initialised for training."""

    def latents(self, encoded: Tensor) -> Tensor:
        """The codec's latents -> the sampler's, and back."""

    def codecs(self, latents: Tensor) -> Tensor: ...

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """The velocity (noise - data), like x; sigma [n], context [n, length, width], pooled [n, 768]."""


class Still:
    """Latents of pictures are the codec's."""

    shift, menu = 3.0, ((0, 1.0),)

    def latents(self, encoded: Tensor) -> Tensor:
        return encoded

    def codecs(self, latents: Tensor) -> Tensor:
        return latents


class SD3(Still):
    """A three-block MMDiT. Text is 4096 wide there and pooled 2048, but this CLIP fills 768 (``tiny.WIDE``)."""

    depth = 3

    def build(self, attention: Any) -> torch.nn.Module:
        import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

        mmdit.optimized_attention = attention
        model = mmdit.OpenAISignatureMMDITWrapper(
            input_size=None,
            in_channels=vector_codec.CHANNELS,
            depth=self.depth,
            adm_in_channels=captions.POOLED,
            context_embedder_config={
                "target": "torch.nn.Linear",
                "params": {"in_features": captions.POOLED, "out_features": 64 * self.depth},
            },
            qk_norm="rms",
            operations=torch.nn,
            dtype=torch.float32,
        )
        return initialised(model, ones=("ln_q.weight", "ln_k.weight"), zeros=("adaLN_modulation", "final_layer.linear"))

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return model(x, sigma * 1000, context=context, y=pooled)


class Flux(Still):
    """Two double and two single blocks, without guidance, like Schnell; sampled with Dev's shift."""

    def build(self, attention: Any) -> torch.nn.Module:
        import comfy.ldm.flux.math as flux_math

        flux_math.optimized_attention = attention
        model = tiny.flux_model(hidden=256, double=2, single=2, context=captions.WIDTH)
        zeros = ("img_mod.lin", "txt_mod.lin", "modulation.lin", "adaLN_modulation", "final_layer.linear")
        return initialised(model, ones=("query_norm.weight", "key_norm.weight"), zeros=zeros)

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return model(x, sigma, context, pooled)


class Wan:
    """Four blocks of a Wan 2.1 text-to-video model. It learns from single frames and, every third step, from clips."""

    shift, menu = 3.0, ((1, 1.0), (1, 1.0), (4, 0.25))

    def build(self, attention: Any) -> torch.nn.Module:
        import comfy.ldm.wan.model as wan

        wan.optimized_attention = attention
        model = tiny.wan_model("t2v", dim=256, layers=4, context=captions.WIDTH)
        model = initialised(model, ones=("norm_q.weight", "norm_k.weight"), zeros=("time_projection", "head.head"))
        for name, parameter in model.named_parameters():
            if name.endswith("modulation"):
                torch.nn.init.normal_(parameter, std=256**-0.5)
        return model

    def latents(self, encoded: Tensor) -> Tensor:
        return vector_codec.to_wan(encoded)

    def codecs(self, latents: Tensor) -> Tensor:
        return vector_codec.from_wan(latents)

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return model(x, sigma * 1000, context)


FAMILIES: dict[str, type[Family]] = {"sd3": SD3, "flux": Flux, "wan": Wan}


def initialised(model: torch.nn.Module, ones: tuple[str, ...], zeros: tuple[str, ...]) -> torch.nn.Module:
    """ComfyUI leaves some parameters unset; gates and the last layer start at zero, so that blocks start as nothing."""
    for name, parameter in model.named_parameters():
        if name.endswith(ones):
            torch.nn.init.ones_(parameter)
        elif any(part in name for part in zeros):
            torch.nn.init.zeros_(parameter)
    return model


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: None = None, skip_reshape: bool = False, **_: Any
) -> Tensor:
    """On a CPU one whose backward is faster than SDPA's: q, k [n, length, heads * d], v the same or
    [n, length, heads, d]; with ``skip_reshape`` all are [n, heads, length, d]."""
    n = len(q)
    if not skip_reshape:
        q, k, v = (t.reshape(n, t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    if q.is_cuda:
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        z = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1).to(v.dtype) @ v
    return z.transpose(1, 2).reshape(n, z.shape[2], -1)


# -- what is learned from ---------------------------------------------------------------------------------------------


class Pool:
    """Scenes as latents, in memory: each step takes some of them, and some new ones take the place of the oldest."""

    def __init__(self, options: argparse.Namespace, basis: vector_codec.Basis, frames: int, seed: int) -> None:
        self.options, self.basis, self.frames = options, basis, frames
        self.rng = np.random.default_rng(seed)
        self.things = itertools.cycle(world.THINGS)
        self.latents: Tensor | None = None
        self.parts: Tensor
        self.scenes: list[tuple[world.Scenes, int]] = []
        self.next = 0

    def draw(self) -> None:
        """``--fresh`` new scenes of the next object."""
        options = self.options
        scenes = world.sample_scenes(self.rng, next(self.things), options.fresh, options.alone)
        if self.frames:
            drawn = world.draw_clips(scenes, self.frames, options.device)
        else:
            drawn = world.draw(scenes, device=options.device)
        encoded = self.encode(drawn.pictures).half()
        flat = drawn.parts.flatten(0, -4)
        cells = torch.nn.functional.avg_pool2d(flat, vector_codec.PATCH).unflatten(0, drawn.parts.shape[:-3]).half()
        if self.latents is None:
            self.latents, self.parts = (t.new_empty(options.pool, *t.shape[1:]) for t in (encoded, cells))
        rows = torch.arange(self.next, self.next + len(scenes)) % options.pool
        self.latents[rows], self.parts[rows] = encoded, cells
        for i, row in enumerate(rows.tolist()):
            if row < len(self.scenes):
                self.scenes[row] = scenes, i
            else:
                self.scenes.append((scenes, i))
        self.next = (self.next + len(scenes)) % options.pool

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, h, w], or clips [n, 3, t, h, w], -> latents."""
        if pictures.ndim == 4:
            return self.basis.encode(pictures)
        frames = self.basis.encode(pictures.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(pictures), -1)).transpose(1, 2)

    def take(self, count: int) -> tuple[Tensor, Tensor, list[str]]:
        """Latents, how much of each place shows a part [count, 1, ...], and captions."""
        while len(self.scenes) < min(count, self.options.pool):
            self.draw()
        self.draw()
        rows = self.rng.integers(len(self.scenes), size=count)
        texts = [world.caption(self.rng, *self.scenes[row]) for row in rows]
        at = torch.from_numpy(rows)
        assert self.latents is not None
        return self.latents[at].float(), self.parts[at].float(), texts


def examples(
    options: argparse.Namespace, family: Family, basis: vector_codec.Basis, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Endless (latents, weight, context, pooled); a share of the captions is empty, for CFG's sake.

    weight: what an error counts, broadcast over the latents' channels.
    """
    embed = embedding(options.family, options.device)
    pools: dict[int, Pool] = {}
    rng = np.random.default_rng(seed)
    for frames, share in itertools.cycle(family.menu):
        pool = pools.setdefault(frames, Pool(options, basis, frames, seed + frames))
        data, parts, texts = pool.take(max(1, round(options.batch * share)))
        kept = ["" if gone else text for text, gone in zip(texts, rng.random(len(texts)) < options.drop, strict=True)]
        weight = 1 + (options.part_weight - 1) * parts
        yield family.latents(data), weight / weight.mean(), *embed(kept)


@lru_cache(maxsize=1)
def embedding(family: str, device: str) -> captions.Captions:
    """What embeds a family's captions."""
    return captions.Captions(family, device)


def random_sigmas(n: int, shift: float, g: torch.Generator) -> Tensor:
    """Noise levels [n]: logit-normal, then shifted as the sampler's are."""
    t = torch.sigmoid(torch.randn(n, generator=g) * 1.1)
    return shift * t / (1 + (shift - 1) * t)


# -- training ---------------------------------------------------------------------------------------------------------


class Progress:
    """How far a run is, in steps or, with ``--minutes``, in time; and the rate that goes with it."""

    def __init__(self, options: argparse.Namespace, step: int, seconds: float) -> None:
        self.options, self.first, self.step = options, step, step
        self.before, self.began = seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent in all runs."""
        return self.before + time.monotonic() - self.began

    @property
    def done(self) -> float:
        """0 to 1."""
        by_time = self.seconds / (60 * self.options.minutes) if self.options.minutes else 0.0
        return min(1.0, max(self.step / self.options.steps, by_time))

    @property
    def annealing(self) -> bool:
        return self.done >= 1 - self.options.anneal

    @property
    def rate(self) -> float:
        """Warm-up, then even, then down to nothing in the last phase."""
        return self.options.rate * min(1.0, (self.step + 1) / 200, (1 - self.done) / max(self.options.anneal, 1e-6))

    def line(self, loss: float) -> str:
        each = (time.monotonic() - self.began) / (self.step - self.first)
        left = self.seconds / 60 * (1 / max(self.done, 1e-9) - 1)
        return f"step {self.step}/{self.options.steps} loss {loss:.4f} {each:.2f} s/step, {left:.0f} min left"


class Trainer:
    """A model, its average and its optimizer, and their checkpoints."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options, self.family = options, FAMILIES[options.family]()
        self.model = self.family.build(attention).to(options.device).train()
        self.average = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.progress = Progress(options, *self._resume())
        self.forward = torch.compile(self.model, dynamic=False) if options.compile else self.model
        self.g = torch.Generator().manual_seed(options.seed + self.progress.step)

    def _resume(self) -> tuple[int, float]:
        """Step and seconds of the checkpoint gone on from: the last, or the last before a phase that ends too soon."""
        for path in (self.options.out.with_suffix(".ckpt"), self.options.out.with_suffix(".main.ckpt")):
            if not path.exists():
                continue
            saved = torch.load(path, map_location=self.options.device, weights_only=True)
            if saved["annealing"] and saved["steps"] != self.options.steps:
                continue
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average = saved["average"]
            return saved["step"], saved["seconds"]
        return 0, 0.0

    def step(self, data: Tensor, weight: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """One update; gives the loss."""
        device, progress = self.options.device, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = progress.rate
        sigma = random_sigmas(len(data), self.family.shift, self.g).to(device)
        noise = torch.randn(data.shape, generator=self.g).to(device)
        mixed = data + sigma.view(-1, *[1] * (data.ndim - 1)) * (noise - data)
        self.optimizer.zero_grad(set_to_none=True)
        saving = nullcontext if self.options.compile else torch.autograd.graph.allow_mutation_on_saved_tensors
        with saving():  # Flux adds to its residual in place
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=not self.options.float32):
                velocity = self.family.predict(self.forward, mixed, sigma, context, pooled)
            loss = (weight * (velocity.float() - (noise - data)).square()).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        keep = min(0.999, (progress.step + 1) / (progress.step + 10))
        with torch.no_grad():
            state = self.model.state_dict()
            torch._foreach_lerp_([self.average[key] for key in state], list(state.values()), 1 - keep)
        progress.step += 1
        return loss.detach()

    def save(self, *, main: bool = False) -> None:
        """Checkpoint and weights; ``main``: the one to go on from when more steps are asked for."""
        progress, out = self.progress, self.options.out
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        state |= {"step": progress.step, "seconds": progress.seconds, "steps": self.options.steps}
        path = out.with_suffix(".main.ckpt" if main else ".ckpt")
        torch.save({**state, "annealing": progress.annealing and not main}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        weights = {key: value.float().cpu().contiguous() for key, value in self.average.items()}
        part = out.with_suffix(".part.safetensors")
        save_file(tiny.packed(weights), part, metadata=self.made())
        part.replace(out)

    def made(self) -> dict[str, str]:
        """How the weights were made."""
        options, progress = self.options, self.progress
        return {
            "world": "vector",
            "family": options.family,
            "steps": f"{progress.step} of {options.steps}",
            "batch": ", ".join(f"{options.batch * share:g}" for _, share in self.family.menu),
            **{name: f"{getattr(options, name):g}" for name in ("seed", "alone", "part_weight", "rate", "anneal")},
            "precision": "float32" if options.float32 else "bfloat16 autocast",
            "device": torch.device(options.device).type,
            "minutes": f"{progress.seconds / 60:.0f}",
            "torch": torch.__version__,
        }

    @torch.no_grad()
    def preview(self) -> None:
        """Draws what the averaged weights make of each object's name: two seeds, 12 steps, without guidance."""
        from PIL import Image

        basis, decoder = vector_codec.load(self.options.codec)
        own = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        texts = [f"a {thing.name}" for thing in world.THINGS] * 2
        context, pooled = embedding(self.options.family, self.options.device)(texts)
        frames = (1,) * (self.family.menu[0][0] > 0)
        g, side = torch.Generator().manual_seed(7), world.SIZE // vector_codec.PATCH
        x = torch.randn(len(texts), vector_codec.CHANNELS, *frames, side, side, generator=g).to(self.options.device)
        times = torch.linspace(1, 0, 13)
        sigmas = (self.family.shift * times / (1 + (self.family.shift - 1) * times)).tolist()
        for high, low in itertools.pairwise(sigmas):
            velocity = self.family.predict(self.model, x, torch.full((len(x),), high, device=x.device), context, pooled)
            x = x + (low - high) * velocity.float()
        self.model.load_state_dict(own)
        latents = self.family.codecs(x)
        pictures = decoder((latents[:, :, 0] if frames else latents).cpu()).clamp(0, 1)
        rows = torch.cat([torch.cat(list(row), 2) for row in pictures.split(len(texts) // 2)], 1)
        Image.fromarray((rows.movedim(0, 2) * 255).round().byte().numpy()).save(self.options.out.with_suffix(".png"))


def train(options: argparse.Namespace) -> None:
    import comfy.model_management

    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    comfy.model_management.in_training = True  # rotary embeddings with a gradient
    trainer = Trainer(options)
    progress, device = trainer.progress, options.device
    basis = vector_codec.load(options.codec)[0].to(device)
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(f"{options.family}: {size:.2f} M parameters, from step {progress.step}", flush=True)
    source = examples(options, trainer.family, basis, options.seed + progress.step)
    losses, last_save, in_main = [], time.monotonic(), not progress.annealing
    while progress.done < 1:
        losses.append(trainer.step(*next(source)))
        if in_main and progress.annealing:
            in_main = False
            trainer.save(main=True)
        if progress.step % options.report == 0:
            print(progress.line(torch.stack(losses[-200:]).mean().item()), flush=True)
            del losses[:-200]
        if time.monotonic() - last_save > options.save_minutes * 60 or progress.done >= 1:
            last_save = time.monotonic()
            trainer.save()
            trainer.preview()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True, help="what train_codec.py writes")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, help="end after so many, as if the steps were done")
    parser.add_argument("--anneal", type=float, default=0.25, help="how much of it is the last phase")
    parser.add_argument("--alone", type=float, default=world.ALONE, help="share of scenes of parts alone")
    parser.add_argument(
        "--part-weight",
        type=float,
        default=1.5,
        help="what an error counts where a part shows: parts vary in place more than they are large, so that most "
        "places that may be a part's are none's in most pictures, and a toy forgets small parts",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--fresh", type=int, default=8, help="new scenes a step")
    parser.add_argument("--pool", type=int, default=16384, help="scenes in memory")
    parser.add_argument("--drop", type=float, default=0.05, help="share of empty captions")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--float32", action="store_true", help="for a CPU without instructions for bf16")
    parser.add_argument("--compile", action="store_true", help="by torch.compile: a third faster, but not for Flux")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=int, default=20, help="steps between two lines")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    asked = parse()
    from comfy.cli_args import args as comfy_args

    comfy_args.cpu = asked.device == "cpu"
    train(asked)
