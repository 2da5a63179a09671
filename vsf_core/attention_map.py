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

    Bounded: per step, layer group (``LAYERS``) and picture two fp32 numbers an image token, a sum and a count, on the
    CPU, however many blocks, heads and negatives there are. 8 steps of 1024 x 1024 in SD3 or Flux are 0.8 MB a picture;
    20 steps of an 81-frame 480p video in Wan are 16 MB.
    """

    def __init__(self) -> None:
        self.runs = 0
        """How many runs have begun here, ever."""
        self.shape = (0, 0, 0, 0)
        """(pictures, latent frames, latent height, latent width) of the run."""
        self.steps = 0
        self.patch = 1
        self._totals: dict[int, Tensor] = {}
        """Of each step: sums and counts [2, layer groups, pictures, latent frames, grid height, grid width]."""
        self._lock = Lock()  # ComfyUI's MultiGPU runs forward passes in threads

    def begin(self, shape: tuple[int, int, int, int], steps: int, patch: int) -> None:
        """Forget everything; a run of ``steps`` steps starts. ``patch``: latent pixels a token, along each side."""
        self.runs += 1
        self.shape, self.steps, self.patch = shape, steps, patch
        self._totals.clear()

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        return -(-self.shape[2] // self.patch), -(-self.shape[3] // self.patch)

    def _zeros(self, *first: int) -> Tensor:
        return torch.zeros(*first, *self.shape[:2], *self.grid)

    @property
    def acted(self) -> list[int]:
        """The steps, from 0, in which the negative was there to be attended to."""
        return sorted(self._totals)

    def add(self, step: int, sums: Tensor, counts: Tensor, at: Sequence[Sequence[int]] | None = None) -> None:
        """One forward pass of a step: ``sums`` [3, B, frames, token rows, token columns] of 1 - W, over ``counts`` [3]
        blocks of each layer group.

        ``at``: which pictures, latent frames, latent rows and latent columns of the run the pass showed (a context
        window), None for all. Raises ``ValueError`` where the shapes are not the run's, or a window's tokens lie across
        those of the whole.
        """
        pictures, frames, rows, columns = map(range, self.shape) if at is None else at
        places = list(pictures), list(frames), self._tokens(rows), self._tokens(columns)
        expected = (len(LAYERS), *map(len, places))
        if tuple(sums.shape) != expected:
            raise ValueError(f"expected attention mass of shape {expected}, got {tuple(sums.shape)}")
        where = torch.meshgrid(*map(torch.tensor, (range(2), range(len(LAYERS)), *places)), indexing="ij")
        sums, counts = sums.to("cpu", torch.float32), counts[:, None, None, None, None].expand(expected)
        with self._lock:
            totals = self._totals.setdefault(step, self._zeros(2, len(LAYERS)))
            totals.index_put_(where, torch.stack((sums, counts.float())), accumulate=True)

    def _tokens(self, latent: Sequence[int]) -> list[int]:
        """The tokens along a side of which each covers ``patch`` of the ``latent`` rows or columns shown."""
        firsts = list(latent)[:: self.patch]
        for first in firsts:
            if first % self.patch:
                inside = f"inside a token of the whole picture, which are {self.patch} wide"
                raise ValueError(f"a window begins at latent pixel {first}, {inside}")
        return [first // self.patch for first in firsts]

    def mean(self, layers: str = "all", step: int | None = None) -> Tensor:
        """1 - W, [pictures, latent frames, grid height, grid width]: the mean over a layer group, or all of them, of
        one step, or over all steps in which the negative acted. 0 where it never did."""
        group = slice(None) if layers == "all" else [LAYERS.index(layers)]
        steps = [s for s in self.acted if step in (None, s)]
        total, count = sum((self._totals[s][:, group].sum(dim=1) for s in steps), start=self._zeros(2))
        return total / count.clamp(min=1)

    def fitted(self, maps: Tensor, height: int, width: int) -> Tensor:
        """``maps`` [n, grid height, grid width] as [n, height, width] over the picture, interpolated.

        The last tokens of an odd latent reach beyond the picture; what is beyond is cut off.
        """
        rows, columns = (side * self.patch for side in self.grid)
        size = round(height * rows / self.shape[2]), round(width * columns / self.shape[3])
        return F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0, :height, :width]
