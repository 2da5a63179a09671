"""What in the picture each value of a latent is: made once at the start of a run, asked by everybody else.

A latent is not always one whole picture or video. Frames of references and guides may stand before and behind the
picture's own; ComfyUI's context windows show a part of it, along any dimension. Masks, windows of frames, negatives and
scales of one picture each, VSF Record and VSF Attention Map all read the same answer here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from .negative import Negative


@dataclass(frozen=True)
class View:
    """What one prediction shows of a run's latent: the indices of its pictures (none where nothing tells), and of each
    one's frames, rows and columns; ``size``: rows and columns of the whole."""

    pictures: tuple[int, ...]
    frames: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    size: tuple[int, int]

    def of(self, whole: Tensor) -> Tensor:
        """The part [..., frames, rows, columns] of ``whole`` [..., all frames, all rows, all columns]."""
        for dim, shown in ((-3, self.frames), (-2, self.rows), (-1, self.columns)):
            if shown != tuple(range(whole.shape[dim])):
                whole = whole.index_select(dim, torch.tensor(shown, device=whole.device))
        return whole

    def pictures_of(self, whole: Tensor, batch: int) -> Tensor:
        """The shown ones of a run's ``batch`` pictures, from one for all, or from fewer that are repeated in turn, as
        ComfyUI does with prompts."""
        if whole.shape[0] == 1:
            return whole
        if not self.pictures:
            raise some_pictures(batch)
        return comfy.utils.repeat_to_batch_size(whole, batch)[list(self.pictures)]


class LatentMap:
    """The latent [B, C, (frames,) h, w] of a run.

    ``before``, ``after``: how many of its frames are references' or guides', in front of the picture's own and behind.
    """

    def __init__(self, shape: Sequence[int], before: int = 0, after: int = 0) -> None:
        self.shape, self.before, self.after = tuple(shape), before, after
        self._whole: dict[tuple, tuple[Negative, Tensor]] = {}  # a negative is kept, so that its id stays its own

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def frames(self) -> int:
        """The picture's own latent frames; 1 where it has no such dimension."""
        return self.shape[2] - self.before - self.after if len(self.shape) == 5 else 1

    @property
    def is_video(self) -> bool:
        """Whether frames mean anything here; models of pictures may have one, too."""
        return self.frames > 1

    def own(self, view: View) -> tuple[list[int], list[int]]:
        """Where in ``view`` the picture's own frames are, and which of these each one is."""
        places = [place for place, frame in enumerate(view.frames) if 0 <= frame - self.before < self.frames]
        return places, [view.frames[place] - self.before for place in places]

    def view(self, x: Tensor, model_options: Mapping[str, Any]) -> View:
        """What the latent ``x`` of a prediction shows of the run's. Raises ``RuntimeError`` if nothing tells."""
        shown: list[Sequence[int]] = [range(size) for size in self.shape]
        window = self._window(model_options)
        if window is not None:
            shown[window[0]] = window[1]
        elif x.shape[-2:] != self.shape[-2:]:  # a pack that changes the size on the way: the whole picture, in another
            shown[-2:] = map(range, x.shape[-2:])
        if window is None or window[0] != 0:  # twice as many are the same pictures twice, as ComfyUI repeats them
            shown[0] = [i % self.batch for i in range(x.shape[0])] if x.shape[0] % self.batch == 0 else []
        lengths = [len(shown[0]) or x.shape[0], *map(len, shown[2:])]
        if [x.shape[0], *x.shape[2:]] != lengths:
            raise RuntimeError(
                f"VSF: this run shows a part {tuple(x.shape)} of its latent {self.shape} at a time without saying "
                "which. VSF works with ComfyUI's own context windows; please report which node made these."
            )
        frames = shown[2] if len(shown) == 5 else range(1)
        size = self.shape[-2:] if window is not None else x.shape[-2:]
        return View(*(tuple(part) for part in (shown[0], frames, *shown[-2:])), size=(size[0], size[1]))

    def _window(self, model_options: Mapping[str, Any]) -> tuple[int, Sequence[int]] | None:
        """The dimension along which ComfyUI's context window at work cuts the latent, and the indices that it shows:
        with the frame that it leans on, those that it retains, and the guides inside it."""
        handler = model_options.get("context_handler")
        window = model_options.get("transformer_options", {}).get("context_window")
        if handler is None or window is None or window.dim >= len(self.shape):
            return None
        dim, total = window.dim, window.total_frames
        if total <= getattr(handler, "context_length", 0):  # ComfyUI leaves the last window where it was
            return None
        index = torch.arange(total).view([-1 if d == dim else 1 for d in range(len(self.shape))])
        retained = getattr(handler, "latent_retain_index_list", [])
        shown = window.get_tensor(index, dim=dim, retain_index_list=retained).flatten().tolist()
        return dim, shown + [total + guide for guide in getattr(window, "guide_frames_indices", [])]

    def is_nowhere(self, negative: Negative) -> bool:
        """Whether mask and window of frames of ``negative`` leave nothing of the picture to act in."""
        size = self.shape[-2], self.shape[-1]
        return negative.mask is not None and not self._own_frames(negative, size).any()

    def mask_of(self, negative: Negative, view: View, on_others: float) -> Tensor:
        """Where in ``view`` a negative acts, [b, frames, rows, columns] in 0..1, on the CPU; ``on_others``: what it is
        on frames of references and guides, to which masks do not apply."""
        key = id(negative), view.size, on_others
        if key not in self._whole:
            own = self._own_frames(negative, view.size)
            others = [own.new_full((own.shape[0], count, *view.size), on_others) for count in (self.before, self.after)]
            self._whole[key] = negative, torch.cat([others[0], own, others[1]], dim=1)
        return view.of(view.pictures_of(self._whole[key][1], self.batch))

    def _own_frames(self, negative: Negative, size: tuple[int, int]) -> Tensor:
        """[b, own frames, h, w]: the mask of ``negative`` and its window of frames; 1 where there are none."""
        mask = negative.mask
        if not self.is_video:
            small = torch.ones(1, *size) if mask is None else _smaller(mask, size)
            return small[:, None]
        made = torch.ones(self.frames, *size) if mask is None else _in_latent_frames(mask, self.frames, size)
        inside = torch.tensor(in_frames(negative.frames, self.frames))
        return (made * inside[:, None, None])[None]


def some_pictures(batch: int) -> RuntimeError:
    return RuntimeError(
        f"VSF: another node samples some of the {batch} pictures at a time without saying which, and negatives, masks "
        "or scales are here for one picture each. Remove that node, or use the same for all pictures."
    )


def first_latent(latent: Tensor, shapes: Sequence[Sequence[int]] | None) -> Tensor:
    """The picture's own part of a latent that ComfyUI has packed with others, of ``shapes``; LTX-2's has sound."""
    return latent if shapes is None else comfy.utils.unpack_latents(latent, shapes)[0]


def in_frames(window: tuple[float, float], frames: int) -> list[bool]:
    """Which latent frames of a video a negative's ``frames`` cover: those whose middle lies inside."""
    return [window[0] <= (frame + 0.5) / frames < window[1] for frame in range(frames)]


def latent_frames_of(frames: int, latent_frames: int) -> Tensor:
    """int [frames]: which latent frame each of a video's frames lies in. Video VAEs are causal: the first latent frame
    is one frame, each further one is as many as the next (4 in Wan and HunyuanVideo, 8 in LTX-Video)."""
    last = max(frames, latent_frames, 2) - 1
    return (torch.arange(frames) * (latent_frames - 1) + last - 1) // last


def _smaller(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[:, None], size=size, mode="area")[:, 0].cpu()


def _in_latent_frames(mask: Tensor, latent_frames: int, size: tuple[int, int]) -> Tensor:
    """A mask [frames, H, W] as [latent frames, h, w]: each latent frame has the mean over its own frames."""
    frames = mask.shape[0]
    if frames <= latent_frames:
        return F.interpolate(mask[None, None], size=(latent_frames, *size), mode="area")[0, 0].cpu()
    at = latent_frames_of(frames, latent_frames)
    total = torch.zeros(latent_frames, *size).index_add_(0, at, _smaller(mask, size))
    return total / at.bincount()[:, None, None]
