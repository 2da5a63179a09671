"""The attention map: the part 1 - W of each image token's attention that fell on the negative, kept."""

from collections.abc import Sequence
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = ("early", "middle", "late")
"""The layer groups: thirds of a model's blocks, in the order in which they run."""


def layer_of(position: int, blocks: int) -> int:
    """Index in ``LAYERS`` of the block at ``position`` (0 ..) of ``blocks``."""
    return position * len(LAYERS) // blocks


class AttentionRecord:
    """The maps of one sampling run: 1 - W, mean over heads and over what ran, at token-grid size.

    Bounded: per step, layer group (``LAYERS``) and picture one fp32 number an image token, on the CPU, however many
    blocks, heads and negatives there are. 8 steps of 1024 x 1024 in SD3 or Flux are 0.4 MB a picture; 20 steps of an
    81-frame 480p video in Wan are 8 MB.
    """

    def __init__(self) -> None:
        self.runs = 0
        """How many runs have begun here, ever."""
        self.shape = (0, 0, 0, 0)
        """(pictures, latent frames, latent height, latent width) of the run."""
        self.steps = 0
        self.patch = 1
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}
        self._lock = Lock()  # ComfyUI's MultiGPU runs forward passes in threads

    def begin(self, shape: tuple[int, int, int, int], steps: int, patch: int) -> None:
        """Forget everything; a run of ``steps`` steps starts. ``patch``: latent pixels a token, along each side."""
        self.runs += 1
        self.shape, self.steps, self.patch = shape, steps, patch
        self._sums.clear()
        self._counts.clear()

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        return -(-self.shape[2] // self.patch), -(-self.shape[3] // self.patch)

    @property
    def acted(self) -> list[int]:
        """The steps, from 0, in which the negative was there to be attended to."""
        return sorted(self._sums)

    def add(self, step: int, sums: Tensor, counts: Tensor, frames: Sequence[int] | None = None) -> None:
        """One forward pass of a step: ``sums`` [3, B, tokens] of 1 - W over ``counts`` [3] blocks of each layer group.

        ``frames``: the latent frames that were shown (a context window), None for all. Raises ``ValueError`` where the
        shapes are not the run's.
        """
        batch, total, *_ = self.shape
        shown = list(range(total) if frames is None else frames)
        expected = (len(LAYERS), batch, len(shown) * self.grid[0] * self.grid[1])
        if tuple(sums.shape) != expected:
            raise ValueError(f"expected an attention mass of shape {expected}, got {tuple(sums.shape)}")
        with self._lock:
            if step not in self._sums:
                self._sums[step] = torch.zeros(len(LAYERS), batch, total, *self.grid)
                self._counts[step] = torch.zeros(len(LAYERS), total)
            self._sums[step][:, :, shown] += sums.to("cpu", torch.float32).reshape(*expected[:2], -1, *self.grid)
            self._counts[step][:, shown] += counts[:, None]

    def mean(self, layers: str = "all", step: int | None = None) -> Tensor:
        """1 - W, [pictures, latent frames, grid height, grid width]: the mean over a layer group, or all of them, of
        one step, or over all steps in which the negative acted. 0 where it never did."""
        steps = self.acted if step is None else [step] if step in self._sums else []
        group = slice(None) if layers == "all" else slice(LAYERS.index(layers), LAYERS.index(layers) + 1)
        total, count = torch.zeros(*self.shape[:2], *self.grid), torch.zeros(self.shape[1])
        for s in steps:
            total += self._sums[s][group].sum(dim=0)
            count += self._counts[s][group].sum(dim=0)
        return total / count.clamp(min=1)[:, None, None]

    def fitted(self, maps: Tensor, height: int, width: int) -> Tensor:
        """``maps`` [n, grid height, grid width] as [n, height, width] over the picture, interpolated.

        The last tokens of an odd latent reach beyond the picture; what is beyond is cut off.
        """
        rows, columns = (side * self.patch for side in self.grid)
        size = round(height * rows / self.shape[2]), round(width * columns / self.shape[3])
        return F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0, :height, :width]
