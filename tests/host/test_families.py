"""What makes a family right, each by the same tests: whole tiny models through ComfyUI's own loader and sampler."""

from dataclasses import dataclass, field
from functools import partial

import comfy.clip_vision
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from helpers import (
    conditioning,
    load_chroma,
    load_flux,
    load_flux2,
    load_hunyuan_video,
    load_qwen_image,
    load_sd3,
    load_wan,
    load_z_image,
    only_rounded,
    relative,
    sample,
    spy_override,
    text,
    with_override,
)
from oracle import Expect, oracle_model


@dataclass(frozen=True)
class Case:
    """A tiny model: how it is loaded, how wide its text is, latents that it takes; what a prompt of it may carry."""

    load: object
    sizes: tuple = ((16, 24), (15, 21))
    """Latent sizes, the second odd."""
    width: int = 64
    pooled: int = 64
    channels: int = 16
    blocks: tuple = ("double",)
    patch: int = 2
    options: dict = field(default_factory=dict)
    cross: bool = False
    filled_in_front: int = 0
    """ComfyUI fills shorter texts up to so many tokens, in front, before the model gets them."""
    filled_to: int = 1
    """The model fills texts up to a multiple of so many tokens."""

    def prompt(self, length=13, seed=1):
        (tokens, _), pooled = conditioning(length, seed, self.width)[0], text(1, 1001, self.pooled)[:, 0] * 0.5
        return [[tokens, {"pooled_output": pooled, **self.options}]]

    def run(self, model, positive, size=None, **kw):
        return sample(model, positive, channels=self.channels, size=size or self.sizes[0], **kw)

    def expect(self, positive, n=5, **kw):
        """What the oracle should do to ``positive`` with a negative of ``n`` tokens."""
        given = positive[0][0]
        given = torch.nn.functional.pad(given, (0, 0, max(0, self.filled_in_front - given.shape[1]), 0))
        return [Expect(given, text(n, 5, self.width), 3.3, 0.2, **kw)]

    def tokens(self, size=None):
        *frames, h, w = size or self.sizes[0]
        return -(-h // self.patch) * -(-w // self.patch) * (frames[0] if frames else 1)

    def references(self):
        return sum(self.tokens(r.shape[2:]) for r in self.options.get("reference_latents", ()))


def reference(*size, seed=4, channels=16):
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed))


def padded(*hidden, length=13):
    """A prompt's mask with padding at the given places."""
    mask = torch.ones(1, length, dtype=torch.long)
    mask[:, list(hidden)] = 0
    return {"attention_mask": mask}


def seen_image(tokens):
    """What CLIP vision makes of an image."""
    output = comfy.clip_vision.Output()
    output["last_hidden_state"] = text(tokens, 9, 1152)
    return output


FLUX_BLOCKS = ("double", "single")
STILL = ((1, 16, 24), (1, 15, 21))
PIXELS = {"sizes": ((48, 64), (44, 60)), "channels": 3, "patch": 16, "blocks": FLUX_BLOCKS}
FLUX2 = {"sizes": ((8, 12), (7, 11)), "channels": 128, "patch": 1, "blocks": FLUX_BLOCKS, "filled_in_front": 512}
CLIPS = ((3, 6, 10), (2, 6, 14))
HUNYUAN = {"pooled": 768, "blocks": FLUX_BLOCKS}
"""No odd side: ComfyUI's own model cannot put its patches together then."""
CASES = {
    "sd3": Case(load_sd3, pooled=2048),
    "sd3.5 medium": Case(lambda: load_sd3(self_attn_layers=(0, 1)), pooled=2048),
    "flux": Case(load_flux, pooled=768, blocks=FLUX_BLOCKS),
    "kontext": Case(load_flux, pooled=768, blocks=FLUX_BLOCKS, options={"reference_latents": [reference(10, 11)]}),
    "wan": Case(load_wan, ((3, 8, 10), (2, 7, 9)), 4096, cross=True),
    "chroma": Case(load_chroma, blocks=FLUX_BLOCKS),
    "radiance": Case(lambda: load_chroma(radiance="alike"), **PIXELS),
    "radiance, counted": Case(lambda: load_chroma(radiance="counted"), **PIXELS),
    "qwen-image": Case(load_qwen_image, STILL),
    "qwen-image, padding": Case(load_qwen_image, STILL, options=padded(11, 12)),
    "qwen-image edit": Case(load_qwen_image, STILL, options={"reference_latents": [reference(1, 10, 11)]}),
    "qwen-image edit 2511": Case(
        lambda: load_qwen_image(default_ref_method="index_timestep_zero"),
        STILL,
        options={"reference_latents": [reference(1, 10, 11), reference(1, 6, 8)]},
    ),
    "flux.2 dev": Case(load_flux2, **FLUX2),
    "flux.2 klein": Case(
        lambda: load_flux2(guidance=False), **FLUX2, options={"reference_latents": [reference(5, 6, channels=128)]}
    ),
    "z-image": Case(load_z_image, filled_to=32),
    "hunyuan": Case(load_hunyuan_video, CLIPS, **HUNYUAN),
    "hunyuan 1.5": Case(
        lambda: load_hunyuan_video("1.5"),
        ((3, 5, 8), (2, 5, 7)),
        channels=32,
        patch=1,
        blocks=FLUX_BLOCKS,
        options={"conditioning_byt5small": text(6, 8, 1472), "clip_vision_output": seen_image(4)},
    ),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
JOINT = pytest.mark.parametrize("case", [pytest.param(c, id=i) for i, c in CASES.items() if not c.cross])
WITH_FILES_OF_THEIR_OWN = {"sd3", "sd3.5 medium", "flux", "kontext", "wan"}
NEW = pytest.mark.parametrize(
    "case", [pytest.param(c, id=i) for i, c in CASES.items() if i not in WITH_FILES_OF_THEIR_OWN]
)
PICTURES = pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=i)
        for i, c in CASES.items()
        if i not in WITH_FILES_OF_THEIR_OWN and not i.startswith("hunyuan")
    ],
)
RUNS = pytest.mark.parametrize(("batch", "cfg"), [(1, 1.0), (2, 2.5)])


@pytest.fixture(scope="module")
def model_of():
    """Each case's model, loaded once."""
    models = {}

    def get(case):
        if id(case) not in models:
            models[id(case)] = case.load()
        return models[id(case)]

    return get


def attached(pack, case, n=5, seed=5, positive=None, gain=1.0):
    return pack.negative(positive or case.prompt(), negative=[[text(n, seed, case.width) * gain, {}]])


@NEW
@RUNS
@pytest.mark.parametrize(("n", "size"), [(1, 0), (5, 1), (40, 0)], ids=["1", "5, odd size", "40"])
def test_parity_with_dense_attention(pack, model_of, case, n, size, batch, cfg):
    model, positive, run = model_of(case), case.prompt(), {"size": case.sizes[size], "batch": batch, "cfg": cfg}
    oracle, record = oracle_model(model, case.expect(positive, n))
    result, expected = (
        case.run(pack.patch(model), attached(pack, case, n), **run),
        case.run(oracle, positive, **run),
    )
    assert record.joint > 0
    assert relative(result, expected) <= 1e-5
    assert relative(case.run(model, positive, **run), expected) > 1e-3  # and it matters


@NEW
def test_each_prompt_its_own_negative(pack, model_of, case):
    """Two of different lengths in one batch are padded to one, which moves neither."""
    model, prompts, lengths = model_of(case), (case.prompt(), case.prompt(seed=9)), (5, 40)
    oracle, _ = oracle_model(model, [case.expect(p, n)[0] for p, n in zip(prompts, lengths, strict=True)])
    both = [attached(pack, case, n, 5, p) for p, n in zip(prompts, lengths, strict=True)]
    result = case.run(pack.patch(model), both[0], negative=both[1], cfg=2.5)
    assert relative(result, case.run(oracle, prompts[0], negative=prompts[1], cfg=2.5)) <= 1e-5


@ALL
@pytest.mark.parametrize("n", [1, 40])
@RUNS
def test_neutrality_at_a_large_finite_offset(pack, model_of, case, n, batch, cfg):
    """Offset 60 equals stock whatever N is, while N went through every block: nothing of it leaks into P, and it shifts
    no position, count, mask or modulation."""
    model, seen, size = model_of(case), [], case.sizes[1]
    plain = partial(case.run, positive=case.prompt(), batch=batch, cfg=cfg, size=size)
    stock, patched = plain(model), pack.patch(model, offset=60.0)
    for m in (patched, with_override(patched, spy_override(seen))):
        neutral = case.run(m, attached(pack, case, n, gain=3.0), batch=batch, cfg=cfg, size=size)
        assert only_rounded(neutral, stock, model, plain)
    if not case.cross:
        blocks = len(pack_blocks(pack, model))
        # the row-mask path: image rows and N0's rows see all keys, in each block of each step
        assert max(seen) >= 13 + n + case.tokens(size) + case.references()
        assert seen.count(max(seen)) >= 2 * blocks * 3


def pack_blocks(pack, model):
    """All blocks of a model, as the family counts them."""
    families = __import__(f"{pack.module.__name__}.nodes.families", fromlist=["family_of"])
    counts = families.family_of(model.model).block_counts(model.model.diffusion_model)
    return [(kind, i) for kind, count in counts.items() for i in range(count)]


@ALL
@RUNS
def test_isolation(pack, model_of, case, batch, cfg):
    """The picture does not see N (each token's mask is black): then changing N changes nothing at all."""
    model = pack.patch(model_of(case), scale=5.0, affect_references=False)
    black = torch.zeros(1, 32, 32)
    made = [
        pack.negative(case.prompt(), negative=[[text(n, seed, case.width), {}]], mask=black)
        for n, seed in ((5, 5), (5, 6), (12, 7))
    ]
    first, second, third = (case.run(model, m, batch=batch, cfg=cfg) for m in made)
    assert torch.equal(first, second)
    plain = partial(case.run, positive=case.prompt(), batch=batch, cfg=cfg)
    stock = plain(model_of(case))
    assert only_rounded(first, stock, model_of(case), plain)
    assert only_rounded(third, stock, model_of(case), plain)
    seen = case.run(model, attached(pack, case), batch=batch, cfg=cfg)
    assert relative(seen, first) > 1e-3


@JOINT
def test_n_reads_nothing_of_p(pack, model_of, case):
    """In the first block, whose picture P has not reached yet, N0 comes out the same whatever P is; and so does P
    whatever N is."""
    kept = {}
    for p, n in ((1, 5), (2, 5), (1, 6)):
        model = model_of(case).clone()

        def note(args, extra, key=(p, n)):
            out = extra["original_block"](args)
            kept.setdefault(key, (out["txt"] if "txt" in out else out["img"]).clone())
            return out

        def note_after(args, key=(p, n)):  # of models whose blocks cannot be replaced
            if args["block_index"] == 0:
                kept.setdefault(key, args["txt"].clone())
            return {}

        if model.model.diffusion_model.__class__.__name__ == "NextDiT":
            model.set_model_patch(note_after, "double_block")
        model.set_model_patch_replace(note, "dit", "double_block", 0)
        case.run(pack.patch(model), attached(pack, case, 5, n, case.prompt(seed=p)), steps=1)
    first, other_p, other_n = kept[1, 5], kept[2, 5], kept[1, 6]
    rest = slice(-13 - -13 % case.filled_to, None)
    assert torch.equal(first[:, :5], other_p[:, :5])
    assert not torch.equal(first[:, rest], other_p[:, rest])
    assert torch.equal(first[:, rest], other_n[:, rest])
    assert not torch.equal(first[:, :5], other_n[:, :5])


@NEW
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_off(pack, model_of, case, cfg):
    model, positive = model_of(case), case.prompt()
    stock = case.run(model, positive, cfg=cfg, batch=2)
    patched, with_n = pack.patch(model), attached(pack, case)
    off = {
        "no patch": (model, with_n),
        "no negative": (patched, positive),
        "empty text": (patched, pack.negative(positive, text=" ")),
        "outside the window": (pack.patch(model, start_percent=0.99), with_n),
    }
    for name, (m, p) in off.items():
        assert torch.equal(case.run(m, p, cfg=cfg, batch=2), stock), name

    def fail(func, q, k, v, heads, **kw):
        raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        case.run(with_override(patched, fail), with_n, cfg=cfg, batch=2)
    case.run(patched, with_n, cfg=cfg, batch=2)
    assert torch.equal(case.run(model, positive, cfg=cfg, batch=2), stock)
    assert not torch.equal(case.run(patched, with_n, cfg=cfg, batch=2), stock)


@NEW
@RUNS
def test_mask(pack, model_of, case, batch, cfg):
    """A negative acts where its mask is white; reference images see it, unless told otherwise."""
    model, positive, (h, w) = model_of(case), case.prompt(), case.sizes[0][-2:]
    inside = torch.ones(h // case.patch, w // case.patch)
    inside[: len(inside) // 2] = 0
    mask = inside.repeat_interleave(case.patch, 0).repeat_interleave(case.patch, 1)[None]
    for affect in {True, not case.references()}:
        rest = torch.full((case.references(),), float(affect))
        picture = inside.flatten().repeat(case.tokens() // inside.numel())
        keep = torch.cat([picture, rest])[:, None].expand(-1, 5)
        oracle, _ = oracle_model(model, case.expect(positive, keep=keep))
        with_n = pack.negative(positive, negative=[[text(5, 5, case.width), {}]], mask=mask)
        result = case.run(pack.patch(model, affect_references=affect), with_n, batch=batch, cfg=cfg)
        assert relative(result, case.run(oracle, positive, batch=batch, cfg=cfg)) <= 1e-5


@PICTURES
def test_each_picture_of_a_batch_its_own_mask(pack, model_of, case):
    masks = torch.zeros(2, 32, 32)
    masks[1] = 1
    pair = pack.negative(case.prompt(), negative=[[text(5, 5, case.width), {}]], mask=masks)
    one = pack.negative(case.prompt(), negative=[[text(5, 5, case.width), {}]], mask=masks[1:])
    patched = pack.patch(model_of(case), affect_references=False)
    result, seen = case.run(patched, pair, batch=2), case.run(patched, one, batch=2)
    stock = case.run(model_of(case), case.prompt(), batch=2)
    assert relative(result[:1], stock[:1]) <= 1e-5 and relative(result[1:], seen[1:]) <= 1e-5


@NEW
def test_blocks(pack, model_of, case):
    """In blocks that are not selected the picture does not see N; N0 goes on in isolation."""
    model, positive, kind = model_of(case), case.prompt(), case.blocks[-1]
    of_model = sorted(pack_blocks(pack, model))
    selected = {of_model.index((kind, 1))}
    oracle, _ = oracle_model(model, case.expect(positive, blocks=selected))
    result = case.run(pack.patch(model, blocks=f"{kind}:1"), attached(pack, case))
    assert relative(result, case.run(oracle, positive)) <= 1e-5
    for bad in (f"{kind}:9", "triple", f"{kind}:0-9"):
        with pytest.raises(ValueError, match="double:0-"):
            pack.patch(model, blocks=bad)


@NEW
def test_the_released_pipeline_knows_none_of_these(pack, model_of, case):
    with pytest.raises(ValueError, match="they have none for .*Set layout to paper"):
        pack.patch(model_of(case), layout="released")


@NEW
def test_encoder_and_width_are_checked(pack, model_of, case):
    wide = pack.negative(case.prompt(), negative=[[text(5, 5, case.width + 1), {}]])
    with pytest.raises(ValueError, match=f"{case.width + 1} wide, but this model .* takes {case.width}"):
        case.run(pack.patch(model_of(case)), wide)
    made = attached(pack, case)
    object.__setattr__(made[0][1]["vsf_negatives"][0], "encoder", "sd3")
    with pytest.raises(ValueError, match='of type "sd3", but this model'):
        case.run(pack.patch(model_of(case)), made)


# -- HunyuanVideo ------------------------------------------------------------------------------------------------------

ONE_AT_A_TIME = {
    "padding": Case(lambda: load_hunyuan_video("i2v"), CLIPS, **HUNYUAN, options=padded(11, 12)),
    "reference": Case(load_hunyuan_video, CLIPS, **HUNYUAN, options={"ref_latent": reference(1, 6, 8)}),
}


@pytest.mark.parametrize("case", ONE_AT_A_TIME.values(), ids=ONE_AT_A_TIME)
def test_hunyuan_video_of_what_it_takes_one_at_a_time(pack, case):
    """ComfyUI's own model fails on two pictures at once when their text is padded, or with a reference."""
    model, positive, seen = case.load(), case.prompt(), {"affect_references": False}
    stock, with_n = case.run(model, positive), attached(pack, case)
    for mask in (None, torch.zeros(1, 32, 32)):
        inside = torch.full((case.tokens(),), float(mask is None))
        keep = torch.cat([torch.zeros(12 if "ref_latent" in case.options else 0), inside])[:, None].expand(-1, 5)
        masked = pack.negative(positive, negative=[[text(5, 5, case.width), {}]], mask=mask)
        oracle, record = oracle_model(model, case.expect(positive, keep=keep))
        result, expected = case.run(pack.patch(model, **seen), masked), case.run(oracle, positive)
        assert record.joint > 0 and relative(result, expected) <= 1e-5
        assert relative(expected, stock) > 1e-3 if mask is None else relative(expected, stock) <= 1e-5
    assert relative(case.run(pack.patch(model, offset=60.0), with_n), stock) <= 1e-6
    assert torch.equal(case.run(pack.patch(model), positive), stock)


def test_hunyuan_video_refines_a_short_negative_beside_a_long_one(pack, model_of):
    """It is padded there; the refiner's mean and its attention must not see that."""
    case = CASES["hunyuan"]
    one, other = case.prompt(), case.prompt(seed=2)
    both = attached(pack, case, 3) + attached(pack, case, 11, 6, positive=other)
    expects = [*case.expect(one, 3), Expect(other[0][0], text(11, 6, case.width), 3.3, 0.2)]
    expected = case.run(oracle_model(model_of(case), expects)[0], one + other)
    assert relative(case.run(pack.patch(model_of(case)), both), expected) <= 1e-5


def test_hunyuan_video_with_a_guiding_frame(pack, model_of):
    case = CASES["hunyuan"]
    guided = [[t, {**o, "guiding_frame_index": 0}] for t, o in attached(pack, case)]
    with pytest.raises(ValueError, match="guiding frame .* is not supported"):
        case.run(pack.patch(model_of(case)), guided)


@NEW
def test_compiled_whole(request, pack, model_of, case):
    """ComfyUI's TorchCompileModel: no graph break, and no graph of stock or of another negative is mistaken."""
    if not request.config.getoption("--long"):
        pytest.skip("half a minute each; --long runs it")
    torch._dynamo.reset()
    model = model_of(case)
    compiled, options = model.clone(), {"guard_filter_fn": skip_torch_compile_dict}
    in_pieces = hasattr(model.model.diffusion_model, "cond_type_embedding") and model.model.diffusion_model.byt5_in
    set_torch_compile_wrapper(compiled, "eager", options, keys=["diffusion_model"], fullgraph=not in_pieces)
    if in_pieces:  # ComfyUI's own code of HunyuanVideo 1.5 breaks the graph
        with pytest.raises(RuntimeError, match="Remove the node that compiles the model"):
            case.run(pack.patch(compiled), attached(pack, case), steps=1)
        return
    for n, settings in ((0, {}), (5, {}), (9, {"scale": 1.0}), (0, {}), (5, {"blocks": f"{case.blocks[-1]}:1"})):
        positive, pair = case.prompt(), [model, compiled]
        if n:
            positive = pack.negative(positive, negative=[[text(n, 5, case.width), {}]])
            pair = [pack.patch(m, **settings) for m in pair]
        with torch.no_grad():
            eager, result = (case.run(m, positive, steps=1) for m in pair)
        assert relative(result, eager) <= (1e-5 if n else 0.0)
    torch._dynamo.reset()
