"""Latents that hold a picture exactly, and a TAESD-format autoencoder whose weights are written by hand to say so.

A latent is [n, 16, 32, 32] as the sampler sees it (after ``process_in``): each pixel's RGB lies along three orthonormal
directions of the 16 channels, bent by the inverse of the clamp at TAESD's input. Decoding gives the 32x32 picture,
enlarged 8 times without smoothing.

``python tests/toy/codec.py DIR`` writes taesd3_encoder and taesd3_decoder below DIR/vae_approx.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

CHANNELS, WIDTH = 16, 64
GAIN = 6.0
"""Length of the RGB axis 0..1 in a latent before it is bent; gives latents of about unit standard deviation."""
CLAMP = 3.0
"""TAESD's input is ``tanh(x / 3) * 3``."""
WAN_GAIN = 4.8
"""The same for Wan, whose three colours have channels of their own."""
KNEE = 1.45
"""Where the encoder's two straight lines meet that stand for ``3 artanh(c / 3)``."""


def directions() -> Tensor:
    """Three orthonormal directions, [3, 16]: rows of a Hadamard matrix, so that all channels carry alike."""
    rows = torch.tensor([[1.0]])
    while len(rows) < CHANNELS:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows[[5, 10, 12]] / CHANNELS**0.5


def encode(pictures: Tensor) -> Tensor:
    """Pictures [n, 3, h, w] in 0..1 -> the sampler's latents [n, 16, h, w]."""
    straight = torch.einsum("nchw,cd->ndhw", (pictures - 0.5) * GAIN, directions())
    return CLAMP * torch.atanh(straight / CLAMP)


def decode(latents: Tensor) -> Tensor:
    """The sampler's latents [n, 16, h, w] -> pictures [n, 3, h, w] in 0..1."""
    straight = CLAMP * torch.tanh(latents / CLAMP)
    return (torch.einsum("ndhw,cd->nchw", straight, directions()) / GAIN + 0.5).clamp(0, 1)


def wan_channels() -> tuple[Tensor, Tensor, Tensor]:
    """In Wan's latents each channel carries one of R, G, B: which, 0/1 [3, 16]; and ComfyUI's mean and std [16]."""
    import comfy.latent_formats

    wan = comfy.latent_formats.Wan21()
    mean, std = wan.latents_mean.flatten(), wan.latents_std.flatten()
    colour = torch.zeros(CHANNELS, dtype=torch.long)
    colour[std.argsort()] = torch.arange(CHANNELS) % 3  # equal shares of channels with a small std, which say more
    return torch.nn.functional.one_hot(colour, 3).T.float(), mean, std


def encode_wan(clips: Tensor) -> Tensor:
    """Clips [n, 3, t, h, w] in 0..1, a picture a latent frame -> the sampler's latents [n, 16, t, h, w]."""
    colours, mean, std = wan_channels()
    straight = torch.einsum("ncthw,cd->ndthw", (clips - 0.5) * WAN_GAIN, colours)
    raw = CLAMP * torch.atanh(straight / CLAMP)
    return (raw - mean[:, None, None, None]) / std[:, None, None, None]


def decode_wan(latents: Tensor) -> Tensor:
    """The sampler's latents [n, 16, t, h, w] -> clips [n, 3, t, h, w] in 0..1."""
    _, mean, std = wan_channels()
    raw = latents * std[:, None, None, None] + mean[:, None, None, None]
    straight = CLAMP * torch.tanh(raw / CLAMP)
    return (torch.einsum("ndthw,cd->ncthw", straight, _wan_readout()) + 0.5).clamp(0, 1)


def _wan_readout() -> Tensor:
    """[3, 16]: the mean over a colour's channels, each weighted by how little its std blurs it."""
    colours, _, std = wan_channels()
    weights = colours / std.square()
    return weights / weights.sum(1, keepdim=True) / WAN_GAIN


def wan_decoder() -> dict[str, Tensor]:
    """TAEHV's decoder for Wan 2.1: the first convolution reads RGB off the latent, all others pass it on."""
    import comfy.taesd.taehv

    shapes = comfy.taesd.taehv.TAEHV(latent_channels=CHANNELS).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    state["decoder.1.weight"][:3, :, 1, 1] = _wan_readout()
    state["decoder.1.bias"][:3] = 0.5
    for key, value in state.items():
        if not key.startswith("decoder.") or key == "decoder.1.weight" or not key.endswith("weight"):
            continue
        if ".conv.weight" in key:  # TGrow: every copy of a frame is that frame
            for copy in range(value.shape[0] // value.shape[1]):
                value[copy * value.shape[1] :][:3, :3, 0, 0] = torch.eye(3)
        elif ".conv." not in key:
            value[:3, :3, 1, 1] = torch.eye(3)
    return state


def to_vae(latents: Tensor) -> Tensor:
    """The sampler's latents -> what ComfyUI hands to the VAE (SD3's ``process_out``)."""
    return latents / 1.5305 + 0.0609


def decoder() -> dict[str, Tensor]:
    """TAESD3's decoder: the first convolution reads RGB off the latent, all others pass it on."""
    state = _blank("Decoder")
    state["1.weight"][:3, :, 1, 1] = directions() / GAIN
    state["1.bias"][:3] = 0.5
    for key, value in state.items():
        if key.endswith("weight") and key != "1.weight" and ".conv." not in key:
            value[:3, :3, 1, 1] = torch.eye(3)  # ReLU and the residual blocks (zero beside their skip) keep p >= 0
    return state


def encoder() -> dict[str, Tensor]:
    """TAESD3's encoder: every eighth pixel, mixed into 16 channels, bent by two straight lines a side."""
    state = _blank("Encoder")
    for index in (0, 2, 6, 10):
        state[f"{index}.weight"][:3, :3, 1, 1] = torch.eye(3)
    mix = (directions() * GAIN).T  # [16, 3]
    for step in ("0", "2"):
        state[f"11.conv.{step}.weight"][:3, :3, 1, 1] = torch.eye(3)
    for k, (sign, knee) in enumerate([(1, 0.0), (-1, 0.0), (1, KNEE), (-1, KNEE)]):
        rows = slice(k * CHANNELS, (k + 1) * CHANNELS)
        state["11.conv.4.weight"][rows, :3, 1, 1] = sign * mix
        state["11.conv.4.bias"][rows] = -sign * mix.sum(1) * 0.5 - knee
    state["11.conv.4.weight"][:3, :3, 1, 1] -= torch.eye(3)  # the block's skip would add RGB
    at_knee, top = CLAMP * torch.atanh(torch.tensor([KNEE, GAIN * 3 / 8]) / CLAMP)
    inner = at_knee / KNEE
    outer = (top - inner * KNEE) / (GAIN * 3 / 8 - KNEE)
    for k, slope in enumerate([inner, -inner, outer - inner, inner - outer]):
        state["14.weight"][:, k * CHANNELS : (k + 1) * CHANNELS, 1, 1] = slope * torch.eye(CHANNELS)
    return state


def _blank(name: str) -> dict[str, Tensor]:
    import comfy.taesd.taesd

    shapes = getattr(comfy.taesd.taesd, name)(CHANNELS).state_dict()
    return {key: torch.zeros(value.shape) for key, value in shapes.items()}


def write(folder: Path) -> None:
    """The files, in fp16, where ComfyUI's VAELoader finds them as "taesd3" and, for Flux, "taef1"."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, state in {"encoder": encoder(), "decoder": decoder()}.items():
        for model in ("taesd3", "taef1"):  # the same: each scales latents as its model does
            path = folder / f"{model}_{name}.safetensors"
            save_file({key: value.half().contiguous() for key, value in state.items()}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)


WAN_FILE = "vsf_tiny_wan_vae.safetensors"


def write_wan(folder: Path) -> None:
    """Wan's decoder alone, where VAELoader finds it; fp32, by which ComfyUI knows it from HunyuanVideo's."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    part = (folder / WAN_FILE).with_suffix(".part")
    save_file(wan_decoder(), part)
    part.replace(folder / WAN_FILE)


if __name__ == "__main__":
    sys.path.insert(0, os.environ["VSF_COMFYUI"])
    from comfy.cli_args import args

    args.cpu = True
    write(Path(sys.argv[1]) / "vae_approx")
