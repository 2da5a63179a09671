"""What the nodes refuse, and what they say."""

import logging

import comfy.model_base
import comfy.sd
import pytest
import tiny
import torch
from helpers import conditioning, load_flux, load_sd3, sample, text

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def model():
    return load_sd3()


def test_schema_has_a_default_for_everything_but_the_two_sockets(pack):
    for node, required in (("VSFNegativeConditioning", {"positive"}), ("VSFModelPatch", {"model"})):
        cls = pack.mapping[node]
        inputs = cls.INPUT_TYPES()
        for name, spec in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            assert name in required or name in inputs.get("optional", {}) or "default" in spec[1]
            assert spec[1].get("tooltip"), f"{node}.{name} has no tooltip"
        assert pack.mapping[node].GET_SCHEMA().search_aliases
    assert pack.mapping["VSFNegativeConditioning"].RETURN_TYPES == ["CONDITIONING"]
    assert pack.mapping["VSFModelPatch"].RETURN_TYPES == ["MODEL"]


def test_patching_twice(pack, model):
    with pytest.raises(ValueError, match="patched by VSF Model Patch already"):
        pack.patch(pack.patch(model))
    pack.patch(model)  # the model itself was never touched


def test_unsupported_model(pack):
    class Subclass(type(load_sd3().model)):
        """Subclasses differ in what matters, so they are not supported by inheritance."""

    model = load_sd3()
    model.model.__class__ = Subclass
    with pytest.raises(
        ValueError,
        match=r"class .*Subclass .of tests.host.test_nodes. are not supported. Supported, .*: Stable Diffusion 3",
    ):
        pack.patch(model)


def test_variant_whose_text_is_mixed_before_the_blocks(pack):
    model = comfy.sd.load_diffusion_model_state_dict(tiny.sd3(context=64, context_processor_layers=1))
    with pytest.raises(ValueError, match="context_processor"):
        pack.patch(model)


@pytest.mark.parametrize(
    "blocks",
    [
        "single",
        "double:",
        "double:3",
        "double:2-1",
        "double:0-9",
        "0-2",
        "double:-1-2",
        ";",
        "double,,",
        "double:" + "9" * 5000,
    ],
)
def test_bad_blocks_name_the_valid_range(pack, model, blocks):
    with pytest.raises(ValueError, match="double:0-2"):
        pack.patch(model, blocks=blocks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": float("nan")}, "scale must be a number from -20 to 20"),
        ({"offset": float("inf")}, "offset must be a number from -20 to 100"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "must lie before"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "must lie before"),
        ({"layout": "other"}, "layout must be one of paper, released"),
    ],
)
def test_bad_settings(pack, model, settings, message):
    with pytest.raises(ValueError, match=message):
        pack.patch(model, **settings)


def test_negative_of_another_width_fails_before_the_first_step(pack, model):
    steps = []
    attached = pack.negative(conditioning(), negative=[[text(4, 5, width=128), {}]])
    with pytest.raises(ValueError, match="128 wide, but this model .* takes 64"):
        sample(pack.patch(model), attached, callback=lambda *a: steps.append(a))
    assert not steps


def test_text_and_negative_together(pack):
    with pytest.raises(ValueError, match="both text and negative"):
        pack.negative(conditioning(), text="roof", negative=conditioning(seed=2))


def test_text_without_clip(pack):
    with pytest.raises(ValueError, match="text needs clip"):
        pack.negative(conditioning(), text="roof")


def test_several_negative_entries(pack):
    with pytest.raises(ValueError, match="2 entries"):
        pack.negative(conditioning(), negative=conditioning() + conditioning())


def test_negative_of_padding_only(pack):
    empty = [[text(4, 5), {"attention_mask": torch.zeros(1, 4)}]]
    with pytest.raises(ValueError, match="no token left"):
        pack.negative(conditioning(), negative=empty)


def test_extrapolation_of_a_ready_conditioning(pack):
    with pytest.raises(ValueError, match="extrapolation needs text and clip"):
        pack.negative(conditioning(), negative=conditioning(), extrapolation=8.0)


def test_empty_mask(pack):
    with pytest.raises(ValueError, match="mask is empty"):
        pack.negative(conditioning(), negative=conditioning(), mask=torch.zeros(1, 0, 8))


def test_mask_of_nan(pack):
    mask = torch.ones(1, 8, 8)
    mask[0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="mask has values that are NaN"):
        pack.negative(conditioning(), negative=conditioning(), mask=mask)


def test_mask_beyond_its_range(pack, model):
    """Below 0 is 0 and above 1 is 1, as ComfyUI's own nodes take masks."""
    mask = torch.linspace(-3, 4, 64).reshape(1, 8, 8)
    made = [pack.negative(conditioning(), negative=[[text(4, 5), {}]], mask=m) for m in (mask, mask.clamp(0, 1))]
    beyond, within = (sample(pack.patch(model), attached) for attached in made)
    assert torch.equal(beyond, within)


def messages(caplog):
    return [r.getMessage() for r in caplog.records if "VSF:" in r.getMessage()]


def test_log_of_a_run(pack, model, caplog):
    attached = pack.negative(conditioning(), negative=[[text(4, 5), {"attention_mask": torch.ones(1, 4)}]])
    with caplog.at_level(logging.INFO):
        sample(pack.patch(model, scale=2.0), attached, cfg=2.5, steps=4)
    (line,) = messages(caplog)
    for part in (
        "Stable Diffusion 3",
        "4 negative tokens",
        "scale 2",
        "offset 0.2",
        "3 of 3 blocks",
        "reached 3",
        "merge (cpu_flash)",
    ):
        assert part in line


def test_patched_model_without_a_negative_says_so_once(pack, model, caplog):
    sample(pack.patch(model), conditioning())
    (line,) = messages(caplog)
    assert "no conditioning carries a negative" in line


def test_window_that_no_step_hits_says_so(pack, model, caplog):
    attached = pack.negative(conditioning(), negative=[[text(4, 5), {"attention_mask": torch.ones(1, 4)}]])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sample(pack.patch(model, start_percent=0.99), attached)
    (line,) = messages(caplog)
    assert "no step of this run fell inside" in line


def test_negative_on_the_wrong_socket_says_so(pack, model, caplog):
    wrong = pack.negative(conditioning(seed=99), negative=[[text(4, 5), {}]])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sample(pack.patch(model), conditioning(), wrong)
    assert any("negative input only" in line for line in messages(caplog))


def graph_check(pack):
    import importlib

    return importlib.import_module(pack.module.__name__ + ".nodes.graph_check")


def test_unmet_negatives(pack):
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {}},
        "2": {"class_type": "VSFModelPatch", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}},
        "4": {"class_type": "VSFNegativeConditioning", "inputs": {"positive": ["3", 0]}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "positive": ["4", 0]}},
    }
    unmet = graph_check(pack).unmet_negatives
    assert unmet(prompt) == []
    prompt["5"]["inputs"]["model"] = ["1", 0]
    assert unmet(prompt) == ["4"]
    prompt["6"] = {"class_type": "KSampler", "inputs": {"model": ["2", 0], "positive": ["4", 0]}}
    assert unmet(prompt) == []  # one sampler of two is patched: a before-and-after graph
    prompt["7"] = {"class_type": "ModelMergeSimple", "inputs": {"model1": ["2", 0], "model2": ["1", 0], "ratio": 0.5}}
    prompt["6"]["inputs"]["model"] = ["7", 0]
    assert unmet(prompt) == []
    prompt["7"]["inputs"].update(model1=["1", 0], model2=["2", 0])
    assert unmet(prompt) == ["4"]  # a merge takes the weights alone of its second model
    assert unmet({"1": "nonsense", "2": {"inputs": 5}, "3": {"class_type": "VSFNegativeConditioning"}}) == ["3"]


def test_a_queued_prompt_is_looked_at_and_passed_on(pack, caplog):
    data = {"prompt": {"4": {"class_type": "VSFNegativeConditioning", "inputs": {"positive": ["9", 0]}}}}
    assert graph_check(pack)._on_prompt(data) is data
    assert any("node 4" in line and "no patched model" in line for line in messages(caplog))
    assert graph_check(pack)._on_prompt({"prompt": None}) == {"prompt": None}


def test_a_block_without_its_joint_attention_fails_loudly(pack, model, monkeypatch):
    """A host that computes attention past the override: an error in the first step, not a picture without effect."""
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
    import torch.nn.functional as F

    def direct(q, k, v, heads, **kw):
        q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    attached = pack.negative(conditioning(), negative=[[text(4, 5), {}]])
    monkeypatch.setattr(mmdit, "optimized_attention", direct)
    with pytest.raises(RuntimeError, match="block 0 ran without the attention call over text"):
        sample(pack.patch(model), attached)


def test_a_replaced_forward_fails_loudly(pack, model, monkeypatch):
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

    monkeypatch.setattr(mmdit.MMDiT, "forward_core_with_concat", lambda self, x, *a, **kw: self.final_layer(x, a[0]))
    attached = pack.negative(conditioning(), negative=[[text(4, 5), {}]])
    with pytest.raises(RuntimeError, match="no block of this model ran through"):
        sample(pack.patch(model), attached)


@pytest.mark.parametrize(
    ("outer", "name", "pack_name"),
    [(False, "ComfyFluxWrapper", "ComfyUI-nunchaku"), (True, "WanVideoModel", "ComfyUI-WanVideoWrapper")],
)
def test_models_of_packs_with_their_own_forward_are_named(pack, outer, name, pack_name):
    """Nunchaku puts its network into ComfyUI's Flux; Kijai's Wan nodes have a model class of their own."""
    model = load_flux()
    stranger = type(name, (comfy.model_base.BaseModel if outer else torch.nn.Module,), {})
    if outer:
        model.model.__class__ = stranger
    else:
        model.model.diffusion_model = stranger()
    with pytest.raises(ValueError, match=rf"models of class {name} of {pack_name} are not supported. Supported, with"):
        pack.patch(model)
