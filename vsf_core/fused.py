"""VSF in one launch (``fused_kernel.py``): for which heads, on which chips, and how it is cut up.

Needs Triton: import it where it is used. With TRITON_INTERPRET=1 Triton runs it on a CPU, for tests.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import JointCall, NegativeTerms
from .backends import unit_stride
from .fused_kernel import attention_kernel
from .layout import TokenLayout
from .reference import joint_attention_reference

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v, and k and v of N: [B, H, L, D]."""


class Tiles(NamedTuple):
    """How a launch is cut up: queries and keys a tile, warps, and stages of the pipeline that loads keys."""

    queries: int
    keys: int
    warps: int
    stages: int


ALWAYS = 2**31
SMALL_SHARED = {64: {ALWAYS: Tiles(128, 64, 8, 3)}, 128: {ALWAYS: Tiles(128, 32, 8, 3)}}
TABLE: dict[tuple[int, int], dict[int, dict[int, Tiles]]] = {
    (8, 0): {64: {ALWAYS: Tiles(128, 64, 8, 3)}, 128: {ALWAYS: Tiles(128, 64, 8, 2)}},
    (8, 6): SMALL_SHARED,
    (8, 9): SMALL_SHARED,
    (9, 0): {64: {ALWAYS: Tiles(128, 64, 8, 3)}, 128: {2048: Tiles(64, 64, 4, 3), ALWAYS: Tiles(128, 128, 8, 3)}},
    (12, 0): SMALL_SHARED,
    (12, 1): SMALL_SHARED,
}
"""For half precision, by NVIDIA's compute capability, padded head dimension, and up to how many queries. Chosen once,
never timed at run time: the same seed gives the same picture tomorrow. All fit their chips' shared memory and registers
as Triton 3.6 compiles them; those of (9, 0) were the quickest of a trial on an H200, the others were not tried. On
(10, 0) cuDNN's kernel, which a merge stands on, should leave this one behind."""
OTHERWISE = {16: Tiles(64, 32, 4, 2), 32: Tiles(64, 32, 4, 2), 64: Tiles(64, 32, 4, 2), 128: Tiles(32, 32, 4, 2)}
OTHERWISE[256] = Tiles(32, 16, 4, 1)
"""Where it is asked for and the table has nothing, by padded head dimension."""
MOST_PADDING = 1.34
"""How much wider than a head its tile may be: 96 is padded to 128, 80 is not."""


class Places(NamedTuple):
    """Where the groups end or begin. Queries: P's first up to ``before``, N's up to ``rest``, P's others up to
    ``image``, and I's. Keys, less N's: P's first up to ``before``, P's others from ``rest`` to ``image_keys``, and I's
    up to ``keys``."""

    before: int
    rest: int
    image: int
    image_keys: int
    keys: int


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    mask_neg: Tensor | None,
    places: list[int],
    tiles: list[int],
    softmax_scale: float,
    two: bool,
    share: bool,
) -> list[Tensor]:
    """[Z [B, H, rows, D], in memory [B, rows, H, D]]; with ``two`` its I rows are Z+, and Z- [B, H, I, D] follows; with
    ``share`` 1 - W follows, fp32 [B, H, I].

    q, k, v, k_neg, v_neg: [B, H, L, D] of one dtype, the last dimension's stride 1. alpha, beta, padding: those of
    ``NegativeTerms``. mask: additive, [B or 1, 1, 1, keys]; mask_neg: the same over N.
    """
    (batch, heads, rows, dim), negative = q.shape, k_neg.shape[2]
    at, tile = Places(*places), Tiles(*tiles)
    _check_shapes(q, k, v, k_neg, v_neg, alpha, beta, padding, mask, at)  # here: in a graph, sizes are no numbers yet
    out = q.new_empty(batch, rows, heads, dim).transpose(1, 2)
    out_neg = q.new_empty(batch, rows - at.image, heads, dim).transpose(1, 2) if two else None
    shares = q.new_empty(batch, heads, rows - at.image, dtype=torch.float32) if share else None

    def strides(t: Tensor | None, *dims: int) -> list[int]:
        """Those of ``dims``, 0 where there is one of it."""
        return [0 if t is None or t.shape[dim] == 1 else t.stride(dim) for dim in dims]

    groups = rows - at.image, at.before, at.rest - at.before, at.image - at.rest
    grid = sum(-(-group // tile.queries) for group in groups), batch * heads
    strided = q, k, v, k_neg, v_neg, out, out if out_neg is None else out_neg
    kernel: Any = attention_kernel
    with torch.cuda.device_of(q):
        kernel[grid](
            q, k, v, k_neg, v_neg, mask, mask_neg, padding, alpha, beta, out, out_neg, shares,
            *(t.stride(dim) for t in strided for dim in range(3)),
            *strides(mask, 0), *strides(padding, 0), *strides(alpha, 0, 1), *strides(beta, 0, 1, 2),
            heads, negative, at.before, at.rest, at.image, rows, at.image_keys, at.keys, softmax_scale,
            D=dim, DIM=_padded(dim), QUERIES=tile.queries, KEYS=tile.keys,
            NEGATIVES=min(64, _padded(negative)),
            OPERAND=tl.float32 if INTERPRETED else getattr(tl, str(q.dtype).removeprefix("torch.")),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return [t for t in (out, out_neg, shares) if t is not None]


INTERPRETED = not isinstance(attention_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this was imported."""

_op = torch.library.custom_op("comfyui_vsf::fused_attention", _launch, mutates_args=())
"""What torch.compile keeps as one call."""


@_op.register_fake
def _(q, k, v, k_neg, v_neg, alpha, beta, padding, mask, mask_neg, places, tiles, softmax_scale, two, share):  # noqa: ANN001, ANN202
    batch, heads, rows, dim = q.shape
    image = rows - places[2]
    made = [q.new_empty(batch, rows, heads, dim).transpose(1, 2)]
    made += [q.new_empty(batch, image, heads, dim).transpose(1, 2)] if two else []
    return made + ([q.new_empty(batch, heads, image, dtype=torch.float32)] if share else [])


class FusedAttention:
    """The kernel for one kind of head: all that ``attend_joint`` and ``attend_cross`` need, in one launch.

    Raises ``RuntimeError`` where it does not work; ``find`` returns None where another way is better.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int, tiles: dict[int, Tiles]) -> None:
        self.tiles = tiles
        self._check(device, dtype, head_dim)

    @classmethod
    def find(cls, device: torch.device, dtype: torch.dtype, head_dim: int, forced: bool) -> "FusedAttention | None":
        """``forced``: whatever the table says, if it can run at all."""
        dim = _padded(head_dim)
        known: dict[int, Tiles] = {}
        is_nvidia = device.type == "cuda" and torch.version.hip is None
        if is_nvidia and dtype.itemsize == 2 and dim <= MOST_PADDING * head_dim:
            known = TABLE.get(torch.cuda.get_device_capability(device), {}).get(dim, {})
        if forced and not known and dim in OTHERWISE and (device.type == "cuda" or INTERPRETED):
            known = {ALWAYS: OTHERWISE[dim]}
        return cls(device, dtype, head_dim, known) if known else None

    def joint(self, call: JointCall, two: bool = False) -> list[Tensor]:
        """What ``_launch`` returns for a joint call."""
        n = call.layout.span("N")
        mask = None if call.mask is None else unit_stride(call.mask)[0]
        masks = mask, None if mask is None else mask[..., n]
        tensors = call.q, call.k, call.v, call.k[:, :, n], call.v[:, :, n]
        scale, share = call.backend.softmax_scale, call.attention_mass is not None
        return self._run(tensors, call.negative, masks, self._places(call.layout), scale, two, share)

    def cross(
        self,
        tensors: Five,
        negative: NegativeTerms,
        mask: Tensor | None,
        softmax_scale: float | None,
        two: bool,
        share: bool,
    ) -> list[Tensor]:
        """What ``_launch`` returns for a cross-attention; tensors: q, k, v and N's k and v."""
        keys = tensors[1].shape[2]
        masks = None if mask is None else unit_stride(mask)[0], None
        return self._run(tensors, negative, masks, Places(0, 0, 0, keys, keys), softmax_scale, two, share)

    @staticmethod
    def _places(layout: TokenLayout) -> Places:
        image = layout.length - layout.image
        return Places(layout.before, layout.before + layout.negative, image, image, layout.keys)

    def _run(
        self,
        tensors: Five,
        negative: NegativeTerms,
        masks: tuple[Tensor | None, Tensor | None],
        places: Places,
        softmax_scale: float | None,
        two: bool,
        share: bool,
        tile: Tiles | None = None,
    ) -> list[Tensor]:
        """``_launch`` of q, k, v and N's k and v, cut up as the table says where no ``tile`` is given. masks: over the
        keys, and over N's."""
        q, k, v, k_neg, v_neg = unit_stride(*tensors)
        tile = tile or next(tile for most, tile in self.tiles.items() if q.shape[2] <= most)
        alpha, beta, padding = negative.alpha, negative.beta, negative.padding
        padding = None if padding is None else padding.contiguous()
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        launch = _op if torch.compiler.is_compiling() else _launch
        cut = list(places), list(halved(tile) if two else tile)
        return launch(q, k, v, k_neg, v_neg, alpha, beta, padding, *masks, *cut, scale, two, share)

    def _check(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """Every launch that there may be, with all that it may take, against the definition: a few kilobytes."""
        layout, generator = TokenLayout(70, 21, 35, 3), torch.Generator().manual_seed(0)
        shape, i = (2, layout.length, 3, head_dim), layout.span("I")
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3))
        alpha, beta = (torch.full((1, 1, 1), number, device=device) for number in (2.0, 0.2))
        padding = torch.arange(layout.negative, device=device)[None] > 32
        mask = torch.zeros(1, 1, 1, layout.keys, device=device, dtype=dtype)
        negative, n = NegativeTerms(alpha, beta, padding), layout.span("N")
        tensors, masks = (q, k, v, k[:, :, n], v[:, :, n]), (mask, mask[..., n])
        places = self._places(layout)
        doubles = q.double(), k.double(), v.double(), layout, alpha.double(), beta.double()
        exact = joint_attention_reference(*doubles, padding)[:, :, i]
        plain = joint_attention_reference(*doubles[:5], torch.full_like(doubles[5], torch.inf), padding)[:, :, i]
        for tile in dict.fromkeys(self.tiles.values()):
            for two in (False, True):
                z, *_ = self._run(tensors, negative, masks, places, None, two, not two, tile)
                error = (z[:, :, i].double() - (plain if two else exact)).abs().max().item()
                if not error < 0.03:
                    raise RuntimeError(f"the fused kernel is off by {error:.2g} in {tile}")


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    places: Places,
) -> None:
    """Raises ``ValueError``: a kernel would read beyond what is there."""
    (batch, heads, rows, dim), n, keys = q.shape, k_neg.shape[2], places.keys
    lengths = {"k": (k, keys), "v": (v, keys), "N's k": (k_neg, n), "N's v": (v_neg, n)}
    terms = {
        "alpha": (alpha, [1, batch], [1, n], [1]),
        "beta": (beta, [1, batch], [1, rows - places.image], [1, n]),
        "padding": (padding, [1, batch], [n]),
        "mask": (mask, [1, batch], [1], [1], [keys]),
    }
    misfits = {
        name: t for name, (t, length) in lengths.items() if t.shape != (batch, heads, length, dim) or t.dtype != q.dtype
    }
    for name, (t, *sizes) in terms.items():
        if t is not None and not (
            t.ndim == len(sizes) and all(x in fits for x, fits in zip(t.shape, sizes, strict=True))
        ):
            misfits[name] = t
    for name, t in misfits.items():
        raise ValueError(f"{name} {list(t.shape)} in {t.dtype} does not fit q {list(q.shape)} in {q.dtype}")


def halved(tile: Tiles) -> Tiles:
    """For methods that steer, which keep two accumulators."""
    return tile._replace(keys=max(32, tile.keys // 2))


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
