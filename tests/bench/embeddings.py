"""What a text encoder makes of a negation: cosines between prompts, and their first two principal components.

    python3 dev.py bench embeddings --encoder FILE [FILE ...] --type sd3 [--text WORDS ...] [--out DIR]

The paper's Appendix A asks this of CLIP ViT-B/32, which no diffusion model has; its prompts are those used here when
none are given. FILE is any text encoder of a model that this pack supports, as ComfyUI's CLIPLoader takes it. Two
vectors of each prompt are compared: the mean of its words' tokens, as VSF takes them (no padding, no template), and the
pooled embedding, where the encoder has one. Writes DIR/cosines.csv and DIR/embeddings.png.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hosting.errors import HostError
from sampling import load_pack, open_comfyui
from torch import Tensor

TEXTS = (
    *("a dog", "a dog running", "a dog not running"),
    *("a photo of a bike", "a photo of a bike without wheels", "a photo of a bike with wheels"),
    "a photo of a car with wheels",
)


def cosines(vectors: Tensor) -> Tensor:
    """[n, C] -> [n, n]."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return unit @ unit.T


def components(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """[n, C] -> the places [n, 2] on the first two principal axes, and the share of the variance on each, [2].

    The largest part of each axis is positive, so that the picture is the same everywhere.
    """
    centred = vectors.double() - vectors.double().mean(0)
    u, s, axes = torch.linalg.svd(centred, full_matrices=False)
    sign = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()[:, 0]
    places = torch.nn.functional.pad(u * s * sign, (0, 2))[:, :2]
    share = torch.nn.functional.pad(s**2 / (s**2).sum().clamp_min(1e-30), (0, 2))[:2]
    return places, share


def vectors(clip: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """By kind: [n, C] of each text. Raises ValueError of the pack's for an encoder that it does not know."""
    attach = load_pack()["VSFNegativeConditioning"]
    found: dict[str, list[Tensor]] = {"mean of the words": [], "pooled": []}
    for text in texts:
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        (carried,) = attach.execute(positive=positive, clip=clip, text=text).result[0][0][1]["vsf_negatives"]
        found["mean of the words"].append(carried["tokens"][0].float().mean(0))
        if (pooled := positive[0][1].get("pooled_output")) is not None:
            found["pooled"].append(pooled[0].float())
    return {kind: torch.stack(rows) for kind, rows in found.items() if len(rows) == len(texts)}


def write(kinds: dict[str, Tensor], texts: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """The table of all cosines, and a picture of them and of the principal components."""
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "cosines.csv", folder / "embeddings.png"
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["vector", "text", "other", "cosine"])
        for kind, vector in kinds.items():
            both = cosines(vector)
            for i, j in torch.triu_indices(len(texts), len(texts), 1).T.tolist():
                rows.writerow([kind, texts[i], texts[j], f"{both[i, j]:.4f}"])
    draw(kinds, texts).savefig(picture, metadata={"Software": None})
    return table, picture


def draw(kinds: dict[str, Tensor], texts: Sequence[str]) -> Any:
    """A row for each kind of vector: cosines on the left, principal components on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(14, 5.5 * len(kinds)), dpi=100, layout="constrained")
        for axes, (kind, vector) in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds.items(), strict=True):
            _draw_cosines(axes[0], cosines(vector), texts)
            axes[0].set_title(f"cosines, {kind}")
            _draw_components(axes[1], *components(vector), texts)
            axes[1].set_title(f"principal components, {kind}")
        return figure


def _draw_cosines(axes: Any, both: Tensor, texts: Sequence[str]) -> None:
    low = min(0.0, float(both.min()))
    axes.imshow(both, vmin=low, vmax=1, cmap="viridis", aspect="auto")
    for i, row in enumerate(both.tolist()):
        for j, value in enumerate(row):
            ink = "black" if value - low > 0.7 * (1 - low) else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
    axes.set_yticks(range(len(texts)), [text[:50] for text in texts], fontsize=9)
    axes.set_xticks([])


def _draw_components(axes: Any, places: Tensor, share: Tensor, texts: Sequence[str]) -> None:
    """Texts in the same place have one label; labels point inwards."""
    axes.scatter(*places.T)
    grid = (places / places.abs().max().clamp_min(1e-30)).mul(100).round()
    labels: dict[tuple, list[int]] = {}
    for i, place in enumerate(grid.tolist()):
        labels.setdefault(tuple(place), []).append(i)
    for rows in labels.values():
        x, y = places[rows[0]].tolist()
        right = x > float(places[:, 0].mean())
        words, side = "\n".join(texts[i][:50] for i in rows), "right" if right else "left"
        axes.annotate(words, (x, y), (-7 if right else 7, 5), textcoords="offset points", fontsize=9, ha=side)
    axes.set(xlabel=f"{share[0]:.0%} of the variance", ylabel=f"{share[1]:.0%} of the variance")
    axes.margins(0.1, 0.2)
    axes.grid(alpha=0.3)


def opened(files: Sequence[str], kind: str) -> Any:
    """A text encoder through ComfyUI's own loader."""
    import comfy.sd

    kinds = [one.name.lower() for one in comfy.sd.CLIPType]
    if kind.lower() not in kinds:
        raise HostError(f"--type {kind}: ComfyUI knows {', '.join(kinds)}")
    for file in files:
        if not Path(file).is_file():
            raise HostError(f"--encoder {file}: no such file")
    try:
        return comfy.sd.load_clip(list(files), clip_type=comfy.sd.CLIPType[kind.upper()])
    except Exception as error:  # ComfyUI's loaders raise many kinds
        raise HostError(f"ComfyUI can't load {', '.join(files)} as {kind}: {type(error).__name__}: {error}") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py bench embeddings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", nargs="+", required=True, metavar="FILE", help="of one text encoder")
    parser.add_argument("--type", required=True, metavar="KIND", help="as in CLIPLoader: sd3, flux, wan, ...")
    parser.add_argument("--text", nargs="+", default=list(TEXTS), metavar="WORDS", help="instead of the paper's")
    parser.add_argument("--out", type=Path, default=Path("bench-output/embeddings"), metavar="DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if len(set(options.text)) < max(2, len(options.text)):
            raise HostError("--text takes two or more texts, each once")
        open_comfyui()
        found = vectors(opened(options.encoder, options.type), options.text)
        for kind, vector in found.items():
            print(f"{kind}: {len(vector)} texts, {vector.shape[1]} channels")
        print(*write(found, options.text, options.out), sep="\n")
    except (HostError, ValueError) as error:
        print(f"embeddings: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
