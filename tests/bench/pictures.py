"""Draws the pictures that ship: a thumbnail beside each workflow, the help page's comparison of presets, and README's
attention map and scale sweep.

    VSF_COMFYUI=... PYTHONPATH=tests python tests/bench/pictures.py [NAME ...]

All from the trained toys through the pack's real nodes, and marked as toys.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sampling  # noqa: E402
from sampling import ROOT, Case, Toy  # noqa: E402

THUMBNAILS = {
    "vsf_tiny_demo": ("sd3", "house", "roof"),
    "vsf_sd35_large_turbo_text_to_image": ("sd3", "car", "wheels"),
    "vsf_flux_schnell_text_to_image": ("flux", "clock", "bells"),
    "vsf_flux_kontext_edit": ("flux", "tree", "apples"),
    "vsf_wan21_t2v_1_3b_causvid": ("wan", "cake", "candles"),
    "vsf_wan22_i2v_14b_lightx2v": ("wan", "clock", "bells"),
    "vsf_wan22_t2v_14b_lightx2v": ("wan", "clock", "bells"),
    "vsf_generate_then_edit_flux_kontext": ("sd3", "snowman", "hat"),
    "vsf_z_image_turbo_text_to_image": ("sd3", "cake", "candles"),
    "vsf_flux2_klein_4b_text_to_image": ("sd3", "snowman", "scarf"),
    "vsf_qwen_image_lightning_text_to_image": ("sd3", "clock", "bells"),
    "vsf_chroma1_hd_text_to_image": ("flux", "car", "wheels"),
    "vsf_sdxl_dmd2_text_to_image": ("sd3", "house", "door"),
    "vsf_anima_turbo_text_to_image": ("sd3", "car", "lamps"),
    "vsf_ltxv_2b_distilled_text_to_video": ("wan", "house", "door"),
    "vsf_hunyuan_video_text_to_video": ("wan", "snowman", "hat"),
}
"""Of each workflow: the toy's family, the object, and the part that goes."""
BY_VSF = "vsf_generate_then_edit_flux_kontext"
"""Compares VSF with a model that has no toy: its thumbnail says whose picture it shows."""

WORDED = {
    "vsf_style_avoidance_sd35_large_turbo": ("a picture of a house at night", "night", 3.3, 1),
    "vsf_abstract_art_sd35_large_turbo": ("a house", "a house", 0.5, 1),
    "vsf_anti_aesthetic_sd35_large_turbo": ("a snowman", "a snowman", 0.5, 1),
}
"""Of each workflow whose negative is no part: the prompt, the negative, the scale and the seed."""

SWEEPS = {
    "vsf_scale_sweep_sd35_large_turbo": ("sd3", ("house", "roof"), ("car", "wheels")),
    "vsf_scale_sweep_z_image_turbo": ("sd3", ("cake", "candles"), ("house", "window")),
    "vsf_scale_sweep_flux2_klein_4b": ("sd3", ("snowman", "scarf"), ("car", "lamps")),
    "vsf_scale_sweep_qwen_image_lightning": ("sd3", ("clock", "bells"), ("car", "wheels")),
    "vsf_scale_sweep_chroma1_hd": ("flux", ("car", "wheels"), ("clock", "hands")),
    "vsf_scale_sweep_sdxl_dmd2": ("sd3", ("house", "door"), ("tree", "trunk")),
    "vsf_scale_sweep_flux_schnell": ("flux", ("clock", "hands"), ("tree", "apples")),
    "vsf_scale_sweep_wan21_t2v_1_3b_causvid": ("flux", ("clock", "bells"), ("car", "lamps")),
    "vsf_scale_sweep_ltxv_2b_distilled": ("flux", ("boat", "sail"), ("house", "window")),
    "vsf_scale_sweep_hunyuan_video": ("sd3", ("snowman", "hat"), ("car", "wheels")),
    "vsf_scale_sweep_anima_turbo": ("sd3", ("house", "window"), ("clock", "hands")),
}
"""Of each sweep: the toy's family, and the object and part of each row."""
SCALES = "0, 1, 2, 3, 4"
FIGURES = ("attention-map", "scale-sweep")
"""README's, of the toy SD3's house and roof."""

TRIES, LEAST_QUALITY = 10, 0.9
PRESETS = {
    "no negative": None,
    "Quality, released": ("vsf released", 3.3),
    "Strong, released": ("vsf released", 3.8),
    "Hard, paper": ("vsf", 3.3),
    "Harder, paper": ("vsf", 3.8),
}
COMPARED = (("house", "roof"), ("car", "wheels"), ("snowman", "hat"))
SEEDS = (1, 2)
SIDE, GAP, INK, PAPER = 96, 6, (40, 40, 40), (250, 250, 248)


def main() -> None:
    every = (*THUMBNAILS, *WORDED, *SWEEPS, "presets", *FIGURES)
    wanted = sys.argv[1:] or every
    if unknown := sorted(set(wanted) - set(every)):
        sys.exit(f"no such picture: {', '.join(unknown)}; there are {', '.join(every)}")
    sampling.open_comfyui()
    toy = cache(Toy)
    for name, (family, thing, part) in THUMBNAILS.items():
        if name in wanted:
            before, after = telling_pair(toy(family), thing, part)
            caption = f"{'by VSF: ' if name == BY_VSF else ''}a {thing}, not: {part}"
            thumbnail(before, after, caption).save(ROOT / "workflows" / f"{name}.jpg", quality=88)
    for name, (caption, unwanted, scale, seed) in WORDED.items():
        if name in wanted:
            case = Wording("", "", caption, "", unwanted)
            pair = [
                shown(toy("sd3").pictures(case, method, settings, [seed])[0])
                for method, settings in (("none", {}), ("vsf", {"scale": scale, "offset": 0.2}))
            ]
            words = f"{caption}, not: {unwanted}"
            thumbnail(*pair, words).save(ROOT / "workflows" / f"{name}.jpg", quality=88)
    for name, (family, *swept) in SWEEPS.items():
        if name in wanted:
            sweeps(toy(family), swept).save(ROOT / "workflows" / f"{name}.jpg", quality=88)
    if "presets" in wanted:
        compare(toy("sd3")).save(ROOT / "js" / "docs" / "presets.png", optimize=True)
    for name in FIGURES:
        if name in wanted:
            figure = attention_map(toy("sd3")) if name == "attention-map" else scale_sweep(toy("sd3"))
            figure.quantize(128).save(ROOT / "docs" / "images" / f"{name}.png", optimize=True)


@dataclass(frozen=True)
class Wording(Case):
    """A case whose negative is any words, not a part."""

    unwanted: str

    @property
    def negative(self) -> str:
        return self.unwanted


def telling_pair(toy: Toy, thing: str, part: str) -> tuple[Image.Image, Image.Image]:
    """Without and with the negative, of the clearest seed: thumbnails say what it does, not how often."""
    without, with_, _ = telling_seed(toy, thing, part)
    return shown(without[0]), shown(with_[0])


def telling_seed(toy: Toy, thing: str, part: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The samples of that pair, and the seed."""
    case, found = Case(thing, part, f"a {thing}", ""), []
    for seed in range(TRIES):
        without, with_ = (
            drawn(toy, thing, part, method, scale, seed) for method, scale in (("none", 0.0), ("vsf", 3.3))
        )
        had, has = (sampling.score(one, case) for one in (without, with_))
        if not had.negative[0] and has.negative[0] and has.positive[0] and has.quality[0] >= LEAST_QUALITY:
            found.append((body_left(with_, case), has.quality[0], seed, without, with_))
    if not found:
        raise RuntimeError(f"{toy.family}: no seed takes {part} from {thing}")
    *_, seed, without, with_ = max(found, key=lambda one: one[:2])
    return without, with_, seed


def body_left(pictures: np.ndarray, case: Case) -> int:
    """How much of the object there is in the last picture, in pixels of its body."""
    import world

    last = pictures[-1:] if pictures.ndim == 4 else pictures[-1:, :, -1]
    pixels, _ = world.classify(last, world.BY_NAME[case.thing], case.style)
    return int(pixels["body"].sum())


def drawn(toy: Toy, thing: str, part: str, method: str, scale: float, seed: int) -> np.ndarray:
    """One sample with its batch dimension."""
    settings = {"scale": scale, "offset": 0.2} if method != "none" else {}
    return toy.pictures(Case(thing, part, f"a {thing}", ""), method, settings, [seed])


def shown(sample: np.ndarray) -> Image.Image:
    """A picture; of a clip, the frame in its middle."""
    frame = sample if sample.ndim == 3 else sample[:, sample.shape[1] // 2]
    return Image.fromarray((frame.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8))


def thumbnail(before: Image.Image, after: Image.Image, caption: str) -> Image.Image:
    """Both side by side with a caption, 448 x 256."""
    sheet = Image.new("RGB", (448, 256), PAPER)
    for x, picture in ((8, before), (228, after)):
        sheet.paste(picture.resize((212, 212), Image.Resampling.NEAREST), (x, 8))
    write(sheet, (8, 226), f"{caption}  (toy)", 18)
    return sheet


def sweeps(toy: Toy, swept: Sequence[tuple[str, str]]) -> Image.Image:
    """A row for each run of the sweep: its pictures and labels, by the pack's nodes; 448 x 256."""
    runs = [telling_sweep(toy, thing, part) for thing, part in swept]
    cells = enlarged(np.concatenate([pictures for pictures, _ in runs]), 80)
    rows = contact_sheet(toy, cells, "\n".join(lines for _, lines in runs))
    sheet = Image.new("RGB", (448, 256), "white")
    sheet.paste(rows, (0, 0))
    write(sheet, (8, 226), "; ".join(f"a {thing}, not: {part}" for thing, part in swept) + "  (toy)", 18)
    return sheet


def enlarged(pictures: np.ndarray, side: int) -> torch.Tensor:
    """Pictures [n, 3, 32, 32] as ComfyUI's images [n, side, side, 3]."""
    big = [shown(one).resize((side, side), Image.Resampling.NEAREST) for one in pictures]
    return torch.from_numpy(np.stack([np.asarray(one) for one in big])).float() / 255


def contact_sheet(toy: Toy, images: torch.Tensor, labels: str) -> Image.Image:
    """By the pack's node, five in a row at most."""
    columns = min(5, len(images))
    made = toy.pack["VSFContactSheet"].execute(images=images, labels=labels, columns=columns).result[0][0]
    return Image.fromarray((made * 255).round().byte().numpy())


def attention_map(toy: Toy) -> Image.Image:
    """Without and with the negative, and where the picture attended to it, by the pack's nodes."""
    without, with_, seed = telling_seed(toy, "house", "roof")
    model, record = toy.pack["VSFRecord"].execute(model=toy.patched(scale=3.3, offset=0.2)).result
    toy.swept(Case("house", "roof", "a house", ""), model, seed, 1)
    pair = enlarged(np.concatenate([without, with_]), 256)
    heat, laid_over, _ = toy.pack["VSFAttentionMap"].execute(map=record, image=pair[1:]).result
    labels = "no negative\nwith VSF\nshare on the negative\nlaid over"
    return contact_sheet(toy, torch.cat([pair, heat, laid_over]), labels)


def scale_sweep(toy: Toy) -> Image.Image:
    pictures, labels = telling_sweep(toy, "house", "roof")
    return contact_sheet(toy, enlarged(pictures, 256), labels)


def telling_sweep(toy: Toy, thing: str, part: str) -> tuple[np.ndarray, str]:
    """A run of VSF Scale Sweep and its labels, of the clearest seed where the part goes on the way."""
    case = Case(thing, part, f"a {thing}", "")
    latent = {"samples": torch.zeros(1, 16, 32, 32)}
    sweep = toy.pack["VSFScaleSweep"].execute
    model, latents, labels = sweep(model=toy.patched(offset=0.2), latent=latent, scales=SCALES).result
    telling = []
    for seed in range(TRIES):
        pictures = toy.swept(case, model, seed, len(latents["samples"]))
        found = sampling.score(pictures, case)
        goes = not found.negative[0] and all(found.negative[-2:])
        if goes and all(found.positive) and min(found.quality) >= LEAST_QUALITY:
            telling.append((body_left(pictures, case), min(found.quality), pictures))
    if not telling:
        raise RuntimeError(f"{toy.family}: no seed takes {part} from {thing} on the way")
    return max(telling, key=lambda one: one[:2])[2], labels


def compare(toy: Toy) -> Image.Image:
    """A row for each object and seed, a column for each preset."""
    rows = [(thing, part, seed) for thing, part in COMPARED for seed in SEEDS]
    left, top = 132, 26
    sheet = Image.new("RGB", (left + len(PRESETS) * (SIDE + GAP + 30), top + len(rows) * (SIDE + GAP) + 20), PAPER)
    for x, label in enumerate(PRESETS):
        write(sheet, (left + x * (SIDE + GAP + 30), 6), label, 13)
    for y, (thing, part, seed) in enumerate(rows):
        at = top + y * (SIDE + GAP)
        if seed == SEEDS[0]:
            write(sheet, (6, at + SIDE // 2 - 16), f"a {thing}", 13)
            write(sheet, (6, at + SIDE // 2), f"not: {part}", 13)
        for x, choice in enumerate(PRESETS.values()):
            method, scale = choice or ("none", 0.0)
            picture = shown(drawn(toy, thing, part, method, scale, seed)[0])
            small = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(small, (left + x * (SIDE + GAP + 30), at))
    write(
        sheet, (6, sheet.height - 18), "A toy of 4 million parameters, 32 x 32 pixels: not what a real model draws.", 12
    )
    return sheet.quantize(128).convert("P")


def write(sheet: Image.Image, at: Sequence[int], text: str, size: int) -> None:
    ImageDraw.Draw(sheet).text((at[0], at[1]), text, fill=INK, font=ImageFont.load_default(size))


if __name__ == "__main__":
    main()
