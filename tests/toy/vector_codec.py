"""Latents eight times smaller than a picture, and an autoencoder that ComfyUI loads by itself and that knows them.

The encoder is fixed and linear: of each 8x8 patch the 16 principal components (``Basis``). So transformers can be
trained before, beside and after the decoder. TAESD's encoder computes just that, with weights written by hand. The
decoder is trained (``train_codec.py``). It is narrower than TAESD's and has what the decoders of TAESD and TAEHV share;
filled up with zeros it is either of them, and gives the same.

A latent is [n, 16, h / 8, w / 8] as the sampler sees SD3's and Flux's (after ``process_in``). Wan's differ by ComfyUI's
mean and std of each channel (``to_wan``).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

StateDict = dict[str, Tensor]
CHANNELS, PATCH, WIDE = 16, 8, 64
STD = 0.75
"""Of a latent's values."""
EVEN = 0.5
"""A component's standard deviation is raised to one less this: 0 leaves it, 1 makes all alike. Small ones are details:
alike, they would cost a model as much as all that is large; left as they are, it would hardly learn them."""
CLAMP = 3.0
"""TAESD's and TAEHV's input is ``tanh(x / 3) * 3``."""
HUNYUAN_SCALE = 0.476986
"""By which ComfyUI multiplies what a video decoder in fp16 gets."""


@dataclass(frozen=True)
class Basis:
    """mean [192] of a patch, as ``pixel_unshuffle`` lays it out; down [16, 192]: a patch less that to a latent; up
    [192, 16]: and back, as far as 16 numbers tell."""

    mean: Tensor
    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, pictures: Tensor) -> "Basis":
        """The principal components of pictures [n, 3, h, w], mixed so that all channels carry alike."""
        patches = pixel_unshuffle(pictures.double(), PATCH).movedim(1, -1).reshape(-1, 3 * PATCH**2)
        mean = patches.mean(0)
        variance, axes = torch.linalg.eigh(torch.cov(patches.T))
        deviation, axes = variance[-CHANNELS:].sqrt(), axes[:, -CHANNELS:]
        gain = deviation.pow(-EVEN)
        gain = gain * STD / (deviation * gain).square().mean().sqrt()
        down = hadamard().double() @ (axes * gain).T
        up = (axes / gain) @ hadamard().double().T
        return cls(mean.float(), down.float(), up.float())

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in 0..1 -> latents."""
        patches = pixel_unshuffle(pictures, PATCH) - self.mean.view(-1, 1, 1)
        return torch.einsum("nchw,dc->ndhw", patches, self.down)

    def decode(self, latents: Tensor) -> Tensor:
        """The nearest picture that latents tell by themselves, patch by patch."""
        patches = torch.einsum("ndhw,cd->nchw", latents, self.up) + self.mean.view(-1, 1, 1)
        return pixel_shuffle(patches, PATCH)

    def to(self, device: torch.device | str) -> "Basis":
        return Basis(self.mean.to(device), self.down.to(device), self.up.to(device))


def hadamard() -> Tensor:
    """An orthogonal [16, 16] whose entries are all of one size."""
    rows = torch.tensor([[1.0]])
    while len(rows) < CHANNELS:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows / CHANNELS**0.5


class Residual(nn.Module):
    """Three convolutions beside a skip, as in TAESD."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv[0](x).relu()
        return (self.conv[2](self.conv[1](h).relu()) + x).relu()


class Decoder(nn.Module):
    """Latents -> pictures about 0..1. widths: of the features at an eighth, a quarter and half of a picture's size, and
    at all of it; depths: how many blocks at the first three."""

    def __init__(
        self, widths: tuple[int, int, int, int] = (64, 48, 32, 16), depths: tuple[int, int, int] = (3, 2, 2)
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(Residual(width) for _ in range(depth)) for width, depth in zip(widths, depths, strict=False)
        )
        self.ups = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.first(CLAMP * torch.tanh(latents / CLAMP)).relu()
        for blocks, up in zip(self.stages, self.ups, strict=True):
            for block in blocks:
                h = block(h)
            h = up(interpolate(h, scale_factor=2))
        return self.last(h.relu())


# -- the same in ComfyUI's forms --------------------------------------------------------------------------------------


def taesd_encoder(basis: Basis) -> StateDict:
    """TAESD's encoder: each halving moves 2x2 pixels into channels, the last one projects them, and a latent's sign
    comes through the ReLUs as two channels."""
    state = _blank("Encoder")
    state["0.weight"][:3, :3, 1, 1] = torch.eye(3)
    for key, channels in (("2.weight", 3), ("6.weight", 12)):
        for y in range(2):
            for x in range(2):
                for c in range(channels):  # rows and columns 2i and 2i + 1 are a kernel's middle and what follows it
                    state[key][(y * 2 + x) * channels + c, c, 1 + y, 1 + x] = 1
    axes = basis.down.view(CHANNELS, 3, 2, 2, 2, 2, 2, 2)  # of colour, then a row's and a column's binary digits
    for index in range(192):
        c, y2, y1, y0, x2, x1, x0 = torch.unravel_index(torch.tensor(index), (3, 2, 2, 2, 2, 2, 2))
        channel = (y1 * 2 + x1) * 12 + (y0 * 2 + x0) * 3 + c
        weight = axes[:, c, y2, y1, y0, x2, x1, x0]
        state["10.weight"][:CHANNELS, channel, 1 + y2, 1 + x2] = weight
        state["10.weight"][CHANNELS : 2 * CHANNELS, channel, 1 + y2, 1 + x2] = -weight
    state["14.weight"][:, :CHANNELS, 1, 1] = torch.eye(CHANNELS)
    state["14.weight"][:, CHANNELS : 2 * CHANNELS, 1, 1] = -torch.eye(CHANNELS)
    state["14.bias"] = -basis.down @ basis.mean
    return state


def taesd_decoder(decoder: Decoder) -> StateDict:
    """TAESD's decoder; what ours lacks passes on what it gets."""
    state = _blank("Decoder")
    _put(state, "1", decoder.first)
    for stage, (start, up) in enumerate(((3, 7), (8, 12), (13, 17))):
        for k, block in enumerate(decoder.stages[stage]):
            for step, conv in enumerate(block.conv):
                _put(state, f"{start + k}.conv.{2 * step}", conv)
        _put(state, f"{up}", decoder.ups[stage])
    _put(state, "19", decoder.last)
    return state


def taehv_decoder(decoder: Decoder) -> StateDict:
    """TAEHV's decoder for 16 channels: a latent frame becomes four alike, the first one alone."""
    import comfy.taesd.taehv

    shapes = comfy.taesd.taehv.TAEHV(latent_channels=CHANNELS).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    _put(state, "decoder.1", decoder.first)
    for stage, start in enumerate((3, 9, 15)):
        for k, block in enumerate(decoder.stages[stage]):
            for step, conv in enumerate(block.conv):
                _put(state, f"decoder.{start + k}.conv.{2 * step}", conv)  # what was before is not looked at
        grow = state[f"decoder.{start + 4}.conv.weight"]
        for copy in grow.split(grow.shape[1]):
            copy[:, :, 0, 0] = torch.eye(grow.shape[1])
        _put(state, f"decoder.{start + 5}", decoder.ups[stage])
    _put(state, "decoder.22", decoder.last)
    return state


def _put(state: StateDict, key: str, conv: nn.Module) -> None:
    """A convolution's weights into the corner of a wider one."""
    for name, value in conv.state_dict().items():
        state[f"{key}.{name}"][tuple(slice(size) for size in value.shape)] = value


def _blank(name: str) -> StateDict:
    import comfy.taesd.taesd

    shapes = getattr(comfy.taesd.taesd, name)(CHANNELS).state_dict()
    return {key: torch.zeros(value.shape) for key, value in shapes.items()}


def write_stills(folder: Path, basis: Basis, decoder: Decoder) -> None:
    """The files, in fp16, where ComfyUI's VAELoader finds them as "taesd3" and, for Flux, "taef1"."""
    for name, state in {"encoder": taesd_encoder(basis), "decoder": taesd_decoder(decoder)}.items():
        for model in ("taesd3", "taef1"):  # the same: each scales latents as its model does
            _write(folder / f"{model}_{name}.safetensors", state)


def write_video(path: Path, decoder: Decoder) -> None:
    """The decoder of clips, where VAELoader finds it; fp16 ComfyUI takes for HunyuanVideo's, and scales latents so."""
    _write(path, taehv_decoder(decoder))


def _write(path: Path, state: StateDict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({key: value.detach().half().contiguous() for key, value in state.items()}, part)
    part.replace(path)


# -- Wan's latents ----------------------------------------------------------------------------------------------------


def to_wan(latents: Tensor) -> Tensor:
    """Latents [n, 16, ...] as Wan's sampler sees those that its decoder takes for them."""
    mean, std = (t.to(latents).view(-1, *[1] * (latents.ndim - 2)) for t in _wan_scale())
    return (latents / HUNYUAN_SCALE - mean) / std


def from_wan(latents: Tensor) -> Tensor:
    """``to_wan`` undone."""
    mean, std = (t.to(latents).view(-1, *[1] * (latents.ndim - 2)) for t in _wan_scale())
    return (latents * std + mean) * HUNYUAN_SCALE


def _wan_scale() -> tuple[Tensor, Tensor]:
    import comfy.latent_formats

    wan = comfy.latent_formats.Wan21()
    return wan.latents_mean.flatten(), wan.latents_std.flatten()


# -- files ------------------------------------------------------------------------------------------------------------


def save(path: Path, basis: Basis, decoder: StateDict, made: dict[str, str] | None = None) -> None:
    """One file of both; the decoder in fp16."""
    state = {f"decoder.{key}": value.half() for key, value in decoder.items()}
    state |= {f"basis.{key}": getattr(basis, key) for key in ("mean", "down", "up")}
    part = path.with_suffix(".part")
    save_file({key: value.cpu().contiguous() for key, value in state.items()}, part, metadata=made)
    part.replace(path)


def load(path: Path) -> tuple[Basis, Decoder]:
    """What ``save`` wrote."""
    state = load_file(path)
    basis = Basis(*(state[f"basis.{key}"] for key in ("mean", "down", "up")))
    decoder = Decoder()
    own = {key.removeprefix("decoder."): value.float() for key, value in state.items() if key.startswith("decoder.")}
    decoder.load_state_dict(own)
    return basis, decoder.eval()
