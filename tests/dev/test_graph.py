"""The UI's workflow format becomes the API format; nodes can be taken out of an API graph."""

import json

import pytest
from hosting.errors import HostError
from hosting.graph import only_node, to_prompt, upstream_text, without_nodes

# As GET /object_info of ComfyUI 0.30.0 gives it, less the fields that play no part; choices shortened.
OBJECT_INFO = {
    "UNETLoader": {"input": {"required": {"unet_name": [["a.safetensors"]], "weight_dtype": [["default", "fp8"]]}}},
    "CLIPTextEncode": {
        "input": {
            "required": {
                "text": ["STRING", {"multiline": True, "dynamicPrompts": True, "tooltip": "The text."}],
                "clip": ["CLIP", {"tooltip": "The CLIP model."}],
            }
        }
    },
    "KSampler": {
        "input": {
            "required": {
                "model": ["MODEL", {"tooltip": "The model."}],
                "seed": ["INT", {"default": 0, "min": 0, "max": 18446744073709551615, "control_after_generate": True}],
                "steps": ["INT", {"default": 20, "min": 1, "max": 10000}],
                "cfg": ["FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}],
                "sampler_name": [["euler", "heun"], {}],
                "scheduler": ["COMBO", {"options": ["simple", "beta"]}],
                "positive": ["CONDITIONING", {}],
                "latent_image": ["LATENT", {}],
                "denoise": ["FLOAT", {"default": 1.0}],
            }
        }
    },
    "LoadImage": {"input": {"required": {"image": [["x.png"], {"image_upload": True}]}}},
    "VSFModelPatch": {
        "display_name": "VSF Model Patch",
        "input": {
            "required": {"model": ["MODEL", {}]},
            "optional": {"scale": ["FLOAT", {"default": 3.3}], "blocks": ["STRING", {"default": ""}]},
        },
    },
    "VSFNegativeConditioning": {
        "input": {
            "required": {"positive": ["CONDITIONING", {}]},
            "optional": {
                "clip": ["CLIP", {}],
                "text": ["STRING", {"default": "", "multiline": True}],
                "note": ["STRING", {"forceInput": True}],
                "strength": ["FLOAT", {"default": 1.0}],
            },
        }
    },
    "SaveImage": {"input": {"required": {"images": ["IMAGE", {}], "filename_prefix": ["STRING", {"default": "x"}]}}},
    "PreviewAny": {"input": {"required": {"source": ["*", {}]}}},
}


def node(node_id, kind, inputs=(), outputs=(), values=(), **more):
    return {
        "id": node_id,
        "type": kind,
        "mode": 0,
        "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
        "outputs": [{"name": type_, "type": type_, "links": []} for type_ in outputs],
        "widgets_values": list(values),
        **more,
    }


@pytest.fixture
def workflow():
    return {
        "nodes": [
            node(1, "UNETLoader", outputs=["MODEL"], values=["a.safetensors", "default"]),
            node(2, "CLIPTextEncode", [("clip", "CLIP", None)], ["CONDITIONING"], ["a house"]),
            node(3, "VSFModelPatch", [("model", "MODEL", 1)], ["MODEL"], [2.5, "all"]),
            node(
                4,
                "VSFNegativeConditioning",
                [("positive", "CONDITIONING", 2), ("clip", "CLIP", None), ("note", "STRING", None)],
                ["CONDITIONING", "STRING"],
                ["a roof", 0.5],
            ),
            node(
                5,
                "KSampler",
                [("model", "MODEL", 3), ("positive", "CONDITIONING", 4), ("steps", "INT", None)],
                ["LATENT"],
                [7, "randomize", 8, 1.0, "heun", "beta", 0.9],
                title="Sample here",
            ),
            node(6, "MarkdownNote", values=["read me"]),
            node(7, "PreviewAny", [("source", "*", 5)]),
        ],
        "links": [
            [1, 1, 0, 3, 0, "MODEL"],
            [2, 2, 0, 4, 0, "CONDITIONING"],
            [3, 3, 0, 5, 0, "MODEL"],
            [4, 4, 0, 5, 1, "CONDITIONING"],
            [5, 4, 1, 7, 0, "STRING"],
        ],
    }


def set_mode(workflow, node_id, mode):
    next(n for n in workflow["nodes"] if n["id"] == node_id)["mode"] = mode


def inputs(workflow, node_id):
    return to_prompt(workflow, OBJECT_INFO)[str(node_id)]["inputs"]


def test_widgets_and_links(workflow):
    prompt = to_prompt(workflow, OBJECT_INFO)
    assert set(prompt) == {"1", "2", "3", "4", "5", "7"}
    assert prompt["1"]["inputs"] == {"unet_name": "a.safetensors", "weight_dtype": "default"}
    assert prompt["3"] == {
        "class_type": "VSFModelPatch",
        "inputs": {"scale": 2.5, "blocks": "all", "model": ["1", 0]},
        "_meta": {"title": "VSF Model Patch"},
    }
    assert prompt["5"]["_meta"]["title"] == "Sample here"
    json.dumps(prompt)


def test_the_value_after_a_seed_is_the_ui_s_own(workflow):
    assert inputs(workflow, 5) == {
        "seed": 7,
        "steps": 8,
        "cfg": 1.0,
        "sampler_name": "heun",
        "scheduler": "beta",
        "denoise": 0.9,
        "model": ["3", 0],
        "positive": ["4", 0],
    }


def test_a_forced_input_has_no_widget_value(workflow):
    assert inputs(workflow, 4) == {"text": "a roof", "strength": 0.5, "positive": ["2", 0]}


def test_a_linked_widget_keeps_its_place_but_takes_the_link(workflow):
    workflow["nodes"][4]["inputs"][2]["link"] = 5
    found = inputs(workflow, 5)
    assert found["steps"] == ["4", 1] and found["cfg"] == 1.0


def test_values_of_buttons_at_the_end_are_ignored(workflow):
    workflow["nodes"].append(node(8, "LoadImage", outputs=["IMAGE"], values=["x.png", "image"]))
    assert inputs(workflow, 8) == {"image": "x.png"}


def test_missing_values_take_the_default(workflow):
    workflow["nodes"][2]["widgets_values"] = [1.5]
    assert inputs(workflow, 3) == {"scale": 1.5, "blocks": "", "model": ["1", 0]}


def test_bypassed_nodes_pass_their_input_through(workflow):
    set_mode(workflow, 3, 4)
    set_mode(workflow, 4, 4)
    prompt = to_prompt(workflow, OBJECT_INFO)
    assert not {"3", "4"} & set(prompt)
    assert prompt["5"]["inputs"]["model"] == ["1", 0]
    assert prompt["5"]["inputs"]["positive"] == ["2", 0]


def test_bypass_takes_the_input_of_the_output_s_type(workflow):
    workflow["nodes"][3]["inputs"].reverse()
    set_mode(workflow, 4, 4)
    assert inputs(workflow, 5)["positive"] == ["2", 0]


def test_muted_nodes_are_gone_with_their_links(workflow):
    set_mode(workflow, 4, 2)
    prompt = to_prompt(workflow, OBJECT_INFO)
    assert "4" not in prompt and "positive" not in prompt["5"]["inputs"]


def test_unknown_node_is_an_error(workflow):
    workflow["nodes"].append(node(9, "Reroute"))
    with pytest.raises(HostError, match=r"no node Reroute \(node 9"):
        to_prompt(workflow, OBJECT_INFO)


def test_nodes_are_taken_out_with_what_only_they_feed(workflow):
    prompt = to_prompt(workflow, OBJECT_INFO)
    plain = without_nodes(prompt, {"VSFModelPatch": "model", "VSFNegativeConditioning": "positive"})
    assert set(plain) == {"1", "2", "5"}
    assert plain["5"]["inputs"] == {**prompt["5"]["inputs"], "model": ["1", 0], "positive": ["2", 0]}
    assert prompt["5"]["inputs"]["model"] == ["3", 0]


def test_chained_nodes_are_taken_out_together(workflow):
    prompt = to_prompt(workflow, OBJECT_INFO)
    prompt["4b"] = {"class_type": "VSFNegativeConditioning", "inputs": {"positive": ["4", 0]}}
    prompt["5"]["inputs"]["positive"] = ["4b", 0]
    plain = without_nodes(prompt, {"VSFNegativeConditioning": "positive"})
    assert plain["5"]["inputs"]["positive"] == ["2", 0]


def test_reading_the_graph(workflow):
    prompt = to_prompt(workflow, OBJECT_INFO)
    assert only_node(prompt, "KSampler") == "5"
    assert upstream_text(prompt, ["4", 0]) == "a roof"
    assert upstream_text(prompt, prompt["4"]["inputs"]["positive"]) == "a house"
    assert upstream_text(prompt, ["1", 0]) == ""
    with pytest.raises(HostError, match="0 SaveImage nodes"):
        only_node(prompt, "SaveImage")
