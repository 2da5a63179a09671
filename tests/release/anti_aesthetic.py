"""Writes the workflow of the paper's Fig. 18: ``python tests/release/anti_aesthetic.py`` (standard library).

Ten pairs of prompts, each drawn at scale 0 and at the scale that pushes away what most pictures are made to please
with. The kinds of pairs are the paper's, the words are not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from release.workflows import DARK, FOLDER, GREEN, RED, File, Graph, text_of  # noqa: E402

NAME = "vsf_anti_aesthetic_sd35_large_turbo"
SD35 = "stabilityai/stable-diffusion-3.5-large-turbo"
ENCODERS = "Comfy-Org/stable-diffusion-3.5-fp8/text_encoders"
PAIRS = {
    "An apple, half cancelled": ("an oil painting of an apple on a blue cloth", "apple"),
    "People, half cancelled": ("a pencil sketch of people in front of a television", "people"),
    "A cat, half cancelled": ("an abstract canvas with a cat", "cat"),
    "Not cute": ("an abstract canvas with a puppy", "cute"),
    "Washed out": ("a fruit market in pale, washed-out colours, almost grey", "vivid colours, saturated"),
    "Sad": ("a lonely clown on a park bench, in tears", "happy, smiling, cheerful"),
    "Coarse": ("a castle in coarse pixels and very few colours", "fine detail, high resolution, smooth"),
    "Too dark": ("a kitchen in far too little light, hardly anything can be seen", "bright light, well lit"),
    "Wrong colours": ("a forest with violet leaves below a green sky", "natural colours, realistic"),
    "Not beautiful": ("an old stray cat with a torn ear and matted fur", "beautiful, fluffy, elegant"),
}
ROWS, ROW, COLUMN = 5, 620, 2110
NOTE = """**Pictures that are not meant to please (the paper's Fig. 18).** Models are tuned towards what most people \
like; each pair here pushes that away. On the left of each sheet scale 0, on the right the scale in *VSF Scale Sweep*.

- The first four name the object itself, or what is liked about it, as the negative: what is left is abstract.
- In the others the positive asks for the unusual look, and the negative names the usual one.
- One run draws all ten. To try a few, select the nodes of the others and press Ctrl+M.
- More scales: *0, 1, 2, 3, 4* in *VSF Scale Sweep*. The scale in *VSF Model Patch* is not used.

The paper drew with scales from 0 to 4; **layout** is *released*, to which its numbers belong. The pairs are of the \
paper's kinds, in other words. Keep **cfg at 1** on Turbo models. Untested here on real weights."""


def workflow() -> dict[str, Any]:
    """The file's content."""
    graph = Graph(NAME)
    checkpoint = File("sd3.5_large_turbo.safetensors", SD35, "checkpoints")
    encoders = [
        File(f"{name}.safetensors", ENCODERS, "text_encoders")
        for name in ("clip_l", "clip_g", "t5xxl_fp8_e4m3fn_scaled")
    ]
    loaded = graph.add(
        "CheckpointLoaderSimple", (0, 0), (380, 98), [checkpoint.name], ["MODEL", "CLIP", "VAE"], [checkpoint]
    )
    names = [file.name for file in encoders]
    clip = graph.add("TripleCLIPLoader", (0, 150), (380, 106), names, ["CLIP"], encoders), 0
    latent = graph.add("EmptySD3LatentImage", (0, 310), (315, 106), (1024, 1024, 1), ["LATENT"])
    values = (3.3, 0.2, 0.0, 1.0, "", "released", True)
    patch = graph.add("VSFModelPatch", (0, 470), (320, 250), values, ["MODEL"], inputs={"model": (loaded, 0)}, look=RED)
    inputs, outputs = {"model": (patch, 0), "latent": (latent, 0)}, ["MODEL", "LATENT", "labels:STRING"]
    sweep = graph.add("VSFScaleSweep", (0, 1030), (320, 150), ["0, 3.3"], outputs, inputs=inputs, look=RED)
    graph.add("MarkdownNote", (0, 1240), (380, 480), [NOTE], look={"title": "How to use", **DARK})
    groups = {"Models and scales": (-20, -50, 420, 1790)}
    for k, (title, pair) in enumerate(PAIRS.items()):
        left, top = 430 + COLUMN * (k // ROWS), ROW * (k % ROWS)
        groups[f"{k + 1}. {title}"] = (left - 20, top - 50, COLUMN - 30, ROW - 20)
        _pair(graph, (left, top), pair, f"vsf_anti_aesthetic/{k + 1:02d}", (clip, (loaded, 2), sweep))
    return graph.saved(groups)


def _pair(graph: Graph, at: tuple[int, int], pair: tuple[str, str], prefix: str, given: Any) -> None:
    """The nodes of one pair."""
    (x, y), (clip, vae, sweep) = at, given
    look, inputs = {"title": "Positive prompt", **GREEN}, {"clip": clip}
    prompt = graph.add("CLIPTextEncode", (x, y), (400, 160), [pair[0]], ["CONDITIONING"], (), inputs, look)
    inputs = {"positive": (prompt, 0), "clip": clip, "negative": "CONDITIONING", "mask": "MASK"}
    values = (pair[1], 1.0, 0.0, 0.0, 1.0)
    positive = graph.add("VSFNegativeConditioning", (x, y + 210), (400, 330), values, ["CONDITIONING"], (), inputs, RED)
    inputs, look = {"conditioning": (prompt, 0)}, {"title": "Unused at cfg 1"}
    unused = graph.add("ConditioningZeroOut", (x + 450, y + 330), (210, 26), (), ["CONDITIONING"], (), inputs, look)
    inputs = {"model": (sweep, 0), "positive": (positive, 0), "negative": (unused, 0), "latent_image": (sweep, 1)}
    values = (42, "fixed", 8, 1.0, "euler", "sgm_uniform", 1.0)
    samples = graph.add("KSampler", (x + 450, y), (315, 262), values, ["LATENT"], (), inputs)
    inputs = {"samples": (samples, 0), "vae": vae}
    pictures = graph.add("VAEDecode", (x + 815, y), (210, 46), (), ["IMAGE"], (), inputs)
    inputs = {"images": (pictures, 0), "labels": (sweep, 2)}
    sheet = graph.add("VSFContactSheet", (x + 815, y + 110), (315, 102), [0], ["IMAGE"], (), inputs, RED)
    graph.add("SaveImage", (x + 1180, y), (860, 520), [prefix], inputs={"images": (sheet, 0)})


if __name__ == "__main__":
    (FOLDER / f"{NAME}.json").write_text(text_of(workflow()), encoding="utf-8")
    print(FOLDER / f"{NAME}.json")
