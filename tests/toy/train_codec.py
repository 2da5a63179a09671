"""Trains the decoder of the toys' latents on crops of the picture world.

    python tests/toy/train_codec.py --out codec.safetensors [--device cuda] [--steps 6000]

It goes on from the checkpoint beside the output (``.ckpt``), written every few minutes, if there is one. Latents are
disturbed a little, since those of a model are; what is learned is the picture and its edges.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import vector_codec
import vector_world
from torch import Tensor

CROP = 64
"""Side of a crop in pixels."""
DISTURBED = 0.15
"""Largest standard deviation of what is added to the latents."""
EDGES = 1.0
"""What the error of differences between neighbours counts, beside that of pixels."""


def pictures(rng: np.random.Generator, count: int, device: str) -> Tensor:
    """Of all objects in equal shares, as bytes."""
    share = math.ceil(count / len(vector_world.THINGS))
    scenes = [vector_world.sample_scenes(rng, thing, share) for thing in vector_world.THINGS]
    drawn = torch.cat([vector_world.draw(s, device=device).pictures for s in scenes])
    return (drawn * 255).round().to(torch.uint8)[torch.from_numpy(rng.permutation(len(drawn))[:count])]


def fixed_basis(device: str = "cpu") -> vector_codec.Basis:
    """The same for everyone: of 400 pictures of seed 0."""
    rng = np.random.default_rng(0)
    return vector_codec.Basis.of(pictures(rng, 400, "cpu").float() / 255).to(device)


def crops(pool: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Random ones [count, 3, CROP, CROP] in 0..1, on whole patches, of random pictures."""
    patch, places = vector_codec.PATCH, (pool.shape[-1] - CROP) // vector_codec.PATCH + 1
    rows = torch.randint(len(pool), (count,), generator=g).tolist()
    corners = (torch.randint(places, (count, 2), generator=g) * patch).tolist()
    some = [pool[k, :, y : y + CROP, x : x + CROP] for k, (y, x) in zip(rows, corners, strict=True)]
    return torch.stack(some).float() / 255


def loss_of(made: Tensor, true: Tensor) -> Tensor:
    """Mean absolute error of pixels, and of the differences between neighbours."""
    error = made - true
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + EDGES * edges


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device, checkpoint = options.device, options.out.with_suffix(".ckpt")
    decoder = vector_codec.Decoder().to(device)
    average = {key: value.detach().clone() for key, value in decoder.state_dict().items()}
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    start, spent, basis = 0, 0.0, fixed_basis(device)
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        decoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start, spent = saved["average"], saved["step"], saved["seconds"]
        basis = vector_codec.Basis(*(saved["basis"][key] for key in ("mean", "down", "up")))
    rng, g = np.random.default_rng(options.seed + start + 1), torch.Generator().manual_seed(options.seed + start)
    pool = pictures(rng, min(options.pool, 64), device)
    forward = torch.compile(decoder) if options.compile else decoder
    began = time.monotonic()
    last_save = 0.0  # at once: the toys need the basis
    losses: list[float] = []
    step = start
    while (done := progress(options, step, spent + time.monotonic() - began)) < 1:
        pool = torch.cat([pictures(rng, options.fresh, device), pool])[: options.pool]
        true = crops(pool, options.batch, g)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * done)) + 0.005)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            made = forward(disturbed(basis.encode(true), g))
        loss = loss_of(made.float(), true)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            state = decoder.state_dict()
            keep = min(0.998, step / (step + 9))
            torch._foreach_lerp_([average[key] for key in state], list(state.values()), 1 - keep)
        losses.append(loss.detach())
        seconds = spent + time.monotonic() - began
        if step % 50 == 0:
            mean, each = torch.stack(losses[-200:]).mean().item(), (seconds - spent) / (step - start)
            print(f"step {step}/{options.steps} loss {mean:.4f} {each:.2f} s/step", flush=True)
            del losses[:-200]
        if seconds - last_save > options.save_minutes * 60 or progress(options, step, seconds) >= 1:
            last_save = seconds
            state = {"model": decoder.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            state["basis"] = {key: getattr(basis, key) for key in ("mean", "down", "up")}
            part = checkpoint.with_suffix(".part")
            torch.save({**state, "step": step, "seconds": seconds}, part)
            part.replace(checkpoint)
            made_by = {"steps": f"{step} of {options.steps}", "batch": str(options.batch), "seed": str(options.seed)}
            vector_codec.save(options.out, basis, average, made_by | {"minutes": f"{seconds / 60:.0f}"})


def progress(options: argparse.Namespace, step: int, seconds: float) -> float:
    """0 to 1, by steps or, with ``--minutes``, by time."""
    by_time = seconds / (60 * options.minutes) if options.minutes else 0.0
    return max(step / options.steps, by_time)


def disturbed(latents: Tensor, g: torch.Generator) -> Tensor:
    """Latents with noise of a random size each."""
    size = DISTURBED * torch.rand(len(latents), 1, 1, 1, generator=g)
    return latents + (size * torch.randn(latents.shape, generator=g)).to(latents.device)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, help="end after so many, as if the steps were done")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--fresh", type=int, default=4, help="new pictures a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--pool", type=int, default=600, help="pictures that crops are taken from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
