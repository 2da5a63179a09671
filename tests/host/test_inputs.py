"""Whatever the nodes are given: a result, or an error that names the input before the model is called. Never a NaN
picture, a crash in a kernel, or a negative that silently does nothing."""

import math
import time
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import comfy.sd
import comfy.sd1_clip
import pytest
import torch
from comfy.supported_models_base import ClipTarget
from encoders import make_clip, make_flux_clip, make_wan_clip, randomized
from helpers import assert_close, carried, conditioning, load_flux, load_sd3, load_wan, relative, sample, text
from hosting.client import run_in_thread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAN, INF = math.nan, math.inf
CASES = {"sd3": 500, "flux": 350, "wan": 200}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Per family: its smallest model, a text encoder that fits, and how long its text and picture are on each side."""
    clips = {
        "sd3": make_clip(clip_l=False, clip_g=False),
        "flux": make_flux_clip(pooled=768),
        "wan": make_wan_clip(tmp_path_factory.mktemp("spiece")),
        "other": randomized(ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel), 64),
    }
    models = {"sd3": load_sd3(depth=2), "flux": load_flux(double=1, single=1), "wan": load_wan(layers=1)}
    shapes = {"sd3": (64, 2048, (4, 6)), "flux": (64, 768, (4, 6)), "wan": (4096, 8, (2, 4, 6))}
    made = {}
    for name, model in models.items():
        width, pooled, size = shapes[name]
        calls = []
        model.model.diffusion_model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        given = {"clip": clips[name], "clips": clips, "width": width, "pooled": pooled, "size": size}
        made[name] = SimpleNamespace(name=name, model=model, calls=calls, stock={}, **given)
    return made


def positive_of(family, seed=1, length=5):
    return conditioning(length, seed, family.width, family.pooled)


def ready(family, tokens, **options):
    """A conditioning to be the ``negative``; its pooled output is what layout released needs."""
    return [[tokens, {"pooled_output": text(1, 9, family.pooled)[:, 0], **options}]]


def run(family, model, positive, batch=1):
    family.calls.clear()
    return sample(model, positive, positive_of(family, 99), steps=1, size=family.size, batch=batch)


@dataclass(repr=False)
class Case:
    """One use of both nodes; ``errors``: patterns of which one must match, none for a case that works."""

    batch: int
    positive: object
    patch: dict
    negatives: list[dict]
    model: bool = True
    errors: list[str] = field(default_factory=list)

    def __repr__(self):
        with torch._tensor_str.printoptions(threshold=0, edgeitems=1):
            return f"Case({self.batch}, {self.positive}, {self.patch}, {self.negatives}, errors={self.errors})"


WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["", " \n\t", None]),
    st.sampled_from(
        ["a roof", " ", "(roof:1.3)", "((((", "\u200b", "\0", "embedding:none", "\\(", "屋根 🏠", "e\u0301\u202e"]
    ),
)
BLOCKS = {"sd3": "double", "flux": "single", "wan": "double"}
NO_NUMBER = [NAN, INF, -INF, None, "x", 1e39, 10**400, [1.0], text(1, 1)]
BAD_BLOCKS = (
    "double: double:9 double:1-0 0-2 double:-1-2 ; , -- double,, all,x double:0x0 double:0:0 double:² double:٣ doublé"
)
BAD_BLOCKS = [*BAD_BLOCKS.split(), "double 0", "\ud800", "x" * 10_000, "double:" + "9" * 5000]


@st.composite
def cases(draw, family, kind):
    """A case in which everything fits; after that one input is broken as ``kind`` says (or none), maybe another too."""
    image, width = family.name != "wan", family.width
    batch = draw(st.integers(1, 4))
    fitting = st.sampled_from([b for b in range(1, batch + 1) if batch % b == 0])
    start, end = draw(st.sampled_from([(0.0, 1.0), (0.0, 1.0), (0.0, 0.3), (0.5, 1.0)]))
    patch = {
        "scale": draw(st.floats(-20, 20)),
        "offset": draw(st.one_of(st.floats(-20, 4), st.floats(-20, 100))),
        "start_percent": start,
        "end_percent": end,
        "blocks": draw(
            st.sampled_from(["", "all", " ALL ", BLOCKS[family.name], f"{BLOCKS[family.name]}:0-", "double:-0", None])
        ),
        "layout": draw(st.sampled_from(["paper", "released"])),
        "affect_references": draw(st.booleans()),
    }
    negatives = []
    for seed in range(1 if patch["layout"] == "released" else draw(st.sampled_from([1, 1, 2, 3]))):
        size = draw(st.tuples(fitting if image else st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)))
        one = {"strength": draw(st.floats(0, 10)), "mask": None}
        if draw(st.booleans()):
            one["mask"] = draw(st.sampled_from([torch.ones, torch.zeros, torch.rand]))(size)
        one["from_frame"], one["to_frame"] = draw(st.sampled_from([(0.0, 1.0), (0.0, 0.3), (0.7, 1.0)]))
        if draw(st.booleans()):
            words = draw(WORDS)
            extrapolation = draw(st.one_of(st.just(0.0), st.floats(0, 20)))
            negatives.append({**one, "text": words, "clip": family.clip, "extrapolation": extrapolation})
        else:
            tokens = text(draw(st.integers(1, 12)), seed, width, draw(fitting))
            negatives.append({**one, "negative": ready(family, tokens)})
    case = Case(batch, positive_of(family, 1, draw(st.integers(1, 12))), patch, negatives)
    for what in [kind, *draw(st.sets(st.sampled_from(sorted(BREAK)), max_size=1))] if kind else ():
        BREAK[what](draw, family, case)
    return case


def break_patch_number(draw, family, case):
    name = draw(st.sampled_from(["scale", "offset", "start_percent", "end_percent"]))
    case.patch[name] = draw(st.sampled_from(NO_NUMBER))
    case.errors.append(f"{name} must be a number from")


def break_window(draw, family, case):
    window = draw(st.sampled_from([(0.6, 0.4), (0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (1.0, 0.0)]))
    case.patch["start_percent"], case.patch["end_percent"] = window
    case.errors += ["start_percent .* must lie before end_percent", "_percent must be a number from 0 to 1"]


def break_blocks(draw, family, case):
    nonsense = st.text("xyz:-,0 ", max_size=10).map(lambda s: "q" + s)
    case.patch["blocks"] = draw(st.one_of(st.sampled_from(BAD_BLOCKS), nonsense))
    case.errors.append(r"blocks(: .* has .*double:0-\d| is not valid Unicode)")


def break_layout(draw, family, case):
    case.patch["layout"] = draw(st.sampled_from(["", "Paper", None, 3]))
    case.errors.append("layout must be one of paper, released")


def break_model(draw, family, case):
    case.model = False
    case.errors.append("model must be a model, got None")


def break_positive(draw, family, case):
    case.positive = draw(st.sampled_from([None, [], "x", [None], [text(1, 1)], [[text(1, 1), None]]]))
    case.errors.append("positive (must be|is) a conditioning")


def break_negative_number(draw, family, case):
    name = draw(st.sampled_from(["strength", "extrapolation", "from_frame", "to_frame"]))
    case.negatives[-1][name] = draw(st.sampled_from(NO_NUMBER))
    case.errors.append(f"{name} must be a number from")


def break_frames(draw, family, case):
    frames = draw(st.sampled_from([(0.6, 0.4), (0.5, 0.5), (-1.0, 1.0), (0.0, 2.0)]))
    if family.name == "wan" and draw(st.booleans()):
        frames = (0.4, 0.6)  # between the middles of two frames
        _turn_on(case)
    case.negatives[-1]["from_frame"], case.negatives[-1]["to_frame"] = frames
    case.errors += ["from_frame .* must lie before to_frame", "_frame must be a number from 0 to 1"]
    case.errors += ["none of this video's 2 latent frames"]


def break_mask(draw, family, case):
    shape = draw(st.sampled_from([(), (3,), (0, 8, 8), (1, 0, 8), (1, 8, 0), (5, 8, 8)]))
    mask = torch.rand(shape)
    if shape == (5, 8, 8):
        _turn_on(case)
    if shape == (5, 8, 8) and family.name == "wan":
        mask[0, 0, 0] = NAN  # five pictures are five frames there
    case.negatives[-1]["mask"] = draw(st.sampled_from([mask, mask * NAN, "white"]))
    case.errors.append("mask (must be a mask|is empty|has values that are NaN|is a batch of 5)")


def _turn_on(case):
    """What only a run can find wrong is looked for where there is a negative."""
    if "text" in case.negatives[-1]:
        case.negatives[-1]["text"] = "a roof"


def break_text(draw, family, case, error):
    clips = family.clips
    strange = [clip for name, clip in clips.items() if name != family.name]
    broken = {
        "text needs clip": {"text": "a roof", "clip": None},
        "not valid Unicode": {"text": "a \ud800", "clip": family.clip},
        "nested too deep": {"text": "(" * 2000 + "a" + ")" * 2000, "clip": family.clip},
        "NaN or infinite": {"text": draw(st.sampled_from(["(a:nan)", "b (a:1e39)", "(a:-inf)"])), "clip": family.clip},
        "both text and negative": {
            "text": "a",
            "clip": family.clip,
            "negative": ready(family, text(2, 1, family.width)),
        },
        "text encoder": {"text": "a roof", "clip": draw(st.sampled_from(strange))},
    }
    _replace(case, broken, error)


def break_embedding(draw, family, case, error):
    width = family.width
    wild = text(3, 5, width)
    wild[0, 1, 2] = draw(st.sampled_from([NAN, INF, -INF]))
    of_no_use = [None, "x", text(3, 5, width)[0], text(3, 5, width)[None], torch.ones(1, 3, width, dtype=torch.long)]
    broken = {
        "NaN or infinite": ready(family, wild),
        "must be numbers of shape": ready(family, draw(st.sampled_from(of_no_use))),
        "embedding is empty": ready(family, text(3, 5, width)[:, : draw(st.integers(0, 0))]),
        "no token left": ready(family, text(3, 5, width), attention_mask=torch.zeros(1, 3)),
        "65 wide": ready(family, text(3, 5, 65)),
        "embedding is a batch of 5": ready(family, text(3, 5, width, batch=5)),
        "2 entries": 2 * ready(family, text(3, 5, width)),
        "negative (must be|is) a conditioning": draw(st.sampled_from([[], "x", [None], 5])),
        "extrapolation needs text": ready(family, text(3, 5, width)),
    }
    _replace(case, {key: {"negative": one} for key, one in broken.items()}, error)
    if error.startswith("extrapolation"):
        case.negatives[-1]["extrapolation"] = 8.0


def _replace(case, broken, error):
    """Let the last negative come from ``broken[error]`` instead."""
    kept = {k: v for k, v in case.negatives[-1].items() if k not in ("text", "clip", "negative", "extrapolation")}
    case.negatives[-1] = {**kept, **broken[error]}
    case.errors.append(error)


TEXT_ERRORS = ["text needs clip", "not valid Unicode", "nested too deep", "NaN or infinite", "both text and negative"]
TEXT_ERRORS += ["text encoder"]
UNREADABLE = ["nothing is left of the text", "A negative takes weights above 0", "has no name behind it"]
"""What any text may be refused with: the encoders here know few letters."""
EMBEDDING_ERRORS = ["NaN or infinite", "must be numbers of shape", "embedding is empty", "no token left", "65 wide"]
EMBEDDING_ERRORS += ["embedding is a batch of 5", "2 entries", "negative (must be|is) a conditioning"]
EMBEDDING_ERRORS += ["extrapolation needs text"]
BREAK = {name.removeprefix("break_"): f for name, f in list(globals().items()) if name.startswith("break_")}
BREAK |= {f"text: {error}": partial(BREAK["text"], error=error) for error in TEXT_ERRORS}
BREAK |= {f"embedding: {error}": partial(BREAK["embedding"], error=error) for error in EMBEDDING_ERRORS}
del BREAK["text"], BREAK["embedding"]


def attach(pack, case):
    positive = case.positive
    for one in case.negatives:
        positive = pack.negative(positive, **one)
    return positive


def refusal_of_texts(pack, case):
    """Whether a text of the case is refused for what it says, whatever else is wrong."""
    try:
        attach(pack, case)
    except ValueError as error:
        return any(reason in str(error) for reason in UNREADABLE)
    return False


def try_out(pack, family, case):
    """Both nodes and one step; the latent and the negatives that came to it."""
    patched = pack.patch(family.model if case.model else None, **case.patch)
    attached = attach(pack, case)
    return run(family, patched, attached, case.batch), carried(attached)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_any_input_gives_a_result_or_an_error_that_names_it(pack, families, name, times, tally):
    family = families[name]
    outcomes = {"works": 0, "is refused": 0, "is off": 0}

    def check(case):
        unreadable = any(one.get("text") for one in case.negatives) and refusal_of_texts(pack, case)
        if case.errors or unreadable:
            family.calls.clear()
            expected = [*case.errors, *UNREADABLE] if unreadable else case.errors
            with pytest.raises(ValueError, match=rf"(?s)^VSF: .*({'|'.join(expected)})") as error:
                try_out(pack, family, case)
            assert not family.calls, "the model was called before the error"
            assert len(str(error.value).encode()) < 500, "ComfyUI's log takes no half of a Unicode pair"
            outcomes["is refused"] += 1
            return
        result, negatives = try_out(pack, family, case)
        assert torch.isfinite(result).all()
        stock = run(family, family.model, case.positive, case.batch)
        if not negatives:
            assert torch.equal(result, stock)
            outcomes["is off"] += 1
        else:
            shown = any(n.mask is None or (n.mask.mean(dim=(1, 2)) > 0.1).all() for n in negatives)
            acts = shown and case.patch["start_percent"] == 0 and case.patch["offset"] < 5
            assert not (acts and torch.equal(result, stock)), "no effect, and no word about it"
            outcomes["works"] += 1

    for kind in (None, *BREAK):
        examples = times * CASES[name] // (2 if kind is None else 2 * len(BREAK)) + 1
        checks = {"suppress_health_check": list(HealthCheck), "derandomize": times == 1, "database": None}
        settings(max_examples=examples, deadline=None, **checks)(given(cases(family, kind))(check))()
    assert min(outcomes.values()) >= CASES[name] / 50, outcomes
    tally["inputs"] += sum(outcomes.values())


@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_characters(pack, families, name):
    """More tokens than any of these encoders takes at once: all of them count, and the run works."""
    family, words = families[name], "roof house tree sails " * 455
    assert len(words) > 10_000
    attached = pack.negative(positive_of(family), clip=family.clip, text=words)
    (negative,) = carried(attached)
    (short,) = carried(pack.negative(positive_of(family), clip=family.clip, text=words[:22]))
    assert negative.tokens.shape[1] >= 455 * (short.tokens.shape[1] - 1)
    result = run(family, pack.patch(family.model), attached)
    assert torch.isfinite(result).all()
    assert not torch.equal(result, run(family, family.model, positive_of(family)))


@pytest.mark.parametrize("words", ["\u200b", "\u200b\n\u200b"])
def test_text_without_a_word_is_off_and_says_so(pack, families, words, caplog):
    family = families["sd3"]
    attached = pack.negative(positive_of(family), clip=family.clip, text=words)
    assert "vsf_negatives" not in attached[0][1]
    assert "no word that can be seen" in caplog.text


def test_batches_are_repeated_in_turn(pack, families):
    """Six pictures; negatives of 1, 2 and 3 with masks of 3, 2 and 1: each picture is as if it were alone."""
    family, pictures = families["sd3"], 6
    patched = pack.patch(family.model)
    g = torch.Generator().manual_seed(0)
    masks = [torch.rand(b, 16, 24, generator=g) for b in (3, 2, 1)]
    tokens = [text(3, b, family.width, batch=b) for b in (1, 2, 3)]

    def attach_all(pick):
        attached = positive_of(family)
        for t, m in zip(tokens, masks, strict=True):
            attached = pack.negative(attached, negative=ready(family, pick(t)), mask=pick(m))
        return attached

    together = run(family, patched, attach_all(lambda t: t), pictures)
    alone = [run(family, patched, attach_all(lambda t, i=i: t[i % len(t)][None]), pictures)[i] for i in range(pictures)]
    assert_close(together, torch.stack(alone))
    assert min(relative(together[i], alone[j]) for i in range(6) for j in range(6) if i != j) > 1e-2


def test_values_that_half_precision_cannot_hold(pack):
    model = load_sd3(depth=2)
    model.set_model_compute_dtype(torch.float16)
    steps = []
    attached = pack.negative(conditioning(), negative=[[text(3, 5) * 1e6, {}]])
    with pytest.raises(ValueError, match="VSF: .* torch.float16, in which this model runs, cannot hold"):
        sample(pack.patch(model), attached, size=(4, 6), callback=lambda *a: steps.append(a))
    assert not steps


@pytest.mark.parametrize(
    ("pooled", "message"),
    [(text(1, 9, 768)[:, 0] * NAN, "pooled embedding, .* NaN"), (text(1, 9, 64)[:, 0], "64 wide")],
)
def test_pooled_output_that_layout_released_cannot_mix(pack, families, pooled, message):
    family = families["flux"]
    attached = pack.negative(positive_of(family), negative=[[text(3, 5), {"pooled_output": pooled}]])
    with pytest.raises(ValueError, match=f"VSF: .*{message}"):
        run(family, pack.patch(family.model, layout="released"), attached)
    assert not family.calls
    assert torch.isfinite(run(family, pack.patch(family.model), attached)).all(), "layout paper does not use it"


def test_a_run_that_ends_in_nan_is_an_error(pack, families):
    family = families["sd3"]
    attached = pack.negative(positive_of(family), negative=ready(family, text(3, 5) * 1e30))
    with pytest.raises(
        RuntimeError, match="VSF: the sampled latent, or .* has values that are NaN or infinite, at scale 3.3"
    ):
        run(family, pack.patch(family.model), attached)


@pytest.mark.parametrize(
    ("patch", "scales", "named", "lower"),
    [
        ({"scale": 9.0}, "1, 2.5", "at scale 1, 2.5 in", "lower scale and strength"),
        ({"method": "nag", "nag_scale": 4.0, "scale": 9.0}, None, "at nag_scale 4 in", "lower nag_scale and strength"),
        ({"method": "nasa", "nasa_scale": 0.5}, "0.2, 0.3", "at nasa_scale 0.2, 0.3 in", "lower nasa_scale and"),
        ({"method": "ong", "nag_scale": 4.0}, None, "at ong_scale 3 in", "lower ong_scale and strength"),
    ],
)
def test_that_error_names_the_numbers_in_use(pack, families, patch, scales, named, lower):
    family = families["sd3"]
    attached = pack.negative(positive_of(family), negative=ready(family, text(3, 5) * 1e30))
    model = pack.patch(family.model, **patch)
    if scales:
        given = {"model": model, "latent": {"samples": torch.zeros(1, 16, *family.size)}, "scales": scales}
        model = pack.mapping["VSFScaleSweep"].execute(**given).result[0]
    with pytest.raises(RuntimeError, match=f"{named} .*{lower}"):
        run(family, model, attached, batch=2 if scales else 1)


# -- every input of every node, as its schema says ---------------------------------------------------------------------

NODES = ("NegativeConditioning", "ModelPatch", "Record", "AttentionMap", "ScaleSweep", "ContactSheet")
HUGE, MANY_DIGITS = "x" * 10**7, 10**5000
OF_NO_TYPE = ["\ud800", HUGE, [1.0], {}, object(), torch.ones(2, 2, 2, 2, 2), torch.zeros(0)]
WRONG = {
    "INT": [None, NAN, INF, "x", MANY_DIGITS, -MANY_DIGITS, 10**9, -(10**9), *OF_NO_TYPE],
    "FLOAT": [None, NAN, INF, -INF, "x", MANY_DIGITS, 1e9, -1e9, 1e-5j, *OF_NO_TYPE],
    "BOOLEAN": [None, NAN, "false", *OF_NO_TYPE],
    "STRING": OF_NO_TYPE,
    "COMBO": [None, "", 0, True, *OF_NO_TYPE],
    "MODEL": [None, "x", NAN, 5, *OF_NO_TYPE],
    "CLIP": ["x", NAN, 5, *OF_NO_TYPE],
    "VSF_MAP": [None, "x", NAN, 5, *OF_NO_TYPE],
    "CONDITIONING": ["x", NAN, 5, [], [None], [[]], *OF_NO_TYPE],
    "MASK": ["x", NAN, 5, torch.ones(3), torch.ones(0, 8, 8), torch.full((1, 8, 8), NAN), *OF_NO_TYPE[:5]],
    "IMAGE": [None, "x", NAN, torch.ones(8, 8, 3), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), *OF_NO_TYPE],
    "LATENT": [None, "x", NAN, {"samples": None}, {"samples": torch.ones(3)}, *OF_NO_TYPE],
}
"""By the type of an input, what a link or an API call may bring that it cannot be."""


@pytest.fixture(scope="module")
def sockets(pack, families):
    """What fits each socket."""
    sd3 = families["sd3"]
    patched = pack.patch(sd3.model)
    record = pack.mapping["VSFRecord"].execute(model=patched).result[1]
    picture, latent = torch.zeros(1, 8, 8, 3), {"samples": torch.zeros(1, 16, 4, 4)}
    return {
        **{"model": patched, "positive": positive_of(sd3), "map": record},
        **{"image": picture, "images": picture, "latent": latent},
    }


@pytest.mark.parametrize("name", NODES)
def test_what_no_input_can_be(pack, sockets, name):
    """A schema's limits do not bind links: what is given is read before anything is done with it."""
    node = pack.mapping[f"VSF{name}"]
    inputs = node.define_schema().inputs
    good = {one.id: sockets.get(one.id, getattr(one, "default", None)) for one in inputs if not one.optional}
    for one in inputs:
        wrong = [*WRONG[one.get_io_type()], *([] if one.optional or one.get_io_type() != "STRING" else [None])]
        for value in wrong:
            began = time.monotonic()
            with pytest.raises(ValueError, match=rf"^VSF: (character 1 of )?{one.id} ") as error:
                node.execute(**{**good, one.id: value})
            assert time.monotonic() < began + 5
            assert len(str(error.value).encode()) < 300
            limits = [getattr(one, "min", None), getattr(one, "max", None), *(getattr(one, "options", None) or ())]
            assert all((x if isinstance(x, str) else f"{x:g}") in str(error.value) for x in limits if x is not None)


@pytest.mark.parametrize("name", NODES)
def test_what_comfyui_converts_is_taken(pack, name):
    """Whatever a widget may be set to in an API call, a link may bring too, and it becomes the same."""
    import importlib

    import execution

    fitted = importlib.import_module(pack.module.__name__ + ".nodes.checks").fitted
    node = pack.mapping[f"VSF{name}"]
    taken = 0
    for one in node.define_schema().inputs:
        limits = [getattr(one, "min", 0) or 0, getattr(one, "max", 1) or 1]
        values = [
            *limits,
            *map(float, limits),
            *map(str, limits),
            sum(limits) / 2,
            True,
            False,
            "1.5",
            "a",
            *limits[1:],
        ]
        for value in [*values, *(getattr(one, "options", None) or ())] if hasattr(one, "default") else ():
            prompt = {"1": {"class_type": f"VSF{name}", "inputs": {one.id: value}}}
            errors = run_in_thread(execution.validate_inputs("", prompt, "1", {}))[1]
            if not any(error["extra_info"].get("input_name") == one.id for error in errors):
                converted = prompt["1"]["inputs"][one.id]
                assert fitted(one, converted) == converted
                if not (isinstance(value, str) and isinstance(converted, bool)):  # "false" is true there
                    made = fitted(one, value)
                    assert made == converted and type(made) is type(converted)
                taken += 1
    assert taken >= 5 or name == "Record"


def test_a_socket_left_open_and_a_grey_picture(pack, families):
    family = families["sd3"]
    given = {"clip": None, "text": None, "negative": ready(family, text(3, 5)), "mask": None}
    assert pack.negative(positive_of(family), **given)[0][1]["vsf_negatives"]
    sheet = pack.mapping["VSFContactSheet"].execute
    grey = torch.rand(1, 32, 32, 1)
    assert torch.equal(
        sheet(images=grey, labels=5).result[0], sheet(images=grey.expand(-1, -1, -1, 3), labels="5").result[0]
    )


def test_any_queued_graph_is_looked_at_and_passed_on(pack, times, tally):
    """The prompt handler sees what anybody posts, before ComfyUI checks it: it never fails and changes nothing."""
    import importlib

    check_graph = importlib.import_module(pack.module.__name__ + ".nodes.graph_check")
    ids = st.sampled_from(["1", "2", "3", "\ud800"])
    value = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ids, st.text(max_size=3)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ids, inner, max_size=3)),
    )
    link = st.tuples(ids, st.just(0)).map(list)
    kind = st.one_of(st.sampled_from(["VSFNegativeConditioning", "VSFModelPatch", "KSampler"]), value)
    one = st.fixed_dictionaries({}, optional={"class_type": kind, "inputs": st.dictionaries(ids, link | value) | value})

    @settings(max_examples=200 * times, deadline=None, database=None, derandomize=times == 1)
    @given(st.fixed_dictionaries({}, optional={"prompt": st.dictionaries(ids, one | value) | value}))
    def check(data):
        before = repr(data)
        assert check_graph._on_prompt(data) is data
        assert repr(data) == before

    check()
    tally["graphs looked at"] += 200 * times
