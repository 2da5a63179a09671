"""Trains a toy model of ComfyUI's own class by flow matching on the picture world, so that ComfyUI's loader takes it.

    VSF_COMFYUI=... python tests/toy/train.py --family sd3 --out sd3.safetensors --steps 4000 --resume

One core does it in about an hour. The last ``--anneal`` steps show fewer scenes of parts alone, at a small learning
rate: a part alone teaches what its word means, but also that what goes unnamed may be missing. ``--start FILE`` trains
exported weights on; with ``--anneal`` as many as ``--steps`` all of it is the last phase. The checkpoint beside the
output (``.ckpt``) is written every few minutes; ``--resume`` goes on from it. A GPU is used where there is one.
"""

import argparse
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, os.environ["VSF_COMFYUI"])

from comfy.cli_args import args as comfy_args  # noqa: E402

comfy_args.cpu = True

import captions  # noqa: E402
import codec  # noqa: E402
import comfy.model_management  # noqa: E402
import tiny  # noqa: E402
import world  # noqa: E402


class Family(Protocol):
    """What differs between model families."""

    shift: float
    """The sampler's sigma shift."""
    menu: tuple[tuple[int, int], ...]
    """(latent frames, batch size) of the steps in turn; 0 frames: pictures."""

    def build(self) -> torch.nn.Module:
        """ComfyUI's model class, initialised for training."""

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures or clips in 0..1 -> the sampler's latents."""

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """The velocity (noise - data), like x; sigma [n], context [n, length, width], pooled [n, 768]."""


class SD3:
    """A three-block MMDiT. Text is 4096 wide there and pooled 2048, but this CLIP fills 768 (``tiny.WIDE``)."""

    shift, menu = 3.0, ((0, 32),)
    depth = 3

    def build(self) -> torch.nn.Module:
        import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

        mmdit.optimized_attention = plain_attention
        model = mmdit.OpenAISignatureMMDITWrapper(
            input_size=None,
            in_channels=codec.CHANNELS,
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

    def encode(self, pictures: Tensor) -> Tensor:
        return codec.encode(pictures)

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return model(x, sigma * 1000, context=context, y=pooled)


class Flux:
    """Two double and two single blocks, without guidance, like Schnell; sampled with Dev's shift."""

    shift, menu = 3.0, ((0, 24),)

    def build(self) -> torch.nn.Module:
        import comfy.ldm.flux.math as flux_math

        flux_math.optimized_attention = plain_attention
        model = tiny.flux_model(hidden=256, double=2, single=2, context=captions.WIDTH)
        zeros = ("img_mod.lin", "txt_mod.lin", "modulation.lin", "adaLN_modulation", "final_layer.linear")
        return initialised(model, ones=("query_norm.weight", "key_norm.weight"), zeros=zeros)

    def encode(self, pictures: Tensor) -> Tensor:
        return codec.encode(pictures)

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return model(x, sigma, context, pooled)


class Wan:
    """Four blocks of a Wan 2.1 text-to-video model. It learns from single frames and, every third step, from clips."""

    shift, menu = 3.0, ((1, 16), (1, 16), (4, 4))

    def build(self) -> torch.nn.Module:
        import comfy.ldm.wan.model as wan

        wan.optimized_attention = plain_attention
        model = tiny.wan_model("t2v", dim=256, layers=4, context=captions.WIDTH)
        model = initialised(model, ones=("norm_q.weight", "norm_k.weight"), zeros=("time_projection", "head.head"))
        for name, parameter in model.named_parameters():
            if name.endswith("modulation"):
                torch.nn.init.normal_(parameter, std=256**-0.5)
        return model

    def encode(self, pictures: Tensor) -> Tensor:
        return codec.encode_wan(pictures)

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


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: None = None, skip_reshape: bool = False, **_: Any
) -> Tensor:
    """Attention whose backward is faster on a CPU than SDPA's: q, k [n, length, heads * d], v the same or
    [n, length, heads, d]; with ``skip_reshape`` all are [n, heads, length, d]."""
    n = len(q)
    if not skip_reshape:
        q, k, v = (t.reshape(n, t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    z = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1).to(v.dtype) @ v
    return z.transpose(1, 2).reshape(n, z.shape[2], -1)


ANNEAL_RATE = 2e-4
"""Learning rate at the beginning of the last phase."""


def examples(
    name: str, family: Family, seed: int, alone: float, part_weight: float, drop: float = 0.05
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Endless (latents, weight, context, pooled); a share ``drop`` of the captions is empty, for CFG's sake.

    weight: what a pixel's error counts, broadcast over the latents' channels.
    """
    embed = captions.Captions(name)
    g = torch.Generator().manual_seed(seed)
    menu = enumerate(family.menu)
    sources = [world.batches(seed + k, batch, frames=frames, alone=alone) for k, (frames, batch) in menu]
    for source in itertools.cycle(sources):
        pictures, texts, parts = next(source)
        dropped = torch.rand(len(texts), generator=g) < drop
        kept = ["" if gone else words for gone, words in zip(dropped.tolist(), texts, strict=True)]
        weight = 1 + (part_weight - 1) * torch.from_numpy(parts.astype("float32"))
        yield family.encode(torch.from_numpy(pictures.copy())), weight, *embed(kept)


def begin_with(path: Path, model: torch.nn.Module) -> None:
    """Loads exported weights, by the model's own names and without the columns that no text fills here."""
    state, own = tiny.unpacked(load_file(path)), model.state_dict()
    named = {key if key in own else key.replace("_norm.scale", "_norm.weight"): value for key, value in state.items()}
    model.load_state_dict(
        {key: value[:, : own[key].shape[1]] if value.ndim == 2 else value for key, value in named.items()}
    )


def random_sigmas(n: int, shift: float, g: torch.Generator) -> Tensor:
    """Noise levels [n]: logit-normal, then shifted as the sampler's are."""
    t = torch.sigmoid(torch.randn(n, generator=g) * 1.1)
    return shift * t / (1 + (shift - 1) * t)


def rate(step: int, steps: int, anneal: int, top: float, warm: int = 150) -> float:
    """Warm-up, then a cosine down to a hundredth; another one down to nothing over the last ``anneal`` steps.

    With no other steps than these, it goes down from ``top``.
    """
    main = steps - anneal
    if step < min(warm, steps // 10):
        return top * (step + 1) / min(warm, steps // 10)
    if step < main:
        return top * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, main - warm))))
    return (ANNEAL_RATE if main else top) * 0.5 * (1 + math.cos(math.pi * (step - main) / anneal))


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    comfy.model_management.in_training = True  # rotary embeddings with a gradient
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    family = FAMILIES[options.family]()
    model = family.build().to(device).train()
    if options.start:
        begin_with(options.start, model)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, spent, checkpoint = 0, 0.0, options.out.with_suffix(".ckpt")
    if options.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start, spent = saved["average"], saved["step"], saved["seconds"]
    print(f"{options.family}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {start}")
    g = torch.Generator().manual_seed(options.seed + start)
    began = last_save = time.monotonic()
    losses = []
    main = options.steps - options.anneal
    phases = [
        examples(options.family, family, options.seed + start, alone, options.part_weight)
        for alone in (world.ALONE, options.alone)
    ]
    forward = torch.compile(model, dynamic=False) if options.compile else model
    saving = nullcontext if options.compile else torch.autograd.graph.allow_mutation_on_saved_tensors
    for step in range(start, options.steps):
        annealing = step >= main
        data, weight, context, pooled = next(phases[annealing])
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps, options.anneal, options.rate)
        sigma = random_sigmas(len(data), family.shift, g)
        noise = torch.randn(data.shape, generator=g)
        mixed = data + sigma.view(-1, *[1] * (data.ndim - 1)) * (noise - data)
        inputs = [t.to(device) for t in (mixed, sigma, context, pooled)]
        optimizer.zero_grad(set_to_none=True)
        with saving():  # Flux adds to its residual in place
            with torch.autocast(device.type, torch.bfloat16, enabled=not options.float32):
                velocity = family.predict(forward, *inputs)
            weight = (weight / weight.mean()).to(device)
            loss = (weight * (velocity.float() - (noise - data).to(device)).square()).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        age = step - main if annealing else step
        keep = min(0.999, (age + 1) / (age + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - keep)
        losses.append(loss.item())
        done, now = step + 1, time.monotonic()
        if done % 20 == 0:
            each = (now - began) / (done - start)
            left = each * (options.steps - done) / 60
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {done}/{options.steps} loss {mean:.4f} {each:.2f} s/step, {left:.0f} min left", flush=True)
        if now - last_save > options.save_minutes * 60 or done == options.steps:
            last_save = now
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            part = checkpoint.with_suffix(".part")
            torch.save({**state, "step": done, "seconds": spent + now - began}, part)
            part.replace(checkpoint)
            export(average, options, done, spent + now - began)


def export(average: dict[str, Tensor], options: argparse.Namespace, steps: int, seconds: float) -> None:
    """Writes the averaged weights as tests/toy/weights has them, with how they were made as metadata."""
    made = {
        "family": options.family,
        "steps": f"{steps} of {options.steps}",
        "batch": ", ".join(str(batch) for _, batch in FAMILIES[options.family].menu),
        "seed": str(options.seed),
        "alone": f"{options.alone:g}",
        "part_weight": f"{options.part_weight:g}",
        "precision": "float32" if options.float32 else "bfloat16 autocast",
        "minutes": f"{seconds / 60:.0f}",
        "torch": torch.__version__,
    }
    if options.start:
        made["start"] = hashlib.sha256(options.start.read_bytes()).hexdigest()[:12]
    part = options.out.with_suffix(".part.safetensors")
    state = {key: value.float().cpu().contiguous() for key, value in average.items()}
    save_file(tiny.packed(state), part, metadata=made)
    part.replace(options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--anneal", type=int, default=500, help="how many of the steps are the last phase")
    parser.add_argument("--start", type=Path, metavar="FILE", help="begin with these weights instead of random ones")
    parser.add_argument("--alone", type=float, default=0.08, help="the last phase's share of scenes of parts alone")
    parser.add_argument(
        "--part-weight",
        type=float,
        default=1.0,
        help="what an error in a pixel of a part counts: parts vary in place more than they are large, so that most "
        "pixels that may be a part's are none's in most pictures, and a toy forgets small parts",
    )
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="for a CPU without instructions for bf16")
    parser.add_argument("--compile", action="store_true", help="by torch.compile: a third faster, but not for Flux")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
