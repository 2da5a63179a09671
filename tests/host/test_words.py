"""What is pushed away is what the words say: what each text encoder reads of a text, and what it is told apart from."""

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from encoders import (
    make_chroma_clip,
    make_clip,
    make_cosmos_clip,
    make_flux2_clip,
    make_flux_clip,
    make_hunyuan_video_15_clip,
    make_hunyuan_video_clip,
    make_klein_clip,
    make_ltxav_clip,
    make_ltxv_clip,
    make_ovis_clip,
    make_qwen_image_clip,
    make_unet_clip,
    make_wan_clip,
    make_z_image_clip,
)
from helpers import carried, conditioning
from safetensors.torch import save_file

import nodes

MAKERS = {
    "sd3": lambda _: make_clip(),
    "flux": lambda _: make_flux_clip(),
    "wan": make_wan_clip,
    "sd1": lambda _: make_unet_clip("sd1"),
    "sd2": lambda _: make_unet_clip("sd2"),
    "sdxl": lambda _: make_unet_clip("sdxl"),
    "cosmos": lambda _: make_cosmos_clip("cosmos"),
    "anima": lambda _: make_cosmos_clip("anima"),
    "ltxv": lambda _: make_ltxv_clip(),
    "ltxav": lambda folder: make_ltxav_clip(folder, "2.3"),
    "chroma": lambda _: make_chroma_clip(),
    "qwen_image": lambda _: make_qwen_image_clip(),
    "z_image": lambda _: make_z_image_clip(),
    "flux2": lambda _: make_flux2_clip(),
    "klein": lambda _: make_klein_clip(),
    "ovis": lambda _: make_ovis_clip(),
    "hunyuan_video": lambda _: make_hunyuan_video_clip(),
    "hunyuan_video_15": lambda _: make_hunyuan_video_15_clip(),
}
ALL = pytest.mark.parametrize("name", MAKERS)
TEMPLATES = {"qwen_image", "z_image", "flux2", "klein", "ovis", "hunyuan_video", "hunyuan_video_15"}
OWN = importlib.util.find_spec("comfy.text_encoders.bpe_tokenizer") is not None
"""Whether ComfyUI reads LLaMA's vocabulary itself, as from 0.31 on; transformers 5 reads it wrongly."""
BROKEN = {"hunyuan_video"} if int(transformers.__version__.split(".")[0]) >= 5 and not OWN else set()
"""Those whose tokenizer loses the blanks between words; their encoder fails at a text that begins with an embedding."""
NO_EMBEDDINGS = {"wan", "ltxav", "qwen_image", "ovis", "hunyuan_video_15", "anima", *BROKEN}
"""Anima's Qwen3 would take them, but its T5 asks that with words alone."""
NO_WEIGHTS = TEMPLATES - {"hunyuan_video"} | {"ltxav"}
SENTENCEPIECE = {"sd3", "flux", "wan", "cosmos", "anima", "ltxv", "ltxav", "chroma"}
"""Those with a vocabulary of whole letters: what is not in it is one token for all that is unknown."""
READS = {
    "flux": ["t5xxl"],
    "wan": ["umt5xxl"],
    "sd1": ["l"],
    "sd2": ["h"],
    "sdxl": ["l", "g"],
    "sd3": ["l", "g", "t5xxl"],
    "cosmos": ["t5xxl"],
    "anima": ["t5xxl"],
    "ltxv": ["t5xxl"],
    "ltxav": ["gemma3_12b"],
    "chroma": ["t5xxl"],
    "qwen_image": ["qwen25_7b"],
    "z_image": ["qwen3_4b"],
    "flux2": ["mistral3_24b"],
    "klein": ["qwen3_4b"],
    "ovis": ["qwen3_2b"],
    "hunyuan_video": ["llama"],
    "hunyuan_video_15": ["qwen25_7b"],
}
"""The keys of ComfyUI's tokens that a negative is made of; Anima's Qwen3 is asked with T5's."""


@pytest.fixture(scope="module")
def clip_of(tmp_path_factory):
    return functools.cache(lambda name: MAKERS[name](tmp_path_factory.mktemp("spiece")))


@pytest.fixture
def clip(clip_of, name):
    return clip_of(name)


@pytest.fixture
def node(pack, clip):
    """(what the node attaches for a text, the lines that it shows)"""

    def run(text, **kw):
        out = pack.mapping["VSFNegativeConditioning"].execute(positive=conditioning(), clip=clip, text=text, **kw)
        negatives = carried(out.result[0]) or (None,)
        return negatives[-1], out.ui.as_dict()["text"][0].splitlines()

    return run


def part(owner, key):
    found = getattr(owner, key, None)
    return found if found is not None else getattr(owner, f"clip_{key}", None)


def width_of(clip, key):
    """Channels of the embeddings that the encoder under ``key`` takes."""
    return part(clip.cond_stage_model, key).transformer.get_input_embeddings().weight.shape[1]


@pytest.fixture
def embeddings(clip, name, tmp_path):
    """Saves an embedding of two tokens, ``width`` wide, where all tokenizers of the encoder look for it."""
    wrapper = clip.tokenizer
    for tokenizer in {id(t): t for t in vars(wrapper).values() if hasattr(t, "embedding_directory")}.values():
        if tokenizer.embedding_directory is not None:
            tokenizer.embedding_directory = [str(tmp_path)]

    def save(stem, width, seed=0):
        rows = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
        save_file({"emb_params": rows}, str(tmp_path / f"{stem}.safetensors"))
        return rows

    return save


def same(a, b):
    """Whether two negatives are the same to the model."""
    return (
        torch.equal(a.tokens, b.tokens)
        and a.extra.keys() == b.extra.keys()
        and all(torch.equal(torch.as_tensor(a.extra[k]), torch.as_tensor(b.extra[k])) for k in a.extra)
    )


# -- embeddings


@ALL
def test_an_embedding_of_another_width_is_left_out_and_said(name, node, embeddings, caplog):
    embeddings("wide", 24)
    negative, shown = node("roof embedding:wide, tree")
    plain, _ = node("roof , tree")
    assert same(negative, plain)
    why = "takes no embeddings" if name in NO_EMBEDDINGS else "embedding:wide is 24 wide and left out"
    assert any(why in line for line in shown) and why in caplog.text
    assert not any("[embedding]" in line for line in shown)


@ALL
def test_an_embedding_that_is_all_there_is(name, node, embeddings):
    embeddings("wide", 24)
    for text in ("embedding:wide", "(embedding:nowhere:1.2)", " embedding:wide embedding:nowhere"):
        with pytest.raises(ValueError, match=r"nothing is left of the text\. .*embedding"):
            node(text)


@ALL
def test_an_embedding_that_does_not_exist(name, node, embeddings):
    for text in ("roof embedding:nowhere, tree", "roof (embedding:nowhere:1.3), tree"):
        negative, shown = node(text)
        why = "takes no embeddings" if name in NO_EMBEDDINGS else "no embedding nowhere"
        assert any(why in line for line in shown)
    assert same(node("roof embedding:nowhere, tree")[0], node("roof , tree")[0])


@ALL
def test_an_embedding_that_fits(name, clip, node, embeddings):
    key = READS[name][0]
    if name in NO_EMBEDDINGS:
        embeddings("fits", 1024 if name == "anima" else 64)
        assert same(node("roof embedding:fits tree")[0], node("roof  tree")[0])
        return
    rows = embeddings("fits", width_of(clip, key))
    negative, shown = node("roof embedding:fits tree")
    said = [line.split(": ", 1)[1] for line in shown if "[embedding]" in line]
    assert said[0] == "roof · [embedding] · [embedding] · tree"
    if name in TEMPLATES:
        assert torch.equal(negative.tokens, encoded_by_hand(clip, key, "roof ", rows, " tree"))
        return
    tokens = clip.tokenize("roof embedding:fits tree")
    if "t5xxl" in tokens:  # whose embeddings depend on its padding
        tokens["t5xxl"] = [[t for t in tokens["t5xxl"][0] if torch.is_tensor(t[0]) or t[0] != 0]]
    stock, count = clip.encode_from_tokens(tokens)[0], 6 if name == "sd3" else negative.tokens.shape[1]
    assert all((row == stock).all(-1).any() for row in negative.tokens[0, :count])  # SD3's T5 takes it not
    assert negative.tokens.shape[1] == node("roof tree")[0].tokens.shape[1] + 2


def encoded_by_hand(clip, key, before, rows, after):
    """The embeddings of words around an embedding, in the template as it is without one."""
    tokens = clip.tokenize("roof")
    tokenizer = part(clip.tokenizer, key)
    skip = [] if tokenizer.start_token is None else [tokenizer.start_token]

    def ids(text):
        return tokenizer.tokenizer(text)["input_ids"][len(skip) :]

    frame = [t[0] for t in tokens[key][0]]
    (at,) = [i for i, t in enumerate(frame) if t == ids("roof")[0]]
    own = [*ids(before), *rows, *ids(after)]
    whole = [*frame[:at], *own, *frame[at + 1 :]]
    tokens[key] = [[(t, 1.0) for t in whole]]
    out = clip.encode_from_tokens(tokens)
    start = at - (len(whole) - out.shape[1])  # what the encoder leaves out itself
    return out[:, start : start + len(own)]


def test_an_embedding_that_clip_l_alone_can_read(clip_of, pack, tmp_path):
    clip = clip_of("sdxl")
    for key in ("l", "g"):
        part(clip.tokenizer, key).embedding_directory = [str(tmp_path)]
    save_file({"emb_params": torch.randn(2, 768)}, str(tmp_path / "old.safetensors"))
    out = pack.mapping["VSFNegativeConditioning"].execute(positive=conditioning(), clip=clip, text="embedding:old roof")
    lines = out.ui.as_dict()["text"][0].splitlines()
    assert lines[1:3] == ["CLIP-L: [embedding] · [embedding] · roof", "CLIP-G: roof"]
    assert any("CLIP-G takes embeddings that are 1280 wide" in line for line in lines)
    negative = carried(out.result[0])[-1]
    stock = clip.encode_from_tokens(clip.tokenize("embedding:old roof"))
    assert torch.equal(negative.tokens, stock[:, 1:4])  # two of the embedding and "roof"; CLIP-G has "roof" first


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "z_image"])
def test_files_that_are_no_embedding(name, clip, node, tmp_path, embeddings):
    """Whatever lies in the folder: it is left out, and said."""
    width = width_of(clip, READS[name][-1])
    files = {
        "none": {},
        "number": {"x": torch.tensor(1.0)},
        "state": {"epoch": 3, "x": torch.zeros(2, width)},
        "old": [{"a": torch.randn(2, 17)}],
        "deep": {"x": torch.randn(1, 3, width)},
    }
    plain, _ = node("roof tree")
    for stem, content in files.items():
        torch.save(content, tmp_path / f"{stem}.pt")
        negative, shown = node(f"roof embedding:{stem} tree")
        assert same(negative, node("roof  tree")[0])
        assert any("left out" in line or "no embedding" in line for line in shown), stem


@pytest.mark.parametrize("name", ["sd1", "z_image", "klein"])
def test_where_the_name_of_an_embedding_ends(name, clip, node, embeddings):
    """At a blank, a comma, ``<`` or ``[``; older ComfyUIs went on. Parentheses in it are escaped."""
    rows = embeddings("fits", width_of(clip, READS[name][0]))
    embeddings("a(1)", rows.shape[1], seed=1)
    for text in ("embedding:fits[x]", "embedding:fits<x>", r"embedding:a\(1\)", "embedding:fits, x"):
        _, shown = node(text)
        assert shown[1].startswith(f"{shown[1].split(':')[0]}: [embedding] · [embedding]"), (text, shown)
    heavy, light = (node(f"roof {text}")[0].tokens for text in ("(embedding:fits:1.5)", "embedding:fits"))
    assert torch.equal(heavy, light) == (name in NO_WEIGHTS)


# -- letters


@ALL
def test_letters_that_an_encoder_does_not_know(name, clip, node, caplog):
    caplog.set_level(logging.WARNING)
    foreign = [letter for letter in "屋根 крыша سقف 🏠 {}" if not letter.isspace()]
    unknown = [letter for letter in foreign if is_unknown(clip, READS[name][-1], letter)]
    text = "roof 屋根 крыша سقف 🏠 {tree}"
    negative, shown = node(text)
    assert any("does not know" in line for line in shown) == bool(unknown) == ("does not know" in caplog.text)
    if unknown:
        (line,) = [line for line in shown if "does not know" in line]
        assert all(letter in line for letter in unknown)
        read = text
        for letter in unknown:
            read = read.replace(letter, " ")
        if name not in ("sd3", "anima"):  # whose other tokenizer reads bytes
            assert same(negative, node(read)[0])


def is_unknown(clip, key, letter):
    tokenizer = part(clip.tokenizer, key)
    inner = tokenizer.tokenizer
    pieces = getattr(inner, "tokenizer", inner)
    unknown = pieces.unk_id() if hasattr(pieces, "unk_id") else getattr(inner, "unk_token_id", None)
    ids = inner(letter)["input_ids"]
    special = {tokenizer.start_token, tokenizer.end_token}
    return unknown in [t for t in ids if t not in special] or not set(ids) - special


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_what_cannot_be_seen_is_not_pushed_away(name, node):
    """Marks of control and direction are read as nothing; private and newest letters are unknown."""
    plain, shown = node("roof tree")
    assert not any("know" in line for line in shown)
    for text in ("roof\u2060 tree", "\u202eroof tree\0", "roof\ufe0f tree"):
        negative, shown = node(text)
        assert same(negative, plain) and not any("know" in line for line in shown), text
    for letter in ("\U0001fae9", "\ue000"):
        negative, shown = node(f"roof tree {letter}")
        assert same(negative, plain) and any("does not know" in line for line in shown)


@pytest.mark.parametrize("name", sorted(SENTENCEPIECE - {"sd3", "ltxav"}))
@pytest.mark.parametrize("text", ["屋根", "{🏠}", "屋根 embedding:nowhere"])
def test_nothing_left_is_an_error(name, node, text):
    with pytest.raises(ValueError, match=r"nothing is left of the text\. .*(T5|umT5) does not know .* in other words"):
        node(text)


@pytest.mark.parametrize("name", ["sd3"])
def test_a_segment_that_reads_nothing_gives_nothing(name, clip, node):
    """T5 would give its end token, and CLIP still knows letters as bytes."""
    negative, shown = node("屋根")
    count = len(clip.tokenizer.clip_l.tokenizer("屋根")["input_ids"])
    assert [line.split(":")[0] for line in shown] == [f"pushes away {count} tokens", "CLIP", "T5 does not know 屋 根."]
    assert negative.tokens.shape[1] == count


def test_accents_and_joined_signs_are_one_letter(clip_of, pack):
    show = functools.partial(pack.mapping["VSFNegativeConditioning"].execute, positive=conditioning())
    out = show(clip=clip_of("flux"), text="cafe\u0301 👨\u200d👩\u200d👧 roof 👍🏽")
    assert out.ui.as_dict()["text"][0].splitlines()[1:] == [
        "T5: café · roof",
        "T5 does not know 👨\u200d👩\u200d👧 👍🏽.",
    ]


@pytest.mark.parametrize("name", ["flux"])
def test_an_unknown_accent_leaves_the_letter(name, node):
    """T5 has no ñ and no ł."""
    negative, shown = node("montaña łódź")
    assert same(negative, node("montana  ódz")[0]) and shown[-1] == "T5 does not know ñ ł ź."


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "qwen_image", "z_image", "klein", "flux2", "ovis"])
@pytest.mark.parametrize("text", ["naïve", "屋根 крыша", "سقف 🏠", "ὀροφή"])
def test_what_is_listed_can_be_read(name, node, text):
    """Bytes and halves of letters are shown as the text that they are together, a lone mark of a word not at all."""
    if name == "flux":
        text = "Dächer für café"  # whose T5 knows these
    _, shown = node(text)
    listed = [line.split(": ", 1)[1].split(" · ") for line in shown if ": " in line and "know" not in line]
    for words in listed:
        assert all(words) and "\ufffd" not in "".join(words)
        assert "".join(words) == text.replace(" ", "") or name == "sd3"


@ALL
@pytest.mark.parametrize("text", ["a red roof, wow!!", "屋根 naïve roof 🏠"])
def test_what_is_listed_is_what_is_encoded(name, clip, node, text, monkeypatch):
    """The tokens at the places that are kept, as the encoder got them, say what the node lists."""
    seen = record_tokens(clip, name, monkeypatch)
    negative, shown = node(text)
    lines = [line for line in shown[1:] if ": " in line and not line.endswith(".")]
    listed = "".join("".join(line.split(": ", 1)[1].split(" · ")) for line in lines)
    kept = "".join(seen(negative))
    assert listed == kept


def record_tokens(clip, name, monkeypatch):
    """After a run: what the kept tokens decode to, of each of the keys that show theirs."""
    tokens, encode = [], clip.encode_from_tokens_scheduled

    def recorded(given, **kw):
        tokens.append(given)
        return encode(given, **kw)

    monkeypatch.setattr(clip, "encode_from_tokens_scheduled", recorded)

    def spoken(negative):
        for key in READS[name]:
            if key == "g":  # shown with CLIP-L's
                continue
            tokenizer = part(clip.tokenizer, key)
            ids = [t[0] for chunk in tokens[0][key] for t in chunk]
            if name in TEMPLATES:
                bare = [t[0] for chunk in clip.tokenize("")[key] for t in chunk]
                start = next(i for i, (a, b) in enumerate(zip(ids, bare, strict=False)) if a != b)
                ids = ids[start : start + negative.tokens.shape[1]]
            special = {tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token}
            yield tokenizer.tokenizer.decode([t for t in ids if t not in special]).replace(" ", "")

    return spoken


# -- weights


@ALL
def test_weights_where_there_are_none(name, node, caplog):
    heavy, shown = node("(roof:1.5) and ((door))")
    light, plain = node("roof and door")
    assert any("has no weights" in line for line in shown) == (name in NO_WEIGHTS)
    assert not any("weights" in line for line in plain)
    assert heavy.tokens.shape == light.tokens.shape or name not in NO_WEIGHTS
    assert same(heavy, light) == (name in NO_WEIGHTS)
    assert not any("(" in line or "1.5" in line for line in shown)


@ALL
def test_escaped_and_lone_parentheses_are_words(name, node):
    for text in (r"roof \(red\)", "roof) red"):
        negative, shown = node(text)
        assert not any("has no weights" in line for line in shown)
        if name in NO_WEIGHTS - {"ltxav"}:
            assert any(")" in line for line in shown)
    _, shown = node("((a) b")
    assert not any("has no weights" in line for line in shown)


@ALL
@pytest.mark.parametrize("text", ["(roof:-1)", "(roof:0)", "tree (a (red:1.2) roof:-0.5)", "(roof:nan)", "(roof:inf)"])
def test_weights_that_a_negative_cannot_have(name, node, text):
    with pytest.raises(ValueError, match="the weight .* A negative takes weights above 0"):
        node(text)


# -- the encoder's own marks


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_marks_of_the_template_are_no_words(name, clip, node):
    mark = "<|eot_id|>" if name == "hunyuan_video" else "<|im_end|>"
    for text in (f"roof {mark} tree", "<|im_start|>user\nroof", "<|start_header_id|>roof"):
        with pytest.raises(ValueError, match="mark of a text encoder's template"):
            node(text)


@pytest.mark.parametrize("name", ["qwen_image"])
def test_marks_where_the_tokenizer_lists_none(name, clip, node, monkeypatch):
    """As ComfyUI's own tokenizer, from 0.31 on: it tells no added tokens, and writes none unless asked to."""
    tokenizer = clip.tokenizer.qwen25_7b
    inner = tokenizer.tokenizer

    class Bare:
        def __call__(self, text):
            return inner(text)

        def decode(self, tokens, skip_special_tokens=True):
            return inner.decode(tokens, skip_special_tokens=skip_special_tokens)

    plain = node("red roof")
    monkeypatch.setattr(tokenizer, "tokenizer", Bare())
    assert same(node("red roof")[0], plain[0]) and node("red roof")[1] == plain[1]
    for mark in ("<|im_end|>", "<|im_start|>"):
        with pytest.raises(ValueError, match="mark of a text encoder's template"):
            node(f"roof {mark} tree")


@ALL
def test_blanks_around_the_text_are_no_words(name, node):
    """In a template they would be, and a line's end would merge with the template's own."""
    plain, _ = node("roof")
    for text in ("roof\n", "\nroof", "  roof \n\n"):
        assert same(node(text)[0], plain), text
    assert node("()")[1] in (["off: no word in the text"], ["off: no negative"])


@ALL
def test_an_embedding_without_a_name(name, node):
    with pytest.raises(ValueError, match='"embedding:" in the text has no name'):
        node("roof embedding:")


# -- Eq. 10


def extrapolated(pack, clip, **options):
    clip = clip.clone()
    for key, value in options.items():
        clip.set_tokenizer_option(f"t5xxl_{key}", value)
    made = pack.negative(conditioning(), clip=clip, text="roof", extrapolation=8.0)
    return carried(made)[-1].tokens


@pytest.mark.parametrize("make", [make_flux_clip, lambda: make_clip(clip_l=False, clip_g=False)], ids=["flux", "sd3"])
def test_eq_10_does_not_depend_on_what_ran_before(pack, make):
    """T5TokenizerOptions changes how far the empty prompt is padded, or takes its padding away."""
    clip = make()
    long = extrapolated(pack, clip, min_length=300)
    short = extrapolated(pack, clip)
    assert not torch.equal(long, short)
    assert torch.equal(extrapolated(pack, make()), short)
    assert torch.equal(extrapolated(pack, clip, min_length=300), long)
    for _ in range(2):
        with pytest.raises(ValueError, match="extrapolation compares with the padding"):
            extrapolated(pack, clip, min_length=0, min_padding=0)


# -- padding, for the methods that keep it


@ALL
def test_padded_is_what_a_prompt_is(name, clip, node):
    """NAG and NASA take the negative as CLIPTextEncode encodes it, but for models that fill prompts up themselves."""
    negative, _ = node("a roof")
    ((prompt, options),) = nodes.CLIPTextEncode().encode(clip, "a roof")[0]
    if name in ("anima", "ltxav"):
        assert negative.padded is None
        return
    if "attention_mask" in options:
        prompt = prompt[:, options["attention_mask"][0].bool()]
    assert torch.equal(negative.padded, prompt)
    assert negative.padded.shape[1] > negative.tokens.shape[1] or name in ("chroma", "cosmos", "ltxv")


# -- a conditioning as the negative


def test_a_negative_that_is_the_positive(pack, caplog, clip_of):
    """What a node that connects unseen makes of the optional input."""
    positive = conditioning()
    copy = [[positive[0][0].clone(), {}]]
    for negative in (positive, copy):
        caplog.clear()
        with_text = pack.negative(positive, clip=clip_of("flux"), text="roof", negative=negative)
        assert "Use Everywhere" in caplog.text and "text is" in caplog.text
        without = pack.negative(positive, clip=clip_of("flux"), text="roof")
        assert same(carried(with_text)[0], carried(without)[0])
        caplog.clear()
        alone = pack.negative(positive, negative=negative)
        assert "pushes itself away" in caplog.text and len(carried(alone)) == 1
    with pytest.raises(ValueError, match="both text and negative are given"):
        pack.negative(positive, clip=clip_of("flux"), text="roof", negative=conditioning(seed=3))


# -- tokenizers that read their vocabulary wrongly


@pytest.mark.parametrize("name", ["hunyuan_video"])
def test_words_that_run_together_are_said(name, clip, node, caplog):
    """As transformers 5 makes of LLaMA's; with an older one there is nothing to say."""
    _, shown = node("a red roof")
    assert any("runs words together, in the positive prompt too" in line for line in shown) == (name in BROKEN)
    assert ("runs words together" in caplog.text) == (name in BROKEN)


def test_hunyuan_video_and_flux_2_on_transformers_4():
    texts = ["red roof", "屋根 roof", "red (roof:1.5)"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["VSF_TRANSFORMERS_4"], os.environ["PYTHONPATH"]])}
    script = Path(__file__).with_name("on_transformers_4.py")
    done = subprocess.run([sys.executable, str(script), *texts], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("transformers").startswith("4.")
    llama, mistral = "LLaMA: ", "Mistral or Qwen3: "
    assert (
        found
        == {
            "hunyuan_video: red roof": [["pushes away 2 tokens", llama + "red · roof"], 2],
            "hunyuan_video: 屋根 roof": [["pushes away 3 tokens", llama + "屋 · 根 · roof"], 3],
            "hunyuan_video: red (roof:1.5)": [["pushes away 3 tokens", llama + "red · roof"], 3],  # the blank is one
            "flux2: red roof": [["pushes away 2 tokens", mistral + "red · roof"], 2],
            "flux2: 屋根 roof": [["pushes away 7 tokens", mistral + "屋 · 根 · roof"], 7],  # of bytes
            "flux2: red (roof:1.5)": [
                [
                    "pushes away 2 tokens",
                    mistral + "red · roof",
                    f"{mistral[:-2]} has no weights: words count without theirs.",
                ],
                2,
            ],
        }
    )
