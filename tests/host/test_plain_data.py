"""What travels in a CONDITIONING is plain data: through files, other processes and other packs' nodes, to the same
picture."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from cases import CASES, clip_of, model_of
from helpers import relative

import nodes

PLAIN = (dict, list, tuple, str, int, float, bool, type(None))

ELSEWHERE = """
import sys
import torch

positive = torch.load(sys.argv[1], weights_only=True)
for _, entry in positive:
    for negative in entry["vsf_negatives"]:
        negative["tokens"] = negative["tokens"].clone()
assert not [name for name in sys.modules if "vsf" in name.lower() or name.startswith(("nodes", "comfy"))]
torch.save(positive, sys.argv[2])
"""


def parts_of(value):
    """Everything inside ``value``."""
    yield value
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for one in inside:
        yield from parts_of(one)


def through_pickle(positive, folder):
    return pickle.loads(pickle.dumps(positive))


def through_a_file(positive, folder):
    torch.save(positive, folder / "positive.pt")
    return torch.load(folder / "positive.pt", weights_only=True)


def through_another_process(positive, folder):
    """A real one, in which nothing of this pack can be imported."""
    torch.save(positive, folder / "there.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(folder / "there.pt"), str(folder / "back.pt")]
    subprocess.run(command, check=True, cwd=folder)
    return torch.load(folder / "back.pt", weights_only=True)


def through_the_end_and_back(positive, folder):
    return copy.deepcopy(positive)


def attached_of(pack, name):
    """A positive with two negatives, of which one has everything that a negative may have."""
    case = CASES[name]
    words = {"clip": clip_of(name), "text": "a red roof"} if case.clip else {"negative": case.negative()}
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:48, 16:64] = 1
    first = pack.negative(case.prompt(), **words, mask=mask, strength=0.7)
    return pack.negative(first, negative=case.negative(seed=6))


@pytest.mark.parametrize("name", ["sd3", "anima", "sdxl"])
def test_it_is_plain_data(pack, name):
    attached = attached_of(pack, name)
    negatives = attached[0][1]["vsf_negatives"]
    assert len(negatives) == 2
    for part in parts_of(negatives):
        assert type(part) in PLAIN or type(part) is torch.Tensor, type(part)


@pytest.mark.parametrize("way", [through_pickle, through_a_file, through_another_process, through_the_end_and_back])
@pytest.mark.parametrize("name", ["sd3", "anima"])
def test_another_way_gives_the_same_picture(pack, name, way, tmp_path):
    case, model = CASES[name], model_of(name)
    attached = attached_of(pack, name)
    expected = case.run(pack.patch(model), attached, steps=1)
    assert relative(expected, case.run(model, case.prompt(), steps=1)) > 1e-4
    assert torch.equal(case.run(pack.patch(model), way(attached, tmp_path), steps=1), expected)


def test_core_nodes_that_change_a_conditioning(pack):
    """Timestep ranges, areas, strengths and combinations copy an entry's dict: they take the negative along. Concat and
    Average keep that of ``conditioning_to``."""
    case = CASES["sd3"]
    attached, plain = attached_of(pack, "sd3"), case.prompt(seed=2)
    expected = attached[0][1]["vsf_negatives"]
    mask = torch.ones(1, 64, 64)
    for made in (
        nodes.ConditioningSetTimestepRange().set_range(attached, 0.0, 0.5)[0],
        nodes.ConditioningSetAreaPercentage().append(attached, 0.5, 0.5, 0.0, 0.0, 1.0)[0],
        nodes.ConditioningSetAreaStrength().append(attached, 0.5)[0],
        nodes.ConditioningSetMask().append(attached, mask, "default", 1.0)[0],
        nodes.ConditioningCombine().combine(attached, plain)[0],
        nodes.ConditioningConcat().concat(attached, plain)[0],
        nodes.ConditioningAverage().addWeighted(attached, plain, 0.5)[0],
    ):
        assert made[0][1]["vsf_negatives"] is expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "carries a negative in format 2, and this version of ComfyUI-VSF reads format 1"),
        ({"format": None}, "in format None"),
        ({"more": 1}, r"in which \['more'\] differ"),
    ],
)
def test_data_of_another_version_is_refused(pack, change, said):
    case, model = CASES["sd3"], model_of("sd3")
    attached = pack.negative(case.prompt(), negative=case.negative())
    attached[0][1]["vsf_negatives"][0].update(change)
    with pytest.raises(ValueError, match=said):
        case.run(pack.patch(model), attached)
    older = [[attached[0][0], {**attached[0][1], "vsf_negatives": (object(),)}]]  # as before there was a format
    with pytest.raises(ValueError, match="in format None.*run VSF Negative Conditioning again"):
        case.run(pack.patch(model), older)
    case.run(model, attached)  # an unpatched model never looks
