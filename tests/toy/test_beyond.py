"""How ``bench beyond`` scores and decides, and that what it samples is what it says."""

import baselines
import beyond
import numpy as np
import pytest
import sampling
import torch
import world
from quality import Job


def test_area_of_what_is_dominated():
    assert beyond.dominated(np.array([1.0]), np.array([1.0])) == 1.0
    assert np.isclose(beyond.dominated(np.array([0.5, 1.0]), np.array([1.0, 0.5])), 0.75)
    assert np.isclose(beyond.dominated(np.array([0.9, 0.5, 0.4]), np.array([0.2, 1.0, 0.9])), 0.5 + 0.4 * 0.2)
    two = beyond.dominated(np.array([[0.5, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.5], [1.0, 0.3]]))
    assert np.allclose(two, [0.75, 1.0])


def records(jobs, positive, negative):
    """Three pairs with two prompts of two pictures each; one score a job."""
    return [
        {
            "thing": "house",
            "part": part,
            "positive_scores": [p] * 2,
            "negative_scores": [n] * 2,
            "quality_scores": [1.0] * 2,
        }
        for _, p, n in zip(jobs, positive, negative, strict=True)
        for part in "abc"
        for _ in range(2)
    ]


def test_a_sweeps_scores_and_areas():
    jobs = beyond.sweep("vsf", {"offset": 0.2}, (1.0, 5.0))
    one = beyond.Sweep(jobs, records(jobs, (1.0, 0.5), (0.5, 1.0)))
    assert one.scores.shape == (3, 2, 3, 4)
    assert np.allclose(beyond.Sweep.areas(one.means()), [0.75, 1.0, 0.875])
    assert np.allclose(beyond.Sweep.areas(one.draws()), [0.75, 1.0, 0.875])


def test_bootstrap_draws_the_same_pictures_for_every_sweep():
    jobs = beyond.sweep("vsf", {"offset": 0.2}, (1.0, 5.0))
    one = beyond.Sweep(jobs, records(jobs, (1.0, 0.5), (0.5, 1.0)))
    one.scores = np.random.default_rng(0).random(one.scores.shape)
    two = beyond.Sweep(jobs, records(jobs, (1.0, 0.5), (0.5, 1.0)))
    two.scores = one.scores - 0.1
    assert np.allclose(one.draws() - two.draws(), 0.1)
    assert one.draws().std(0).min() > 0.01


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.01, 0.1), (0.02, 0.1), (-0.1, 0.1)], True),
        ([(0.01, 0.1), (0.02, 0.1), (-0.2, -0.1)], False),
        ([(0.01, 0.1), (-0.02, 0.1), (-0.1, 0.1)], False),
    ],
)
def test_what_wins(intervals, verdict):
    assert beyond.wins([{"area_gain_interval": interval} for interval in intervals]) is verdict


def test_a_figure_stands_in_its_familys_column():
    rows = [
        {"family": family, "candidate": name, "settings": {}, "area": 0.5, "area_gain": gain}
        | {"area_gain_interval": (gain, gain)}
        for family, name, gain in (("sd3", "vsf", 0.0), ("flux", "vsf", 0.0), ("wan", "vsf", 0.0), ("wan", "cap", 0.25))
    ]
    lines = beyond.table([*rows, {**rows[-1], "family": "sd3", "area_gain": 0.125}]).splitlines()
    cap, vsf = (line.split("|")[1:-1] for line in lines[2:])
    assert [cell.strip()[:13] for cell in cap[:4]] == ["cap", "0.500, +0.125", "-", "0.500, +0.250"]
    assert [cell.strip()[:13] for cell in vsf[:4]] == ["vsf", *["0.500, +0.000"] * 3]


@pytest.mark.parametrize("family", sampling.FAMILIES)
def test_no_two_candidates_are_the_same(family):
    asked = beyond.candidates(family)
    jobs = [job for method, grid in asked.values() for own in grid for job in beyond.sweep(method, own, beyond.SCALES)]
    assert len({(job.method, job.note) for job in jobs}) == len(jobs)
    assert all(job.settings["steps"] == beyond.STEPS for job in jobs)


@pytest.mark.parametrize("cross", [False, True])
def test_the_rule_for_vsf_is_vsf(cross):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 19, 32, generator=g) for _ in range(3))
    joint = baselines.Call(q, k, v, 3, 5)
    call = baselines.Call(q[:, :, 8:], k[:, :, :8], v[:, :, :8], 3, 5, cross=True) if cross else joint
    expected = baselines.vsf_dense(3.3, 0.2)(call)
    assert torch.allclose(baselines.beyond("vsf", 3.3, 0.2)(call), expected, atol=1e-5)


def test_sampling_with_a_candidate_is_sampling_with_the_node():
    """At numbers at which a candidate is VSF, through ComfyUI's sampler."""
    toy, case = sampling.Toy("sd3"), sampling.cases(world.pairs(["house"]), 1)[0]
    node = toy.pictures(case, "vsf", {"scale": 2.0, "offset": 0.2, "steps": 2}, [1])
    same = toy.pictures(case, "cap", {"scale": 2.0, "offset": 0.2, "most": 1.0, "steps": 2}, [1])
    shared = toy.pictures(case, "distinct", {"scale": 2.0, "offset": 0.2, "part": 0.0, "steps": 2}, [1])
    other = toy.pictures(case, "distinct", {"scale": 2.0, "offset": 0.2, "part": 1.0, "steps": 2}, [1])
    assert np.abs(same - node).max() < 1e-4
    assert np.abs(shared - node).max() < 1e-4
    assert np.abs(other - node).max() > 0.01
    assert Job("vsf", {"scale": 2.0, "blocks": "double"}).note == "scale 2, blocks double"
