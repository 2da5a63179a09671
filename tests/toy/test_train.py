"""The toys' training, a few tiny steps: it goes on from its checkpoints, and ComfyUI's loader takes what comes out."""

import comfy.ldm.flux.math
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.wan.model
import comfy.model_management
import pytest
import sampling
import torch
import train
import train_codec
from safetensors import safe_open

TINY = ["--float32", "--batch", "4", "--fresh", "2", "--pool", "4", "--report", "1"]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Training sets these, and does not put them back."""
    monkeypatch.setattr(comfy.model_management, "in_training", False)
    for module in (comfy.ldm.flux.math, comfy.ldm.modules.diffusionmodules.mmdit, comfy.ldm.wan.model):
        monkeypatch.setattr(module, "optimized_attention", module.optimized_attention)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    out = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    for steps in (2, 3):
        asked = [f"--out={out}", f"--steps={steps}", "--batch=2", "--pool=8", "--fresh=2"]
        train_codec.train(train_codec.parse(asked))
    assert torch.load(out.with_suffix(".ckpt"), weights_only=True)["step"] == 3
    return out


@pytest.mark.parametrize("family", train.FAMILIES)
def test_it_goes_on_and_comfyui_loads_it(family, codec, tmp_path, capsys):
    out = tmp_path / f"{family}.safetensors"

    def trained(steps):
        asked = [f"--family={family}", f"--out={out}", f"--codec={codec}", f"--steps={steps}", "--anneal=0.5", *TINY]
        train.train(train.parse(asked))
        return capsys.readouterr().out

    assert "from step 0" in trained(4)
    done = torch.load(out.with_suffix(".ckpt"), weights_only=True)
    assert (done["step"], done["annealing"]) == (4, True)
    assert "from step 4" in trained(4)  # done: nothing more to do
    assert "from step 2" in trained(6)  # where the last phase began
    assert out.with_suffix(".png").exists()
    with safe_open(out, "pt") as file:
        assert file.metadata()["steps"] == "6 of 6"
    assert sampling.load(out).model.diffusion_model is not None


def test_the_rate_rises_stays_and_falls_to_nothing(tmp_path):
    asked = ["--family=sd3", f"--out={tmp_path}/x", "--codec=x", "--steps=1000", "--anneal=0.25", "--rate=1e-3"]
    rates = {step: train.Progress(train.parse(asked), step, 0.0).rate for step in (0, 199, 700, 875, 999)}
    assert rates[0] == pytest.approx(5e-6)
    assert rates[199] == rates[700] == 1e-3
    assert rates[875] == pytest.approx(5e-4)
    assert rates[999] == pytest.approx(4e-6)
    half_time = train.Progress(train.parse([*asked, "--minutes=10"]), 0, 450.0)
    assert half_time.done == pytest.approx(0.75, abs=1e-3)
