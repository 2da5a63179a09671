"""Writes the workflows that differ in little but their model: ``python tests/release/workflows.py`` (standard library).

Two a model: one picture, and the same picture at several scales. Their thumbnails: ``tests/bench/pictures.py``.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from release.spread import spread  # noqa: E402
from release.starts import start_of  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
HUB = "https://huggingface.co/"
GREEN, RED, DARK = (
    {"color": front, "bgcolor": back} for front, back in (("#232", "#353"), ("#322", "#533"), ("#222", "#000"))
)
NEW_SCALES = "0.5, 1, 2, 3.3, 5"

Node = dict[str, Any]
Source = tuple[Node, int]


@dataclass(frozen=True)
class File:
    """A model file as ComfyUI's dialog about missing ones wants it; ``repository`` with the folder inside."""

    name: str
    repository: str
    directory: str

    def listed(self) -> dict[str, str]:
        owner, name, *inside = self.repository.split("/")
        address = "/".join([HUB + owner, name, "resolve", "main", *inside, self.name])
        return {"name": self.name, "url": address, "directory": self.directory}


@dataclass(frozen=True)
class Model:
    """What the workflows of a model have of their own. encoders, vae: empty where the checkpoint holds them."""

    key: str
    title: str
    file: File
    prompt: str
    negative: str
    steps: int
    sampler: str
    scheduler: str
    advice: str
    """What the note says about this model."""
    sweep_advice: str = ""
    encoders: tuple[File, ...] = ()
    encoder_type: str = ""
    vae: File | None = None
    lora: File | None = None
    lora_strength: float = 1.0
    shift: float | None = None
    shift_node: str = "ModelSamplingAuraFlow"
    guidance: float | None = None
    """What FluxGuidance tells the model."""
    size: tuple[int, int] = (1024, 1024)
    frames: int = 0
    """Of a video; a sweep's is shorter."""
    rate: float = 24.0
    latent: str = "EmptySD3LatentImage"
    cfg: float = 1.0
    scales: str = NEW_SCALES
    single: str = ""
    """Name of the workflow for one picture, where that is kept by hand."""

    @property
    def one(self) -> str:
        """Name of the workflow for one picture or video."""
        return self.single or f"vsf_{self.key}_text_to_{'video' if self.frames else 'image'}"


AE = File("ae.safetensors", "Comfy-Org/z_image_turbo/split_files/vae", "vae")
QWEN3_4B = File("qwen_3_4b.safetensors", "Comfy-Org/z_image_turbo/split_files/text_encoders", "text_encoders")
CFG_1 = "Keep **cfg at 1**: the model is distilled for it."

TEXT_ENCODERS = "comfyanonymous/flux_text_encoders"
CLIP_L = File("clip_l.safetensors", TEXT_ENCODERS, "text_encoders")
T5 = File("t5xxl_fp16.safetensors", TEXT_ENCODERS, "text_encoders")
WAN, HUNYUAN = (f"Comfy-Org/{name}/split_files" for name in ("Wan_2.1_ComfyUI_repackaged", "HunyuanVideo_repackaged"))
SWEPT_FRAMES = 33

MODELS = (
    Model(
        key="flux_schnell",
        title="Flux.1 Schnell",
        file=File("flux1-schnell.safetensors", "Comfy-Org/flux1-schnell", "diffusion_models"),
        encoders=(CLIP_L, T5),
        encoder_type="flux",
        vae=File("ae.safetensors", "Comfy-Org/Lumina_Image_2.0_Repackaged/split_files/vae", "vae"),
        prompt="a grand piano on an empty stage, spotlight",
        negative="piano keys",
        scales="2, 3.5, 4, 5, 6",
        steps=8,
        sampler="euler",
        scheduler="simple",
        single="vsf_flux_schnell_text_to_image",
        advice=CFG_1,
        sweep_advice="The authors' README has 3.5 to 6, with **layout** *released*, **offset** 0 and 8 steps.",
    ),
    Model(
        key="wan21_t2v_1_3b_causvid",
        title="Wan 2.1 1.3B with the CausVid LoRA",
        file=File("wan2.1_t2v_1.3B_fp16.safetensors", f"{WAN}/diffusion_models", "diffusion_models"),
        encoders=(File("umt5_xxl_fp8_e4m3fn_scaled.safetensors", f"{WAN}/text_encoders", "text_encoders"),),
        encoder_type="wan",
        vae=File("wan_2.1_vae.safetensors", f"{WAN}/vae", "vae"),
        lora=File("Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors", "Kijai/WanVideo_comfy", "loras"),
        lora_strength=0.5,
        shift=3.0,
        shift_node="ModelSamplingSD3",
        size=(832, 480),
        frames=81,
        rate=16.0,
        latent="EmptyHunyuanLatentVideo",
        prompt="an astronaut hatching from an egg on the surface of the moon, the darkness of space behind",
        negative="stars in the sky",
        scales="0.5, 1, 1.5, 2",
        steps=8,
        sampler="uni_pc",
        scheduler="simple",
        single="vsf_wan21_t2v_1_3b_causvid",
        advice="Keep **cfg at 1**: the LoRA is made for it.",
    ),
    Model(
        key="ltxv_2b_distilled",
        title="LTX-Video 2B distilled",
        file=File("ltxv-2b-0.9.8-distilled.safetensors", "Lightricks/LTX-Video", "checkpoints"),
        encoders=(T5,),
        encoder_type="ltxv",
        size=(768, 512),
        frames=97,
        rate=25.0,
        latent="EmptyLTXVLatentVideo",
        prompt="A sailing boat crosses a calm bay in the morning. The camera follows it slowly from the shore. The "
        "light is warm, the water is smooth.",
        negative="birds",
        scales="0.5, 1, 2, 3.3",
        steps=8,
        sampler="euler",
        scheduler="ltxv",
        advice="*BasicGuider* runs the model without cfg, for which it is distilled. LTX-Video wants long prompts.",
    ),
    Model(
        key="hunyuan_video",
        title="HunyuanVideo",
        file=File("hunyuan_video_t2v_720p_bf16.safetensors", f"{HUNYUAN}/diffusion_models", "diffusion_models"),
        encoders=(
            CLIP_L,
            File("llava_llama3_fp8_scaled.safetensors", f"{HUNYUAN}/text_encoders", "text_encoders"),
        ),
        encoder_type="hunyuan_video",
        vae=File("hunyuan_video_vae_bf16.safetensors", f"{HUNYUAN}/vae", "vae"),
        shift=7.0,
        shift_node="ModelSamplingSD3",
        guidance=6.0,
        size=(848, 480),
        frames=73,
        latent="EmptyHunyuanLatentVideo",
        prompt="a fox walks through fresh snow in front of a mountain hut, film still",
        negative="smoke from the chimney",
        scales="0.5, 1, 2, 3.3",
        steps=20,
        sampler="euler",
        scheduler="simple",
        advice="HunyuanVideo is guided by a number that it was trained to take (*FluxGuidance*): keep **cfg at 1**.",
    ),
    Model(
        key="z_image_turbo",
        title="Z-Image Turbo",
        file=File(
            "z_image_turbo_bf16.safetensors", "Comfy-Org/z_image_turbo/split_files/diffusion_models", "diffusion_models"
        ),
        encoders=(QWEN3_4B,),
        encoder_type="lumina2",
        vae=AE,
        shift=3.0,
        prompt="a birthday cake on a wooden table, studio photo",
        negative="candles",
        steps=8,
        sampler="res_multistep",
        scheduler="simple",
        advice=CFG_1,
    ),
    Model(
        key="flux2_klein_4b",
        title="Flux.2 Klein 4B",
        file=File(
            "flux-2-klein-4b.safetensors", "Comfy-Org/flux2-klein/split_files/diffusion_models", "diffusion_models"
        ),
        encoders=(File("qwen_3_4b.safetensors", "Comfy-Org/flux2-klein/split_files/text_encoders", "text_encoders"),),
        encoder_type="flux2",
        vae=File("flux2-vae.safetensors", "Comfy-Org/flux2-dev/split_files/vae", "vae"),
        prompt="a snowman in a garden, winter morning, photo",
        negative="scarf",
        steps=4,
        sampler="euler",
        scheduler="flux2",
        latent="EmptyFlux2LatentImage",
        advice="*BasicGuider* runs the model without cfg, for which it is distilled. A picture of another size needs "
        "it in *Flux2Scheduler* too.",
    ),
    Model(
        key="qwen_image_lightning",
        title="Qwen-Image with the Lightning LoRA",
        file=File(
            "qwen_image_fp8_e4m3fn.safetensors",
            "Comfy-Org/Qwen-Image_ComfyUI/split_files/diffusion_models",
            "diffusion_models",
        ),
        encoders=(
            File(
                "qwen_2.5_vl_7b_fp8_scaled.safetensors",
                "Comfy-Org/Qwen-Image_ComfyUI/split_files/text_encoders",
                "text_encoders",
            ),
        ),
        encoder_type="qwen_image",
        vae=File("qwen_image_vae.safetensors", "Comfy-Org/Qwen-Image_ComfyUI/split_files/vae", "vae"),
        lora=File("Qwen-Image-Lightning-8steps-V1.0.safetensors", "lightx2v/Qwen-Image-Lightning", "loras"),
        shift=3.1,
        size=(1328, 1328),
        prompt="an alarm clock on a bedside table, watercolour",
        negative="bells",
        steps=8,
        sampler="euler",
        scheduler="simple",
        advice="For 4 steps take *Qwen-Image-Lightning-4steps-V1.0*. Keep **cfg at 1**: the LoRA is made for it.",
    ),
    Model(
        key="chroma1_hd",
        title="Chroma1-HD",
        file=File(
            "Chroma1-HD-fp8mixed.safetensors",
            "Comfy-Org/Chroma1-HD_repackaged/split_files/diffusion_models",
            "diffusion_models",
        ),
        encoders=(File("t5xxl_fp8_e4m3fn_scaled.safetensors", "comfyanonymous/flux_text_encoders", "text_encoders"),),
        encoder_type="chroma",
        vae=File("ae.safetensors", "Comfy-Org/Lumina_Image_2.0_Repackaged/split_files/vae", "vae"),
        shift=1.0,
        prompt="a vintage car in front of a garage, photo",
        negative="wheels",
        steps=26,
        sampler="euler",
        scheduler="beta",
        cfg=2.0,
        advice="Chroma1-HD is **not distilled**: it needs cfg, which VSF does not replace. Here cfg is 2, less than "
        "the 3.5 of ComfyUI's own template, since both together push hard. A distilled Chroma wants cfg 1 and fewer "
        "steps.",
    ),
    Model(
        key="anima_turbo",
        title="Anima with its Turbo LoRA",
        file=File(
            "anima-base-v1.0.safetensors", "circlestone-labs/Anima/split_files/diffusion_models", "diffusion_models"
        ),
        encoders=(
            File("qwen_3_06b_base.safetensors", "circlestone-labs/Anima/split_files/text_encoders", "text_encoders"),
        ),
        encoder_type="stable_diffusion",
        vae=File("qwen_image_vae.safetensors", "circlestone-labs/Anima/split_files/vae", "vae"),
        lora=File("anima-turbo-lora-v0.2.safetensors", "circlestone-labs/Anima-Official-LoRAs", "loras"),
        prompt="a lighthouse keeper's cottage on a hill, anime background art",
        negative="windows",
        steps=8,
        sampler="euler",
        scheduler="simple",
        latent="EmptyLatentImage",
        advice="Keep **cfg at 1**: the LoRA is made for it.",
    ),
    Model(
        key="sdxl_dmd2",
        title="SDXL with the DMD2 LoRA",
        file=File("sd_xl_base_1.0.safetensors", "stabilityai/stable-diffusion-xl-base-1.0", "checkpoints"),
        lora=File("dmd2_sdxl_4step_lora_fp16.safetensors", "tianweiy/DMD2", "loras"),
        prompt="a cottage by a lake, oil painting",
        negative="door",
        steps=4,
        sampler="lcm",
        scheduler="sgm_uniform",
        latent="EmptyLatentImage",
        advice="DMD2 wants *lcm*, *sgm_uniform*, 4 steps and **cfg 1**. Any SDXL checkpoint can take the base's place.",
        sweep_advice="*lcm* adds noise after every step, and other noise to each picture: they differ in details for "
        "that reason too. Judge whether the thing is there.",
    ),
)

ONE = """**A negative prompt on {title}.** Write what you do *not* want into *VSF Negative Conditioning*, in plain \
words (no "no", no "without").

- No setting was tuned on this model here: *vsf_scale_sweep_{key}* shows several scales at once.
- Too little happens: raise **scale**. The main object suffers: lower it, or raise **offset**.
- Compare: bypass *VSF Model Patch* (Ctrl+B).

{advice}"""
SWEEP = """**Which scale is right for {title}?** One run draws the same {drawn} at each of the scales in *VSF Scale \
Sweep*, side by side. No setting was tuned on this model here.

- Write your own list; then set the scale you like in *VSF Model Patch* of *{one}*. The one \
here is not used; the node's other settings are.
- The {drawn}s are one batch: use fewer scales if memory runs out.
- 0 is not off: the negative still takes attention, it only pushes nothing away.

{advice}"""


class Graph:
    """A workflow in the UI's format, node by node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Node] = []
        self.links: list[list[Any]] = []

    def add(
        self,
        kind: str,
        at: Sequence[int],
        size: Sequence[int],
        widgets: Sequence[Any] = (),
        outputs: Sequence[str] = (),
        files: Sequence[File] = (),
        inputs: Mapping[str, Source | str] | None = None,
        look: Mapping[str, str] | None = None,
    ) -> Node:
        """A node. outputs: "TYPE" or "name:TYPE"; inputs: where each comes from, or the type of one without a link."""
        node: Node = {
            **{"id": len(self.nodes) + 1, "type": kind, "pos": list(at), "size": list(size)},
            **{"flags": {}, "order": len(self.nodes), "mode": 0},
        }
        node["inputs"] = [self._input(node, i, *one) for i, one in enumerate((inputs or {}).items())]
        made = [one.rpartition(":")[::2] for one in outputs]
        node["outputs"] = [{"name": name or kind_, "type": kind_, "links": []} for name, kind_ in made]
        properties: dict[str, Any] = {"Node name for S&R": kind} if outputs or inputs else {}
        node["properties"] = properties | ({"models": [file.listed() for file in files]} if files else {})
        node["widgets_values"] = list(widgets)
        self.nodes.append({**node, **(look or {})})
        return self.nodes[-1]

    def _input(self, node: Node, slot: int, name: str, source: Source | str) -> dict[str, Any]:
        if isinstance(source, str):
            return {"name": name, "type": source, "link": None}
        (origin, output), link = source, len(self.links) + 1
        kind = origin["outputs"][output]["type"]
        origin["outputs"][output]["links"].append(link)
        self.links.append([link, origin["id"], output, node["id"], slot, kind])
        return {"name": name, "type": kind, "link": link}

    def saved(self, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The file's content; groups: title -> left, top, width and height."""
        look = {"color": "#3f789e", "font_size": 24, "flags": {}}
        made = {
            **{"id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.name)), "revision": 0},
            **{"last_node_id": len(self.nodes), "last_link_id": len(self.links)},
            **{"nodes": self.nodes, "links": self.links},
            "groups": [
                {"id": i, "title": title, "bounding": list(box), **look}
                for i, (title, box) in enumerate(groups.items(), 1)
            ],
            **{"config": {}, "extra": {"ds": {"scale": 0.8, "offset": [60, 60]}}, "version": 0.4},
        }
        spread(made)
        return made


def workflows() -> Iterator[tuple[str, dict[str, Any]]]:
    """File name without ending, and content, of every workflow made here."""
    for model in MODELS:
        if not model.single:
            yield model.one, workflow(model, model.one, is_sweep=False)
        name = f"vsf_scale_sweep_{model.key}"
        yield name, workflow(model, name, is_sweep=True)


def workflow(model: Model, name: str, is_sweep: bool) -> dict[str, Any]:
    """One picture or video of a model, or a sheet of it at several scales."""
    graph, size = Graph(name), tuple(min(side, 1024) if is_sweep else side for side in model.size)
    frames = (min(model.frames, SWEPT_FRAMES) if is_sweep else model.frames,) if model.frames else ()
    (patched, clip, vae), bottom = loaded(graph, model)
    groups: dict[str, Sequence[int]] = {"Models": (-20, -50, 420, bottom + 30)}
    latent: Source = (
        graph.add(model.latent, (0, bottom + 370), (315, 130 if frames else 106), (*size, *frames, 1), ["LATENT"]),
        0,
    )
    look, given = {"title": "Positive prompt", **GREEN}, {"clip": clip}
    prompt = graph.add("CLIPTextEncode", (430, 0), (400, 160), [model.prompt], ["CONDITIONING"], (), given, look=look)
    positive: Source = prompt, 0
    if model.guidance is not None:
        given = {"conditioning": positive}
        positive = graph.add("FluxGuidance", (430, 695), (210, 58), [model.guidance], ["CONDITIONING"], (), given), 0
    with_negative = graph.add(
        "VSFNegativeConditioning",
        (430, 210),
        (400, 330),
        (model.negative, 1.0, 0.0, 0.0, 1.0),
        ["CONDITIONING"],
        inputs={"positive": positive, "clip": clip, "negative": "CONDITIONING", "mask": "MASK"},
        look=RED,
    )
    groups["Prompt and negative"] = (410, -50, 440, 810 if model.cfg != 1 or model.guidance else 720)
    begin = start_of(model.file.name)
    values = (float(begin["scale"]), float(begin["offset"]), 0.0, 1.0, "", begin["layout"], True)
    inputs = {"model": patched}
    patch = graph.add("VSFModelPatch", (880, 0), (320, 250), values, ["MODEL"], inputs=inputs, look=RED)
    patched, labels, x = (patch, 0), None, 1250
    if is_sweep:
        inputs = {"model": patched, "latent": latent}
        outputs = ["MODEL", "LATENT", "labels:STRING"]
        sweep = graph.add("VSFScaleSweep", (x, 0), (320, 150), [model.scales], outputs, inputs=inputs, look=RED)
        patched, latent, labels = ((sweep, slot) for slot in range(3))
        x += 370
    samples = sampled(graph, model, (prompt, 0), clip, (with_negative, 0), patched, latent, size, x)
    below = 60 + max(node["pos"][1] + node["size"][1] for node in graph.nodes if node["pos"][0] == x)
    inputs = {"samples": samples, "vae": vae}
    picture: Source = graph.add("VAEDecode", (x, below), (210, 46), (), ["IMAGE"], inputs=inputs), 0
    if labels:
        inputs = {"images": picture, "labels": labels}
        picture = graph.add("VSFContactSheet", (x, below + 100), (315, 102), [0], ["IMAGE"], inputs=inputs, look=RED), 0
        below += 150
    width = 900 if is_sweep else 420
    prefix = f"vsf_{'scale_sweep_' if is_sweep else ''}{model.key}"
    if model.frames:
        inputs = {"images": picture, "audio": "AUDIO"}
        video = graph.add("CreateVideo", (x, below + 100), (270, 78), [model.rate], ["VIDEO"], inputs=inputs)
        below += 130
        values = (f"video/{prefix}", "auto", "auto")
        graph.add("SaveVideo", (x + 360, 0), (width, 470), values, inputs={"video": (video, 0)})
    else:
        graph.add("SaveImage", (x + 360, 0), (width, 470), [prefix], inputs={"images": picture})
    advice = f"{model.advice}\n\n{model.sweep_advice}".rstrip() if is_sweep else model.advice
    note = (SWEEP if is_sweep else ONE).format(
        title=model.title, key=model.key, one=model.one, drawn="video" if model.frames else "picture", advice=advice
    )
    graph.add("MarkdownNote", (0, bottom + 30), (380, 290), [note], look={"title": "How to use", **DARK})
    title = "VSF at several scales" if is_sweep else "VSF and sampling"
    groups[title] = (860, -50, x + 360 + width - 840, max(560, below + 130))
    return graph.saved(groups)


def loaded(graph: Graph, model: Model) -> tuple[tuple[Source, Source, Source], int]:
    """The nodes that load a model, its LoRA and shift: model, CLIP and VAE, and where the next node may begin."""
    top = 0

    def below(height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        nonlocal top
        here, top = top, top + height + 50
        return (0, here), (380, height)

    if model.vae:
        of_model = graph.add("UNETLoader", *below(82), (model.file.name, "default"), ["MODEL"], [model.file])
    else:
        of_model = graph.add(
            "CheckpointLoaderSimple", *below(98), [model.file.name], ["MODEL", "CLIP", "VAE"], [model.file]
        )
    clip, vae = (of_model, 1), (of_model, 2)
    if model.encoders:
        values = (*(file.name for file in model.encoders), model.encoder_type, "default")
        kind, height = ("DualCLIPLoader", 130) if len(model.encoders) > 1 else ("CLIPLoader", 106)
        clip = graph.add(kind, *below(height), values, ["CLIP"], model.encoders), 0
    if model.vae:
        vae = graph.add("VAELoader", *below(58), [model.vae.name], ["VAE"], [model.vae]), 0
    last: Source = (of_model, 0)
    if model.lora:
        values, given = (model.lora.name, model.lora_strength), {"model": last}
        last = graph.add("LoraLoaderModelOnly", *below(82), values, ["MODEL"], [model.lora], given), 0
    if model.shift is not None:
        last = graph.add(model.shift_node, *below(58), [model.shift], ["MODEL"], inputs={"model": last}), 0
    return (last, clip, vae), top


def sampled(
    graph: Graph,
    model: Model,
    prompt: Source,
    clip: Source,
    positive: Source,
    patched: Source,
    latent: Source,
    size: Sequence[int],
    x: int,
) -> Source:
    """The nodes that sample, from ``x`` on; the latent that they make."""
    if model.scheduler in ("flux2", "ltxv"):
        noise = graph.add("RandomNoise", (x, 0), (315, 82), (42, "fixed"), ["NOISE"])
        inputs: Mapping[str, Source | str] = {"model": patched, "conditioning": positive}
        guider = graph.add("BasicGuider", (x, 130), (315, 46), (), ["GUIDER"], inputs=inputs)
        sampler = graph.add("KSamplerSelect", (x, 230), (315, 58), [model.sampler], ["SAMPLER"])
        if model.scheduler == "flux2":
            sigmas = graph.add("Flux2Scheduler", (x, 340), (315, 106), (model.steps, *size), ["SIGMAS"])
        else:
            values, given = (model.steps, 2.05, 0.95, True, 0.1), {"latent": latent}
            sigmas = graph.add("LTXVScheduler", (x, 340), (315, 154), values, ["SIGMAS"], inputs=given)
        parts = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}
        inputs = {**{name: (node, 0) for name, node in parts.items()}, "latent_image": latent}
        outputs = ["output:LATENT", "denoised_output:LATENT"]
        return graph.add(
            "SamplerCustomAdvanced",
            (x, 540 if model.scheduler == "ltxv" else 500),
            (315, 106),
            (),
            outputs,
            inputs=inputs,
        ), 0
    if model.cfg == 1:
        given, title = {"conditioning": prompt}, "Unused at cfg 1"
        unused = graph.add(
            "ConditioningZeroOut", (430, 620), (210, 26), (), ["CONDITIONING"], (), given, {"title": title}
        )
    else:
        given, title = {"clip": clip}, "For cfg: empty"
        unused = graph.add(
            "CLIPTextEncode", (430, 620), (400, 120), [""], ["CONDITIONING"], (), given, {"title": title}
        )
    inputs = {"model": patched, "positive": positive, "negative": (unused, 0), "latent_image": latent}
    values = (42, "fixed", model.steps, model.cfg, model.sampler, model.scheduler, 1.0)
    return graph.add("KSampler", (x, 0), (315, 262), values, ["LATENT"], inputs=inputs), 0


def text_of(content: dict[str, Any]) -> str:
    """The file as it is written."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, content in workflows():
        (FOLDER / f"{name}.json").write_text(text_of(content), encoding="utf-8")
        print(FOLDER / f"{name}.json")
