"""The colours of the attention map. ``nodes/drawing.py`` needs torch alone: it is loaded by itself, without ComfyUI."""

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "nodes" / "drawing.py"


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("drawing", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_colours_rise_in_lightness(drawing):
    values = torch.linspace(-0.5, 1.5, 401)
    colours = drawing.heat_colors(values)
    assert colours.min() >= 0 and colours.max() <= 1
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ torch.tensor([0.2126, 0.7152, 0.0722])
    inside = luminance[100:301]
    assert (inside.diff() > 0).all()
    assert torch.equal(colours[0], colours[100]) and torch.equal(colours[-1], colours[300])
    lightness = 116 * inside.clamp(min=0.008856) ** (1 / 3) - 16
    assert lightness[50] == pytest.approx(25, abs=6) and lightness[100] == pytest.approx(50, abs=6)


def test_an_overlay_hides_the_more_the_hotter(drawing):
    picture, values = torch.full((1, 1, 3, 3), 0.25), torch.tensor([[[0.0, 0.5, 2.0]]])
    cold, warm, hot = drawing.laid_over(picture, values, 0.8)[0, 0]
    colours = drawing.heat_colors(values)[0, 0]
    assert torch.equal(cold, picture[0, 0, 0])
    assert torch.allclose(warm, 0.6 * picture[0, 0, 1] + 0.4 * colours[1])
    assert torch.allclose(hot, 0.2 * picture[0, 0, 2] + 0.8 * colours[2])
