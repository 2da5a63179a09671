"""Trains a toy model of ComfyUI's own class by flow matching on the picture world, so that ComfyUI's loader takes it.

    VSF_COMFYUI=... python tests/toy/train.py --family sd3 --out sd3.safetensors --steps 4000 --resume

One core does it in about an hour. The checkpoint beside the output (``.ckpt``) is written every few minutes;
``--resume`` goes on from it. A GPU is used where there is one.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

sys.path.insert(0, os.environ["VSF_COMFYUI"])

from comfy.cli_args import args as comfy_args  # noqa: E402

comfy_args.cpu = True

import captions  # noqa: E402
import codec  # noqa: E402
import world  # noqa: E402


class Family(Protocol):
    """What differs between model families."""

    shift: float
    """The sampler's sigma shift, as ComfyUI's model class of this family has it."""

    def build(self) -> torch.nn.Module:
        """ComfyUI's model class, initialised for training."""

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """The velocity (noise - data), like x [n, 16, 32, 32]; sigma [n], context [n, 77, 768], pooled [n, 768]."""

    def exported(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trained weights with the keys and shapes that ComfyUI's loader recognises."""


class SD3:
    """A three-block MMDiT. Text is 4096 wide there and pooled 2048, but this CLIP fills 768: zero columns come last."""

    shift = 3.0
    depth = 3

    def build(self) -> torch.nn.Module:
        import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

        mmdit.optimized_attention = plain_attention
        model = mmdit.OpenAISignatureMMDITWrapper(
            input_size=None,
            in_channels=codec.CHANNELS,
            depth=self.depth,
            adm_in_channels=captions.WIDTH,
            context_embedder_config={
                "target": "torch.nn.Linear",
                "params": {"in_features": captions.WIDTH, "out_features": 64 * self.depth},
            },
            qk_norm="rms",
            operations=torch.nn,
            dtype=torch.float32,
        )
        for name, parameter in model.named_parameters():
            if name.endswith(("ln_q.weight", "ln_k.weight")):
                torch.nn.init.ones_(parameter)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                torch.nn.init.zeros_(parameter)
        return model

    def predict(self, model: torch.nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return model(x, sigma * 1000, context=context, y=pooled)

    def exported(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        wide = {"context_embedder.weight": 4096, "y_embedder.mlp.0.weight": 2048}
        return {
            key: torch.nn.functional.pad(value, (0, wide[key] - value.shape[1])) if key in wide else value
            for key, value in state.items()
        }


FAMILIES: dict[str, type[Family]] = {"sd3": SD3}


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """SDPA with gradients: q, k [n, length, heads * d], v the same or [n, length, heads, d]."""
    n, length = q.shape[:2]
    q, k, v = (t.reshape(n, t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v.to(q.dtype))
    return z.transpose(1, 2).reshape(n, length, -1)


def examples(batch: int, seed: int, drop: float = 0.05) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (latents, context, pooled); a share ``drop`` of the captions is empty, for CFG's sake."""
    embed = captions.Captions()
    g = torch.Generator().manual_seed(seed)
    for pictures, texts in world.batches(seed, batch):
        dropped = torch.rand(batch, generator=g) < drop
        kept = ["" if gone else words for gone, words in zip(dropped.tolist(), texts, strict=True)]
        yield codec.encode(torch.from_numpy(pictures.copy())), *embed(kept)


def random_sigmas(n: int, shift: float, g: torch.Generator) -> Tensor:
    """Noise levels [n]: logit-normal, then shifted as the sampler's are."""
    t = torch.sigmoid(torch.randn(n, generator=g) * 1.1)
    return shift * t / (1 + (shift - 1) * t)


def rate(step: int, steps: int, top: float, warm: int = 150) -> float:
    """Warm-up, then a cosine down to a hundredth."""
    if step < warm:
        return top * (step + 1) / warm
    return top * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    family = FAMILIES[options.family]()
    model = family.build().to(device).train()
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
    for step, (data, context, pooled) in enumerate(examples(options.batch, options.seed + start), start):
        if step >= options.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps, options.rate)
        sigma = random_sigmas(len(data), family.shift, g)
        noise = torch.randn(data.shape, generator=g)
        mixed = data + sigma[:, None, None, None] * (noise - data)
        inputs = [t.to(device) for t in (mixed, sigma, context, pooled)]
        with torch.autocast(device.type, torch.bfloat16):
            velocity = family.predict(model, *inputs)
        loss = torch.nn.functional.mse_loss(velocity.float(), (noise - data).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(0.999, (step + 1) / (step + 10))
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
            export(family, average, options, done, spent + now - began)


def export(family: Family, average: dict[str, Tensor], options: argparse.Namespace, steps: int, seconds: float) -> None:
    """Writes the averaged weights in fp16, with how they were made as metadata."""
    from safetensors.torch import save_file

    made = {
        "family": options.family,
        "steps": f"{steps} of {options.steps}",
        "batch": str(options.batch),
        "seed": str(options.seed),
        "minutes": f"{seconds / 60:.0f}",
        "torch": torch.__version__,
    }
    part = options.out.with_suffix(".part.safetensors")
    state = family.exported({key: value.float().cpu() for key, value in average.items()})
    save_file({key: value.half().contiguous() for key, value in state.items()}, part, metadata=made)
    part.replace(options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
