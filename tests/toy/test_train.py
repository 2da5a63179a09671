"""The toys' training, a few tiny steps: it goes on from its checkpoints, and ComfyUI's loader takes what comes out."""

import captions
import comfy.ldm.flux.math
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.wan.model
import comfy.model_management
import numpy as np
import pytest
import sampling
import torch
import train
import train_codec
import vector_codec
import vector_world
import worlds
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
        options = [f"--out={out}", f"--steps={steps}", "--batch=2", "--pool=8", "--fresh=2"]
        train_codec.train(train_codec.parse(options))
    assert torch.load(out.with_suffix(".ckpt"), weights_only=True)["step"] == 3
    return out


def asked(family, out, *more):
    return train.parse([f"--family={family}", f"--out={out}", "--codec=x", "--steps=4", "--anneal=0.5", *TINY, *more])


@pytest.mark.parametrize(
    "family", [name if name == "sd3" else pytest.param(name, marks=pytest.mark.long) for name in train.FAMILIES]
)
def test_a_step_learns(family, tmp_path):
    """The same batch costs less and less."""
    comfy.model_management.in_training = True
    trainer = train.Trainer(asked(family, tmp_path / "x.safetensors", "--rate=3e-3"))
    frames = (2,) if family == "wan" else ()
    width = captions.POOLED if family == "sd3" else captions.WIDTH
    torch.manual_seed(0)
    data, weight = torch.randn(2, 16, *frames, 16, 16), torch.ones(2, 1, *frames, 16, 16)
    text = torch.randn(2, 12, width), torch.randn(2, captions.POOLED)
    losses = []
    for _ in range(8):
        trainer.g.manual_seed(0)
        losses.append(float(trainer.step(data, weight, *text)))
        trainer.progress.step = 200  # past the warm-up
        trainer.progress.options.steps = 1000
    assert losses[-1] < 0.97 * losses[0], losses


def test_training_goes_on_and_the_bench_samples_it(codec, capsys, monkeypatch):
    out = codec.parent / "sd3.safetensors"

    def trained(steps):
        train.train(asked("sd3", out, f"--codec={codec}", f"--steps={steps}"))
        return capsys.readouterr().out

    assert "from step 0" in trained(4)
    done = torch.load(out.with_suffix(".ckpt"), weights_only=True)
    assert (done["step"], done["annealing"]) == (4, True)
    assert "from step 4" in trained(4)  # done: nothing more to do
    assert "from step 2" in trained(5)  # where the last phase began
    assert out.with_suffix(".png").exists()
    with safe_open(out, "pt") as file:
        assert file.metadata()["steps"] == "5 of 5"
    monkeypatch.undo()  # ComfyUI's attention again
    toy = sampling.Toy("sd3", out)
    case = sampling.cases(toy.world.pairs["test"], 1)[0]
    pictures = toy.pictures(case, "vsf", {"scale": 2.0, "offset": 0.0, "steps": 1}, [1])
    assert pictures.shape == (1, 3, 128, 128)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert sampling.score(pictures, case).positive == [0]


def test_wans_latents_come_out_as_clips(codec):
    wan = worlds.World(vector_world, 16, codec.parent)
    latents = torch.randn(2, 16, 3, 16, 16)
    clips = wan.decode("wan", vector_codec.to_wan(latents))
    stills = wan.decode("sd3", latents[1, :, 2:].transpose(0, 1))
    assert clips.shape == (2, 3, 3, 128, 128)
    assert np.abs(clips[1, :, 2] - stills[0]).max() < 1e-4


def test_the_rate_rises_stays_and_falls_to_nothing(tmp_path):
    def progress(step, *more):
        options = asked("sd3", tmp_path / "x", "--steps=1000", "--anneal=0.25", "--rate=1e-3", *more)
        return train.Progress(options, step, 450.0)

    rates = {step: progress(step).rate for step in (0, 199, 700, 875, 999)}
    assert rates[0] == pytest.approx(5e-6)
    assert rates[199] == rates[700] == 1e-3
    assert rates[875] == pytest.approx(5e-4)
    assert rates[999] == pytest.approx(4e-6)
    assert progress(0, "--minutes=10").done == pytest.approx(0.75, abs=1e-3)
