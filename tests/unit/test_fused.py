"""The fused kernel besides its results: what it is cut into, on which chips, and inside torch.compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import DEVICE, backend_of, make

from vsf_core import NAG, VSF, NegativeTerms, TokenLayout, attend_cross, attend_joint, fused

SHARED = {"80": 163, "86": 99, "90": 227, "120": 99}
"""KiB of shared memory that one block of threads can have, by architecture, from NVIDIA's CUDA programming guide; of
those that share a column of the table and the number, one."""


@pytest.mark.parametrize("method", [VSF(), NAG(0.25, 2.5)], ids=["vsf", "nag"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_keeps_it(method, backend):
    """In one graph, as one call; with a mass too."""
    layout = TokenLayout(20, 5, 3)
    q, k, v = make(layout, spread=4.0)
    terms, kernel = NegativeTerms(torch.full((1, 3, 1), 3.3), torch.full((1, 1, 1), 0.2)), backend_of("fused", q)

    def run(q, k, v, mass):
        joint = attend_joint(method, kernel, q, k, v, layout, terms, None, mass)
        cross = attend_cross(method, kernel, q, k[:, :, 3:], v[:, :, 3:], k[:, :, :3], v[:, :, :3], terms)
        return joint, cross

    torch._dynamo.reset()
    compiled, masses = torch.compile(run, fullgraph=True, backend=backend), []
    results = []
    for each in (run, compiled):
        masses.append(torch.zeros(1, 20) if method.records else None)
        results.append(each(q, k, v, masses[-1]))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain) and ours.stride() == plain.stride()
    assert not method.records or (torch.equal(*masses) and masses[0].all())


def test_one_picture_for_one_seed():
    layout = TokenLayout(70, 9, 5)
    q, k, v = make(layout, dtype=torch.float16)
    terms, backend = NegativeTerms(torch.full((1, 1, 1), 3.3), torch.full((1, 1, 1), 0.2)), backend_of("fused", q)
    assert torch.equal(*(attend_joint(VSF(), backend, q, k, v, layout, terms) for _ in range(2)))


def test_the_tables_choice(monkeypatch):
    """By chip, dtype, head dimension and length; nothing is timed."""
    chosen = []
    monkeypatch.setattr(fused.FusedAttention, "_check", lambda self, *kind: chosen.append(self.tiles))
    monkeypatch.setattr(torch.version, "hip", None)

    def found(chip, dtype, dim):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
        kernel = fused.FusedAttention.find(torch.device("cuda", 0), dtype, dim, False)
        return kernel and kernel.tiles

    half = torch.bfloat16
    assert found((9, 0), half, 128) == fused.TABLE[9, 0][128]
    assert found((9, 0), half, 96) == found((9, 0), half, 128)
    assert found((8, 9), torch.float16, 64) == fused.SMALL_SHARED[64]
    for chip, dtype, dim in (((9, 0), torch.float32, 64), ((10, 0), half, 64), ((7, 5), half, 64), ((9, 0), half, 80)):
        assert found(chip, dtype, dim) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert found((9, 0), half, 128) is None
    if DEVICE.type == "cpu":
        assert fused.FusedAttention.find(DEVICE, half, 64, False) is None


def test_the_tables_launches_fit_their_chips(request):
    """With no GPU at hand too: Triton compiles for all of them, in a process in which it does."""
    command, env = [sys.executable, str(Path(__file__).with_name("compile_table.py"))], os.environ
    env = {**env, "TRITON_INTERPRET": "0"}
    every = ["--all"] if request.config.getoption("--long") else []  # 3 s each
    done = subprocess.run([*command, *SHARED, *every], env=env, check=True, capture_output=True, text=True)
    made = json.loads(done.stdout)
    assert {arch for arch, *_ in made} == {*SHARED} and len(made) == 2 * (9 if every else 4)
    for arch, tiles, shared, spilled in made:
        # what is spilled is in the step over N
        assert shared <= SHARED[arch] and spilled <= 128, (arch, tiles, shared, spilled)


def test_shapes_that_do_not_fit_are_refused():
    """A kernel would read beyond them, or take one picture's numbers for another's."""
    layout = TokenLayout(20, 6, 5)
    q, k, v = make(layout, batch=2)
    alpha, beta, padding = torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 5, dtype=torch.bool)
    kernel, mask = backend_of("fused", q), torch.zeros(1, 1, 1, layout.keys)

    def run(q=q, k=k, v=v, alpha=alpha, beta=beta, padding=padding, mask=mask):
        return attend_joint(VSF(), kernel, q, k, v, layout, NegativeTerms(alpha, beta, padding), mask)

    run()
    bad = {
        "alpha": [torch.ones(4, 1, 1), torch.ones(1, 3, 1), torch.ones(1, 1)],
        "beta": [torch.ones(3, 1, 1), torch.ones(1, 19, 1), torch.ones(1, 1, 4)],
        "padding": [padding.expand(3, 5), padding[:, :4]],
        "mask": [mask[..., :-1], mask.expand(3, 1, 1, -1), mask[..., :1]],
        "k": [k[:, :1], k[:1], k[:, :, :-1], k[..., :32], k.half()],
        "v": [v[:, :1], v[:, :, :-1], v.half()],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=r"does not fit q \[2, 2, 31, 64\] in torch.float32|grouped-query"):
                run(**{name: value})


def test_padding_lies_as_it_likes():
    layout = TokenLayout(20, 6, 5)
    q, k, v = make(layout, batch=2)
    padding = torch.tensor([[False, True]] * 5).T
    terms = NegativeTerms(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), padding)
    ours, expected = (attend_joint(VSF(), backend_of(way, q), q, k, v, layout, terms) for way in ("fused", "reference"))
    assert (ours - expected)[:, :, 5:].abs().max() < 1e-5
