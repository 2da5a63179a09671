"""What a step's conds get of the negatives: masks in latent frames, and no more of them than is needed."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from helpers import conditioning, load_qwen_image, sample, text


@pytest.fixture(scope="module", name="module")
def module_fixture(pack):
    names = ("latent_map", "negative", "negative_batch")
    parts = [vars(importlib.import_module(f"{pack.module.__name__}.nodes.{name}")) for name in names]
    return SimpleNamespace(**{name: value for part in parts for name, value in part.items()})


def masks(module, groups, latent):
    """The masks that each entry gets, [b, m, (frames,) h, w]."""
    whole = module.LatentMap(latent.shape)
    made = module.NegativeBatch.collate(groups, (1.0,), 0.2, whole, whole.view(latent, {}), latent)
    return [conds.to_conds()["vsf_mask"].cond for conds in made]


def in_time(module, mask, frames):
    """What a mask [b, 4, 6] is in a video of so many latent frames, one value a frame."""
    negative = module.Negative(text(2, 5), mask=mask)
    (made,) = masks(module, [[negative]], torch.zeros(1, 16, frames, 4, 6))
    assert made.shape == (1, 1, frames, 4, 6)
    return made.mean(dim=(0, 1, 3, 4)).tolist()


def frames(*values):
    return torch.tensor(values)[:, None, None].expand(-1, 4, 6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0]),  # 1 + 2 x 4 pixel frames, as of Wan, HunyuanVideo and Cosmos
        ([0, 1, 1, 0, 0, 1, 1, 1, 1], [0, 0.5, 1]),
        ([1] + 7 * [0] + [1] + 8 * [0], [1, 0.125, 0]),  # 1 + 2 x 8, as of LTX-Video
        ([0, 1, 0], [0, 1, 0]),  # the latent's own
        ([0.5], [0.5, 0.5, 0.5]),
        ([0, 1], [0, 0.5, 1]),
        ([1, 0, 0, 0, 1], [1, 0, 0.5]),  # of no video that long: the first frame is still the first
    ],
)
def test_frames_of_a_mask(module, given, expected):
    assert in_time(module, frames(*map(float, given)), 3) == pytest.approx(expected)


def test_every_latent_frame_has_pixel_frames(module):
    for latent in range(2, 9):
        for count in range(latent, 60):
            at = module.latent_frames_of(count, latent).tolist()
            assert at[0] == 0 and at[1] == 1 and set(at) == set(range(latent)) and at == sorted(at)
    assert module.latent_frames_of(17, 5).tolist() == [0] + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert module.latent_frames_of(15, 7).tolist()[1::7] == [1, 4]
    assert module.latent_frames_of(3, 1).tolist() == [0, 0, 0]


def test_equal_masks_are_one(module):
    """Every node clamps its mask, so one MASK in two nodes is two tensors."""
    mask = torch.rand(1, 32, 48)
    pair = [module.Negative(text(2, seed), mask=mask.clone()) for seed in (5, 6)]
    latent = torch.zeros(1, 16, 4, 6)
    assert masks(module, [pair], latent)[0].shape == (1, 1, 4, 6)
    pair[1] = module.Negative(text(2, 6), mask=1 - mask)
    assert masks(module, [pair], latent)[0].shape == (1, 4, 4, 6)
    pair[1] = module.Negative(text(2, 6))
    assert masks(module, [pair], latent)[0].shape == (1, 4, 4, 6)


@pytest.mark.parametrize("latent", [torch.zeros(1, 16, 4, 6), torch.zeros(1, 16, 3, 4, 6)], ids=["picture", "video"])
def test_a_shared_mask_keeps_no_more_in_memory(module, latent):
    negative = module.Negative(text(50, 5), mask=torch.rand(1, 32, 48))
    (made,) = masks(module, [[negative]], latent)
    assert made.untyped_storage().nbytes() == made.numel() * made.element_size()


def test_a_picture_of_one_frame_is_no_video(pack):
    """Models of pictures may have a frame too (Qwen-Image): there, from_frame and to_frame mean nothing."""
    model = load_qwen_image()
    stock = conditioning(13, 1, 64, 768)
    made = [
        sample(pack.patch(model), pack.negative(stock, negative=[[text(5, 5), {}]], **window), size=(1, 16, 24))
        for window in ({}, {"from_frame": 0.6})
    ]
    assert torch.equal(*made)
