"""Masks in memory as attention kernels of GPUs read it: 16 elements on, row after row."""

import pytest
import torch

from vsf_core import aligned, padding_mask
from vsf_core.layout import MASK_ROW, zero_mask


def starts(mask):
    return {start % MASK_ROW for start in (mask.storage_offset(), *mask.stride()[:-1])} | {mask.stride(-1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool])
def test_masks_are_copied_to_where_rows_can_be_read(dtype):
    whole = (torch.arange(2 * 7 * 32).view(2, 1, 7, 32) % 3).to(dtype)
    for mask in (
        whole[..., 5:],
        whole[..., :29].contiguous(),
        whole[..., ::2],
        whole.mT,
        whole[..., :1].expand_as(whole),
    ):
        made = aligned(mask)
        assert torch.equal(made, mask) and made.dtype == dtype and starts(made) == {0, 1}
    for mask in (whole, whole[..., 16:], whole[:, :, 2:, :7], whole[:1].expand(2, -1, -1, -1)):
        assert aligned(mask) is mask


def test_masks_that_are_made(dtype=torch.bfloat16):
    padding = torch.tensor([[False] * 5, [False, True] * 2 + [True]])
    for mask in (padding_mask(padding, dtype), padding_mask(padding[:, None, None], dtype)):
        assert starts(mask) == {0, 1} and mask.dtype == dtype
        assert torch.equal(torch.isinf(mask), padding.view_as(mask))
    mask = zero_mask(2, 1, 4, 33, like=torch.zeros(1, dtype=dtype))
    assert mask.shape == (2, 1, 4, 33) and mask.dtype == dtype and mask.stride() == (192, 192, 48, 1)
