"""`bench embeddings` on a tiny encoder, through ComfyUI's own loader: its cosines and components, by hand."""

import csv
import os
import re
from pathlib import Path

import comfy.sd
import embeddings
import numpy as np
import pytest
import torch
from PIL import Image

CLIP = Path(os.environ["VSF_MODELS"]) / "text_encoders" / "vsf_tiny_clip_l.safetensors"
TEXTS = ("a dog", "a dog running", "a dog not running", "a house")


def by_hand(clip, text):
    """The mean of the words' rows, and the pooled row, from the encoder itself."""
    tokens = clip.tokenize(text)
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    words = [token for token, _ in tokens["l"][0]].index(49407) + 1
    return cond[0, :words].double().mean(0).numpy(), pooled[0].double().numpy()


def test_the_command(tmp_path, capsys):
    asked = ["--encoder", str(CLIP), "--type", "sd3", "--out", str(tmp_path), "--text", *TEXTS]
    assert embeddings.main(asked) == 0
    assert "mean of the words: 4 texts" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "cosines.csv").open()))
    assert len(rows) == 2 * 6
    clip = comfy.sd.load_clip([str(CLIP)], clip_type=comfy.sd.CLIPType.SD3)
    hand = {text: dict(zip(("mean of the words", "pooled"), by_hand(clip, text), strict=True)) for text in TEXTS}
    for row in rows:
        one, other = (hand[row[name]][row["vector"]] for name in ("text", "other"))
        assert float(row["cosine"]) == pytest.approx(one @ other / np.sqrt(one @ one * (other @ other)), abs=1e-4)
    assert len({row["cosine"] for row in rows}) > 6
    assert Image.open(tmp_path / "embeddings.png").size == (1400, 1100)


def test_components_are_the_principal_ones():
    """Against the covariance's eigenvectors: another way to the same."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 5, generator=g, dtype=torch.float64) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])
    places, share = embeddings.components(rows)
    values, axes = np.linalg.eigh(np.cov(rows.numpy().T))
    expected = (rows.numpy() - rows.numpy().mean(0)) @ axes[:, [-1, -2]]
    assert np.abs(places.numpy()) == pytest.approx(np.abs(expected))
    assert share.numpy() == pytest.approx(values[[-1, -2]] / values.sum())
    two, rest = embeddings.components(rows[:2])
    assert abs(float(two[0, 0] - two[1, 0])) == pytest.approx(float((rows[0] - rows[1]).norm()))
    assert rest[1] < 1e-12 and two[:, 1].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--type", "sd33"], "--type sd33: ComfyUI knows .*flux"),
        (["--encoder", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--text", "a", "a"], "two or more texts, each once"),
        (["--encoder", __file__], "ComfyUI can't load"),
    ],
)
def test_what_it_refuses(tmp_path, capsys, change, words):
    asked = ["--encoder", str(CLIP), "--type", "sd3", "--out", str(tmp_path), *change]
    assert embeddings.main(asked) == 1
    assert re.search(words, capsys.readouterr().err)
