"""The families whose text is seen in cross-attention alone: what every one of them, and each by itself, has besides."""

import logging

import pytest
import torch
from cases import CASES, attached_of, both, clip_of, model_of, region
from helpers import assert_close, conditioning, relative
from oracle import oracle_model

NAMES = [name for name, case in CASES.items() if case.cross and not name.startswith("wan")]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize(("grid", "cfg"), [(0, 1.0), (-1, 2.5)])
def test_as_many_image_tokens_as_text_tokens(pack, case, model, grid, cfg):
    """Self-attention must pass through untouched."""
    size = (*case.sizes[0][:-2], 8, 16)
    length, n = case.grids(size)[grid] - 5, 5
    if case.length is not None:
        size = case.crowded
        length, n = 13, case.grids(size)[grid] - case.length
    assert_close(*both(pack, case, model, positive=case.prompt(length), n=n, size=size, cfg=cfg))


@pytest.mark.parametrize(("lengths", "cfg"), [((16, 8), 1.0), ((6, 9), 2.5)])
def test_prompts_of_different_lengths(pack, case, model, lengths, cfg):
    """ComfyUI repeats a shorter prompt of a UNet to the length of the other, to let both share a batch."""
    positive, other = case.prompt(lengths[0]), case.prompt(lengths[1], seed=99)
    assert_close(*both(pack, case, model, positive=positive, other=other, cfg=cfg))


@pytest.mark.parametrize("size", [0, 1], ids=["even", "odd"])
def test_attention_map(pack, case, model, size):
    """VSF Record's map is the oracle's; UNets have none."""
    if len(case.patches) > 1:
        with pytest.raises(ValueError, match="VSF Record cannot serve .*SDXL"):
            pack.mapping["VSFRecord"].execute(model=pack.patch(model))
        return
    size, (positive, negative) = case.sizes[size], (case.prompt(), case.negative(40))
    attached = pack.negative(positive, negative=negative)
    oracle, record = oracle_model(model, [case.expect(model, positive, negative)])
    recorded, holder = pack.mapping["VSFRecord"].execute(model=pack.patch(model)).result
    kw = {"size": size, "batch": 2, "steps": 1}
    assert torch.equal(case.run(recorded, attached, **kw), case.run(pack.patch(model), attached, **kw))
    case.run(oracle, positive, **kw)
    expected = torch.stack([share for _, share in record.shares]).mean(0).float()
    assert len(record.shares) == case.layers and expected.std() > 1e-3
    torch.testing.assert_close(holder.record.mean().flatten(1), expected, rtol=1e-4, atol=1e-6)


def test_a_block_that_computes_its_attention_past_comfyui_fails_loudly(pack, name, case, model, monkeypatch):
    """An error in the first step, not a picture without effect."""
    from comfy.ldm.modules import attention

    def direct(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kw):
        if not skip_reshape:
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return z if skip_output_reshape else z.transpose(1, 2).flatten(2)

    import comfy.ldm.cosmos.predict2

    monkeypatch.setattr(comfy.ldm.cosmos.predict2, "optimized_attention", direct)
    for function in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, function, direct)
    attached = pack.negative(case.prompt(), negative=case.negative(5))
    with pytest.raises(RuntimeError, match=r"ran without the attention call over text|no block of this model ran"):
        case.run(pack.patch(model), attached)


# -- from text


WORDS = {"a red roof": ["a", "red", "roof"], "roof": ["roof"]}


@pytest.fixture
def clip(name):
    return clip_of(name)


def test_from_text_to_picture(pack, name, case, model, clip):
    """The encoder's negative is one that the model takes."""
    attached = pack.negative(case.prompt(), clip=clip, text="a red roof")
    assert attached[0][1]["vsf_negatives"][0]["encoder"] is not None
    result = case.run(pack.patch(model), attached)
    assert relative(result, case.run(model, case.prompt())) > 1e-4


@pytest.mark.parametrize("words", [*WORDS, "café für Dächer"])
def test_cosmos_keeps_its_own_tokens(pack, words):
    """T5's, with its end, as its tokenizer gives them without padding; padding is masked and zeroed, so trimming before
    or after encoding is the same."""
    clip = clip_of("cosmos")
    made, padded = attached_of(pack, clip, words), clip.encode_from_tokens(clip.tokenize(words))
    n = len(clip.tokenizer.clip_t5xxl.tokenizer(words)["input_ids"])
    assert padded.shape[1] == 512 and made.tokens.shape[1] == n and made.encoder == "cosmos"
    assert_close(made.tokens, padded[:, :n], 1e-4)


@pytest.mark.parametrize("words", [*WORDS, "café für Dächer"])
def test_ltxv_keeps_its_own_tokens(pack, words):
    """T5's, with its end; its padding is masked, so trimming before or after encoding is the same."""
    clip = clip_of("ltxv")
    made, padded = attached_of(pack, clip, words), clip.encode_from_tokens(clip.tokenize(words))
    n = len(clip.tokenizer.clip_t5xxl.tokenizer(words)["input_ids"])
    assert padded.shape[1] == 128 and made.tokens.shape[1] == n and made.encoder == "ltxv"
    assert_close(made.tokens, padded[:, :n], 1e-4)


@pytest.mark.parametrize("words", [*WORDS, "café für Dächer", "(roof:1.3) and (door)"])
def test_anima_keeps_its_own_tokens(pack, words):
    """An embedding a T5 token, and T5's end, as the tokenizers give them; the node's text is what a prompt would be."""
    case, model, clip = CASES["anima"], model_of("anima"), clip_of("anima")
    made = attached_of(pack, clip, words)
    plain = words.replace("(roof:1.3)", "roof").replace("(door)", "door")
    cond, options = clip.encode_from_tokens_scheduled(clip.tokenize(words))[0]
    assert torch.equal(made.tokens, cond) and made.encoder == "anima"
    if words == plain:  # weighted parts are tokenized apart
        assert made.tokens.shape[1] == len(clip.tokenizer.qwen3_06b.tokenizer(words)["input_ids"])
        assert made.extra["t5xxl_ids"].tolist() == clip.tokenizer.t5xxl.tokenizer(words)["input_ids"]
    positive = case.prompt()
    as_prompt = pack.negative(positive, negative=[[cond, {**options, "attention_mask": None}]])
    as_text = pack.negative(positive, clip=clip, text=words)
    results = [case.run(pack.patch(model), attached) for attached in (as_text, as_prompt)]
    assert torch.equal(*results)
    oracle, _ = oracle_model(model, [case.expect(model, positive, [[made.tokens, made.extra]])])
    assert_close(results[0], case.run(oracle, positive))


def test_anima_shows_its_words_and_cannot_extrapolate(pack, caplog):
    clip, case = clip_of("anima"), CASES["anima"]
    node = pack.mapping["VSFNegativeConditioning"]
    shown = node.execute(positive=conditioning(), clip=clip, text="red café").ui.as_dict()["text"][0]
    n = len(clip.tokenizer.t5xxl.tokenizer("red café")["input_ids"])
    assert shown.splitlines() == [f"pushes away {n} tokens", "T5: red · café"]
    with pytest.raises(ValueError, match="not that of Anima .* Set extrapolation to 0"):
        attached_of(pack, clip, "roof", extrapolation=8.0)
    with caplog.at_level(logging.INFO):
        case.run(pack.patch(model_of("anima")), pack.negative(case.prompt(), clip=clip, text="red café"))
    assert any(f"Anima: {n} negative tokens" in record.getMessage() for record in caplog.records)


def test_a_negative_of_another_encoder_is_refused(pack):
    """Cosmos and Anima take embeddings of the same width."""
    case = CASES["anima"]
    attached = pack.negative(case.prompt(), clip=clip_of("cosmos"), text="roof")
    with pytest.raises(ValueError, match='of type "cosmos", but this model'):
        case.run(pack.patch(model_of("anima")), attached)


def test_ltxv_guides(pack):
    """Frames of guides (LTXVAddGuide) are appended to the latent, of which the model may leave tokens out; a region is
    of the video's own frames. See also ``test_latent_map.py``."""
    case, model = CASES["ltxv"], model_of("ltxv")
    size, (cells, pixels) = case.sizes[0], region(case.sizes[0])
    video = (size[0] - 1, *size[1:])
    masked, plain = ({"mask": pixels}, cells), ({}, torch.ones_like(cells))
    for left_out, (node, inside) in ((0, masked), (1, plain), (2, masked)):
        denoise = torch.ones(1, 1, *size)
        denoise[:, :, -1] = 0.0
        denoise[:, :, -1, 0, :left_out] = -1.0
        coords = torch.zeros(1, 3, size[1] * size[2], 2)
        ((cond, options),) = case.prompt()
        positive = [[cond, {**options, "keyframe_idxs": coords, "concat_mask": denoise}]]
        negative = case.negative(5)
        attached = pack.negative(positive, negative=negative, **node)
        for affect in (True, False):
            guides = torch.full((size[1] * size[2] - left_out, 5), float(affect))
            keep = torch.cat([case.keep(video, inside), guides])
            oracle, _ = oracle_model(model, [case.expect(model, positive, negative, keep=keep)])
            result = case.run(pack.patch(model, affect_references=affect), attached)
            assert_close(result, case.run(oracle, positive))


# -- UNets

UNETS = ("sd1", "sd2", "sdxl")


@pytest.fixture
def unet(name):
    if name not in UNETS:
        pytest.skip("no UNet")
    return name


@pytest.mark.smoke
@pytest.mark.parametrize("words", [*WORDS, "café für Dächer", "wow!!!"])
def test_clip_keeps_the_words_alone(pack, unet, clip, words):
    """The positions of the words in the padded encoding, counted by the tokenizers themselves."""
    made = attached_of(pack, clip, words)
    padded = clip.encode_from_tokens(clip.tokenize(words))
    inner = getattr(clip.tokenizer, "clip_g", None) or getattr(clip.tokenizer, clip.tokenizer.clip)
    n = len(inner.tokenizer(words)["input_ids"]) - 2
    assert padded.shape[1] == 77 and made.tokens.shape[1] == n and made.encoder == unet
    assert torch.equal(made.tokens, padded[:, 1 : 1 + n])


def test_clip_chunks_keep_the_words_alone(pack, unet, clip):
    """120 words: 75 in the first chunk of 77, 45 in the next."""
    words = "house " * 120
    padded = clip.encode_from_tokens(clip.tokenize(words))
    made = attached_of(pack, clip, words).tokens
    assert torch.equal(made, torch.cat([padded[:, 1:76], padded[:, 78 : 78 + 45]], dim=1))


def test_weights_and_extrapolation(pack, unet, clip):
    light, heavy = (attached_of(pack, clip, words).tokens for words in ("(roof:1.0)", "(roof:1.6)"))
    assert light.shape == heavy.shape == (1, 1, light.shape[2]) and not torch.equal(light, heavy)
    null = clip.encode_from_tokens(clip.tokenize(""))[:, 2:].mean(1, keepdim=True)
    moved = attached_of(pack, clip, "roof", extrapolation=8.0).tokens
    assert_close(moved, light * 9 - 8 * null, 1e-5)


def test_node_shows_the_words(pack, unet, clip):
    node = pack.mapping["VSFNegativeConditioning"]
    shown = node.execute(positive=conditioning(), clip=clip, text="red roof").ui.as_dict()["text"][0]
    assert shown.splitlines() == ["pushes away 2 tokens", "CLIP: red · roof"]


def test_attn2_patches_of_other_nodes(pack, unet, case, model):
    """One that changes the text, before ours or after, and one that replaces the attention by ComfyUI's own call."""
    from comfy.ldm.modules.attention import optimized_attention

    def doubled(n, context, value, options):
        return n, context * 1.2, value * 0.8

    def replaced(q, k, v, options):
        return optimized_attention(q, k, v, options["n_heads"], transformer_options=options)

    def theirs(m):
        m = m.clone()
        m.set_model_attn2_patch(doubled)
        m.set_model_attn2_replace(replaced, "middle", 0)
        return m

    positive, negative = case.prompt(), case.negative(5)
    oracle, _ = oracle_model(model, [case.expect(model, positive, negative)])
    oracle.set_model_attn2_patch(doubled)
    expected = case.run(oracle, positive)
    attached = pack.negative(positive, negative=negative)
    for patched in (theirs(pack.patch(model)), pack.patch(theirs(model))):
        assert_close(case.run(patched, attached), expected)


def test_attn2_replacement_past_comfyui_fails_loudly(pack, unet, case, model):
    """As IP-Adapters do: their own attention call, which nobody can hook into."""

    def replaced(q, k, v, options):
        q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    m = model.clone()
    m.set_model_attn2_replace(replaced, "middle", 0)
    attached = pack.negative(case.prompt(), negative=case.negative(5))
    with pytest.raises(RuntimeError, match="middle block 0 ran without the attention call over text"):
        case.run(pack.patch(m), attached)


def test_picture_shrunk_inside_the_model(pack, unet, case, model):
    """Kohya's Deep Shrink: fine without a mask, an error with one."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    def shrunk(m):
        return PatchModelAddDownscale.execute(m, 2, 1.75, 0.0, 1.0, True, "bicubic", "bicubic").result[0]

    positive, negative = case.prompt(), case.negative(5)
    attached = pack.negative(positive, negative=negative)
    oracle, _ = oracle_model(model, [case.expect(model, positive, negative)])
    expected = case.run(shrunk(oracle), positive, size=(16, 20))
    assert_close(case.run(shrunk(pack.patch(model)), attached, size=(16, 20)), expected)
    masked = pack.negative(positive, negative=negative, mask=torch.ones(1, 8, 8) * 0.5)
    with pytest.raises(RuntimeError, match="another node changes the size of the picture inside the model"):
        case.run(shrunk(pack.patch(model)), masked, size=(16, 20))


def test_models_of_other_classes_are_refused(pack, unet, model, monkeypatch):
    other = type("SD21UNCLIP", (type(model.model),), {"__module__": "comfy.model_base"})
    monkeypatch.setattr(model.model, "__class__", other)
    with pytest.raises(ValueError, match=r"SD21UNCLIP are not supported.*Stable Diffusion 1\.5, 2\.1 and SDXL"):
        pack.patch(model)
