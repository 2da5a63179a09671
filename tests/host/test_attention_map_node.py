"""VSF Attention Map: what it draws, what it refuses, and that it finds its map again when the sampler is cached."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import conditioning, load_sd3, sample, text
from hosting.errors import PromptFailed
from hosting.graph import only_node, to_prompt
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def holder(pack):
    return pack.mapping["VSFRecord"].execute(model=load_sd3()).result[1]


def show(pack, holder, image, **kw):
    return pack.mapping["VSFAttentionMap"].execute(map=holder, image=image, **kw).result


def filled(holder, maps, size, groups=(0, 1, 2)):
    """A record of one step a map [B, frames, h, w], the same in each of the layer groups that count."""
    frames, h, w = size
    record = holder.begin()
    record.begin((maps[0].shape[0], frames, h, w), len(maps), patch=2)
    counts = torch.tensor([float(g in groups) for g in range(3)])
    for step, values in enumerate(maps):
        record.add(step, values[None] * counts.view(3, 1, 1, 1, 1), counts)
    return holder


def test_odd_latents_lie_over_the_picture(pack, holder):
    """A latent of 5 x 7 has 3 x 4 tokens, the last of which reach half beyond the picture of 40 x 56 pixels."""
    values = torch.zeros(1, 1, 3, 4)
    values[..., 2, 3] = 1.0
    heat, overlay, _ = show(pack, filled(holder, [values], (1, 5, 7)), torch.zeros(1, 40, 56, 3))
    assert heat.shape == overlay.shape == (1, 40, 56, 3)
    bright = heat[0].sum(-1)
    assert bright[39, 55] == bright.max() > 2.5  # the middle of the last token
    assert bright[23, 55] < 0.1 and bright[39, 39] < 0.1  # the middles of its neighbours


def test_overlay_and_opacity(pack, holder):
    values = torch.tensor([[[[0.0, 0.4]]]])
    filled(holder, [values], (1, 2, 4))
    image = torch.rand(1, 16, 32, 3, generator=torch.Generator().manual_seed(0))
    heat, overlay, _ = show(pack, holder, image, opacity=1.0)
    assert torch.equal(overlay[:, :, :8], image[:, :, :8])  # nothing attended here
    torch.testing.assert_close(overlay[:, :, -8:], heat[:, :, -8:])
    assert torch.equal(show(pack, holder, image, opacity=0.0)[1], image)
    half = show(pack, holder, image, opacity=0.5)[1][:, :, -8:]
    torch.testing.assert_close(half, (heat[:, :, -8:] + image[:, :, -8:]) / 2)


def test_steps_and_scales(pack, holder):
    weak, strong = torch.tensor([[[[0.0, 0.1]]]]), torch.tensor([[[[0.0, 0.4]]]])
    filled(holder, [weak, strong], (1, 2, 4))
    image, yellow = torch.zeros(1, 16, 32, 3), torch.tensor([0xFC, 0xFF, 0xA4]) / 255

    def ends(**kw):
        return [heat[0, -1] for heat in show(pack, holder, image, **kw)[0]]

    (mean,) = ends()
    torch.testing.assert_close(mean, yellow)
    first, second = ends(steps="each")
    torch.testing.assert_close(second, yellow)
    first_alone, second_alone = ends(steps="each", normalize="each")
    torch.testing.assert_close(first_alone, yellow)
    assert first.sum() < 1.0
    dark, lighter = ends(steps="each", normalize="0 to 1")
    assert dark.sum() < lighter.sum() < yellow.sum()
    assert "peak 0.25," in show(pack, holder, image)[2]
    each = show(pack, holder, image, steps="each")[2]
    assert "peak 0.4," in each and "acted in 2 of 2 steps, most in step 2" in each


def test_layers(pack, holder):
    filled(holder, [torch.tensor([[[[0.0, 0.4]]]])], (1, 2, 4), groups=(1,))
    image = torch.zeros(1, 16, 32, 3)
    whole = show(pack, holder, image)[0]
    assert torch.equal(show(pack, holder, image, layers="middle")[0], whole)
    assert not torch.equal(show(pack, holder, image, layers="late")[0], whole)


@pytest.mark.parametrize(
    ("latent", "frames", "expected"),
    [(3, 9, [0, 1, 1, 1, 1, 2, 2, 2, 2]), (3, 3, [0, 1, 2]), (1, 1, [0])],
)
def test_video_frames_get_the_map_of_their_latent_frame(pack, holder, latent, frames, expected):
    values = torch.linspace(0.2, 0.9, latent).view(1, latent, 1, 1).expand(2, -1, 1, 2) * torch.tensor([1.0, 0.5])
    values = values * torch.tensor([1.0, 0.7]).view(2, 1, 1, 1)
    filled(holder, [values], (latent, 2, 4))
    heat = show(pack, holder, torch.zeros(2 * frames, 16, 32, 3), normalize="0 to 1")[0]
    assert heat.shape[0] == 2 * frames
    direct = filled(holder, [values.flatten(0, 1)[:, None]], (1, 2, 4))
    alone = show(pack, direct, torch.zeros(2 * latent, 16, 32, 3), normalize="0 to 1")[0]
    assert torch.equal(heat, torch.cat([alone[expected], alone[latent:][expected]]))


def test_refusals(pack, holder):
    image = torch.zeros(1, 16, 32, 3)
    with pytest.raises(ValueError, match="nothing was sampled with this VSF Record"):
        show(pack, holder, image)
    filled(holder, [torch.rand(2, 1, 1, 2)], (1, 2, 4))
    for count in (1, 3, 4):
        with pytest.raises(ValueError, match="the recorded run made 2 of 1 latent frames"):
            show(pack, holder, torch.zeros(count, 16, 32, 3))
    for name in ("steps", "layers", "normalize"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            show(pack, holder, torch.zeros(2, 16, 32, 3), **{name: "other"})
        with pytest.raises(ValueError, match=r'got "\\ud800"'):
            show(pack, holder, torch.zeros(2, 16, 32, 3), **{name: "\ud800"})


def test_a_run_without_a_negative_is_black(pack):
    recorded, holder = pack.mapping["VSFRecord"].execute(model=pack.patch(load_sd3())).result
    sample(recorded, conditioning(), batch=2)
    image = torch.rand(2, 128, 192, 3)
    heat, overlay, summary = show(pack, holder, image)
    assert heat.max() < 0.02 and torch.equal(overlay, image)
    assert "acted in no step" in summary
    attached = pack.negative(conditioning(), negative=[[text(5, 5), {}]])
    sample(recorded, attached, batch=2)
    heat, overlay, summary = show(pack, holder, image, steps="each")
    assert torch.equal(show(pack, holder, image, steps="each", opacity=0.0)[1], image.repeat(3, 1, 1, 1))
    assert heat.shape[0] == 6 and heat.max() > 0.9 and "acted in 3 of 3 steps" in summary


def test_schema(pack):
    for node, outputs in (("VSFRecord", 2), ("VSFAttentionMap", 3)):
        cls = pack.mapping[node]
        inputs = cls.INPUT_TYPES()
        for name, spec in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            assert spec[1].get("tooltip"), f"{node}.{name} has no tooltip"
        assert cls.GET_SCHEMA().search_aliases and len(cls.OUTPUT_TOOLTIPS) == outputs and all(cls.OUTPUT_TOOLTIPS)


# -- on a real server, whose cache skips what has not changed


def graph(client, seed, **settings):
    """The shipped demo with both nodes: only its heat map and overlay are saved."""
    workflow = json.loads((ROOT / "workflows" / "vsf_tiny_demo.json").read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, client.object_info())
    sampler, decode = only_node(prompt, "KSampler"), only_node(prompt, "VAEDecode")
    del prompt[only_node(prompt, "SaveImage")]
    prompt["record"] = {"class_type": "VSFRecord", "inputs": {"model": prompt[sampler]["inputs"]["model"]}}
    prompt[sampler]["inputs"].update(model=["record", 0], seed=seed, steps=2)
    inputs = {"map": ["record", 1], "image": [decode, 0], **settings}
    prompt["map"] = {"class_type": "VSFAttentionMap", "inputs": {**DEFAULTS, **inputs}}
    for name, slot in (("heat", 0), ("overlay", 1)):
        prompt[name] = {"class_type": "SaveImage", "inputs": {"images": ["map", slot], "filename_prefix": name}}
    return prompt, sampler


DEFAULTS = {"steps": "mean", "layers": "all", "opacity": 0.8, "normalize": "shared"}


def test_a_cached_sampler(client):
    def run(seed, **settings):
        prompt, sampler = graph(client, seed, **settings)
        ran = set()
        outputs = client.run(prompt, lambda node, *_: ran.add(node))
        pictures = [np.array(Image.open(BytesIO(client.image(outputs[n]["images"][0])))) for n in ("heat", "overlay")]
        assert "map" in ran
        return sampler in ran, *pictures

    sampled, heat, overlay = run(7)
    assert sampled and heat.max() > 200
    again, same_heat, other_overlay = run(7, opacity=0.2)
    assert not again, "ComfyUI should have taken the sampler from its cache"
    assert np.array_equal(same_heat, heat) and not np.array_equal(other_overlay, overlay)
    sampled, other_heat, _ = run(8)
    assert sampled and not np.array_equal(other_heat, heat)
    # the picture of seed 7 comes back from the cache, but its map is gone: an error, not the map of seed 8
    with pytest.raises(PromptFailed, match="the map of this picture is gone"):
        run(7, opacity=0.5)
    again, heat_8, _ = run(8, opacity=0.5)
    assert not again and np.array_equal(heat_8, other_heat)
    assert run(9)[0]
