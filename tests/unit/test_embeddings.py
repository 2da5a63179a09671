import pytest
import torch

from vsf_core import content_length, extrapolate, null_embedding


@pytest.mark.parametrize(
    ("tokens", "pad", "end", "length"),
    [
        ([49406, 320, 49407, 49407, 49407], 49407, 49407, 3),  # CLIP-L pads with its end token
        ([49406, 320, 49407], 49407, 49407, 3),
        ([49406, 49407, 49407], 49407, 49407, 2),  # the empty prompt
        ([49406, 0, 49407, 0, 0], 0, 49407, 3),  # CLIP-G pads with "!", which a prompt may contain too
        ([3, 9, 1, 0, 0], 0, 1, 3),  # T5
        ([1], 0, 1, 1),
        ([5, torch.zeros(8), 1, 0], 0, 1, 3),  # a textual-inversion embedding
    ],
)
def test_content_length(tokens, pad, end, length):
    assert content_length(tokens, pad, end) == length


def test_extrapolation_is_eq_10():
    negative = torch.tensor([[[2.0, 4.0], [0.0, 1.0]]])
    empty = torch.tensor([[[9.0, 9.0], [1.0, 1.0], [3.0, 5.0]]])
    null = null_embedding(empty, content=1)
    assert torch.equal(null, torch.tensor([[[2.0, 3.0]]]))
    assert torch.equal(extrapolate(negative, null, 8.0), torch.tensor([[[2.0, 12.0], [-16.0, -15.0]]]))
    assert torch.equal(extrapolate(negative, null, 0.0), negative)
    with pytest.raises(ValueError, match="no padding"):
        null_embedding(empty, content=3)
