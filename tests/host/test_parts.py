"""A pass that another node cuts into parts of the batch: the same picture as of the whole, or an error that says why.

The stand-ins cut where packs do: around ComfyUI's call of the model, around the network (ParallelAnything, with
threads and copies), and in a wrapper around its forward pass (Raylight's CFG parallel: its ranks run in turn here).
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import comfy.patcher_extension
import pytest
import torch
from cases import CASES, DISTINCT, model_of
from helpers import assert_close, relative

ROWS = {"cfg": 2.5, "batch": 2, "steps": 1}
"""Four rows: two pictures, each with the prompt and with the sampler's negative, which has no N."""
SIZES = (1, 3)


def cut(value, sizes):
    """``value`` for each part, cut where it has a row for each of the batch."""
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == sum(sizes):
        return list(value.split(sizes))
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [list(part) for part in zip(*(cut(one, sizes) for one in value), strict=True)]
    return [value] * len(sizes)


def joined(parts):
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return [torch.cat(some) for some in zip(*parts, strict=True)]


def rows_of(x):
    return (x[0] if isinstance(x, (list, tuple)) else x).shape[0]


def in_parts(runs, args, kwargs, sizes, each=map):
    """``runs`` on the parts of what they would be called with, joined again."""
    if rows_of(args[0]) != sum(sizes):
        return runs[0](*args, **kwargs)
    given = zip(*(cut(arg, sizes) for arg in args), strict=True)
    named = [{key: cut(value, sizes)[i] for key, value in kwargs.items()} for i in range(len(sizes))]
    return joined(list(each(lambda run, a, k: run(*a, **k), runs, given, named)))


def around_the_model(model, sizes):
    def wrapper(apply, given):
        if given["input"].shape[0] != sum(sizes):
            return apply(given["input"], given["timestep"], **given["c"])
        return in_parts([apply] * len(sizes), (given["input"], given["timestep"]), given["c"], sizes)

    m = model.clone()
    m.set_model_unet_function_wrapper(wrapper)
    return m


def around_the_model_known_only(model, sizes):
    """Cuts what it knows, and leaves the rest whole."""

    def wrapper(apply, given):
        known = ("c_crossattn", "y", "c_concat")
        named = [{**given["c"], **{k: cut(given["c"][k], sizes)[i] for k in known if k in given["c"]}} for i in (0, 1)]
        x, t = cut(given["input"], sizes), cut(given["timestep"], sizes)
        return torch.cat([apply(x[i], t[i], **named[i]) for i in (0, 1)])

    m = model.clone()
    m.set_model_unet_function_wrapper(wrapper)
    return m


def around_the_network(model, sizes, each=map, copies=False):
    m = model.clone()
    network = m.model.diffusion_model
    runs = [network.forward] + [(copy.deepcopy(network) if copies else network).forward for _ in sizes[1:]]
    m.add_object_patch("diffusion_model.forward", lambda *a, **k: in_parts(runs, a, k, sizes, each))
    return m


def in_threads(run, *given):
    """As torch's modes are a thread's own, each has to be told."""

    def one(*args):
        with torch.inference_mode():
            return run(*args)

    with ThreadPoolExecutor(len(SIZES)) as pool:
        return list(pool.map(one, *given))


def around_the_forward_pass(model, sizes):
    def wrapper(executor, *args, **kwargs):
        return in_parts([executor] * len(sizes), args, kwargs, sizes)

    m = model.clone()
    m.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)
    return m


@pytest.mark.parametrize("name", DISTINCT)
def test_parts_make_the_whole(pack, case, model, name):
    attached = pack.negative(case.prompt(), negative=case.negative())
    expected = case.run(pack.patch(model), attached, **ROWS)
    for around in (around_the_model, around_the_network, around_the_forward_pass):
        assert_close(case.run(around(pack.patch(model), SIZES), attached, **ROWS), expected)


@pytest.mark.parametrize("name", ["flux", "wan", "sdxl", "ltxv"])
def test_copies_of_the_network_in_threads(pack, case, model, name):
    """As ParallelAnything runs a batch, one copy a GPU."""
    attached = pack.negative(case.prompt(), negative=case.negative())
    expected = case.run(pack.patch(model), attached, **ROWS)
    there = around_the_network(pack.patch(model), SIZES, in_threads, copies=True)
    assert_close(case.run(there, attached, **ROWS), expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sd3", "in threads of its own on copies of its network"),
        ("qwen-image", "runs a copy of this model's network"),
        ("hunyuan", "runs a copy of this model's network"),
    ],
)
def test_copies_that_lack_the_hooks_are_refused(pack, case, model, name, said):
    attached = pack.negative(case.prompt(), negative=case.negative())
    there = around_the_network(pack.patch(model), SIZES, in_threads, copies=True)
    with pytest.raises(RuntimeError, match=said):
        case.run(there, attached, **ROWS)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_rows_that_differ_in_their_numbers_alone(pack, case, model, name):
    """Scales and masks of one picture each: the text is the same in all, so the latent tells the rows."""
    swept = pack.mapping["VSFScaleSweep"]
    masks = torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, 32:] = 1, 1
    attached = pack.negative(case.prompt(), negative=case.negative(), **({} if name == "wan" else {"mask": masks}))
    for around in (around_the_network, around_the_forward_pass):
        latent = {"samples": torch.zeros(1, case.channels, *case.sizes[0])}
        patched = swept.execute(model=pack.patch(model), latent=latent, scales="0, 5").result[0]
        expected = case.run(patched, attached, batch=2, steps=1)
        assert relative(expected[1:], expected[:1]) > 1e-3
        assert_close(case.run(around(patched, (1, 1)), attached, batch=2, steps=1), expected)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_numbers_that_are_the_same_need_no_place(pack, case, model, name):
    """At cfg 1 all rows share them: whatever is cut, and however, is right."""
    attached, run = pack.negative(case.prompt(), negative=case.negative()), {"batch": 2, "steps": 1}
    expected = case.run(pack.patch(model), attached, **run)
    assert_close(case.run(around_the_model_known_only(pack.patch(model), (1, 1)), attached, **run), expected)


def test_parts_that_cannot_be_told_are_refused(pack):
    """Whatever the text and the latent do not tell is not guessed."""
    case, model = CASES["flux"], model_of("flux")
    attached = pack.negative(case.prompt(), negative=case.negative())
    with pytest.raises(RuntimeError, match="calls the model with 1 of the 2 rows of a step"):
        case.run(around_the_model_known_only(pack.patch(model), (1, 1)), attached, cfg=2.5, steps=1)
    recorded = pack.mapping["VSFRecord"].execute(model=pack.patch(model)).result[0]
    with pytest.raises(RuntimeError, match="calls the model with 1 of them, VSF Record, which sees whole steps"):
        case.run(around_the_network(recorded, (1, 1)), attached, cfg=2.5, steps=1)

    def louder(m):
        """Changes the latent and the text of a part, so that neither is the step's any more."""
        m = m.clone()
        forward = m.model.diffusion_model.forward

        def changed(x, timestep, context, *args, **kwargs):
            made = [
                forward(
                    x[i : i + 1] * 1.01,
                    timestep[i : i + 1],
                    context[i : i + 1] * 1.01,
                    *args,
                    **{key: cut(value, (1, 1))[i] for key, value in kwargs.items()},
                )
                for i in (0, 1)
            ]
            return torch.cat(made)

        m.add_object_patch("diffusion_model.forward", changed)
        return m

    with pytest.raises(RuntimeError, match="their latent and text are none of this step's"):
        case.run(louder(pack.patch(model)), attached, cfg=2.5, steps=1)
