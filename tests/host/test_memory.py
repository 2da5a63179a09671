"""No tensor over all pairs of tokens is ever made, and the peak stays the plain model's."""

import sys

import pytest
import torch
from cases import CASES, model_of
from helpers import spy_override, with_override
from hosting.live_memory import LiveMemory
from oracle import oracle_model

SIZE = {"sd3": (96, 96), "flux": (96, 96), "wan": (4, 48, 48)}
TOKENS = 2304
"""Of the image: more than any layer of the tiny models is wide."""


def watched(model, positive, family, size=None):
    """One step: what it held in memory."""
    with torch.inference_mode(), LiveMemory() as memory:
        CASES[family].run(model, positive, size=size or SIZE[family], steps=1)
    return memory


def pairs(memory):
    return [shape for shape in memory.shapes if len(shape) > 1 and min(shape[-2:]) >= TOKENS]


WAYS = {
    "merge": {},
    "row mask": {"override": True},
    "masks": {"mask": True},
    "row mask, masks": {"override": True, "mask": True},
    "padding": {"padding": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", SIZE)
def test_no_tensor_over_all_pairs(pack, family, way):
    how, case, model = WAYS[way], CASES[family], model_of(family)
    positive, unwanted = case.prompt(), case.negative()
    if "mask" in how:
        unwanted[0][1]["mask"] = torch.rand(1, *SIZE[family][-2:])
    attached = pack.negative(positive, negative=unwanted)
    if "padding" in how:  # a second entry of another length
        attached = [*attached, *pack.negative(case.prompt(seed=2), negative=[[unwanted[0][0][:, :2], {}]])]
    patched = pack.patch(model, scale=3.3, offset=0.2)
    if "override" in how:
        patched = with_override(patched, spy_override([]))
    memory = watched(patched, attached, family)
    assert memory.shapes and not pairs(memory)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_dense_way_would_be_noticed(family):
    case, model = CASES[family], model_of(family)
    positive = case.prompt()
    oracle, _ = oracle_model(model, [case.expect(model, positive)])
    assert pairs(watched(oracle, positive, family))


@pytest.mark.parametrize("family", SIZE)
def test_peak(pack, family, monkeypatch):
    """At most 1% more is alive at once than in the plain model.

    The sliver's chunks, which do not shrink with the model, are made small here; tests/unit/test_memory.py bounds them.
    """
    attention = sys.modules[f"{pack.module.__name__}.vsf_core.attention"]
    monkeypatch.setattr(attention, "SLIVER_BYTES", {"cpu": 2**14})
    model, positive = model_of(family), CASES[family].prompt()
    attached = pack.negative(positive, negative=CASES[family].negative())
    size = (4, 96, 96) if family == "wan" else None  # next to whose text the negative's five tokens are little
    plain = watched(model, positive, family, size).peak
    assert watched(pack.patch(model, scale=3.3, offset=0.2), attached, family, size).peak <= 1.01 * plain
