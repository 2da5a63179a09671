"""Graphs of the toy models in the API's format, of the smallest pictures, for tests that need many runs."""

from __future__ import annotations

from typing import Any

from hosting.client import ComfyClient, Prompt


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node of an API-format graph."""
    return {"class_type": class_type, "inputs": inputs}


def stock(family: str, seed: int = 1, batch: int = 1) -> Prompt:
    """A graph of stock nodes: one step, the smallest picture or clip."""
    video = family == "wan"
    size = {"width": 64, "height": 64, "batch_size": batch}
    return {
        "model": node("UNETLoader", unet_name=f"vsf_tiny_{family}.safetensors", weight_dtype="default"),
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
        "vae": node(
            "VAELoader", vae_name={"sd3": "taesd3", "flux": "taef1", "wan": "vsf_tiny_wan_vae.safetensors"}[family]
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="vsf_prompts"),
    }


def with_vsf(graph: Prompt, text: str = "a roof", **settings: Any) -> Prompt:
    """The graph with both nodes in it; ``settings`` are the patch's."""
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
