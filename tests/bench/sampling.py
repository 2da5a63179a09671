"""The toy model in a real ComfyUI in this process, and every method of using a negative with it."""

import hashlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hosting.client import run_in_thread
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
WEIGHTS = TOY / "weights"


def open_comfyui(cpu: bool = True) -> None:
    """Puts the host's tree (VSF_COMFYUI) and the toy's modules first on sys.path, and vsf_core's folder last."""
    for folder in (TOY, Path(os.environ["VSF_COMFYUI"])):
        sys.path[:] = [str(folder), *(p for p in sys.path if p != str(folder))]
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]  # its ``nodes`` would shadow ComfyUI's
    from comfy.cli_args import args

    sys.path.append(str(ROOT))  # for vsf_core; last, since the pack's ``nodes`` must not hide ComfyUI's
    args.cpu = cpu
    args.use_pytorch_cross_attention = True


def load_pack() -> Mapping[str, Any]:
    """The pack's node classes, as ComfyUI's own loader registered them."""
    import nodes

    if "VSFModelPatch" not in nodes.NODE_CLASS_MAPPINGS and not run_in_thread(nodes.load_custom_node(str(ROOT))):
        raise RuntimeError("the pack does not load")
    return nodes.NODE_CLASS_MAPPINGS


@dataclass(frozen=True)
class Case:
    """One thing to ask for: a caption of an object, in a style, and the part that should go."""

    thing: str
    part: str
    caption: str
    style: str

    @property
    def negative(self) -> str:
        import worlds

        return worlds.phrase(self.thing, self.part)


PROMPTS = (("a {}", ""), ("a photo of a {} and a sun", ""), ("a picture of a {} at night", "at night"))


def cases(pairs: Sequence[tuple[str, str]], prompts: int = len(PROMPTS)) -> list[Case]:
    """Each (object, part) with each of the first few prompts."""
    return [Case(o, p, text.format(o), style) for o, p in pairs for text, style in PROMPTS[:prompts]]


GUIDED: dict[str, Callable[..., dict[str, float]]] = {
    "nag": lambda phi, blend, tau: {"nag_scale": 1 + phi, "nag_alpha": blend, "nag_tau": tau},
    "nasa": lambda phi: {"nasa_scale": phi},
    "ong": lambda scale: {"ong_scale": scale},
}
"""The pack's methods other than VSF, and their settings as its inputs. They take the negative as a prompt, padding
included; with " words" behind the name they have its words alone, as VSF has them."""
FAMILIES = ("sd3", "flux", "wan")
FRAMES = 4
"""Latent frames of Wan's clips, as it was trained."""


class Toy:
    """A trained toy model of one family, its text encoder and the pack's nodes."""

    def __init__(self, family: str, weights: Path | None = None) -> None:
        import captions
        import worlds

        path = weights or WEIGHTS / f"{family}.safetensors"
        self.family, self.world = family, worlds.of(path)
        self.model = with_shift(family, load(path))
        self.clip = captions.load_clip(family)
        self.encode, self.attach = cache(self._encode), cache(self._attach)

    def _encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def _attach(self, caption: str, unwanted: str) -> list:
        """The caption's conditioning with the negative attached by the pack's node."""
        node = self.pack["VSFNegativeConditioning"]
        return node.execute(positive=self.encode(caption), clip=self.clip, text=unwanted).result[0]

    @cached_property
    def pack(self) -> Mapping[str, Any]:
        return load_pack()

    def patched(self, **settings: Any) -> Any:
        """The model through the pack's node."""
        return self.pack["VSFModelPatch"].execute(model=self.model, **settings).result[0]

    def pictures(self, case: Case, method: str, settings: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        """Samples [n, 3, h, w] (Wan: clips [n, 3, frames, h, w]) in 0..1, one a seed, through ComfyUI's sampler."""
        run = {"steps": 8, "cfg": 1.0, **settings}
        model, positive, negative = self._prepare(case, method, settings)
        return self._decoded(self._sample(model, positive, negative, seeds, run["steps"], run["cfg"]))

    def swept(self, case: Case, model: Any, seed: int, count: int) -> np.ndarray:
        """Samples of one seed with a model of VSF Scale Sweep, one for each of its ``count`` scales."""
        positive = self.attach(case.caption, case.negative)
        return self._decoded(self._sample(model, positive, self.encode(""), [seed] * count, 8, 1.0))

    def _decoded(self, latents: Tensor) -> np.ndarray:
        return self.world.decode(self.family, self.model.model.latent_format.process_in(latents))

    def _prepare(self, case: Case, method: str, settings: Mapping[str, Any]) -> tuple[Any, list, list]:
        import baselines

        model, positive, empty = self.model, self.encode(case.caption), self.encode("")
        own = {k: v for k, v in settings.items() if k not in ("steps", "cfg")}
        unwanted = case.negative
        if method == "none":
            return model, positive, empty
        if method == "cfg":
            return model, positive, self.encode(unwanted)
        if method in ("vsf", "vsf released"):
            layout = "released" if method == "vsf released" else "paper"
            return self.patched(layout=layout, **own), self.attach(case.caption, unwanted), empty
        if method == "vsf padded":
            node = self.pack["VSFNegativeConditioning"]
            padded = node.execute(positive=positive, negative=self.encode(unwanted)).result[0]
            return self.patched(**own), padded, empty
        name = method.removesuffix(" words")
        if name in GUIDED:
            attached = self.attach(case.caption, unwanted)
            attached = attached if name == method else words_alone(attached)
            return self.patched(method=name, **GUIDED[name](**own)), attached, empty
        if method == "wef":
            flipped = -own["scale"] * self.encode(unwanted)[0][0]
            return model, [[torch.cat([tokens, flipped], 1), options] for tokens, options in positive], empty
        rules: dict[str, Callable[..., baselines.Rule]] = {
            "ong per head": partial(baselines.ong, per_head=True),
            "vsf no mask": baselines.vsf_without_mask,
            "vsf no duplication": baselines.vsf_without_duplication,
        }
        tokens = self._tokens(case.caption, unwanted, padded=method == "ong per head")
        if method == "distinct":
            tokens = _less_shared(tokens, self._tokens(case.caption, case.caption), own.pop("part"))
            return baselines.patched(model, baselines.beyond("vsf", **own), tokens), positive, empty
        rule = rules[method] if method in rules else partial(baselines.beyond, method)
        return baselines.patched(model, rule(**own), tokens), positive, empty

    def _tokens(self, caption: str, words: str, padded: bool = False) -> Tensor:
        """The tokens [1, n, C] of some words as a negative, trimmed as the pack trims them, or as a prompt's."""
        (carried,) = self.attach(caption, words)[0][1]["vsf_negatives"]
        return carried["padded" if padded else "tokens"]

    def _sample(
        self, model: Any, positive: list, negative: list, seeds: Sequence[int], steps: int, cfg: float
    ) -> Tensor:
        import comfy.sample

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        frames = (FRAMES,) if self.family == "wan" else ()
        side = self.world.side
        noise = torch.stack([torch.randn(16, *frames, side, side, generator=g) for g in generators])
        start = torch.zeros_like(noise)
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", positive, negative, start, disable_pbar=True, seed=seeds[0]
        )


def words_alone(positive: list) -> list:
    """A conditioning whose negatives are of their words to every method."""
    key = "vsf_negatives"
    return [[cond, {**said, key: [{**n, "padded": None} for n in said[key]]}] for cond, said in positive]


def _less_shared(tokens: Tensor, others: Tensor, part: float) -> Tensor:
    """``tokens`` less ``part`` of what the span of the tokens ``others`` has of them."""
    return tokens - part * (tokens @ torch.linalg.pinv(others[0]) @ others[0])


def fingerprint(path: Path) -> str:
    """Of a file of weights, so that results of others are not taken for its own."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def load(path: Path) -> Any:
    """A file of trained weights through ComfyUI's own model loader, in fp32."""
    import comfy.sd
    import tiny
    from safetensors.torch import load_file

    state = tiny.unpacked(load_file(path))
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})


def with_shift(family: str, model: Any) -> Any:
    """The model with the sigma shift of 3 that it was trained at, by ComfyUI's nodes; SD3's is that already."""
    from comfy_extras import nodes_model_advanced

    if family == "flux":  # this node takes the logarithm
        patch = nodes_model_advanced.ModelSamplingFlux().patch
        return patch(model, max_shift=math.log(3), base_shift=math.log(3), width=256, height=256)[0]
    return nodes_model_advanced.ModelSamplingSD3().patch(model, shift=3.0)[0] if family == "wan" else model


@dataclass(frozen=True)
class Scores:
    """Per picture: positive (the object is there), negative (the part is gone), quality (share of plausible pixels)."""

    positive: list[int]
    negative: list[int]
    quality: list[float]


def score(pictures: np.ndarray, case: Case) -> Scores:
    import worlds

    found = worlds.detect(pictures, case.thing, case.style)
    gone = ~found.parts[case.part]
    quality = [round(float(share), 4) for share in found.quality]
    return Scores(found.body.astype(int).tolist(), gone.astype(int).tolist(), quality)
