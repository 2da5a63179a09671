"""Graphs of the toy models in the API's format, of the smallest pictures: made here, or of workflows that ship."""

from __future__ import annotations

from typing import Any

from hosting.client import ComfyClient, Prompt
from hosting.graph import without_nodes

VAES = {"sd3": "taesd3", "flux": "taef1", "wan": "vsf_tiny_wan_vae.safetensors"}
TINY = {
    **{"Chroma": "chroma", "flux-2-klein": "flux2", "qwen_image": "qwen_image", "sd_xl": "sdxl"},
    **{"z_image": "z_image", "anima": "anima", "ltxv": "ltxv", "hunyuan_video": "hunyuan_video"},
}
"""How the files of models begin that have no trained toy: the family of the tiny random model in their place."""
LOADED = {"CheckpointLoaderSimple": 0, "UNETLoader": 0, "CLIPLoader": 1, "DualCLIPLoader": 1, "VAELoader": 2}
"""The loaders of what that node gives: where in its outputs theirs are."""


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node of an API-format graph."""
    return {"class_type": class_type, "inputs": inputs}


def toy_model(family: str) -> dict[str, Any]:
    """The loader of a family's toy model."""
    return node("UNETLoader", unet_name=f"vsf_tiny_{family}.safetensors", weight_dtype="default")


def stock(family: str, seed: int = 1, batch: int = 1) -> Prompt:
    """A graph of stock nodes: one step, the smallest picture or clip."""
    video = family == "wan"
    size = {"width": 64, "height": 64, "batch_size": batch}
    return {
        "model": toy_model(family),
        "clip": node("VSFToyTextEncoder", family=family),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text="a house"),
        "empty": node("ConditioningZeroOut", conditioning=["prompt", 0]),
        "latent": node("EmptyHunyuanLatentVideo", length=5, **size) if video else node("EmptySD3LatentImage", **size),
        "sample": node(
            "KSampler",
            model=["model", 0],
            positive=["prompt", 0],
            negative=["empty", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "vae": node("VAELoader", vae_name=VAES[family]),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="vsf_prompts"),
    }


def with_vsf(graph: Prompt, text: str = "a roof", **settings: Any) -> Prompt:
    """The graph with VSF Model Patch and VSF Negative Conditioning in it; ``settings`` are the patch's."""
    patch = {"scale": 3.3, "offset": 0.2, **settings}
    sampler = {**graph["sample"]["inputs"], "model": ["patch", 0], "positive": ["negative", 0]}
    return {
        **graph,
        "patch": node("VSFModelPatch", model=["model", 0], **patch),
        "negative": node("VSFNegativeConditioning", positive=["prompt", 0], clip=["clip", 0], text=text),
        "sample": node("KSampler", **sampler),
    }


def picture(client: ComfyClient, graph: Prompt) -> bytes:
    """Runs a graph and gives the file that it saves."""
    return client.image(client.run(graph)["save"]["images"][0])


def with_toys(prompt: Prompt) -> Prompt:
    """A copy of a shipped workflow with toy models, the smallest pictures and few steps.

    Flux and Wan need the toy text encoders' node in the server, the models in ``TINY`` that of tiny models, and Load
    Image its picture.
    """
    prompt = _with_tiny_model(without_nodes(prompt, {"LoraLoaderModelOnly": "model", "FluxKontextImageScale": "image"}))
    for key, old in list(prompt.items()):
        kind, inputs = old["class_type"], old["inputs"]
        if kind == "CheckpointLoaderSimple":
            prompt[key] = toy_model("sd3")
            prompt[f"{key} vae"] = node("VAELoader", vae_name=VAES["sd3"])
        elif kind == "UNETLoader":
            prompt[key] = toy_model(next(family for family in VAES if family in inputs["unet_name"]))
        elif kind == "TripleCLIPLoader":
            prompt[key] = node("CLIPLoader", clip_name="vsf_tiny_clip_l.safetensors", type="sd3")
        elif kind in ("DualCLIPLoader", "CLIPLoader") and inputs["type"] != "sd3":
            prompt[key] = node("VSFToyTextEncoder", family=inputs["type"])
        elif kind == "VAELoader" and inputs["vae_name"] not in VAES.values():
            inputs["vae_name"] = VAES["wan" if "wan" in inputs["vae_name"] else "flux"]
    smallest = {"width": 64, "height": 64, "length": 5}
    for one in prompt.values():
        inputs = one["inputs"]
        if one["class_type"] != "ImageFromBatch":
            inputs.update({name: value for name, value in smallest.items() if name in inputs})
        if one["class_type"] in ("KSampler", "Flux2Scheduler", "LTXVScheduler"):  # a pair of samplers shares its steps
            inputs["steps"] = 2
        for name, value in inputs.items():
            if isinstance(value, list) and value[1] == 2 and f"{value[0]} vae" in prompt:
                inputs[name] = [f"{value[0]} vae", 0]
    return prompt


def _with_tiny_model(prompt: Prompt) -> Prompt:
    """The graph with one tiny random model in place of all that it loads, if its model is one of ``TINY``."""
    files = [one["inputs"].get("unet_name") or one["inputs"].get("ckpt_name", "") for one in prompt.values()]
    family = next((family for start, family in TINY.items() if any(file.startswith(start) for file in files)), None)
    if family is None:
        return prompt
    slots = {key: LOADED[one["class_type"]] for key, one in prompt.items() if one["class_type"] in LOADED}
    result = {key: {**one, "inputs": dict(one["inputs"])} for key, one in prompt.items() if key not in slots}
    for inputs in (one["inputs"] for one in result.values()):
        links = {name: value for name, value in inputs.items() if isinstance(value, list) and value[0] in slots}
        inputs.update({name: ["tiny", slots[key] + slot] for name, (key, slot) in links.items()})
    return {**result, "tiny": node("VSFTinyModel", family=family)}
