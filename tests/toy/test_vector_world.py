"""The vector world: what it draws, what its captions say, and detectors that are right 99 times in 100."""

import detectors
import numpy as np
import pytest
import shapes
import torch
import vector_world as world
from torchvision.transforms.functional import gaussian_blur

COUNT = 64


def scenes_of(name, count=COUNT, **kw):
    return world.sample_scenes(np.random.default_rng(1), world.BY_NAME[name], count, **kw)


@pytest.mark.parametrize(
    ("shape", "inside", "distances"),
    [
        (("box", -4, 0, 4, 6, 1), (0, 3), {(6, 3): 2, (0, 10): 4, (0, 5): -1}),
        (("disc", 1, 1, 3, 3), (1, 1), {(5, 1): 1, (1, 3): -1}),
        (("disc", 0, 0, 8, 2), (0, 0), {(0, 3): 1, (8, 0): 0}),
        (("ring", 0, 0, 5, 2), (5, 0), {(0, 0): 4, (8, 0): 2}),
        (("path", 1, 0, 0, 10, 0), (5, 0), {(5, 3): 2, (12, 0): 1}),
        (("poly", 0, 0, 0, 4, 0, 4, 4, 0, 4), (2, 2), {(2, 1): -1, (7, 2): 3}),
    ],
)
def test_shapes_have_the_distances_of_geometry(shape, inside, distances):
    def at(u, v):
        return float(shapes.distance([shape], torch.full((1, 1, 1), float(u)), torch.full((1, 1, 1), float(v))))

    assert at(*inside) < 0
    for place, expected in distances.items():
        assert at(*place) == pytest.approx(expected, abs=0.3)


def test_edges_are_smooth_and_nothing_is_drawn_outside_a_layers_window():
    layer = shapes.Layer((1.0, 0.0, 0.0), (("disc", 3, 2, 20, 20), ("path", 2, -30, 0, 30, 9)))
    x, y = shapes.grid()
    canvas, seen, one = shapes.Canvas(1), torch.zeros(1, 128, 128), torch.ones(1, 1, 1)
    u, v = x - 60.3, y - 64.8
    canvas.lay(layer, u, v, one, torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1), torch.tensor([0]), seen, part=True)
    expected = (0.5 - shapes.distance(layer.shapes, u, v)).clamp(0, 1)
    assert torch.allclose(seen, expected, atol=1e-6)
    assert ((seen > 0.05) & (seen < 0.95)).sum() > 50
    assert canvas.pixels[:, 1:].max() == 0


@pytest.mark.parametrize("name", world.BY_NAME)
def test_detectors(name):
    scenes = scenes_of(name, alone=0.1)
    scenes.present[:] &= np.random.default_rng(3).random(scenes.present.shape) < 0.6  # absent often enough to matter
    clean = world.draw(scenes).pictures
    g = torch.Generator().manual_seed(2)
    right = {name: [] for name in ("body", *(part.name for part in scenes.thing.parts))}
    quality = {}
    for what, pictures in {
        "clean": clean,
        "noisy": clean + 0.05 * torch.randn(clean.shape, generator=g),
        "blurred": gaussian_blur(clean, [5, 5], [1.0, 1.0]),
    }.items():
        for k, style in enumerate(world.STYLES):
            rows = scenes.style == k
            found = detectors.detect(pictures[torch.from_numpy(rows)], name, style)
            right["body"] += list(found.body == scenes.body[rows])
            quality.setdefault(what, []).extend(found.quality)
            for part, present in zip(scenes.thing.parts, scenes.present[rows].T, strict=True):
                right[part.name] += list(found.parts[part.name] == present)
    for part, was in right.items():
        assert np.mean(was) >= 0.99, part
    assert np.mean(quality["clean"]) >= 0.94
    assert np.mean(quality["blurred"]) < np.mean(quality["clean"])


def test_detectors_see_nothing_in_noise_and_in_empty_scenes():
    noise = torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(4))
    assert detectors.detect(noise, "house").quality.mean() < 0.7
    scenes = scenes_of("house", 24, alone=0.0)
    scenes.style[:], scenes.body[:], scenes.present[:] = 0, False, False
    found = detectors.detect(world.draw(scenes).pictures, "house")
    assert not found.body.any()
    assert not any(there.any() for there in found.parts.values())


def test_what_shows_a_part_is_what_changes_without_it():
    for name in ("bicycle", "cat"):
        scenes = scenes_of(name, 12, alone=0.0)
        with_parts = world.draw(scenes)
        scenes.present[:] = False
        without = world.draw(scenes)
        changed = (with_parts.pictures - without.pictures).abs().amax(1, keepdim=True) > 0.02
        assert not without.parts.any()
        assert (changed & (with_parts.parts == 0)).sum() == 0
        assert ((with_parts.parts > 0.5) & changed).sum() > 0.95 * (with_parts.parts > 0.5).sum()


def test_captions_name_what_is_there_and_nothing_else():
    rng = np.random.default_rng(5)
    unnamed = named = 0
    for thing in world.THINGS:
        scenes = world.sample_scenes(rng, thing, 300, alone=0.0)
        for i, text in enumerate(world.captions(rng, scenes)):
            assert text == text.strip() and "  " not in text
            assert set(text.split()) <= set(world.words())
            assert not set(text.split()) & {"no", "not", "without"}
            for part, present in zip(thing.parts, scenes.present[i], strict=True):
                mentioned = part.name in text.split()
                assert present or not mentioned
                named += mentioned
                unnamed += not mentioned and present
        assert 0.95 < scenes.present.mean() < 0.99
    assert named > 1000
    assert unnamed > 1000


def test_clips_glide():
    scenes = scenes_of("boat", 16, alone=0.0)
    scenes.style[:], scenes.present[:, 1] = 0, False
    clips = world.draw_clips(scenes, 4)
    assert clips.pictures.shape == (16, 3, 4, 128, 128)
    still = np.abs(scenes.numbers[:, -1]) * world.SPEED < 0.3
    moved = (clips.pictures[:, :, 0] - clips.pictures[:, :, 3]).abs().amax((1, 2, 3)).numpy() > 0.1
    assert moved[~still].all()
    found = detectors.detect(clips.pictures, "boat")
    assert found.body.all()
    assert found.parts["sail"].mean() == scenes.present[:, 0].mean()
    assert not found.parts["flag"].any()


def test_pairs():
    assert not set(world.VALIDATION) & set(world.TEST)
    assert set(world.VALIDATION) | set(world.TEST) == set(world.BY_NAME)
    assert ("snowman", "hat") in world.pairs(world.TEST)
