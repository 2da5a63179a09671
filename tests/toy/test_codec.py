"""Pictures survive ComfyUI's own VAE, and captions its own text encoder."""

import captions
import codec
import comfy.latent_formats
import folder_paths
import pytest
import tiny
import torch
import vector_world
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
    return torch.from_numpy(next(world.batches(7, 4))[0].copy())


def enlarged(pictures):
    """[n, 3, 32, 32] -> ComfyUI's IMAGE [n, 256, 256, 3]"""
    return pictures.repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)


def test_decoding_gives_the_picture(vae, pictures):
    decoded = vae.decode(codec.to_vae(codec.encode(pictures)))
    assert decoded.shape == (4, 256, 256, 3)
    assert (decoded - enlarged(pictures)).abs().max() < 0.01


def test_our_own_decoder_agrees(vae, pictures):
    latents = codec.encode(pictures) + 0.3 * torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (vae.decode(codec.to_vae(latents)) - enlarged(codec.decode(latents))).abs().max() < 0.01


def test_encoding_and_decoding_nearly_keeps_the_picture(vae, pictures):
    """Nearly: the encoder bends by two straight lines."""
    encoded = vae.encode(enlarged(pictures))
    assert encoded.shape == (4, 16, 32, 32)
    error = (vae.decode(encoded) - enlarged(pictures)).abs()
    assert error.mean() < 0.02
    assert error.max() < 0.05


def test_latents_are_of_unit_size(pictures):
    latents = codec.encode(pictures)
    assert 0.7 < latents.std() < 1.3
    assert latents.abs().max() < 4


@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
def test_the_table_of_captions_is_the_real_encoder(family):
    clip, embed = captions.load_clip(family), captions.Captions(family)
    for text in ("a house with a pointed roof at night", "", "wheels"):
        context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        ours, ours_pooled = embed([text])
        width = ours.shape[2]
        assert context.shape[:2] == ours.shape[:2]
        assert (context[..., :width] - ours).abs().max() < 1e-4
        assert not context[..., width:].any()
        if family == "wan":
            assert pooled is None
        else:
            assert torch.isfinite(pooled).all()
            assert torch.allclose(pooled[:, :768], ours_pooled, atol=1e-5)
            assert not pooled[:, 768:].any()


def test_umt5_has_a_piece_for_every_word():
    tokenize = captions.load_clip("wan").tokenize
    for word in {*world.words(), *vector_world.words()}:
        own = [token for token, _ in tokenize(word)["umt5xxl"][0] if token != 0]
        assert len(own) == 2 and own[0] > 2, word  # the word, the end; 2 is what is unknown


# -- Wan's clips ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips():
    return torch.from_numpy(next(world.batches(7, 3, frames=2))[0].copy())


def test_wan_latents(clips):
    latents = codec.encode_wan(clips)
    assert latents.shape == (3, 16, 2, 32, 32)
    assert (codec.decode_wan(latents) - clips).abs().max() < 1e-5
    assert 0.5 < latents.std() < 1.3


def test_wan_decoding_gives_the_clip(tmp_path, clips):
    """Through the VAELoader node: a latent frame becomes four frames, the first one alone."""
    codec.write_wan(tmp_path)
    before = folder_paths.folder_names_and_paths["vae"]
    folder_paths.folder_names_and_paths["vae"] = ([str(tmp_path)], before[1])
    try:
        vae = nodes.VAELoader().load_vae(codec.WAN_FILE)[0]
    finally:
        folder_paths.folder_names_and_paths["vae"] = before
    latents = codec.encode_wan(clips) + 0.2 * torch.randn(3, 16, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    raw = comfy.latent_formats.Wan21().process_out(latents)
    decoded = vae.decode(raw).clamp(0, 1)
    expected = codec.decode_wan(latents)[:, :, [0, 1, 1, 1, 1]]
    expected = expected.repeat_interleave(8, 3).repeat_interleave(8, 4).movedim(1, -1)
    assert decoded.shape == (3, 5, 256, 256, 3)
    assert (decoded - expected).abs().max() < 0.01


# -- weights ----------------------------------------------------------------------------------------------------------


def test_packed_weights_come_back():
    g = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(7, 5, generator=g),
        "conv.weight": torch.randn(4, 3, 2, 2, generator=g) * 1e-3,
        "zero.weight": torch.zeros(3, 3),
        "norm.scale": torch.randn(5, generator=g),
        "text_embedding.0.weight": torch.randn(6, 256, generator=g),
    }
    packed = tiny.packed(state)
    back = tiny.unpacked(packed)
    assert packed["a.weight"].dtype == torch.int8
    assert back.keys() == state.keys()
    assert back["text_embedding.0.weight"].shape == (6, 4096)
    assert not back["text_embedding.0.weight"][:, 256:].any()
    for key, value in state.items():
        rows = value.reshape(len(value), -1)
        error = (back[key].reshape(len(value), -1)[:, : rows.shape[1]] - rows).abs().amax(1)
        assert (error <= rows.abs().amax(1) / 250 + 1e-3 * (value.ndim == 1)).all(), key


def test_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in tiny.WEIGHTS.glob("*.safetensors")) <= 16 * 2**20
