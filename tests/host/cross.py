"""The families whose text is seen in cross-attention alone: tiny models and encoders of each, and their oracle.

One ``Family`` below is all that a further one needs.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from encoders import make_cosmos_clip, make_ltxav_clip, make_ltxv_clip, make_unet_clip
from helpers import conditioning, load_cosmos, load_ltxav, load_ltxv, load_unet, sample, text
from oracle import Expect, oracle_model


@dataclass(frozen=True)
class Family:
    load: Callable
    clip: Callable
    width: int
    """Of the text's embedding."""
    pooled: int
    channels: int
    sizes: Sequence[tuple[int, ...]]
    """Latent sizes: an even one first, then odd ones."""
    layers: int
    """Attentions over text in one forward pass."""
    blocks: dict[str, set[int]]
    """Some choices of ``blocks``, and which they are, counting blocks with text."""
    bad_blocks: dict[str, str]
    """Some that are wrong, and what the error says of the right ones."""
    patches: Sequence[int] = (2,)
    """Latent pixels along a side of an image token, for each grid that the model has."""
    options: dict = field(default_factory=dict)
    """What a prompt has besides its embedding."""
    length: int | None = None
    """Of the text as the model sees it, where that is always the same."""
    crowded: tuple[int, ...] = (1, 44, 48)
    """A latent of somewhat more image tokens than that."""
    sound: int = 0
    """How many tokens of sound are made besides."""

    def prompt(self, length=13, seed=1):
        """A CONDITIONING whose text has so many tokens."""
        return conditioning(length, seed, self.width, self.pooled, **self.options)

    def negative(self, n, seed=5, gain=1.0):
        """One of which n tokens will be seen."""
        return [[text(n, seed, self.width) * gain, {}]]

    def seen(self, model, prompt):
        """A CONDITIONING's text as the model's blocks see it, without padding of the model's own."""
        return prompt[0][0]


@dataclass(frozen=True)
class Anima(Family):
    """Its adapter reads the encoder's tokens for each T5 token, and fills up with zeros."""

    def prompt(self, length=13, seed=1):
        return self.with_t5(super().prompt(length + 3, seed), length, seed)

    def negative(self, n, seed=5, gain=1.0):
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


@dataclass(frozen=True)
class Padded(Family):
    """Its encoder says which of the prompt's tokens are padding; here, the last four."""

    def prompt(self, length=13, seed=1):
        ((cond, options),) = super().prompt(length, seed)
        return [[cond, {**options, "attention_mask": torch.tensor([[1] * (length - 4) + [0] * 4])}]]


@dataclass(frozen=True)
class LTX2(Family):
    """Its encoder's text has a start token, which its connectors still see; then the model's own tokens follow."""

    def prompt(self, length=13, seed=1):
        ((cond, options),) = super().prompt(length, seed)
        return [[cond, {**options, "unprocessed_ltxav_embeds": True}]]

    def negative(self, n, seed=5, gain=1.0):
        return [[super().negative(n + 1, seed, gain)[0][0], {"unprocessed_ltxav_embeds": True}]]

    def seen(self, model, prompt):
        cond, options = prompt[0]
        with torch.inference_mode():
            made = model.model.diffusion_model.preprocess_text_embeds(cond, unprocessed=True)
        return made if "pooled_output" in options else made[:, 1 : cond.shape[1]]


SIZES_2D = ((8, 12), (7, 11), (1, 9))
SIZES_3D = ((3, 8, 10), (2, 7, 9), (1, 8, 12))
COSMOS = {
    **{"width": 1024, "pooled": 8, "channels": 16, "sizes": SIZES_3D, "layers": 10},
    "blocks": {"double:3": {3}, "double:-1,double:8-": {0, 1, 8, 9}, "all": set(range(10))},
    "bad_blocks": {"double:10": "double:0-9", "single": "double:0-9"},
}
LTXV = {
    **{"load": load_ltxv, "clip": make_ltxv_clip, "width": 4096, "pooled": 8, "channels": 128, "layers": 3},
    **{"sizes": ((3, 4, 5), (2, 3, 7), (1, 5, 9)), "patches": (1,)},
    "blocks": {"double:1": {1}, "double:0,double:2-": {0, 2}, "all": {0, 1, 2}},
    "bad_blocks": {"double:3": "double:0-2"},
}
LTX2_ = {
    **{"pooled": 8, "channels": 128, "layers": 2, "sizes": LTXV["sizes"], "patches": (1,), "length": 1024},
    **{"sound": 9, "crowded": (1, 33, 32), "blocks": {"double:1": {1}, "all": {0, 1}}},
    "bad_blocks": {"double:2": "double:0-1"},
}
UNET = {"channels": 4, "sizes": SIZES_2D, "patches": (1, 2, 4)}


def ltxav_clip(kind):
    with tempfile.TemporaryDirectory() as folder:
        return make_ltxav_clip(Path(folder), kind)


FAMILIES = {
    "sd1": Family(
        load=lambda: load_unet("sd1"),
        clip=lambda: make_unet_clip("sd1"),
        width=768,
        pooled=768,
        layers=7,
        blocks={"input:1": {0}, "input:2-3,middle": {1, 2}, "output": {3, 4, 5, 6}},
        bad_blocks={"input:0": "input:1-1, input:3-3, middle:0-0, output:2-5", "double": "input:1-1"},
        **UNET,
    ),
    "sd2": Family(
        load=lambda: load_unet("sd2"),
        clip=lambda: make_unet_clip("sd2"),
        width=1024,
        pooled=1024,
        layers=7,
        blocks={"middle,output:5": {2, 6}},
        bad_blocks={"output:6": "output:2-5"},
        **UNET,
    ),
    "sdxl": Family(
        load=lambda: load_unet("sdxl"),
        clip=lambda: make_unet_clip("sdxl"),
        width=2048,
        pooled=1280,
        layers=2 + 5 + 1 + 2 + 1 + 1 + 2,
        blocks={"input:-4": {0}, "input:5,output:1-2": {1, 4, 5}, "all": set(range(7))},
        bad_blocks={"input:4": "input:3-3, input:5-5, middle:0-0, output:0-3", "input:0-9": "input:3-3"},
        **UNET,
    ),
    "ltxv": Padded(**LTXV),
    "ltx2": LTX2(load=lambda: load_ltxav("2"), clip=lambda: ltxav_clip("2"), width=48, **LTX2_),
    "ltx2.3": LTX2(load=lambda: load_ltxav("2.3"), clip=lambda: ltxav_clip("2.3"), width=96, **LTX2_),
    "cosmos": Family(load=lambda: load_cosmos("cosmos"), clip=lambda: make_cosmos_clip("cosmos"), **COSMOS),
    "anima": Anima(load=lambda: load_cosmos("anima"), clip=lambda: make_cosmos_clip("anima"), length=512, **COSMOS),
}


@lru_cache(maxsize=1)
def loaded(name):
    """One at a time: some are narrow rather than tiny."""
    return FAMILIES[name].load()


@lru_cache(maxsize=1)
def cached_clip(name):
    return FAMILIES[name].clip()


def run(family, model, positive, negative=None, **kw):
    kw = {"size": family.sizes[0], "channels": family.channels, "sound": family.sound, "steps": 2, **kw}
    with torch.inference_mode():  # as ComfyUI does
        return sample(model, positive, negative or family.prompt(seed=99), **kw)


def oracle_of(family, model, positive, negative, alpha=3.3, beta=0.2, **expect):
    seen = (family.seen(model, prompt) for prompt in (positive, negative))
    return oracle_model(model, [Expect(*seen, alpha, beta, **expect)])


def both(pack, family, model, n=5, positive=None, alpha=1.9, beta=0.2, patch=(), node=(), expect=(), **kw):
    """The latents of a patched run and of the oracle's."""
    positive, negative = positive or family.prompt(), family.negative(n)
    attached = pack.negative(positive, negative=negative, **dict(node))
    oracle, record = oracle_of(family, model, positive, negative, alpha, beta, **dict(expect))
    result = run(family, pack.patch(model, scale=alpha, offset=beta, **dict(patch)), attached, **kw)
    expected = run(family, oracle, positive, **kw)
    assert record.joint > 0 and record.joint % family.layers == 0
    return result, expected


def attached_of(pack, clip, words, **kw):
    return pack.negative(conditioning(), clip=clip, text=words, **kw)[0][1]["vsf_negatives"][-1]
