"""The attention map: the part 1 - W of each image token's attention that fell on the negative, kept."""

from collections.abc import Iterable, Sequence
from functools import reduce
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = ("early", "middle", "late")
"""The layer groups: thirds of a model's blocks, in the order in which they run."""


MOST_PLACES = 64
"""Of how many context windows a run remembers where they are."""


def layer_of(position: int, blocks: int) -> int:
    """Index in ``LAYERS`` of the block at ``position`` (0 ..) of ``blocks``."""
    return position * len(LAYERS) // blocks


class AttentionRecord:
    """The maps of one sampling run: 1 - W, mean over heads and over what ran, at token-grid size.

    Bounded: per step, layer group (``LAYERS``) and picture two fp32 numbers an image token, a sum and a count, however
    many blocks, heads and negatives there are. 8 steps of 1024 x 1024 in SD3 or Flux are 0.8 MB a picture; 20 steps of
    an 81-frame 480p video in Wan are 16 MB. They stay on the device that samples until ``finish``: a copy to the CPU in
    each step would wait for it.
    """

    def __init__(self) -> None:
        self.runs = 0
        """How many runs have begun here, ever."""
        self.shape = (0, 0, 0, 0)
        """(pictures, latent frames, latent height, latent width) of the run."""
        self.steps = 0
        self.patch = 1
        self._totals: dict[torch.device, Tensor] = {}
        """By device: [steps, sums and counts, layer groups, pictures, latent frames, grid height, grid width]."""
        self._places: dict[tuple, Tensor] = {}
        """Where the tokens of a pass are among the run's, by what it showed: context windows come again every step."""
        self._lock = Lock()  # ComfyUI's MultiGPU runs forward passes in threads

    def begin(self, shape: tuple[int, int, int, int], steps: int, patch: int) -> None:
        """Forget everything; a run of ``steps`` steps starts. ``patch``: latent pixels a token, along each side."""
        self.runs += 1
        self.shape, self.steps, self.patch = shape, steps, patch
        self._totals.clear()
        self._places.clear()

    def finish(self) -> None:
        """The run is over: all that was added goes to the CPU."""
        on_cpu = [totals.cpu() for totals in self._totals.values()] or [self._zeros(max(self.steps, 0), 2, len(LAYERS))]
        self._totals = {torch.device("cpu"): reduce(torch.add, on_cpu)}
        self._places.clear()

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        return -(-self.shape[2] // self.patch), -(-self.shape[3] // self.patch)

    def _zeros(self, *first: int, device: torch.device | None = None) -> Tensor:
        return torch.zeros(*first, *self.shape[:2], *self.grid, device=device)

    def _total(self) -> Tensor:
        """That of all devices, on the CPU."""
        self.finish()
        return next(iter(self._totals.values()))

    @property
    def acted(self) -> list[int]:
        """The steps, from 0, in which the negative was there to be attended to."""
        return self._total()[:, 1].flatten(1).any(dim=1).nonzero().flatten().tolist()

    def add(
        self, step: int | Tensor, sums: Tensor, counts: Iterable[float], at: Sequence[Sequence[int]] | None = None
    ) -> None:
        """One forward pass of a step: ``sums`` [3, B, frames, token rows, token columns] of 1 - W, over ``counts`` [3]
        blocks of each layer group. Nothing here waits for the device, on which ``step`` is, too, if it is a tensor.

        ``at``: which pictures, latent frames, latent rows and latent columns of the run the pass showed (a context
        window), None for all. Raises ``ValueError`` where the shapes are not the run's, or a window's tokens lie across
        those of the whole.
        """
        pictures, frames, rows, columns = map(range, self.shape) if at is None else at
        places = list(pictures), list(frames), self._tokens(rows), self._tokens(columns)
        expected = (len(LAYERS), *map(len, places))
        if tuple(sums.shape) != expected:
            raise ValueError(f"expected attention mass of shape {expected}, got {tuple(sums.shape)}")
        shown = torch.stack((sums.float(), torch.stack([torch.full_like(sums[0], count).float() for count in counts])))
        device, key = sums.device, (sums.device, *map(tuple, places))
        with self._lock:
            if key not in self._places:
                if len(self._places) == MOST_PLACES:
                    self._places.clear()
                self._places[key] = self._where(places).to(device)
            if device not in self._totals:
                self._totals[device] = self._zeros(self.steps, 2, len(LAYERS), device=device)
            whole = self._zeros(2, len(LAYERS), device=device)
            whole.flatten(2).index_add_(2, self._places[key], shown.flatten(2))
            step = step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.long, device=device)
            self._totals[device].index_add_(0, step[None], whole[None])

    def _where(self, places: Sequence[list[int]]) -> Tensor:
        """int [tokens shown]: where they are among all of a run's."""
        pictures, frames, rows, columns = places
        every = torch.arange(self._zeros().numel()).view(*self.shape[:2], *self.grid)
        return every[pictures][:, frames][:, :, rows][..., columns].flatten()

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
        steps = slice(None) if step is None else slice(step, step + 1)
        total, count = self._total()[steps, :, group].sum(dim=(0, 2))
        return total / count.clamp(min=1)

    def fitted(self, maps: Tensor, height: int, width: int) -> Tensor:
        """``maps`` [n, grid height, grid width] as [n, height, width] over the picture, interpolated.

        The last tokens of an odd latent reach beyond the picture; what is beyond is cut off.
        """
        rows, columns = (side * self.patch for side in self.grid)
        size = round(height * rows / self.shape[2]), round(width * columns / self.shape[3])
        return F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0, :height, :width]
