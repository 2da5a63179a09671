"""VSF Scale Sweep: each picture of the batch is the run that one gets with its scale alone."""

import json
import logging
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES
from helpers import assert_close, relative, sample
from hosting.graph import only_node, to_prompt
from hosting.toy_graphs import with_toys
from PIL import Image

import nodes

ROOT = Path(__file__).resolve().parents[2]

FAMILIES = ("sd3", "flux", "wan")
SCALES = (-1.0, 0.0, 1.5, 3.8)


@pytest.fixture(scope="module")
def models():
    return {family: CASES[family].load() for family in FAMILIES}


def attached(pack, family, **kw):
    return pack.negative(CASES[family].prompt(), negative=CASES[family].negative(), **kw)


def sweep(pack, model, latent, scales="-1, 0, 1.5, 3.8"):
    return pack.mapping["VSFScaleSweep"].execute(model=model, latent=latent, scales=scales).result


def ksampler(model, family, positive, latent, cfg=1.0, sampler="euler"):
    """ComfyUI's own KSampler node."""
    return nodes.common_ksampler(model, 7, 3, cfg, sampler, "simple", positive, CASES[family].uncond(), latent)[0][
        "samples"
    ]


def empty(family):
    return {"samples": torch.zeros(1, 16, *CASES[family].sizes[1])}


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_picture_is_the_single_run(pack, models, family, cfg):
    positive = attached(pack, family, strength=0.7)
    model, latent, labels = sweep(pack, pack.patch(models[family], scale=9.0), empty(family))
    result = ksampler(model, family, positive, latent, cfg)
    assert labels == "scale -1\nscale 0\nscale 1.5\nscale 3.8"
    assert result.shape[0] == len(SCALES)
    for i, scale in enumerate(SCALES):
        alone = ksampler(pack.patch(models[family], scale=scale), family, positive, empty(family), cfg)
        assert_close(result[i : i + 1], alone)
        assert relative(result[i - 1 : i or None], alone) > 1e-3  # and not its neighbour's


def test_the_latents_own_place_in_the_batch_and_mask_stay(pack, models):
    """A picture that was picked from a batch gets the noise it had there."""
    positive, model = attached(pack, "sd3"), models["sd3"]
    g = torch.Generator().manual_seed(1)
    picked = {
        "samples": torch.randn(1, 16, 15, 21, generator=g),
        "batch_index": [2],
        "noise_mask": torch.ones(1, 1, 120, 168).triu(),
    }
    swept, latent, _ = sweep(pack, pack.patch(model), picked)
    result = ksampler(swept, "sd3", positive, latent)
    alone = ksampler(pack.patch(model, scale=SCALES[2]), "sd3", positive, picked)
    assert_close(result[2:3], alone)
    other = ksampler(pack.patch(model, scale=SCALES[2]), "sd3", positive, {**picked, "batch_index": [0]})
    assert relative(other, alone) > 1e-3


def test_together_with_a_record(pack, models):
    """The map of each picture is the one of its single run."""
    record = pack.mapping["VSFRecord"].execute
    swept, latent, _ = sweep(pack, pack.patch(models["sd3"]), empty("sd3"))
    swept, holder = record(model=swept).result
    ksampler(swept, "sd3", attached(pack, "sd3"), latent)
    single, alone = record(model=pack.patch(models["sd3"], scale=3.8)).result
    ksampler(single, "sd3", attached(pack, "sd3"), empty("sd3"))
    torch.testing.assert_close(holder.record.mean()[3:], alone.record.mean(), rtol=0, atol=1e-5)


def test_log_names_the_scales(pack, models, caplog):
    model, latent, _ = sweep(pack, pack.patch(models["sd3"]), empty("sd3"), "1, 3.3")
    with caplog.at_level(logging.INFO):
        ksampler(model, "sd3", attached(pack, "sd3"), latent)
    assert any("scale 1, 3.3, offset 0.2" in r.getMessage() for r in caplog.records)


def test_refusals(pack, models):
    model = pack.patch(models["sd3"])
    with pytest.raises(ValueError, match="needs a model that VSF Model Patch has patched"):
        sweep(pack, models["sd3"], empty("sd3"))
    with pytest.raises(ValueError, match="got a batch of 2"):
        sweep(pack, model, {"samples": torch.zeros(2, 16, 8, 8)})
    for bad in ("two", "nan", "inf", "1; 2", "1e39"):
        with pytest.raises(ValueError, match=re.escape(f"must be a finite number, got {bad}.")):
            sweep(pack, model, empty("sd3"), f"1, {bad}")
    with pytest.raises(ValueError, match="scales is empty"):
        sweep(pack, model, empty("sd3"), " , ")
    swept, _, _ = sweep(pack, model, empty("sd3"))
    steps = []
    with pytest.raises(ValueError, match="has 4 scales, but 3 pictures"):
        sample(swept, attached(pack, "sd3"), batch=3, callback=lambda *a: steps.append(a))
    assert not steps


def test_the_model_before_it_is_untouched(pack, models):
    model = pack.patch(models["sd3"])
    before = sample(model, attached(pack, "sd3"), batch=2)
    sweep(pack, model, empty("sd3"))
    assert torch.equal(sample(model, attached(pack, "sd3"), batch=2), before)


def test_shipped_workflow(client):
    """On a real server with tiny models in place of the big ones: a sheet of five different pictures."""
    workflow = json.loads((ROOT / "workflows" / "vsf_scale_sweep_sd35_large_turbo.json").read_text(encoding="utf-8"))
    prompt = with_toys(to_prompt(workflow, client.object_info()))
    outputs = client.run(prompt)
    ref = outputs[only_node(prompt, "SaveImage")]["images"][0]
    picture = np.array(Image.open(BytesIO(client.image(ref))))
    assert picture.shape == (8 + 64 + 18 + 8, 8 + 5 * (64 + 8), 3)
    cells = [picture[8:72, 8 + 72 * i : 72 + 72 * i].tobytes() for i in range(5)]
    assert len(set(cells)) == 5


# -- VSF Contact Sheet


def sheet(pack, images, **kw):
    return pack.mapping["VSFContactSheet"].execute(images=images, **kw).result[0]


def colours(count, frames=1):
    """Pictures of 32 x 48 in one colour each, [count * frames, 32, 48, 3]."""
    values = torch.linspace(0.1, 0.9, count * frames)[:, None, None, None]
    return values.expand(-1, 32, 48, 3) * torch.tensor([1.0, 0.5, 0.2])


@pytest.mark.parametrize(("columns", "places"), [(0, [(0, 0), (0, 1), (0, 2)]), (2, [(0, 0), (0, 1), (1, 0)])])
def test_sheet(pack, columns, places):
    images = colours(3)
    (made,) = sheet(pack, images, labels="scale 1\nscale 2\nscale 3.3", columns=columns)
    strip, gap = 18, 8
    rows, across = (2, 2) if columns else (1, 3)
    assert made.shape == (gap + rows * (32 + strip + gap), gap + across * (48 + gap), 3)
    labels = []
    for image, (row, column) in zip(images, places, strict=True):
        y, x = gap + row * (32 + strip + gap), gap + column * (48 + gap)
        assert torch.equal(made[y : y + 32, x : x + 48], image)
        labels.append(made[y + 32 : y + 32 + strip, x : x + 48])
        assert labels[-1].min() < 0.3 and labels[-1][:, 0].min() == 1.0  # some ink, inside its cell
    assert not torch.equal(labels[0], labels[1])
    assert made[:gap].min() == made[:, :gap].min() == made[-gap:].min() == 1.0


def test_sheet_of_videos(pack):
    images = colours(2, frames=3)
    made = sheet(pack, images, labels="a\nb", videos=True)
    assert made.shape[0] == 3
    for frame in range(3):
        assert torch.equal(made[frame, 8:40, 8:56], images[frame])
        assert torch.equal(made[frame, 8:40, 64:112], images[3 + frame])


def test_sheet_without_labels_and_with_wrong_ones(pack):
    assert sheet(pack, colours(7)).shape[2] == 8 + 5 * 56
    for count, videos in ((7, True), (6, False), (1, True)):
        with pytest.raises(ValueError, match=f"{count} pictures, but 2 labels"):
            sheet(pack, colours(count), labels="a\nb", videos=videos)


@pytest.mark.parametrize(("family", "shape", "frames"), [("sd3", (8, 8), 1), ("wan", (3, 8, 8), 9)])
def test_labels_know_what_is_theirs(pack, models, family, shape, frames):
    """ComfyUI-Distributed joins the batches of several machines: 3 x 5 pictures are no 5 videos of 3 frames."""
    _, _, labels = sweep(pack, pack.patch(models[family]), {"samples": torch.zeros(1, 16, *shape)})
    assert sheet(pack, colours(4, frames), labels=labels).shape[0] == frames
    for joined in (2, 3):
        images = colours(4, frames * joined)
        with pytest.raises(ValueError, match=f"{len(images)} pictures, but 4 labels"):
            sheet(pack, images, labels=labels)
        assert sheet(pack, images, labels=labels, videos=True).shape[0] == frames * joined


@pytest.mark.parametrize("columns", [-1, 65, 100_000, float("nan"), "x", None])
def test_columns_that_a_link_may_bring(pack, columns):
    """A node's limits do not bind links: a row of so many pictures would fill the memory."""
    with pytest.raises(ValueError, match="columns must be a whole number from 0 to 64"):
        sheet(pack, colours(2), columns=columns)


def test_long_labels_are_cut(pack):
    """Much text in one cell took seconds."""
    assert torch.equal(sheet(pack, colours(1), labels="x" * 10**5), sheet(pack, colours(1), labels="x" * 1000))


def test_scales_beyond_a_run(pack, models):
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    patched = pack.patch(models["sd3"])
    with pytest.raises(ValueError, match="257 numbers"):
        pack.mapping["VSFScaleSweep"].execute(patched, latent, ", ".join(["1"] * 257))


def test_schemas(pack):
    for node, outputs in (("VSFScaleSweep", 3), ("VSFContactSheet", 1)):
        cls = pack.mapping[node]
        inputs = cls.INPUT_TYPES()
        for name, spec in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            assert spec[1].get("tooltip"), f"{node}.{name} has no tooltip"
        assert cls.GET_SCHEMA().search_aliases and len(cls.OUTPUT_TOOLTIPS) == outputs and all(cls.OUTPUT_TOOLTIPS)
