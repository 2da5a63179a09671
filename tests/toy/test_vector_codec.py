"""Latents of the vector world: the basis, and ComfyUI's own autoencoders that compute what ours does."""

import comfy.latent_formats
import comfy.sd
import pytest
import torch
import train_codec
import vector_codec
from vector_codec import Basis, Decoder

import nodes


@pytest.fixture(scope="module")
def pictures():
    import numpy as np

    return train_codec.pictures(np.random.default_rng(0), 24, "cpu").float() / 255


@pytest.fixture(scope="module")
def basis(pictures):
    return Basis.of(pictures)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    decoder = Decoder()
    for parameter in decoder.parameters():
        parameter.data.mul_(1.5)  # so that a picture comes out that is not grey
    return decoder.eval()


def test_the_basis_is_the_best_of_sixteen_numbers(basis, pictures):
    latents = basis.encode(pictures)
    assert latents.shape == (24, 16, 16, 16)
    assert latents.std() == pytest.approx(vector_codec.STD, rel=0.05)
    assert (latents.std((0, 2, 3)) / latents.std()).sub(1).abs().max() < 0.35  # all channels carry alike
    again = basis.encode(basis.decode(latents))
    assert (again - latents).abs().max() < 1e-4
    error = (basis.decode(latents) - pictures).square().mean()
    patches = torch.nn.functional.pixel_unshuffle(pictures, 8).movedim(1, -1).reshape(-1, 192).double()
    left = torch.linalg.svdvals(patches - patches.mean(0))[16:].square().sum() / patches.numel()
    assert error == pytest.approx(left.item(), rel=1e-3)


@pytest.fixture(scope="module")
def vae(basis, decoder):
    """What VAELoader makes of the files of "taesd3"."""
    state = {f"taesd_encoder.{key}": value for key, value in vector_codec.taesd_encoder(basis).items()}
    state |= {f"taesd_decoder.{key}": value for key, value in vector_codec.taesd_decoder(decoder).items()}
    state |= {"vae_scale": torch.tensor(1.5305), "vae_shift": torch.tensor(0.0609)}
    return comfy.sd.VAE(sd=state)


@torch.no_grad()
def test_comfyui_encodes_and_decodes_as_we_do(vae, basis, decoder, pictures):
    sd3, some = comfy.latent_formats.SD3(), pictures[:3]
    latents = basis.encode(some)
    assert (sd3.process_in(vae.encode(some.movedim(1, -1))) - latents).abs().max() < 1e-3
    decoded = vae.decode(sd3.process_out(latents)).movedim(-1, 1)
    ours = decoder(latents).clamp(0, 1)
    assert ours.std() > 0.01
    assert (decoded - ours).abs().max() < 2e-3


@torch.no_grad()
def test_comfyui_decodes_wans_clips(basis, decoder, pictures, tmp_path, monkeypatch):
    """Through the VAELoader node: a latent frame becomes four frames, the first one alone."""
    import folder_paths

    vector_codec.write_video(tmp_path / "clips.safetensors", decoder)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae", ([str(tmp_path)], {".safetensors"}))
    vae = nodes.VAELoader().load_vae("clips.safetensors")[0]
    still = basis.encode(pictures[:2])
    wan = vector_codec.to_wan(still.transpose(0, 1)[None])
    assert (vector_codec.from_wan(wan)[0].transpose(0, 1) - still).abs().max() < 1e-5
    decoded = vae.decode(comfy.latent_formats.Wan21().process_out(wan))[0].clamp(0, 1)
    expected = decoder(still).clamp(0, 1)[[0, 1, 1, 1, 1]].movedim(1, -1)
    assert decoded.shape == (5, 128, 128, 3)
    assert (decoded - expected).abs().max() < 5e-3


def test_a_file_has_both(basis, decoder, pictures, tmp_path):
    vector_codec.save(tmp_path / "codec.safetensors", basis, decoder.state_dict())
    same_basis, same = vector_codec.load(tmp_path / "codec.safetensors")
    latents = basis.encode(pictures[:2])
    assert torch.equal(same_basis.encode(pictures[:2]), latents)
    assert (same(latents) - decoder(latents)).abs().max() < 1e-2
    assert (tmp_path / "codec.safetensors").stat().st_size < 1.3e6
