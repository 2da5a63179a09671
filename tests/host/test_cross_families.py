"""The families whose text is seen in cross-attention alone (``cross.py``), whole models through the real sampler."""

import logging
import math
from functools import partial

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from cross import FAMILIES, attached_of, both, cached_clip, loaded, oracle_of, run
from helpers import (
    conditioning,
    only_rounded,
    relative,
    spy_override,
    with_override,
)
from oracle import Expect, oracle_model


@pytest.fixture(scope="module", params=list(FAMILIES))
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


@pytest.fixture
def model(name):
    return loaded(name)


@pytest.mark.parametrize(
    ("size", "n", "batch", "cfg"),
    [(0, 1, 1, 1.0), (0, 5, 2, 2.5), (1, 40, 2, 1.0), (1, 1, 2, 2.5), (2, 5, 1, 2.5)],
    ids=["even", "even, cfg", "odd", "odd, cfg", "flat"],
)
def test_parity(pack, family, model, size, n, batch, cfg):
    size = family.sizes[size]
    result, expected = both(pack, family, model, n=n, batch=batch, cfg=cfg, size=size)
    assert relative(result, expected) <= 1e-5
    assert relative(run(family, model, family.prompt(), batch=batch, cfg=cfg, size=size), expected) > 1e-4


@pytest.mark.parametrize(("alpha", "beta"), [(-2.0, -0.6), (0.0, 0.0), (6.0, 2.0), (0.8, 2.0)])
def test_parity_over_scale_and_offset(pack, family, model, alpha, beta):
    result, expected = both(pack, family, model, alpha=alpha, beta=beta)
    assert relative(result, expected) <= 1e-5


def tokens_on_each_grid(family, size):
    frames = math.prod(size[:-2])
    return [frames * math.ceil(size[-2] / p) * math.ceil(size[-1] / p) for p in family.patches]


@pytest.mark.parametrize(("grid", "cfg"), [(0, 1.0), (-1, 2.5)])
def test_as_many_image_tokens_as_text_tokens(pack, family, model, grid, cfg):
    """Self-attention must pass through untouched."""
    size = (*family.sizes[0][:-2], 8, 16)
    length, n = tokens_on_each_grid(family, size)[grid] - 5, 5
    if family.length is not None:
        size = family.crowded
        length, n = 13, tokens_on_each_grid(family, size)[grid] - family.length
    result, expected = both(pack, family, model, positive=family.prompt(length), n=n, size=size, cfg=cfg)
    assert relative(result, expected) <= 1e-5


def test_blocks(pack, family, model):
    for blocks, selected in family.blocks.items():
        result, expected = both(pack, family, model, patch={"blocks": blocks}, expect={"blocks": selected})
        assert relative(result, expected) <= 1e-5, blocks
        other, _ = both(pack, family, model)
        assert (relative(other, expected) > 1e-4) == (blocks != "all")


def test_wrong_blocks_name_the_right_ones(pack, family, model):
    for blocks, right in family.bad_blocks.items():
        with pytest.raises(ValueError, match=right):
            pack.patch(model, blocks=blocks)


def shares(cells, p):
    """By hand: how much of each square of ``p`` pixels of ``cells`` [frames, h, w] is inside; of those at the edge, the
    pixels that lie beyond are like the nearest."""
    frames, h, w = cells.shape
    out = []
    for f in range(frames):
        for top in range(0, h, p):
            for left in range(0, w, p):
                rows = [min(top + i, h - 1) for i in range(p)]
                columns = [min(left + i, w - 1) for i in range(p)]
                out.append(sum(cells[f, r, c].item() for r in rows for c in columns) / p**2)
    return torch.tensor(out)


def region(size):
    """Cells of a latent [frames, h, w] of which some are inside, and the picture mask of which they come."""
    h, w = size[-2:]
    cells = torch.zeros(h, w)
    cells[h // 3 : h // 3 + 3, 2:7] = 1.0
    return cells, cells.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]


def kept(family, size, cells, n):
    """``Expect.keep``: for each number of image tokens, which of them see the negative's n tokens."""
    frames = math.prod(size[:-2])
    rows = {}
    for p in family.patches:
        share = shares(cells.expand(frames, -1, -1), p)
        rows[len(share)] = share[:, None].expand(-1, n)
    return rows if len(family.patches) > 1 else rows.popitem()[1]


@pytest.mark.parametrize(("size", "cfg"), [(0, 1.0), (1, 2.5)], ids=["even", "odd, cfg"])
def test_mask(pack, family, model, size, cfg):
    size = family.sizes[size]
    cells, pixels = region(size)
    keep = kept(family, size, cells, 5)
    result, expected = both(pack, family, model, node={"mask": pixels}, expect={"keep": keep}, size=size, cfg=cfg)
    assert relative(result, expected) <= 1e-5
    everywhere, _ = both(pack, family, model, size=size, cfg=cfg)
    assert relative(everywhere, expected) > 1e-4


def test_two_negatives_with_a_region_each(pack, family, model):
    size = family.sizes[0]
    cells, pixels = region(size)
    positive, left, right = family.prompt(), family.negative(5, 5), family.negative(3, 6)
    attached = pack.negative(positive, negative=left, mask=pixels)
    attached = pack.negative(attached, negative=right, mask=1 - pixels, strength=0.5)
    inside, outside = kept(family, size, cells, 5), kept(family, size, 1 - cells, 3)
    if isinstance(inside, dict):
        keep = {tokens: torch.cat([inside[tokens], outside[tokens]], dim=1) for tokens in inside}
    else:
        keep = torch.cat([inside, outside], dim=1)
    alpha = torch.tensor([2.0] * 5 + [1.0] * 3)
    seen = torch.cat([family.seen(model, left), family.seen(model, right)], dim=1)
    oracle, _ = oracle_model(model, [Expect(family.seen(model, positive), seen, alpha, 0.2, keep=keep)])
    for cfg in (1.0, 2.5):
        result = run(family, pack.patch(model, scale=2.0), attached, cfg=cfg)
        assert relative(result, run(family, oracle, positive, cfg=cfg)) <= 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_neutrality_at_a_large_finite_offset(pack, family, model, cfg):
    """N reached every block and changed nothing, however large it is."""
    plain = partial(run, family, positive=family.prompt(), cfg=cfg)
    attached = pack.negative(family.prompt(), negative=family.negative(40, gain=3.0))
    stock, patched, seen = plain(model), pack.patch(model, offset=60.0), []
    assert only_rounded(run(family, patched, attached, cfg=cfg), stock, model, plain)
    masked = run(family, with_override(patched, spy_override(seen)), attached, cfg=cfg)
    assert only_rounded(masked, stock, model, plain)
    assert seen.count((family.length or 13) + 40) == 2 * family.layers


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_isolation(pack, family, model, cfg):
    """Where the picture sees nothing of N (beta = +inf), N changes nothing: nothing else reads it."""
    nowhere = torch.zeros(1, 8, 8)
    results = []
    for seed, n in ((5, 5), (6, 5), (7, 40)):
        attached = pack.negative(family.prompt(), negative=family.negative(n, seed, gain=3.0), mask=nowhere)
        results.append(run(family, pack.patch(model), attached, cfg=cfg))
    plain = partial(run, family, positive=family.prompt(), cfg=cfg)
    stock = plain(model)
    assert torch.equal(results[0], results[1])
    assert all(only_rounded(result, stock, model, plain) for result in results)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_off(pack, family, model, cfg):
    stock = run(family, model, family.prompt(), cfg=cfg)
    attached = pack.negative(family.prompt(), negative=family.negative(5))
    patched = pack.patch(model)
    assert torch.equal(run(family, model, attached, cfg=cfg), stock)
    assert torch.equal(run(family, patched, family.prompt(), cfg=cfg), stock)
    assert torch.equal(run(family, pack.patch(model, start_percent=0.999), attached, cfg=cfg), stock)

    def fail(func, q, k, v, heads, **kw):
        raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        run(family, with_override(patched, fail), attached, cfg=cfg)
    assert not torch.equal(run(family, patched, attached, cfg=cfg), stock)
    assert torch.equal(run(family, model, family.prompt(), cfg=cfg), stock)


@pytest.mark.parametrize(("lengths", "cfg"), [((8, 16), 2.5), ((16, 8), 1.0), ((6, 9), 2.5)])
def test_prompts_of_different_lengths(pack, family, model, lengths, cfg):
    """ComfyUI repeats a shorter prompt of a UNet to the length of the other, to let both share a batch."""
    positive, other = family.prompt(lengths[0]), family.prompt(lengths[1], seed=99)
    result, expected = both(pack, family, model, positive=positive, negative=other, cfg=cfg)
    assert relative(result, expected) <= 1e-5


def test_row_mask_path(pack, family, model):
    """An attention of another pack's: no log-sum-exp, so with a mask of one row, or of a row for each image token."""
    positive, negative, size = family.prompt(), family.negative(5), family.sizes[0]
    cells, pixels = region(size)
    for node, expect in ({}, {}), ({"mask": pixels}, {"keep": kept(family, size, cells, 5)}):
        attached, seen = pack.negative(positive, negative=negative, **node), []
        oracle, _ = oracle_of(family, model, positive, negative, **expect)
        result = run(family, with_override(pack.patch(model), spy_override(seen)), attached, batch=2, cfg=2.5)
        assert relative(result, run(family, oracle, positive, batch=2, cfg=2.5)) <= 1e-5
        assert len(seen) > 2 * family.layers


@pytest.mark.parametrize("size", [0, 1], ids=["even", "odd"])
def test_attention_map(pack, family, model, size):
    """VSF Record's map is the oracle's; UNets have none."""
    if len(family.patches) > 1:
        with pytest.raises(ValueError, match="VSF Record cannot serve .*SDXL"):
            pack.mapping["VSFRecord"].execute(model=pack.patch(model))
        return
    size, (positive, negative) = family.sizes[size], (family.prompt(), family.negative(40))
    attached = pack.negative(positive, negative=negative)
    oracle, record = oracle_of(family, model, positive, negative)
    recorded, holder = pack.mapping["VSFRecord"].execute(model=pack.patch(model)).result
    kw = {"size": size, "batch": 2, "steps": 1}
    assert torch.equal(run(family, recorded, attached, **kw), run(family, pack.patch(model), attached, **kw))
    run(family, oracle, positive, **kw)
    expected = torch.stack([share for _, share in record.shares]).mean(0).float()
    assert len(record.shares) == family.layers and expected.std() > 1e-3
    torch.testing.assert_close(holder.record.mean().flatten(1), expected, rtol=1e-4, atol=1e-6)


def test_a_block_that_computes_its_attention_past_comfyui_fails_loudly(pack, name, family, model, monkeypatch):
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
    attached = pack.negative(family.prompt(), negative=family.negative(5))
    with pytest.raises(RuntimeError, match=r"ran without the attention call over text|no block of this model ran"):
        run(family, pack.patch(model), attached)


def test_compiled_whole(request, pack, name, family, model):
    """ComfyUI's TorchCompileModel: no graph break, and no graph of stock or of another negative is mistaken."""
    if name.startswith("ltx2"):
        pytest.skip("refused: test_ltx2.py")
    if name != "ltxv" and not request.config.getoption("--long"):
        pytest.skip("half a minute each; --long runs it")
    torch._dynamo.reset()
    compiled = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(compiled, "eager", options, keys=["diffusion_model"], fullgraph=True)
    size = family.sizes[0]
    cells, pixels = region(size)
    for n, settings, node in (
        (0, {}, {}),
        (5, {}, {}),
        (9, {"scale": 1.0}, {}),
        (0, {}, {}),
        (5, {"blocks": next(iter(family.blocks))}, {}),
        (5, {}, {"mask": pixels}),
    ):
        positive, pair = family.prompt(), [model, compiled]
        if n:
            positive = pack.negative(positive, negative=family.negative(n), **node)
            pair = [pack.patch(m, **settings) for m in pair]
        with torch.no_grad():
            eager, result = (run(family, m, positive, steps=1) for m in pair)
        assert relative(result, eager) <= (1e-5 if n else 0.0)
    torch._dynamo.reset()


# -- from text


WORDS = {"a red roof": ["a", "red", "roof"], "roof": ["roof"]}


@pytest.fixture
def clip(name):
    return cached_clip(name)


def test_from_text_to_picture(pack, name, family, model, clip):
    """The encoder's negative is one that the model takes."""
    attached = pack.negative(family.prompt(), clip=clip, text="a red roof")
    assert attached[0][1]["vsf_negatives"][0].encoder is not None
    result = run(family, pack.patch(model), attached)
    assert relative(result, run(family, model, family.prompt())) > 1e-4


@pytest.mark.parametrize("words", [*WORDS, "naïve café 屋根 🏠"])
def test_cosmos_keeps_its_own_tokens(pack, words):
    """T5's, with its end, as its tokenizer gives them without padding; padding is masked and zeroed, so trimming before
    or after encoding is the same."""
    clip = FAMILIES["cosmos"].clip()
    made, padded = attached_of(pack, clip, words), clip.encode_from_tokens(clip.tokenize(words))
    n = len(clip.tokenizer.clip_t5xxl.tokenizer(words)["input_ids"])
    assert padded.shape[1] == 512 and made.tokens.shape[1] == n and made.encoder == "cosmos"
    assert relative(made.tokens, padded[:, :n]) < 1e-4


@pytest.mark.parametrize("words", [*WORDS, "naïve café 屋根 🏠"])
def test_ltxv_keeps_its_own_tokens(pack, words):
    """T5's, with its end; its padding is masked, so trimming before or after encoding is the same."""
    clip = cached_clip("ltxv")
    made, padded = attached_of(pack, clip, words), clip.encode_from_tokens(clip.tokenize(words))
    n = len(clip.tokenizer.clip_t5xxl.tokenizer(words)["input_ids"])
    assert padded.shape[1] == 128 and made.tokens.shape[1] == n and made.encoder == "ltxv"
    assert relative(made.tokens, padded[:, :n]) < 1e-4


@pytest.mark.parametrize("words", [*WORDS, "naïve café 屋根 🏠", "(roof:1.3) and (door)"])
def test_anima_keeps_its_own_tokens(pack, words):
    """An embedding a T5 token, and T5's end, as the tokenizers give them; the node's text is what a prompt would be."""
    family, model, clip = FAMILIES["anima"], loaded("anima"), cached_clip("anima")
    made = attached_of(pack, clip, words)
    plain = words.replace("(roof:1.3)", "roof").replace("(door)", "door")
    cond, options = clip.encode_from_tokens_scheduled(clip.tokenize(words))[0]
    assert torch.equal(made.tokens, cond) and made.encoder == "anima"
    if words == plain:  # weighted parts are tokenized apart
        assert made.tokens.shape[1] == len(clip.tokenizer.qwen3_06b.tokenizer(words)["input_ids"])
        assert made.extra["t5xxl_ids"].tolist() == clip.tokenizer.t5xxl.tokenizer(words)["input_ids"]
    positive = family.prompt()
    as_prompt = pack.negative(positive, negative=[[cond, {**options, "attention_mask": None}]])
    as_text = pack.negative(positive, clip=clip, text=words)
    results = [run(family, pack.patch(model), attached) for attached in (as_text, as_prompt)]
    assert torch.equal(*results)
    oracle, _ = oracle_of(family, model, positive, [[made.tokens, made.extra]])
    assert relative(results[0], run(family, oracle, positive)) <= 1e-5


def test_anima_shows_its_words_and_cannot_extrapolate(pack, caplog):
    clip, family = cached_clip("anima"), FAMILIES["anima"]
    node = pack.mapping["VSFNegativeConditioning"]
    shown = node.execute(positive=conditioning(), clip=clip, text="red café").ui.as_dict()["text"][0]
    n = len(clip.tokenizer.t5xxl.tokenizer("red café")["input_ids"])
    assert shown.splitlines() == [f"pushes away {n} tokens", "Qwen3: red · café"]
    with pytest.raises(ValueError, match="not that of Anima .* Set extrapolation to 0"):
        attached_of(pack, clip, "roof", extrapolation=8.0)
    with caplog.at_level(logging.INFO):
        run(family, pack.patch(loaded("anima")), pack.negative(family.prompt(), clip=clip, text="red café"))
    assert any(f"Anima: {n} negative tokens" in record.getMessage() for record in caplog.records)


def test_a_negative_of_another_encoder_is_refused(pack):
    """Cosmos and Anima take embeddings of the same width."""
    family = FAMILIES["anima"]
    attached = pack.negative(family.prompt(), clip=FAMILIES["cosmos"].clip(), text="roof")
    with pytest.raises(ValueError, match='of type "cosmos", but this model'):
        run(family, pack.patch(loaded("anima")), attached)


def test_ltxv_guides(pack):
    """Frames of guides (LTXVAddGuide) are appended to the latent: a region means them too, and where the model leaves
    tokens of theirs out, a region cannot be placed."""
    family, model = FAMILIES["ltxv"], loaded("ltxv")
    size, (cells, pixels) = family.sizes[0], region(family.sizes[0])
    guides = size[1] * size[2]
    kept_out = torch.ones(1, 1, *size)
    kept_out[:, :, -1] = 0.0
    for left_out, node, expect in (
        (0, {"mask": pixels}, {"keep": kept(family, size, cells, 5)}),
        (1, {}, {}),
        (1, {"mask": pixels}, None),
    ):
        denoise = kept_out.clone()
        denoise[:, :, -1, 0, :left_out] = -1.0
        coords = torch.zeros(1, 3, guides, 2)
        ((cond, options),) = family.prompt()
        positive = [[cond, {**options, "keyframe_idxs": coords, "concat_mask": denoise}]]
        negative = family.negative(5)
        attached = pack.negative(positive, negative=negative, **node)
        if expect is None:
            with pytest.raises(RuntimeError, match="leaves out or adds some of its tokens"):
                run(family, pack.patch(model), attached)
            continue
        oracle, _ = oracle_of(family, model, positive, negative, **expect)
        result, expected = run(family, pack.patch(model), attached), run(family, oracle, positive)
        assert relative(result, expected) <= 1e-5


# -- UNets

UNETS = ("sd1", "sd2", "sdxl")


@pytest.fixture
def unet(name):
    if name not in UNETS:
        pytest.skip("no UNet")
    return name


@pytest.mark.smoke
@pytest.mark.parametrize("words", [*WORDS, "naïve café 屋根 🏠", "wow!!!"])
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
    assert relative(moved, light * 9 - 8 * null) < 1e-5


def test_node_shows_the_words(pack, unet, clip):
    node = pack.mapping["VSFNegativeConditioning"]
    shown = node.execute(positive=conditioning(), clip=clip, text="red roof").ui.as_dict()["text"][0]
    assert shown.splitlines() == ["pushes away 2 tokens", "CLIP: red · roof"]


def test_attn2_patches_of_other_nodes(pack, unet, family, model):
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

    positive, negative = family.prompt(), family.negative(5)
    oracle, _ = oracle_of(family, model, positive, negative)
    oracle.set_model_attn2_patch(doubled)
    expected = run(family, oracle, positive)
    attached = pack.negative(positive, negative=negative)
    for patched in (theirs(pack.patch(model)), pack.patch(theirs(model))):
        assert relative(run(family, patched, attached), expected) <= 1e-5


def test_attn2_replacement_past_comfyui_fails_loudly(pack, unet, family, model):
    """As IP-Adapters do: their own attention call, which nobody can hook into."""

    def replaced(q, k, v, options):
        q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    m = model.clone()
    m.set_model_attn2_replace(replaced, "middle", 0)
    attached = pack.negative(family.prompt(), negative=family.negative(5))
    with pytest.raises(RuntimeError, match="middle block 0 ran without the attention call over text"):
        run(family, pack.patch(m), attached)


def test_picture_shrunk_inside_the_model(pack, unet, family, model):
    """Kohya's Deep Shrink: fine without a mask, an error with one."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    def shrunk(m):
        return PatchModelAddDownscale.execute(m, 2, 1.75, 0.0, 1.0, True, "bicubic", "bicubic").result[0]

    positive, negative = family.prompt(), family.negative(5)
    attached = pack.negative(positive, negative=negative)
    oracle, _ = oracle_of(family, model, positive, negative)
    expected = run(family, shrunk(oracle), positive, size=(16, 20))
    assert relative(run(family, shrunk(pack.patch(model)), attached, size=(16, 20)), expected) <= 1e-5
    masked = pack.negative(positive, negative=negative, mask=torch.ones(1, 8, 8) * 0.5)
    with pytest.raises(RuntimeError, match="another node changes the size of the picture inside the model"):
        run(family, shrunk(pack.patch(model)), masked, size=(16, 20))


def test_models_of_other_classes_are_refused(pack, unet, model, monkeypatch):
    other = type("SD21UNCLIP", (type(model.model),), {"__module__": "comfy.model_base"})
    monkeypatch.setattr(model.model, "__class__", other)
    with pytest.raises(ValueError, match=r"SD21UNCLIP are not supported.*Stable Diffusion 1\.5, 2\.1 and SDXL"):
        pack.patch(model)
