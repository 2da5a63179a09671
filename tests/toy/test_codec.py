"""Pictures survive ComfyUI's own VAE, and captions its own text encoder."""

import captions
import codec
import folder_paths
import pytest
import torch
import world

import nodes


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The pair of files, through the VAELoader node."""
    folder = tmp_path_factory.mktemp("models") / "vae_approx"
    codec.write(folder)
    before = folder_paths.folder_names_and_paths["vae_approx"]
    folder_paths.folder_names_and_paths["vae_approx"] = ([str(folder)], before[1])
    try:
        yield nodes.VAELoader().load_vae("taesd3")[0]
    finally:
        folder_paths.folder_names_and_paths["vae_approx"] = before


@pytest.fixture(scope="module")
def pictures():
    return torch.from_numpy(next(world.batches(7, 16))[0].copy())


def enlarged(pictures):
    """[n, 3, 32, 32] -> ComfyUI's IMAGE [n, 256, 256, 3]"""
    return pictures.repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)


def test_decoding_gives_the_picture(vae, pictures):
    decoded = vae.decode(codec.to_vae(codec.encode(pictures)))
    assert decoded.shape == (16, 256, 256, 3)
    assert (decoded - enlarged(pictures)).abs().max() < 0.01


def test_our_own_decoder_agrees(vae, pictures):
    latents = codec.encode(pictures) + 0.3 * torch.randn(16, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (vae.decode(codec.to_vae(latents)) - enlarged(codec.decode(latents))).abs().max() < 0.01


def test_encoding_and_decoding_nearly_keeps_the_picture(vae, pictures):
    """Nearly: the encoder bends by two straight lines."""
    encoded = vae.encode(enlarged(pictures))
    assert encoded.shape == (16, 16, 32, 32)
    error = (vae.decode(encoded) - enlarged(pictures)).abs()
    assert error.mean() < 0.02
    assert error.max() < 0.05


def test_latents_are_of_unit_size(pictures):
    latents = codec.encode(pictures)
    assert 0.7 < latents.std() < 1.3
    assert latents.abs().max() < 4


def test_the_table_of_captions_is_the_real_encoder():
    clip, embed = captions.load_clip(), captions.Captions()
    for text in ("a house with a pointed roof at night", "", "wheels"):
        context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        ours, ours_pooled = embed([text])
        assert torch.isfinite(pooled).all()
        assert torch.allclose(context[..., :768], ours, atol=1e-5)
        assert torch.allclose(pooled[:, :768], ours_pooled, atol=1e-5)
        assert not context[..., 768:].any()
        assert not pooled[:, 768:].any()
