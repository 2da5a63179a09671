"""Every tiny model that the tests know, and how a run of it is compared: one table, one ``both``, one ``assert_close``.

A further model is one line in ``CASES``; ``test_families.py`` then asks of it all that makes a family right.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import comfy.clip_vision
import torch
from encoders import make_cosmos_clip, make_ltxav_clip, make_ltxv_clip, make_unet_clip
from helpers import (
    carried,
    conditioning,
    load_chroma,
    load_cosmos,
    load_flux,
    load_flux2,
    load_hunyuan_video,
    load_ltxav,
    load_ltxv,
    load_qwen_image,
    load_sd3,
    load_unet,
    load_wan,
    load_z_image,
    sample,
    text,
)
from oracle import Expect, oracle_model

UNCOND = 99
"""The seed of the sampler's negative."""


@dataclass(frozen=True)
class Case:
    """A tiny model: how it is loaded, how wide its text is, latents that it takes, what a prompt of it may carry."""

    load: Callable
    sizes: tuple = ((16, 24), (15, 21))
    """Latent sizes: an even one, an odd one where the model takes any, and others."""
    width: int = 64
    pooled: int = 64
    channels: int = 16
    patches: tuple = (2,)
    """Latent pixels along a side of an image token, for each grid that the model has."""
    options: dict = field(default_factory=dict)
    """What a prompt has besides its embedding."""
    length: int | None = None
    """Of the text as the model sees it, where that is always the same."""
    filled_to: int = 1
    """The model fills texts up to a multiple of so many tokens."""
    blocks: dict[str, set[int]] = field(default_factory=lambda: {"double:1": {1}, "double:0,double:2-": {0, 2}})
    """Some choices of ``blocks``, and which they are, counting blocks with text."""
    bad_blocks: dict[str, str] = field(default_factory=lambda: {"double:3": "double:0-2", "triple": "double:0-2"})
    """Some that are wrong, and what the error says of the right ones."""
    layers: int = 3
    """Attentions over text in one forward pass."""
    cross: bool = False
    """Text is seen in cross-attention alone."""
    clip: Callable | None = None
    """Makes its tiny text encoder."""
    crowded: tuple[int, ...] = (1, 44, 48)
    """A latent of somewhat more image tokens than ``length``."""
    sound: int = 0
    """How many tokens of sound are made besides."""

    def prompt(self, length=13, seed=1, size=None, **options):
        """A CONDITIONING whose text has so many tokens, for a latent of that size."""
        given = text(length, seed, self.width)
        pooled = text(1, 1100 if seed == UNCOND else 1001, self.pooled)[:, 0] * 0.5
        return [[given, {"pooled_output": pooled, **self.options, **options}]]

    def uncond(self):
        """The sampler's negative: without what the prompt has besides its embedding."""
        ((given, options),) = Case.prompt(self, seed=UNCOND)
        return [[given, {"pooled_output": options["pooled_output"]}]]

    def negative(self, n=5, seed=5, gain=1.0):
        """One of which n tokens will be seen."""
        return [[text(n, seed, self.width) * gain, {}]]

    def seen(self, model, prompt):
        """A CONDITIONING's text as the model's blocks see it, without padding of the model's own."""
        return prompt[0][0]

    def run(self, model, positive, negative=None, **kw):
        """The final latent."""
        kw = {"size": self.sizes[0], "channels": self.channels, "sound": self.sound, "steps": 2, **kw}
        with torch.inference_mode():  # as ComfyUI does
            return sample(model, positive, negative or self.uncond(), **kw)

    def expect(self, model, positive, negative=None, alpha=3.3, beta=0.2, **kw):
        """What the oracle should do to ``positive``."""
        seen = (self.seen(model, prompt) for prompt in (positive, negative or self.negative()))
        return Expect(*seen, alpha, beta, **kw)

    def grids(self, size=None):
        """How many tokens the picture has, on each grid."""
        *frames, h, w = size or self.sizes[0]
        return [math.prod(frames) * -(-h // p) * -(-w // p) for p in self.patches]

    def references(self, size=None):
        """How many tokens of reference images there are, before the picture's and after them."""
        before, after = self.options.get("ref_latent"), self.options.get("reference_latents", ())
        return (0 if before is None else self.grids(before.shape[2:])[0]), sum(
            self.grids(latent.shape[2:])[0] for latent in after
        )

    def keep(self, size, cells, n=5, affected=1.0):
        """``Expect.keep``: which tokens see the negative's n, for each number of them where the model has grids.
        cells: of the latent [h, w], 1 where the picture sees it; affected: what reference images see."""
        rows = {}
        for p in self.patches:
            share = shares(cells.expand(math.prod(size[:-2]), -1, -1), p)
            before, after = (torch.full((count,), float(affected)) for count in self.references(size))
            rows[len(share)] = torch.cat([before, share, after])[:, None].expand(-1, n)
        return rows if len(self.patches) > 1 else rows.popitem()[1]


def shares(cells, p):
    """By hand: how much of each square of ``p`` pixels of ``cells`` [frames, h, w] is inside; of those at the edge, the
    pixels that lie beyond are like the nearest."""
    frames, h, w = cells.shape
    out = []
    for f in range(frames):
        for top in range(0, h, p):
            for left in range(0, w, p):
                rows = [min(top + i, h - 1) for i in range(p)]
                columns = [min(left + i, w - 1) for i in range(p)]
                out.append(cells[f][rows][:, columns].mean())
    return torch.stack(out)


def region(size):
    """Cells of a latent [h, w] of which some are inside, and the picture mask of which they come."""
    h, w = size[-2:]
    cells = torch.zeros(h, w)
    cells[h // 3 : h // 3 + max(3, h // 3), 2 : 2 + max(5, w // 2)] = 1.0
    return cells, cells.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]


# -- models whose prompts or texts are not as they are given ----------------------------------------------------------


class Filled(Case):
    """ComfyUI fills shorter texts up to 512 tokens, in front, before Flux.2 gets them."""

    def seen(self, model, prompt):
        fill = 512 - prompt[0][0].shape[1] if "pooled_output" in prompt[0][1] else 0
        return torch.nn.functional.pad(prompt[0][0], (0, 0, fill, 0))


@dataclass(frozen=True)
class Wan(Case):
    """What a prompt carries depends on the kind, and on the video's size."""

    kind: str = "t2v"

    def prompt(self, length=13, seed=1, size=None, **options):
        frames, *sides = size or self.sizes[0]
        if self.kind in ("i2v", "control", "camera"):
            options = {"clip_vision_output": clip_vision(), **options}
        if self.kind == "control":
            options = {"reference_latents": [latents(1, *sides)], **options}
        if self.kind.startswith("camera"):
            pixels = [16 * -(-side // 2) for side in sides]
            rays = torch.randn(1, 24, frames, *pixels, generator=torch.Generator().manual_seed(8))
            options = {"camera_conditions": rays, **options}
        return super().prompt(length, seed, size, **options)

    def references(self, size=None):
        return (self.grids((1, *(size or self.sizes[0])[1:]))[0] if self.kind == "control" else 0), 0


class Anima(Case):
    """Its adapter reads the encoder's tokens for each T5 token, and fills up with zeros."""

    def prompt(self, length=13, seed=1, size=None, **options):
        return self.with_t5(super().prompt(length + 3, seed, size, **options), length, seed)

    def uncond(self):
        return self.prompt(seed=UNCOND)

    def negative(self, n=5, seed=5, gain=1.0):
        return self.with_t5(super().negative(n + 2, seed, gain), n, seed)

    def with_t5(self, given, length, seed):
        g = torch.Generator().manual_seed(seed)
        ids, weights = torch.randint(3, 32000, (length,), generator=g), 0.5 + torch.rand(length, generator=g)
        return [[given[0][0], {**given[0][1], "t5xxl_ids": ids.int(), "t5xxl_weights": weights}]]

    def seen(self, model, prompt):
        cond, options = prompt[0]
        with torch.inference_mode():
            made = model.model.diffusion_model.preprocess_text_embeds(
                cond, options["t5xxl_ids"][None], options["t5xxl_weights"][None, :, None]
            )
        return made if "pooled_output" in options else made[:, : len(options["t5xxl_ids"])]


class Padded(Case):
    """Its encoder says which of the prompt's tokens are padding; here, the last four."""

    def prompt(self, length=13, seed=1, size=None, **options):
        return super().prompt(length, seed, size, attention_mask=padding(*range(length - 4, length), length=length))

    def uncond(self):
        return self.prompt(seed=UNCOND)


class LTX2(Case):
    """Its encoder's text has a start token, which its connectors still see; then the model's own tokens follow."""

    def prompt(self, length=13, seed=1, size=None, **options):
        return super().prompt(length, seed, size, unprocessed_ltxav_embeds=True, **options)

    def uncond(self):
        return self.prompt(seed=UNCOND)

    def negative(self, n=5, seed=5, gain=1.0):
        return [[super().negative(n + 1, seed, gain)[0][0], {"unprocessed_ltxav_embeds": True}]]

    def seen(self, model, prompt):
        cond, options = prompt[0]
        with torch.inference_mode():
            made = model.model.diffusion_model.preprocess_text_embeds(cond, unprocessed=True)
        return made if "pooled_output" in options else made[:, 1 : cond.shape[1]]


def latents(*size, seed=4, channels=16):
    """A latent that a prompt carries."""
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed))


def clip_vision(tokens=257, seed=9):
    """What CLIP vision makes of an image, for Wan."""
    return SimpleNamespace(penultimate_hidden_states=text(tokens, seed, 1280))


def siglip(tokens):
    """What SigLIP makes of an image, for HunyuanVideo 1.5."""
    output = comfy.clip_vision.Output()
    output["last_hidden_state"] = text(tokens, 9, 1152)
    return output


def padding(*hidden, length=13):
    """A prompt's mask with padding at the given places."""
    mask = torch.ones(1, length, dtype=torch.long)
    mask[:, list(hidden)] = 0
    return mask


def ltxav_clip(kind):
    with tempfile.TemporaryDirectory() as folder:
        return make_ltxav_clip(Path(folder), kind)


# -- the table --------------------------------------------------------------------------------------------------------

FLUX = {
    "blocks": {"single:1": {3}, "double:1,single:0-": {1, 2, 3}},
    "bad_blocks": dict.fromkeys(("double:2", "single:0-2", "triple", "double:0,single:9"), "double:0-1, single:0-1"),
    "layers": 4,
}
STILL = ((1, 16, 24), (1, 15, 21))
PIXELS = {"sizes": ((48, 64), (44, 60)), "channels": 3, "patches": (16,), **FLUX}
FLUX2 = {"sizes": ((8, 12), (7, 11)), "channels": 128, "patches": (1,), "length": 512, **FLUX}
CLIPS = ((3, 6, 10), (2, 6, 14))
"""No odd side: HunyuanVideo as ComfyUI has it cannot put its patches together then."""
HUNYUAN = {"pooled": 768, **FLUX}
CROSS = {"cross": True, "sizes": ((3, 8, 10), (2, 7, 9), (1, 8, 12))}
WAN = {**CROSS, "width": 4096, "pooled": 2048}
EVEN = {**WAN, "sizes": ((3, 8, 10), (2, 6, 10), (1, 8, 12))}
"""Where stock ComfyUI itself takes even latent sizes alone."""
COSMOS = {
    **{**CROSS, "width": 1024, "pooled": 8, "layers": 4},
    "blocks": {"double:3": {3}, "double:-0,double:2-": {0, 2, 3}},
    "bad_blocks": {"double:4": "double:0-3", "single": "double:0-3"},
}
LTX = {**CROSS, "pooled": 8, "channels": 128, "sizes": ((3, 4, 5), (2, 3, 7), (1, 5, 9)), "patches": (1,)}
LTX_2 = {
    **{**LTX, "layers": 2, "length": 1024, "crowded": (1, 33, 32), "sound": 9},
    **{"blocks": {"double:1": {1}, "all": {0, 1}}, "bad_blocks": {"double:2": "double:0-1"}},
}
UNET = {**CROSS, "channels": 4, "sizes": ((8, 12), (7, 11), (1, 9)), "patches": (1, 2, 4), "layers": 7}
CASES = {
    "sd3": Case(load_sd3, pooled=2048),
    "sd3.5 medium": Case(lambda: load_sd3(self_attn_layers=(0, 1)), pooled=2048),
    "flux": Case(load_flux, pooled=768, **FLUX),
    "flux dev": Case(lambda: load_flux(guidance=True), pooled=768, **FLUX),
    "kontext": Case(load_flux, pooled=768, options={"reference_latents": [latents(10, 11)]}, **FLUX),
    "chroma": Case(load_chroma, **FLUX),
    "radiance": Case(lambda: load_chroma(radiance="alike"), **PIXELS),
    "radiance, counted": Case(lambda: load_chroma(radiance="counted"), **PIXELS),
    "qwen-image": Case(load_qwen_image, STILL),
    "qwen-image, padding": Case(load_qwen_image, STILL, options={"attention_mask": padding(11, 12)}),
    "qwen-image edit": Case(load_qwen_image, STILL, options={"reference_latents": [latents(1, 10, 11)]}),
    "qwen-image edit 2511": Case(
        lambda: load_qwen_image(default_ref_method="index_timestep_zero"),
        STILL,
        options={"reference_latents": [latents(1, 10, 11), latents(1, 6, 8)]},
    ),
    "flux.2 dev": Filled(load_flux2, **FLUX2),
    "flux.2 klein": Filled(
        lambda: load_flux2(guidance=False), **FLUX2, options={"reference_latents": [latents(5, 6, channels=128)]}
    ),
    "z-image": Case(load_z_image, filled_to=32),
    "hunyuan": Case(load_hunyuan_video, CLIPS, **HUNYUAN),
    "hunyuan 1.5": Case(
        lambda: load_hunyuan_video("1.5"),
        ((3, 5, 8), (2, 5, 7)),
        channels=32,
        patches=(1,),
        options={"conditioning_byt5small": text(6, 8, 1472), "clip_vision_output": siglip(4)},
        **FLUX,
    ),
    # from here on, text is seen in cross-attention alone
    "wan": Wan(load_wan, **WAN),
    "wan i2v": Wan(lambda: load_wan("i2v"), kind="i2v", **WAN),
    "wan vace": Wan(lambda: load_wan("vace"), kind="vace", **EVEN, layers=6),
    "wan 5b": Wan(lambda: load_wan("5b"), kind="5b", channels=48, **WAN),
    "wan control": Wan(lambda: load_wan("control"), kind="control", **EVEN),
    "wan camera": Wan(lambda: load_wan("camera"), kind="camera", **WAN),
    "wan camera 2.2": Wan(lambda: load_wan("camera_2.2"), kind="camera_2.2", **WAN),
    "sd1": Case(
        lambda: load_unet("sd1"),
        clip=lambda: make_unet_clip("sd1"),
        width=768,
        pooled=768,
        blocks={"input:1": {0}, "input:2-3,middle,output": {1, 2, 3, 4, 5, 6}},
        bad_blocks={"input:0": "input:1-1, input:3-3, middle:0-0, output:2-5", "double": "input:1-1"},
        **UNET,
    ),
    "sd2": Case(
        lambda: load_unet("sd2"),
        clip=lambda: make_unet_clip("sd2"),
        width=1024,
        pooled=1024,
        blocks={"middle,output:5": {2, 6}},
        bad_blocks={"output:6": "output:2-5"},
        **UNET,
    ),
    "sdxl": Case(
        lambda: load_unet("sdxl"),
        clip=lambda: make_unet_clip("sdxl"),
        width=2048,
        pooled=1280,
        blocks={"input:-4": {0}, "input:5,output:1-2": {1, 4, 5}},
        bad_blocks={"input:4": "input:3-3, input:5-5, middle:0-0, output:0-3", "input:0-9": "input:3-3"},
        **{**UNET, "layers": 2 + 5 + 1 + 2 + 1 + 1 + 2},
    ),
    "cosmos": Case(lambda: load_cosmos("cosmos"), clip=lambda: make_cosmos_clip("cosmos"), **COSMOS),
    "anima": Anima(lambda: load_cosmos("anima"), clip=lambda: make_cosmos_clip("anima"), length=512, **COSMOS),
    "ltxv": Padded(load_ltxv, clip=make_ltxv_clip, width=4096, **LTX),
    "ltx2": LTX2(lambda: load_ltxav("2"), clip=lambda: ltxav_clip("2"), width=48, **LTX_2),
    "ltx2.3": LTX2(lambda: load_ltxav("2.3"), clip=lambda: ltxav_clip("2.3"), width=96, **LTX_2),
}
JOINT = [name for name, case in CASES.items() if not case.cross]
VARIANTS = {"flux dev", "qwen-image, padding", "qwen-image edit 2511", "wan 5b", "wan camera 2.2", "sd2", "ltx2.3"}
"""Models that differ from another one here in what a prompt carries, or in sizes alone."""
DISTINCT = [name for name in CASES if name not in VARIANTS]
SMOKE = ("sd3", "flux", "qwen-image", "z-image", "wan", "sdxl", "anima")
"""Those that the usual test command tries on older ComfyUIs, too: one of each kind of model."""


@lru_cache(maxsize=1)
def model_of(name):
    """The model, loaded once; one at a time, since some are narrow rather than tiny."""
    return CASES[name].load()


@lru_cache(maxsize=1)
def clip_of(name):
    """The text encoder, made once."""
    return CASES[name].clip()


# -- a run and the oracle's -------------------------------------------------------------------------------------------


def both(
    pack, case, model, n=5, positive=None, negative=None, alpha=None, beta=0.2, patch=(), node=(), expect=(), **run
):
    """The latents of a patched run, and of the oracle's.

    patch, node: inputs of VSF Model Patch and of VSF Negative Conditioning; expect: of ``Expect``; run: of
    ``Case.run``, where ``other`` is the sampler's negative, and ``stock`` the oracle's model if it is another one."""
    alpha = (1.9 if case.cross else 3.3) if alpha is None else alpha
    positive = positive or case.prompt(size=run.get("size"))
    negative, other = negative or case.negative(n), run.pop("other", None)
    stock = run.pop("stock", model)
    attached = pack.negative(positive, negative=negative, **dict(node))
    released = dict(patch).get("layout") == "released"
    expects = [case.expect(model, [entry], negative, alpha, beta, **dict(expect)) for entry in positive]
    oracle, record = oracle_model(stock, expects, released=released)
    result = case.run(pack.patch(model, scale=alpha, offset=beta, **dict(patch)), attached, other, **run)
    expected = case.run(oracle, positive, other, **run)
    assert record.joint > 0 and record.joint % case.layers == 0, "the oracle was not in force"
    return result, expected


def compare(pack, family, apply=lambda m: m, order="theirs first", model=None, **kw):
    """The final latents of a run with another node's patch ``apply`` and VSF, of the oracle's with that patch, and of
    the oracle's without it."""
    case, model = CASES[family], model or CASES[family].load()
    positive, negative = case.prompt(), case.negative()
    patched = pack.patch(apply(model)) if order == "theirs first" else apply(pack.patch(model))
    expects = [case.expect(model, positive, negative)]
    result = case.run(patched, pack.negative(positive, negative=negative), **kw)
    expected, without = (case.run(oracle_model(m, expects)[0], positive, **kw) for m in (apply(model.clone()), model))
    return result, expected, without


def attached_of(pack, clip, words, **kw):
    """The negative that the node makes of words."""
    return carried(pack.negative(conditioning(), clip=clip, text=words, **kw))[-1]
