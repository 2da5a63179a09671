"""Negatives from text: real tokenizers, real encoder classes of tiny size, their padding removed."""

import functools
import math

import pytest
import torch
from encoders import (
    make_chroma_clip,
    make_clip,
    make_flux2_clip,
    make_flux_clip,
    make_hunyuan_image_clip,
    make_hunyuan_video_15_clip,
    make_hunyuan_video_clip,
    make_klein_clip,
    make_ovis_clip,
    make_qwen_image_clip,
    make_wan_clip,
    make_z_image_clip,
)
from helpers import assert_close, carried, conditioning, load_sd3, relative, sample

PROMPTS = ["roof", "a house with a red roof, wow!!!", "(roof:1.3) and (door)", "naïve café 屋根 🏠", "word " * 120]


@pytest.fixture(scope="module")
def clips():
    return {
        "all": make_clip(),
        "clip": make_clip(t5=False),
        "t5": make_clip(clip_l=False, clip_g=False),
        "l": make_clip(clip_g=False, t5=False),
    }


def attached(pack, clip, text, **kw):
    """The negative that the node makes of ``text``."""
    return carried(pack.negative(conditioning(), clip=clip, text=text, **kw))[-1]


def counts(clip, text):
    """Tokens that the tokenizers themselves give without any padding: start, words, end; per CLIP chunk of 75 words."""
    plain = text.replace("(roof:1.3)", "roof").replace("(door)", "door")
    known = plain.replace("ï", "i").replace("屋根 🏠", "")  # to T5
    clip_words = len(clip.tokenizer.clip_l.tokenizer(plain)["input_ids"]) - 2
    g_words = len(clip.tokenizer.clip_g.tokenizer(plain)["input_ids"]) - 2
    assert clip_words == g_words
    full = max(0, math.ceil(clip_words / 75) - 1)
    return 77 * full + clip_words - 75 * full + 2, len(clip.tokenizer.t5xxl.tokenizer(known)["input_ids"])


@pytest.mark.parametrize("text", PROMPTS)
def test_token_counts_are_the_tokenizers_own(pack, clips, text):
    clip_count, t5_count = counts(clips["all"], text)
    expected = {"all": clip_count + t5_count, "clip": clip_count, "t5": t5_count, "l": clip_count}
    if "(" in text or len(text) > 400:  # weighted parts are tokenized apart; long prompts break at words
        for name, clip in clips.items():
            assert abs(attached(pack, clip, text).tokens.shape[1] - expected[name]) <= 6
        return
    for name, clip in clips.items():
        assert attached(pack, clip, text).tokens.shape[1] == expected[name], name


def test_long_prompts_keep_every_full_chunk(pack, clips):
    """120 words: one full CLIP chunk of 77 and 45 words of the next, with its start and end."""
    text = "house " * 120
    assert attached(pack, clips["clip"], text).tokens.shape[1] == 77 + 45 + 2
    assert attached(pack, clips["t5"], text).tokens.shape[1] == 121


def test_clip_part_is_the_cut_of_the_padded_encoding(pack, clips):
    clip = clips["clip"]
    padded = clip.encode_from_tokens(clip.tokenize("a red roof"))
    made = attached(pack, clip, "a red roof").tokens
    assert torch.equal(made, padded[:, :5])


def test_t5_part_is_encoded_without_its_padding(pack, clips):
    """A bidirectional encoder's output changes with the padding: the kept part of a padded one is another thing."""
    clip = clips["t5"]
    tokens = clip.tokenize("a red roof")
    assert len(tokens["t5xxl"][0]) == 77
    tokens["t5xxl"] = [[t for t in tokens["t5xxl"][0] if t[0] != 0]]
    expected = clip.encode_from_tokens(tokens)
    made = attached(pack, clip, "a red roof").tokens
    assert torch.equal(made, expected)
    padded = clip.encode_from_tokens(clip.tokenize("a red roof"))
    assert relative(padded[:, : made.shape[1]], made) > 1e-3


@pytest.mark.smoke
def test_sd3_negative_is_clip_then_t5(pack, clips):
    made, clip_l_g = (
        attached(pack, clips["all"], "a red roof").tokens,
        attached(pack, clips["clip"], "a red roof").tokens,
    )
    n_clip = clip_l_g.shape[1]
    padded = clips["all"].encode_from_tokens(clips["all"].tokenize("a red roof"))
    assert torch.equal(made[:, :n_clip], padded[:, :n_clip])
    assert made.shape[1] == n_clip + len(clips["all"].tokenizer.t5xxl.tokenizer("a red roof")["input_ids"])


def test_weights_work(pack, clips):
    for clip in clips.values():
        light, heavy = attached(pack, clip, "(roof:1.0)").tokens, attached(pack, clip, "(roof:1.6)").tokens
        assert light.shape == heavy.shape and not torch.equal(light, heavy)


def test_textual_inversion_embeddings_work(pack, clips, tmp_path):
    clip = make_clip(clip_g=False, t5=False)
    from safetensors.torch import save_file

    save_file({"emb_params": torch.randn(2, 64)}, str(tmp_path / "badhands.safetensors"))
    clip.tokenizer.clip_l.embedding_directory = str(tmp_path)
    clip.tokenizer.clip_l.embedding_size = 64
    assert attached(pack, clip, "embedding:badhands").tokens.shape[1] == 2 + 2


def test_extrapolation_is_eq_10_by_hand(pack, clips):
    """p- + lambda (p- - p0), p0 the mean over the empty prompt's padded positions, per segment."""
    clip = clips["all"]
    plain, moved = (
        attached(pack, clip, "a red roof").tokens,
        attached(pack, clip, "a red roof", extrapolation=8.0).tokens,
    )
    empty = clip.encode_from_tokens(clip.tokenize(""))
    null_clip, null_t5 = empty[:, 2:77].mean(1, keepdim=True), empty[:, 78:].mean(1, keepdim=True)
    expected = torch.cat((plain[:, :5] * 9 - 8 * null_clip, plain[:, 5:] * 9 - 8 * null_t5), dim=1)
    assert_close(moved, expected, 1e-6)


def test_null_embedding_follows_patches_on_the_encoder(pack):
    clip = make_clip(clip_l=False, clip_g=False)
    before = attached(pack, clip, "roof", extrapolation=8.0).tokens
    key = "t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo.weight"
    patched = clip.clone()
    assert patched.add_patches({key: (torch.randn(64, 128),)}, 1.0)
    after = attached(pack, patched, "roof", extrapolation=8.0).tokens
    empty = patched.encode_from_tokens(patched.tokenize(""))
    null = empty[:, 1:].mean(1, keepdim=True)
    assert_close(after, attached(pack, patched, "roof").tokens * 9 - 8 * null)
    assert torch.equal(attached(pack, clip, "roof", extrapolation=8.0).tokens, before)


def test_node_shows_which_tokens_it_pushes_away(pack, clips):
    node = pack.mapping["VSFNegativeConditioning"]
    shown = node.execute(positive=conditioning(), clip=clips["all"], text="red roof").ui.as_dict()["text"][0]
    assert shown.splitlines() == ["pushes away 7 tokens", "CLIP: red · roof", "T5: red · roof"]
    assert node.execute(positive=conditioning(), text=" ").ui.as_dict()["text"][0] == "off: no negative"


def test_encoder_of_another_family(pack, clips):
    class OtherModel(torch.nn.Module):
        pass

    clip = clips["t5"].clone()
    clip.cond_stage_model = OtherModel()
    with pytest.raises(
        ValueError, match="cannot encode a negative with the text encoder OtherModel. Supported: Stable"
    ):
        pack.negative(conditioning(), clip=clip, text="roof")


def test_negative_remembers_its_encoder(pack, clips):
    """Even where widths agree: SD3, Flux and Wan are all 4096 wide."""
    clip, model = clips["all"], load_sd3(context=4096)
    positive = conditioning(width=4096)
    made = pack.negative(positive, clip=clip, text="roof")
    sample(pack.patch(model), made, steps=1)
    made[0][1]["vsf_negatives"][0]["encoder"] = "flux"
    with pytest.raises(ValueError, match='of type "flux", but this model'):
        sample(pack.patch(model), made, steps=1)


# -- Flux and Wan


@pytest.fixture(scope="module")
def flux_clip():
    return make_flux_clip()


@pytest.fixture(scope="module")
def wan_clip(tmp_path_factory):
    return make_wan_clip(tmp_path_factory.mktemp("spiece"))


@pytest.mark.smoke
def test_flux_negative_is_t5_without_padding(pack, flux_clip):
    made = attached(pack, flux_clip, "a red roof")
    ids = flux_clip.tokenizer.t5xxl.tokenizer("a red roof")["input_ids"]
    assert made.tokens.shape[1] == len(ids) and made.encoder == "flux"
    assert made.pooled.shape == (1, 64)
    tokens = flux_clip.tokenize("a red roof")
    assert len(tokens["t5xxl"][0]) == 256
    tokens["t5xxl"] = [[t for t in tokens["t5xxl"][0] if t[0] != 0]]
    assert torch.equal(made.tokens, flux_clip.encode_from_tokens(tokens))


@pytest.mark.parametrize("strength", [1.0, 8.0])
def test_flux_extrapolation_is_eq_10_by_hand(pack, flux_clip, strength):
    """The null embedding is the mean of the padding embeddings of the empty prompt: all positions after its end."""
    plain = attached(pack, flux_clip, "a red roof").tokens
    null = flux_clip.encode_from_tokens(flux_clip.tokenize(""))[:, 1:].mean(1, keepdim=True)
    moved = attached(pack, flux_clip, "a red roof", extrapolation=strength).tokens
    assert_close(moved, plain + strength * (plain - null), 1e-6)


@pytest.mark.smoke
def test_wan_negative_keeps_exactly_its_own_tokens(pack, wan_clip):
    """umt5 masks and zeroes its padding, so trimming before or after encoding is the same."""
    made = attached(pack, wan_clip, "a red roof")
    padded = wan_clip.encode_from_tokens(wan_clip.tokenize("a red roof"))
    assert padded.shape[1] == 512 and made.encoder == "wan"
    own = int((padded[0] != 0).any(-1).sum())
    assert made.tokens.shape[1] == own < 20
    assert_close(made.tokens, padded[:, :own])


# -- language models: words inside a template


TEMPLATES = {
    "chroma": make_chroma_clip,
    "qwen_image": make_qwen_image_clip,
    "z_image": make_z_image_clip,
    "flux2": make_flux2_clip,
    "flux2 klein": make_klein_clip,
    "hunyuan_video": make_hunyuan_video_clip,
    "hunyuan_video_15": make_hunyuan_video_15_clip,
    "ovis": make_ovis_clip,
}
WORDS = ["roof", "a house with a red roof, wow!!!", "naïve café 屋根 🏠", "(roof:1.3) and (door)", "word " * 120]


@pytest.fixture(scope="module")
def clip_of():
    return functools.cache(lambda name: TEMPLATES[name]())


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "chroma"])
def test_template_is_no_part_of_the_negative(pack, clip_of, name, words):
    """The kept embeddings are those of the words alone, where the whole template was encoded."""
    clip = clip_of(name)
    given, words = words, words.replace("(roof:1.3)", "roof").replace("(door)", "door")
    if name == "hunyuan_video":  # the one in whose template weights count
        given = words
    given, words = given.strip(), words.strip()  # blanks around a text are no words
    blank = " " if name == "ovis" else ""  # the template's, which is part of the first word's token
    key, tokens = next((k, v) for k, v in clip.tokenize(words).items() if k != "l")
    tokenizer = getattr(clip.tokenizer, key)
    start_token = [tokenizer.start_token] if tokenizer.start_token is not None else []
    ids, own = [t[0] for t in tokens[0]], tokenizer.tokenizer(blank + words)["input_ids"][len(start_token) :]
    at = [i for i in range(len(ids)) if ids[i : i + len(own)] == own]
    assert len(at) == 1
    whole = clip.encode_from_tokens(clip.tokenize(words))
    start = at[0] - (len(ids) - whole.shape[1])  # what the encoder leaves out itself
    made = attached(pack, clip, given)
    assert made.encoder == name.split()[0]
    assert torch.equal(made.tokens, whole[:, start : start + len(own)])
    shown = pack.mapping["VSFNegativeConditioning"].execute(positive=conditioning(), clip=clip, text=given)
    said = shown.ui.as_dict()["text"][0].splitlines()[1].split(": ", 1)[1].split(" · ")
    if words.isascii():
        assert "".join(said) == words.replace(" ", "")


def test_chroma_negative_is_t5_without_padding(pack, clip_of):
    """Chroma's T5 pads nothing of itself; where T5TokenizerOptions makes it pad, that is trimmed."""
    clip = clip_of("chroma")
    made = attached(pack, clip, "a red roof")
    ids = clip.tokenizer.clip_t5xxl.tokenizer("a red roof")["input_ids"]
    assert made.tokens.shape[1] == len(ids) and made.encoder == "chroma"
    assert torch.equal(made.tokens, clip.encode_from_tokens(clip.tokenize("a red roof")))
    padded = clip.clone()
    padded.set_tokenizer_option("t5xxl_min_length", 32)
    assert len(padded.tokenize("a red roof")["t5xxl"][0]) == 32
    assert torch.equal(attached(pack, padded, "a red roof").tokens, made.tokens)


@pytest.mark.parametrize("name", TEMPLATES)
def test_extrapolation_needs_an_encoder_that_pads(pack, clip_of, name):
    with pytest.raises(ValueError, match="Set extrapolation to 0"):
        attached(pack, clip_of(name), "roof", extrapolation=8.0)


def test_the_same_language_model_with_another_models_template(pack):
    """HunyuanImage's encoder derives from Qwen-Image's and is as wide."""
    with pytest.raises(ValueError, match="cannot encode a negative with the text encoder QwenImageTEModel_"):
        attached(pack, make_hunyuan_image_clip(), "roof")
