"""After its first step a run with VSF waits for the device no more often than one without."""

import pytest
import torch
from cases import CASES, DISTINCT, model_of, region
from helpers import spy_override, windowed, with_override
from waits import Waits

import nodes


@pytest.fixture(scope="module", params=DISTINCT)
def name(request):
    return request.param


def waits(case, model, positive, **run):
    """By place, in a run's second step, after the first prediction of which nothing is new."""
    with Waits() as found:
        case.run(model, positive, steps=2, callback=found.next_step, **run)
    assert len(found.steps) == 3
    return found.steps[1]


def added(case, stock, *ours, **run):
    """Where one of ``ours``, (model, positive), waits and ``stock`` does not."""
    plain = waits(case, *stock, **run)
    return [dict(waits(case, *one, **run) - plain) for one in ours]


def recorded(pack, model):
    return pack.mapping["VSFRecord"].execute(model=model).result[0]


def test_families(pack, name, case, model):
    """Two negatives, one of them with a mask, and VSF Record; and NAG."""
    pixels, plain = region(case.sizes[0])[1], case.prompt()
    one = pack.negative(plain, negative=case.negative(), mask=pixels)
    two, patched = pack.negative(one, negative=case.negative(3)), pack.patch(model)
    patched = patched if name in ("sd1", "sdxl") else recorded(pack, patched)
    assert added(case, (model, plain), (patched, two), (pack.patch(model, method="nag"), one)) == [{}, {}]


@pytest.mark.parametrize("family", ["sd3", "flux", "wan", "z-image"])
def test_ways(pack, family):
    """NASA, an attention without a log-sum-exp, the released layout, and a sampler that looks twice a step."""
    case, model = CASES[family], model_of(family)
    plain, pixels = case.prompt(), region(case.sizes[0])[1]
    negative = [[case.negative()[0][0], {"pooled_output": plain[0][1]["pooled_output"]}]]
    attached, masked = pack.negative(plain, negative=negative), pack.negative(plain, negative=negative, mask=pixels)
    others = recorded(pack, pack.patch(with_override(model, spy_override([]))))
    ours = [(pack.patch(model, method="nasa"), attached), (others, masked)]
    if family != "z-image":
        ours.append((pack.patch(model, layout="released"), attached))
    assert added(case, (model, plain), *ours, cfg=2.5, batch=2) == [{}] * len(ours)
    assert added(case, (model, plain), (recorded(pack, pack.patch(model)), attached), sampler="heun") == [{}]


@pytest.mark.parametrize("family", ["wan", "ltxv"])
def test_context_windows(pack, family):
    case, model = CASES[family], windowed(model_of(family))
    size = (8, *case.sizes[0][1:])
    attached = pack.negative(case.prompt(size=size), negative=case.negative(), mask=region(size)[1])
    ours = recorded(pack, pack.patch(model)), attached
    assert added(case, (model, case.prompt(size=size)), ours, size=size) == [{}]


@pytest.mark.parametrize("left_out", [0, 2])
def test_guides(pack, left_out):
    """LTX-Video's, of which the model may leave tokens out; for that it waits itself, each time."""
    case, model = CASES["ltxv"], model_of("ltxv")
    size = case.sizes[0]
    denoise = torch.ones(1, 1, *size)
    denoise[:, :, -1] = 0.0
    denoise[:, :, -1, 0, :left_out] = -1.0
    ((cond, options),) = case.prompt()
    guided = {"keyframe_idxs": torch.zeros(1, 3, size[1] * size[2], 2), "concat_mask": denoise}
    positive = [[cond, {**options, **guided}]]
    attached = pack.negative(positive, negative=case.negative(), mask=region(size)[1])
    assert added(case, (model, positive), (recorded(pack, pack.patch(model)), attached), cfg=2.5) == [{}]


def test_a_window_of_steps_reads_the_noise_level_once(pack):
    """As ComfyUI does for an entry with a range of its own; with both, VSF reads it once all the same."""
    model, case = model_of("sd1"), CASES["sd1"]  # its noise levels are a table on the device
    (part,) = nodes.ConditioningSetTimestepRange().set_range(case.prompt(), 0.0, 0.9)
    for plain, settings in ((case.prompt(), {"end_percent": 0.95}), (part, {"end_percent": 0.95}), (part, {})):
        ours = pack.patch(model, **settings), pack.negative(plain, negative=case.negative())
        ((place, times),) = added(case, (model, plain), ours)[0].items()
        assert place.startswith("nodes/run.py") and times == 1


# -- the checker ------------------------------------------------------------------------------------------------------


WAITING = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 1),
    "if all": lambda x: 1 if (x > 0).all() else 2,
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x.sum()),
    "range": lambda x: range(x.long()[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu", torch.float64),
    "numpy": lambda x: x.numpy(),
    "in": lambda x: 3.0 in x,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "bool index": lambda x: x[x > 1],
    "bool index written": lambda x: x.__setitem__(x > 1, 0.0),
    "list index": lambda x: x[[0, 1]],
    "number on the device": lambda x: x[x.argmax()],
    "ordinary index": lambda x: x[torch.arange(2)],
    "copy there": lambda x: torch.arange(2).to(x.device),
    "copy like it": lambda x: torch.arange(2).to(x),
    "made there of Python's numbers": lambda x: torch.tensor([1, 2], device=x.device),
    "written into it": lambda x: x.copy_(torch.zeros(3)),
}
FREE = {
    "ordinary memory": lambda x: (torch.zeros(3) + 1)[0].item(),
    "ordinary index": lambda x: torch.zeros(3)[torch.tensor([True, False, True])].tolist(),
    "filled there": lambda x: torch.full((3,), 2.0, device=x.device) + torch.arange(3, device=x.device),
    "computed there": lambda x: torch.where(x > 1, x, 0.0)[1:][None, :, None].masked_fill_(x[1:, None] > 2, 0.0),
    "its type": lambda x: x.to(torch.float16).to(x),
    "its index": lambda x: x[x.long().clamp(0, 2)],
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits(what):
    x = torch.tensor([1.0, 2.0, 3.0])  # from before: on the device
    with Waits() as found:
        WAITING[what](x)
    ((place, times),) = found.steps[0].items()
    assert times == 1 and place.startswith("host/test_waits.py") and place.endswith("<lambda>")


@pytest.mark.parametrize("what", FREE)
def test_what_does_not(what):
    x = torch.tensor([1.0, 2.0, 3.0])
    with Waits() as found:
        FREE[what](x)
    assert found.steps == [{}]
