"""What the evaluation makes of its records."""

import baselines
import numpy as np
import pytest
import quality
import sampling
import world


def records(method, positive, negative, split="validation", good=0.97, **settings):
    """Two pairs of ten pictures each."""
    scores = {"positive_scores": positive, "negative_scores": negative, "quality_scores": good}
    return [
        {
            **{"family": "sd3", "split": split, "method": method, "settings": settings},
            **{"thing": thing, "part": "p", "seeds": list(range(10))},
            **{name: [share] * 10 for name, share in scores.items()},
        }
        for thing in ("a", "b")
    ]


def test_rows_have_means_intervals_and_counts():
    (row,) = quality.summarise(records("vsf", 1.0, 0.4, scale=2.0))
    assert row["images"] == 20
    assert row["positive"] == 1.0
    assert abs(row["negative"] - 0.4) < 1e-9
    assert row["settings"] == {"scale": 2.0}


def test_bootstrap_covers_the_mean_and_narrows_with_more_pairs():
    rng = np.random.default_rng(0)
    few, many = ((rng.random((n, 8)) < 0.6).astype(float) for n in (4, 40))
    (low, high), (low_many, high_many) = quality.bootstrap(few), quality.bootstrap(many)
    assert low < few.mean() < high
    assert high_many - low_many < high - low


def test_the_setting_is_chosen_on_validation_pairs_within_bounds():
    rows = quality.summarise(
        records("none", 1.0, 0.1)
        + records("vsf", 1.0, 0.6, scale=1.0)
        + records("vsf", 0.92, 0.8, scale=2.0)
        + records("vsf", 0.80, 0.99, scale=3.0)  # loses the object
        + records("vsf", 1.0, 0.99, good=0.7, scale=4.0)  # loses the picture
        + records("vsf", 1.0, 1.0, split="test", scale=5.0)
        + records("nag", 0.5, 1.0, phi=4)
        + records("nasa", 1.0, 0.3, phi=0.4)
        + records("ong", 0.92, 0.3, scale=6.0)
        + records("ong", 0.89, 1.0, scale=2.0)
    )
    chosen = {method: quality.choose(rows, method) for method in quality.CHOSEN}
    assert chosen == {"vsf": {"scale": 2.0}, "ong": {"scale": 6.0}, "nag": None, "nasa": {"phi": 0.4}}
    lines = quality.table(rows, chosen).splitlines()
    marked = [line for line in lines if "(chosen)" in line]
    assert [line.split("|")[2].strip() for line in marked] == ["vsf", "nasa", "ong"]
    assert "| vsf | scale 2 (chosen)" in marked[0] and "| ong | scale 6 (chosen)" in marked[2]


@pytest.mark.parametrize("family", sampling.FAMILIES)
def test_every_job_is_asked_for_once(family):
    for split in ("validation", "test"):
        jobs = [(job.method, tuple(job.settings.items())) for job in quality.all_jobs(family, split, quick=False)]
        assert len(jobs) == len(set(jobs))
    tuned = {job.method for job in quality.all_jobs(family, "validation", quick=False)}
    assert tuned == {"none", *quality.CHOSEN}
    assert quality.all_jobs(family, "test", quick=True)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_other_methods_have_the_prompt_with_its_padding_or_the_words_alone(family):
    """NAG, NASA and ONG through the pack's nodes, against the formulas on what the text encoder itself says."""
    toy, case, seeds = sampling.Toy(family), sampling.cases(world.pairs(["house"]), 1)[0], [1]
    prompt, empty = toy.encode(case.negative)[0][0], toy.encode("")
    words = prompt[:, : toy.attach(case.caption, case.negative)[0][1]["vsf_negatives"][0]["tokens"].shape[1]]
    assert words.shape[1] < prompt.shape[1]
    made = {}
    for method, settings in (
        ("nag", {"phi": 4, "blend": 0.5, "tau": 2.5}),
        ("nasa", {"phi": 0.4}),
        ("ong", {"scale": 1}),
    ):
        for name, tokens in ((method, prompt), (f"{method} words", words)):
            made[name] = toy.pictures(case, name, {**settings, "steps": 1}, seeds)
            model = baselines.patched(toy.model, getattr(baselines, method)(**settings), tokens)
            expected = toy._decoded(toy._sample(model, toy.encode(case.caption), empty, seeds, 1, 1.0))
            assert np.abs(made[name] - expected).max() < 1e-3
        assert np.abs(made[method] - made[f"{method} words"]).max() > 0.01
