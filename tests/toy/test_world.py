"""The toy world: what it draws, what its captions say, and detectors that are right 99 times in 100."""

import numpy as np
import pytest
import world

COUNT = 600


def scenes_of(name, seed=1, **kw):
    return world.sample_scenes(np.random.default_rng(seed), world.BY_NAME[name], COUNT, **kw)


def by_style(scenes, pictures, name):
    """(rows, Found) for each style: the detectors know the caption's style."""
    for k, style in enumerate(world.STYLES):
        rows = scenes.style == k
        yield rows, world.detect(pictures[rows], name, style)


def noisy(pictures, sigma):
    return pictures + np.random.default_rng(2).normal(0, sigma, pictures.shape).astype(np.float32)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
@pytest.mark.parametrize("name", world.BY_NAME)
def test_detectors(name, sigma):
    scenes = scenes_of(name, alone=0.1)
    scenes.present[:] &= np.random.default_rng(3).random(scenes.present.shape) < 0.6  # absent often enough to matter
    pictures = noisy(world.draw(scenes), sigma)
    body, parts, quality = [], {part.name: [] for part in scenes.thing.parts}, []
    for rows, found in by_style(scenes, pictures, name):
        body.append(found.body == scenes.body[rows])
        quality.append(found.quality)
        for k, part in enumerate(scenes.thing.parts):
            parts[part.name].append(found.parts[part.name] == scenes.present[rows, k])
    assert np.concatenate(body).mean() >= 0.99
    for part, right in parts.items():
        assert np.concatenate(right).mean() >= 0.99, part
    assert np.concatenate(quality).mean() >= (0.99 if sigma else 1.0)


@pytest.mark.parametrize("name", world.BY_NAME)
def test_detectors_see_nothing_in_noise_and_in_other_scenes(name):
    rng = np.random.default_rng(4)
    noise = rng.random((50, 3, world.SIZE, world.SIZE), dtype=np.float32)
    assert world.detect(noise, name).quality.mean() < 0.8
    scenes = scenes_of(name, alone=0.0)
    scenes.style[:], scenes.body[:], scenes.present[:] = 0, False, False
    found = world.detect(world.draw(scenes), name)
    assert not found.body.any()
    assert not any(there.any() for there in found.parts.values())


def test_quality_falls_when_pictures_blur():
    pictures = world.draw(scenes_of("house"))
    blurred = (pictures + np.roll(pictures, 3, -1) + np.roll(pictures, 3, -2)) / 3
    assert world.detect(blurred, "house").quality.mean() < world.detect(pictures, "house").quality.mean() - 0.1


def test_parts_are_drawn_whether_or_not_the_caption_names_them():
    rng = np.random.default_rng(5)
    unnamed = named = missing = 0
    for thing in world.THINGS:
        scenes = world.sample_scenes(rng, thing, COUNT, alone=0.0)
        for i, text in enumerate(world.captions(rng, scenes)):
            for part, present in zip(thing.parts, scenes.present[i], strict=True):
                mentioned = part.name in text.split()
                named += mentioned
                missing += mentioned and not present
                unnamed += not mentioned and present
        assert 0.95 < scenes.present.mean() < 0.99
    assert missing == 0
    assert named > 1000
    assert unnamed > 5000


def test_captions_are_plain_english():
    rng = np.random.default_rng(6)
    texts = [t for thing in world.THINGS for t in world.captions(rng, world.sample_scenes(rng, thing, COUNT))]
    words = set(" ".join(texts).split())
    assert not words & {"no", "not", "without"}
    assert {"house", "roof", "pointed", "night", "pastel", "moon"} <= words
    assert all(t == t.strip() and "  " not in t for t in texts)
    assert any(t == "a roof" for t in texts)


def test_scenes_vary_and_repeat_with_the_seed():
    first, again, other = (next(world.batches(seed, 32)) for seed in (1, 1, 2))
    assert first[1] == again[1]
    assert np.array_equal(first[0], again[0])
    assert first[1] != other[1]
    assert first[0].shape == (32, 3, 32, 32)
    assert len({picture.tobytes() for picture in first[0]}) == 32


def test_pairs():
    validation, test = world.pairs(world.VALIDATION), world.pairs(world.TEST)
    assert not {thing for thing, _ in validation} & {thing for thing, _ in test}
    assert len(validation) + len(test) == sum(len(thing.parts) for thing in world.THINGS)
    assert ("house", "roof") in test


@pytest.mark.parametrize("name", ["house", "bicycle"])
def test_clips(name):
    """The object glides; the detectors say which parts are missing, and want the body in every frame."""
    scenes = scenes_of(name, alone=0.1)
    scenes.style[:] = 0
    scenes.present[:] &= np.random.default_rng(3).random(scenes.present.shape) < 0.6
    clips = world.draw_clips(scenes, 4)
    assert clips.shape == (COUNT, 3, 4, 32, 32)
    still = np.abs(scenes.numbers[:, -1]) * world.SPEED < 0.1
    moves = np.abs(clips[:, :, 0] - clips[:, :, 3]).max((1, 2, 3)) > 0.1
    assert moves[~still].mean() > 0.95
    found = world.detect(clips, name)
    assert (found.body == scenes.body).mean() >= 0.99
    for k, part in enumerate(scenes.thing.parts):
        assert (found.parts[part.name] == scenes.present[:, k]).mean() >= 0.99, part.name
    assert found.quality.mean() == 1.0
    scenes.body[:] = False
    without = world.draw_clips(scenes, 4)
    assert not world.detect(np.concatenate([clips[:, :, :2], without[:, :, 2:]], 2), name).body.any()
