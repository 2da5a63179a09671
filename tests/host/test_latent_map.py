"""What in the picture each image token is: references and guides among the frames, context windows along any dimension,
pictures of a batch, lists of pictures and tiles."""

import importlib
from functools import partial

import comfy.context_windows as windows
import comfy.patcher_extension
import pytest
import torch
from cases import CASES, latents, model_of
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_lt import LTXVAddGuide
from comfy_extras.nodes_wan import WanVaceToVideo
from helpers import assert_close, text
from oracle import oracle_model

HAS_ANCHORS = "causal_window_fix" in windows.IndexListContextHandler.__init__.__code__.co_varnames
HAS_GUIDES_IN_WINDOWS = hasattr(windows, "compute_guide_overlap")


class Encoder:
    """A VAE's encoder: other latents for other pixels."""

    @staticmethod
    def encode(pixels):
        frames = (pixels.shape[0] - 1) // 4 + 1
        g = torch.Generator().manual_seed(int(pixels.sum() * 1000) % 2**31)
        return torch.randn(1, 16, frames, pixels.shape[1] // 8, pixels.shape[2] // 8, generator=g)


def vace(case, frames=3, height=64, width=80, reference=True, **inputs):
    """A prompt as core's node makes it, and the latent's size: with ``reference``, a frame more, in front."""
    image = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(3)) if reference else None
    positive, _, latent, trim = WanVaceToVideo.execute(
        case.prompt(), case.uncond(), Encoder, width, height, 4 * frames - 3, 1, 1.0, reference_image=image, **inputs
    ).result
    assert trim == int(reference)
    return positive, tuple(latent["samples"].shape[2:])


def frames_kept(case, size, each, n=5):
    """``Expect.keep`` for a video: what each of its latent frames sees."""
    tokens = case.grids(size)[0] // size[0]
    return torch.tensor(each).repeat_interleave(tokens)[:, None].expand(-1, n)


def frame_masks(*each):
    return torch.tensor(each)[:, None, None].expand(-1, 64, 80)


WINDOWS = {
    "start": ({"to_frame": 0.3}, [1.0, 0.0, 0.0]),
    "middle": ({"from_frame": 0.4, "to_frame": 0.6}, [0.0, 1.0, 0.0]),
    "end": ({"from_frame": 0.7}, [0.0, 0.0, 1.0]),
    "mask of a frame each": ({"mask": frame_masks(*[0.0] + 4 * [1.0] + 4 * [0.25])}, [0.0, 1.0, 0.25]),
    "mask": ({"mask": frame_masks(0.5)}, [0.5] * 3),
    "everywhere": ({}, [1.0] * 3),
}


@pytest.mark.parametrize("node", WINDOWS)
@pytest.mark.parametrize("affect", [True, False])
def test_reference_image_of_vace(pack, node, affect):
    """Its frame stands in front of the video's, and is a reference's."""
    case, model = CASES["wan vace"], model_of("wan vace")
    inputs, own = WINDOWS[node]
    positive, size = vace(case)
    expect = case.expect(model, positive, keep=frames_kept(case, size, [float(affect), *own]))
    oracle, record = oracle_model(model, [expect])
    attached = pack.negative(positive, negative=case.negative(), **inputs)
    result = case.run(pack.patch(model, affect_references=affect), attached, size=size)
    assert_close(result, case.run(oracle, positive, size=size))
    assert record.joint > 0


def test_control_videos_of_vace_are_no_references(pack):
    """Nothing to change, or a grey control: still the video's own frames."""
    case, model = CASES["wan vace"], model_of("wan vace")
    keep = {"control_masks": torch.zeros(9, 64, 80)}
    for inputs in ({}, keep, {"control_video": torch.full((9, 64, 80, 3), 0.5), **keep}):
        positive, size = vace(case, reference=False, **inputs)
        expect = case.expect(model, positive, keep=frames_kept(case, size, [1.0, 0.0, 0.0]))
        attached = pack.negative(positive, negative=case.negative(), to_frame=0.3)
        patched = pack.patch(model, affect_references=False)
        expected = case.run(oracle_model(model, [expect])[0], positive, size=size)
        assert_close(case.run(patched, attached, size=size), expected)


# -- guides ------------------------------------------------------------------------------------------------------------


def guided(case, size=(3, 4, 5), at=(0,)):
    """A prompt, a latent and a noise mask with guides behind the video, as core's node makes them."""
    positive, negative = case.prompt(), case.uncond()
    latent, mask = torch.zeros(1, 128, *size), torch.ones(1, 1, *size)
    for seed, frame in enumerate(at):
        guide = latents(1, *size[1:], seed=seed, channels=128)
        positive, negative, latent, mask = LTXVAddGuide.append_keyframe(
            positive, negative, frame, latent, mask, guide, 1.0, (8, 32, 32)
        )
    return positive, negative, latent, mask


def run_guided(case, model, made, positive=None, **kw):
    prompt, negative, latent, mask = made
    made = {"size": tuple(latent.shape[2:]), "start_from": latent, "noise_mask": mask}
    return case.run(model, positive or prompt, negative, **made, **kw)


GUIDES = pytest.mark.parametrize("at", [(0,), (8, -1)], ids=["one", "two"])


@pytest.mark.parametrize("name", ["ltxv", "ltx2"])
@pytest.mark.parametrize("node", WINDOWS)
@pytest.mark.parametrize("affect", [True, False])
@GUIDES
def test_guides(pack, name, node, affect, at):
    """They follow the video's frames, are cut off in the end, and are references."""
    case, model = CASES[name], model_of(name)
    inputs, own = WINDOWS[node]
    if "mask of" in node:  # of eight pixel frames a latent frame
        inputs = {"mask": frame_masks(*[0.0] + 8 * [1.0] + 8 * [0.25])}
    made = guided(case, at=at)
    size = tuple(made[2].shape[2:])
    keep = frames_kept(case, size, [*own, *[float(affect)] * len(at)])
    oracle, record = oracle_model(model, [case.expect(model, made[0], keep=keep)])
    attached = pack.negative(made[0], negative=case.negative(), **inputs)
    result = run_guided(case, pack.patch(model, affect_references=affect), made, attached)
    assert_close(result, run_guided(case, oracle, made))
    assert record.joint > 0


def test_a_window_of_guides_alone_never_acts(pack):
    """All of the video lies before 0.9; only a guide's frame would be inside."""
    case = CASES["ltxv"]
    made = guided(case, at=(0, 8))
    attached = pack.negative(made[0], negative=case.negative(), from_frame=0.9)
    with pytest.raises(ValueError, match="none of this video's 3 latent frames"):
        run_guided(case, pack.patch(model_of("ltxv")), made, attached)


# -- context windows ---------------------------------------------------------------------------------------------------


def windowed(model, dim, length, overlap=0, **more):
    m = model.clone()
    if not HAS_ANCHORS:
        more.pop("causal_window_fix", None)
    m.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID),
        context_length=length,
        context_overlap=overlap,
        dim=dim,
        **more,
    )
    windows.create_prepare_sampling_wrapper(m)
    return m


def halves(*size):
    """A mask that is white in the first half of the last dimension of ``size``."""
    mask = torch.zeros(1, *size)
    mask[..., : size[-1] // 2] = 1.0
    return mask


@pytest.mark.parametrize(
    ("name", "dim", "size"),
    [
        ("flux", 3, (16, 24)),
        ("flux", 2, (24, 16)),
        ("sdxl", 3, (16, 32)),
        ("qwen-image", 4, (1, 16, 24)),
        ("wan", 4, (3, 8, 16)),
        ("wan", 3, (3, 16, 8)),
        ("cosmos", 4, (3, 8, 16)),
    ],
)
def test_windows_over_height_or_width(pack, name, dim, size):
    """In windows that do not touch, what a mask leaves white is as without a mask, and the rest is stock."""
    case, model = CASES[name], model_of(name)
    length = size[dim - 5 + 3 if len(size) == 3 else dim - 2] // 2
    mask = halves(8 * size[-2], 8 * size[-1])
    if size[-2] == 2 * length:
        mask = halves(8 * size[-1], 8 * size[-2]).mT
    apply = partial(windowed, dim=dim, length=length, causal_window_fix=False)
    run = partial(case.run, size=size, steps=2)
    stock = run(apply(model), case.prompt())
    everywhere = run(apply(pack.patch(model)), pack.negative(case.prompt(), negative=case.negative()))
    result = run(apply(pack.patch(model)), pack.negative(case.prompt(), negative=case.negative(), mask=mask))
    first, last = (slice(None),) * dim + (slice(0, length),), (slice(None),) * dim + (slice(length, None),)
    assert_close(result[first], everywhere[first])
    assert_close(result[last], stock[last])
    assert (everywhere - stock).abs().max() > 1e-3 * stock.abs().max()


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
@pytest.mark.parametrize("overlap", [0, 2])
def test_windows_over_the_batch(pack, name, overlap):
    """Each picture keeps its own mask, its own negative and its own scale, whichever window it is in."""
    case, model, n = CASES[name], model_of(name), 6
    masks = torch.linspace(0, 1, n)[:, None, None].expand(n, 32, 32).contiguous()
    sweep, _, _ = (
        pack.mapping["VSFScaleSweep"]
        .execute(pack.patch(model), {"samples": torch.zeros(1, case.channels, *case.sizes[0])}, "0, 1, 2, 3, 4, 5")
        .result
    )
    own = [[torch.cat([text(5, seed, case.width) for seed in range(n)]), {}]]
    runs = {
        "masks": (pack.patch(model), pack.negative(case.prompt(), negative=case.negative(), mask=masks)),
        "negatives": (pack.patch(model), pack.negative(case.prompt(), negative=own)),
        "scales": (sweep, pack.negative(case.prompt(), negative=case.negative())),
    }
    for patched, positive in runs.values():
        whole = case.run(patched, positive, batch=n)
        made = case.run(windowed(patched, 0, 4, overlap, causal_window_fix=False), positive, batch=n)
        assert_close(made, whole, 2e-5)
        assert (whole[:1] - whole[-1:]).abs().max() > 1e-3


@pytest.mark.skipif(not HAS_GUIDES_IN_WINDOWS, reason="this ComfyUI samples guides in no windows")
@pytest.mark.parametrize("node", ["start", "end", "mask of a frame each", "everywhere"])
def test_guides_in_windows(pack, node):
    """LTX-2's: offset 60 is stock's picture; a window's guides are references, its frames those of the whole video."""
    case, model = CASES["ltx2"], model_of("ltx2")
    inputs = {"start": {"to_frame": 0.2}, "end": {"from_frame": 0.8}}.get(node, {})
    if "mask" in node:
        inputs = {"mask": frame_masks(*[0.0] + 64 * [1.0])}
    made = guided(case, (9, 4, 5), at=(0, 16))
    apply = partial(windowed, dim=2, length=5, overlap=2)
    attached = pack.negative(made[0], negative=case.negative(), **inputs)
    stock = run_guided(case, apply(model), made)
    assert_close(run_guided(case, apply(pack.patch(model, offset=60.0)), made, attached), stock, 2e-6)
    acts = run_guided(case, apply(pack.patch(model, scale=5.0)), made, attached)
    assert (acts - stock).abs().max() > 1e-3 * stock.abs().max()


def test_windows_keep_few_negatives_ready(pack):
    case, model, kept = CASES["wan"], pack.patch(model_of("wan")), set()
    size = (30, 4, 4)

    def look(executor, *args, **kw):
        out = executor(*args, **kw)
        kept.add(len(args[4]["transformer_options"]["vsf_run"].value.ready))
        return out

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "look", look)
    masks = torch.rand(117, 32, 32)
    attached = pack.negative(case.prompt(), negative=case.negative(), mask=masks)
    m = windowed(model, 2, 4, 2)
    m.model_options["context_handler"].context_schedule = windows.get_matching_context_schedule(
        windows.ContextSchedules.UNIFORM_STANDARD
    )
    case.run(m, attached, size=size, steps=8)
    assert max(kept) == 16


def test_a_part_that_nobody_announces(pack):
    """A pack that shows some of a video's frames at a time, without ComfyUI's context windows."""
    case = CASES["wan"]

    def half(executor, m, conds, x, timestep, options):
        out = executor(m, conds, x[:, :, :2], timestep, options)
        return [torch.cat([o, o[:, :, :1]], dim=2) for o in out]

    unpatched = model_of("wan").clone()
    unpatched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "a", half)
    with pytest.raises(RuntimeError, match="without saying which"):
        case.run(pack.patch(unpatched), pack.negative(case.prompt(), negative=case.negative()))


# -- lists and tiles ---------------------------------------------------------------------------------------------------


def at_work(node, item=0, prompt="one"):
    return CurrentNodeContext(prompt, node, item)


def test_a_list_of_pictures_has_a_map_each(pack):
    """RebatchLatents: the sampler runs once for each, and so does the map."""
    case, model = CASES["flux"], model_of("flux")
    recorded, holder = pack.mapping["VSFRecord"].execute(pack.patch(model)).result
    show = pack.mapping["VSFAttentionMap"].execute
    attached = pack.negative(case.prompt(), negative=case.negative())
    maps, image = [], torch.rand(1, 32, 48, 3)
    for item in range(3):
        with at_work("sampler", item):
            case.run(recorded, attached, seed=item)
    for item in range(3):
        with at_work("map", item):
            maps.append(show(holder, image).result[0])
        alone, own = pack.mapping["VSFRecord"].execute(pack.patch(model)).result
        case.run(alone, attached, seed=item)
        assert torch.equal(maps[item], show(own, image).result[0])
    assert not torch.equal(maps[0], maps[1])
    with at_work("another sampler"):
        case.run(recorded, attached)
    with at_work("map"), pytest.raises(ValueError, match="several runs of this queue"):
        show(holder, image)


def test_tiles(pack, caplog):
    """A node that samples parts of a picture: a part smaller than the whole is refused, several of a size are a
    warning."""
    case, patched = CASES["flux"], pack.patch(model_of("flux"))
    attached = pack.negative(case.prompt(), negative=case.negative(), mask=halves(128, 192))
    with at_work("sampler"):
        case.run(patched, attached, size=(16, 24))
    with at_work("hires sampler"):
        case.run(patched, attached, size=(24, 36))
    said = "24 x 16 latent pixels, and this node samples one of 12 x 8"
    with at_work("upscaler"), pytest.raises(ValueError, match=said):
        case.run(patched, attached, size=(8, 12))
    assert "several times" not in caplog.text
    with at_work("upscaler", prompt="two"):
        case.run(patched, attached, size=(8, 12))
        case.run(patched, attached, size=(8, 12))
        case.run(patched, attached, size=(8, 12))
    assert caplog.text.count("samples several times with a negative that has a mask") == 1
    for item, size in enumerate([(16, 24), (8, 12)]):  # pictures of a list, of any sizes
        with at_work("list", item, "three"):
            case.run(patched, attached, size=size)
    assert caplog.text.count("samples several times") == 1
    combined = pack.negative(case.prompt() + case.prompt(seed=3), negative=case.negative(), mask=halves(128, 192))
    with at_work("sampler", prompt="combined"):  # one run, of two entries with the same negative
        case.run(patched, combined)
    assert caplog.text.count("samples several times") == 1
    plain = pack.negative(case.prompt(), negative=case.negative())
    for size in ((16, 24), (8, 12)):
        with at_work("upscaler", prompt="four"):
            case.run(patched, plain, size=size)


# -- the record --------------------------------------------------------------------------------------------------------


def test_the_map_of_a_video_with_a_reference(pack):
    """Frames of the map are the video's own; as many as are left when the reference is trimmed."""
    case, model = CASES["wan vace"], model_of("wan vace")
    positive, size = vace(case)
    recorded, holder = pack.mapping["VSFRecord"].execute(pack.patch(model)).result
    attached = pack.negative(positive, negative=case.negative())
    case.run(recorded, attached, size=size)
    oracle, record = oracle_model(model, [case.expect(model, positive)])
    case.run(oracle, positive, size=size)
    expected = torch.stack([share for _, share in record.shares]).double().mean(0)
    made = holder.record_here().mean()
    grid = case.grids(size)[0] // size[0]
    assert made.shape[1] == size[0] - 1
    assert_close(made.flatten(), expected[:, grid:].flatten(), 1e-4)


@pytest.mark.parametrize("left_out", [0, 2])
def test_the_map_of_a_video_with_guides(pack, left_out):
    """Also where the model leaves tokens of a guide out."""
    case, model = CASES["ltxv"], model_of("ltxv")
    made = guided(case, at=(0, 8))
    made[3][:, :, -1, 0, :left_out] = -1.0
    recorded, holder = pack.mapping["VSFRecord"].execute(pack.patch(model)).result
    run_guided(case, recorded, made, pack.negative(made[0], negative=case.negative()))
    oracle, record = oracle_model(model, [case.expect(model, made[0])])
    run_guided(case, oracle, made)
    expected = torch.stack([share for _, share in record.shares]).double().mean(0)
    assert holder.record.mean().shape[1:] == (3, 4, 5)
    assert_close(holder.record.mean().flatten(), expected[:, : 3 * 4 * 5].flatten(), 1e-4)


@pytest.mark.parametrize(("name", "dim", "size"), [("flux", 3, (16, 24)), ("wan", 3, (3, 16, 8)), ("flux", 0, (8, 12))])
def test_the_map_of_windows(pack, name, dim, size):
    """In windows that do not touch, each place's map is that of the window it is in."""
    case, model = CASES[name], model_of(name)
    batch = 4 if dim == 0 else 1
    length = (batch, None, *size)[dim] // 2
    recorded, holder = pack.mapping["VSFRecord"].execute(pack.patch(model)).result
    attached = pack.negative(case.prompt(), negative=case.negative())
    case.run(windowed(recorded, dim, length, causal_window_fix=False), attached, size=size, batch=batch)
    made = holder.record_here().mean()
    assert made.shape == (batch, size[0] if len(size) == 3 else 1, size[-2] // 2, size[-1] // 2)
    assert (made > 0).all()
    if dim == 0:
        case.run(recorded, attached, size=size, batch=batch)
        assert_close(made, holder.record_here().mean(), 1e-4)


@pytest.fixture(scope="module", name="module")
def module_fixture(pack):
    return importlib.import_module(pack.module.__name__ + ".nodes.latent_map")


def test_views(module):
    """By hand: the indices that a window shows, along each dimension."""
    whole = module.LatentMap((4, 16, 6, 8, 10), before=1, after=2)
    assert (whole.frames, whole.is_video) == (3, True)
    view = whole.view(torch.zeros(4, 16, 6, 8, 10), {})
    assert whole.own(view) == ([1, 2, 3], [0, 1, 2])
    handler = type("Handler", (), {"context_length": 2, "latent_retain_index_list": []})()
    for dim, size in ((0, 4), (2, 4), (3, 8), (4, 10)):
        window = windows.IndexListContextWindow([1, 3], dim=dim, total_frames=size)
        options = {"context_handler": handler, "transformer_options": {"context_window": window}}
        shape = [4, 16, 6, 8, 10]
        shape[dim] = 2
        if dim == 2 and HAS_GUIDES_IN_WINDOWS:
            window.guide_frames_indices, shape[2] = [1], 3
        view = whole.view(torch.zeros(shape), options)
        parts = {0: view.pictures, 2: view.frames, 3: view.rows, 4: view.columns}
        assert parts[dim] == ((1, 3, 5) if shape[2] == 3 and dim == 2 else (1, 3))
    handler.context_length = 100  # a step in which ComfyUI does not use them: the last window is still there
    assert whole.view(torch.zeros(4, 16, 6, 8, 10), options).columns == tuple(range(10))


def test_some_pictures_at_a_time(pack):
    """A pack that samples a batch one by one: right where all pictures share what they get, else an error."""
    case, model = CASES["flux"], model_of("flux").clone()

    def one_by_one(executor, m, conds, x, timestep, options):
        made = [executor(m, conds, one, timestep[:1], options) for one in x.split(1)]
        return [torch.cat(branch) for branch in zip(*made, strict=True)]

    slow = model.clone()
    slow.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "a", one_by_one)
    attached = pack.negative(case.prompt(), negative=case.negative(), mask=halves(128, 192))
    assert_close(case.run(pack.patch(slow), attached, batch=3), case.run(pack.patch(model), attached, batch=3))
    each = pack.negative(case.prompt(), negative=case.negative(), mask=torch.rand(3, 32, 32))
    with pytest.raises(RuntimeError, match="some of the 3 pictures at a time"):
        case.run(pack.patch(slow), each, batch=3)
