"""Off is bit-identical to stock, whatever turned it off and whatever happened before."""

import comfy.model_management
import pytest
import torch
from helpers import conditioning, load_sd3, sample, spy_override, text, with_override

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def model():
    return load_sd3()


@pytest.fixture(scope="module")
def attached(pack):
    return pack.negative(conditioning(), negative=[[text(5, 5), {}]])


CFG = pytest.mark.parametrize("cfg", [1.0, 2.5])


@CFG
def test_the_comparison_can_fail(pack, model, attached, cfg):
    assert not torch.equal(sample(pack.patch(model), attached, cfg=cfg), sample(model, conditioning(), cfg=cfg))


@CFG
@pytest.mark.parametrize("batch", [1, 3])
def test_either_node_alone(pack, model, attached, cfg, batch):
    stock = sample(model, conditioning(), cfg=cfg, batch=batch)
    assert torch.equal(sample(model, attached, cfg=cfg, batch=batch), stock)
    assert torch.equal(sample(pack.patch(model), conditioning(), cfg=cfg, batch=batch), stock)


@CFG
@pytest.mark.parametrize("empty", ["", "  \n\t "])
def test_empty_text(pack, model, cfg, empty):
    off = pack.negative(conditioning(), text=empty)
    assert torch.equal(sample(pack.patch(model), off, cfg=cfg), sample(model, conditioning(), cfg=cfg))


@CFG
@pytest.mark.parametrize("window", [(0.99, 1.0), (0.0, 0.001)])
def test_outside_the_window(pack, model, attached, cfg, window):
    """The schedule of three steps has none that late or that early."""
    patched = pack.patch(model, start_percent=window[0], end_percent=window[1])
    if window[0] == 0.0:  # the first step, at sigma 1, is inside
        assert not torch.equal(sample(patched, attached, cfg=cfg), sample(model, conditioning(), cfg=cfg))
    else:
        assert torch.equal(sample(patched, attached, cfg=cfg), sample(model, conditioning(), cfg=cfg))


def test_window_acts_on_its_steps_only(pack, model, attached):
    """Before the window's first step the latents are stock's, bit for bit; from there on they are not."""

    def steps(m, cond):
        seen = []
        sample(m, cond, steps=6, callback=lambda i, x0, x, total: seen.append(x.clone()))
        return seen

    stock, late = steps(model, conditioning()), steps(pack.patch(model, start_percent=0.5), attached)
    same = [torch.equal(a, b) for a, b in zip(stock, late, strict=True)]
    assert same[0] and not same[-1] and same == sorted(same, reverse=True)
    early = steps(pack.patch(model, end_percent=0.5), attached)
    always = steps(pack.patch(model), attached)
    same = [torch.equal(a, b) for a, b in zip(always, early, strict=True)]
    assert same[1] and not same[-1]


def test_window_follows_a_later_model_sampling_node(pack, model, attached):
    """percent_to_sigma is asked at run time: a shift patched on afterwards moves the window."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    late = pack.patch(model, start_percent=0.5)
    shifted = ModelSamplingSD3().patch(late, shift=1.0)[0]
    by_hand = pack.patch(ModelSamplingSD3().patch(model, shift=1.0)[0], start_percent=0.5)
    assert torch.equal(sample(shifted, attached, steps=6), sample(by_hand, attached, steps=6))


@CFG
def test_after_an_exception_inside_a_step(pack, model, attached, cfg):
    stock, vsf = sample(model, conditioning(), cfg=cfg), sample(pack.patch(model), attached, cfg=cfg)
    patched = pack.patch(model)

    def fail(func, q, k, v, heads, **kw):
        raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        sample(with_override(patched, fail), attached, cfg=cfg)
    assert torch.equal(sample(model, conditioning(), cfg=cfg), stock)
    assert torch.equal(sample(patched, conditioning(), cfg=cfg), stock)
    assert torch.equal(sample(patched, attached, cfg=cfg), vsf)


@CFG
def test_after_an_interrupt(pack, model, attached, cfg):
    stock, patched = sample(model, conditioning(), cfg=cfg), pack.patch(model)

    def interrupt(*_):
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, attached, cfg=cfg, callback=interrupt)
        comfy.model_management.throw_exception_if_processing_interrupted()
    comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(sample(model, conditioning(), cfg=cfg), stock)
    assert torch.equal(sample(patched, conditioning(), cfg=cfg), stock)


@CFG
def test_in_the_run_after_a_patched_run(pack, model, attached, cfg):
    stock = sample(model, conditioning(), cfg=cfg)
    sample(pack.patch(model), attached, cfg=cfg)
    assert torch.equal(sample(model, conditioning(), cfg=cfg), stock)
    assert torch.equal(sample(model, attached, cfg=cfg), stock)


def test_nothing_of_a_run_outlives_it(pack, model, attached):
    """The model's options and the conditioning are as they were, also after a failure."""
    patched = pack.patch(with_override(model, spy_override([])))
    before = {k: dict(v) if isinstance(v, dict) else v for k, v in patched.model_options.items()}
    entry = dict(attached[0][1])
    sample(patched, attached)
    assert patched.model_options["transformer_options"] == before["transformer_options"]
    assert attached[0][1].keys() == entry.keys()
    assert "model_conds" not in attached[0][1]


@CFG
def test_released_layout_off(pack, model, cfg):
    patched = pack.patch(model, layout="released")
    assert torch.equal(sample(patched, conditioning(), cfg=cfg), sample(model, conditioning(), cfg=cfg))
