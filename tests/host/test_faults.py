"""Whatever stops a run, nothing of VSF outlives it: every option, wrapper and function is as it was, and the next runs,
stock and VSF, give what they gave before, to the last bit. And nothing piles up over hundreds of runs."""

import gc
import importlib
import sys
from collections import Counter
from types import FunctionType

import comfy.ldm.modules.attention as host_attention
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.model_management
import psutil
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from helpers import (
    assert_close,
    conditioning,
    is_trial,
    load_flux,
    load_sd3,
    load_wan,
    sample,
    text,
    with_override,
)

STEPS = 3
SHAPES = {"sd3": ((4, 6), 64, 2048), "flux": ((4, 6), 64, 768), "wan": ((2, 4, 6), 4096, 8)}


class Injected(Exception):
    """Comes from these tests and nowhere else."""


class Fault:
    """Raises at the ``nth`` time that the place it sits in is passed, once."""

    def __init__(self, nth, error=Injected):
        self.left, self.error = nth, error

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise self.error("injected")

    @property
    def raised(self):
        return self.left <= 0


class Subject:
    """A family's smallest model with what its runs give while nothing is wrong, and how everything looks then."""

    def __init__(self, pack, name):
        self.pack = pack
        size, width, pooled = SHAPES[name]
        self.model = {"sd3": load_sd3, "flux": load_flux, "wan": load_wan}[name](**_smallest(name))
        self.positive = conditioning(5, 1, width, pooled)
        self.negative = conditioning(7, 99, width, pooled)
        self.attached = pack.negative(self.positive, negative=[[text(3, 5, width), {}]])
        self.options = {"steps": STEPS, "size": size, "cfg": 2.5}
        self.patched = pack.patch(self.model)
        self.stock, self.vsf = self.run(self.model), self.run(self.patched)
        assert not torch.equal(self.stock, self.vsf)
        self.before = self.state()

    def run(self, model, **kw):
        return sample(model, self.attached, self.negative, **self.options, **kw)

    def state(self):
        """All that a run could have changed: the patchers' options and patches, the conditioning, ComfyUI's code."""
        state = {}
        for name, patcher in (("stock", self.model), ("patched", self.patched)):
            kept = ("model_options", "wrappers", "callbacks", "object_patches", "injections", "attachments")
            state |= {f"{name}.{key}": _frozen(getattr(patcher, key)) for key in kept}
        state["hooks"] = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self.model.model.modules()]
        state["conditioning"] = _frozen(self.attached)
        return state | _functions()

    def check(self):
        gc.collect()
        assert self.state() == self.before
        assert torch.equal(self.run(self.model), self.stock)
        assert torch.equal(self.run(self.patched), self.vsf)


def _smallest(name):
    return {"sd3": {"depth": 2}, "flux": {"double": 1, "single": 1}, "wan": {"layers": 2}}[name]


def _frozen(value):
    """A value as something that stays as it is now; objects by identity."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_frozen(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _functions():
    """Every function of ComfyUI's modules and of their classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("comfy", "comfy_extras", "nodes", "execution"):
            for key, value in vars(module).items():
                if isinstance(value, type) and value.__module__ == name:
                    found |= {f"{name}.{key}.{k}": id(v) for k, v in vars(value).items() if isinstance(v, FunctionType)}
                elif callable(value):
                    found[f"{name}.{key}"] = id(value)
    return found


@pytest.fixture(scope="module", params=SHAPES)
def subject(pack, request):
    return Subject(pack, request.param)


@pytest.fixture(scope="module")
def sd3(pack):
    return Subject(pack, "sd3")


def test_the_check_can_fail(pack):
    """A leftover of any kind shows."""
    subject, original = Subject(pack, "sd3"), mmdit.optimized_attention
    for change, undo in (
        (
            lambda: subject.model.model_options["transformer_options"].update(vsf_run=1),
            lambda: subject.model.model_options["transformer_options"].pop("vsf_run"),
        ),
        (lambda: setattr(mmdit, "optimized_attention", print), lambda: setattr(mmdit, "optimized_attention", original)),
        (lambda: subject.attached[0][1].update(model_conds={}), lambda: subject.attached[0][1].pop("model_conds")),
        (
            lambda: subject.patched.add_wrapper(WrappersMP.APPLY_MODEL, print),
            lambda: subject.patched.wrappers[WrappersMP.APPLY_MODEL].pop(None),
        ),
    ):
        change()
        assert subject.state() != subject.before
        undo()
    subject.check()


# -- interrupts


@pytest.mark.parametrize("where", ["callback", "attention"])
def test_interrupt_at_every_step(subject, where, times, tally):
    """The flag is ComfyUI's own, set where its Cancel may hit: between two steps, and in the middle of one."""
    for step in range(STEPS - 1):
        calls = []

        def at_step(i, *_, step=step):
            if i == step:
                comfy.model_management.interrupt_current_processing()

        def in_attention(func, *args, calls=calls, step=step, **kw):
            calls.append(1)
            if len(calls) == 1 + step:
                comfy.model_management.interrupt_current_processing()
            return func(*args, **kw)

        model = subject.patched if where == "callback" else with_override(subject.patched, in_attention)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            subject.run(model, callback=at_step if where == "callback" else None)
        del model
        subject.check()
        tally["interrupts"] += 1


# -- exceptions


def in_wrapper(kind, when):
    def inject(model, fault):
        def wrapper(executor, *args, **kw):
            if when == "before":
                fault()
            result = executor(*args, **kw)
            if when == "after":
                fault()
            return result

        model.add_wrapper_with_key(kind, "test", wrapper)

    return inject


def in_block_patch(when):
    def inject(model, fault):
        def patch(args, extra):
            if when == "before":
                fault()
            result = extra["original_block"](args)
            if when == "after":
                fault()
            return result

        model.set_model_patch_replace(patch, "dit", "double_block", 0)

    return inject


def in_override(when):
    def inject(model, fault):
        def override(func, q, k, *args, **kw):
            skip = is_trial(k, kw)
            if when == "before" and not skip:
                fault()
            result = func(q, k, *args, **kw)
            if when == "after" and not skip:
                fault()
            return result

        model.model_options["transformer_options"]["optimized_attention_override"] = override

    return inject


SEAMS = {
    "outer_sample": lambda when: in_wrapper(WrappersMP.OUTER_SAMPLE, when),
    "calc_cond_batch": lambda when: in_wrapper(WrappersMP.CALC_COND_BATCH, when),
    "apply_model": lambda when: in_wrapper(WrappersMP.APPLY_MODEL, when),
    "block patch": in_block_patch,
    "attention override": in_override,
}


@pytest.mark.parametrize("order", ["inside ours", "around ours"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("seam", SEAMS)
def test_exception_in_every_seam(subject, seam, when, order, tally):
    """Raised at the first and at a later passage, before and after what the seam calls, within our hook and around."""
    later = 1 if seam == "outer_sample" else 2  # which is passed once a run
    for nth, error in (1, torch.OutOfMemoryError if when == "before" else KeyboardInterrupt), (later, Injected):
        fault, model = Fault(nth, error), subject.model.clone()
        if order == "around ours":
            SEAMS[seam](when)(model, fault)
        model = subject.pack.patch(model)
        if order == "inside ours":
            SEAMS[seam](when)(model, fault)
        with pytest.raises(error, match="injected"):
            subject.run(model)
        assert fault.raised
        del model
        tally["exceptions"] += 1
    subject.check()


@pytest.mark.parametrize("module", ["block", "attention"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_exception_inside_the_model(subject, module, when, tally):
    """Deeper than any hook: in a module of the second block, and in the attention that VSF itself calls."""
    diffusion = subject.model.model.diffusion_model
    blocks = next(getattr(diffusion, n) for n in ("joint_blocks", "single_blocks", "blocks") if hasattr(diffusion, n))
    inner = next(
        m for n, m in blocks[-1].named_modules() if n.endswith(("x_block.attn.qkv", "linear1", "cross_attn.q"))
    )
    target = blocks[-1] if module == "block" else inner
    fault = Fault(2)
    hook = target.register_forward_pre_hook if when == "before" else target.register_forward_hook
    handle = hook(lambda *_: fault())
    try:
        with pytest.raises(Injected):
            subject.run(subject.patched)
    finally:
        handle.remove()
    subject.check()
    tally["exceptions"] += 1


@pytest.mark.parametrize("what", ["tokenize", "encode_from_tokens"])
def test_exception_while_a_negative_is_made(sd3, what, monkeypatch, tally):
    from encoders import make_clip

    clip, given = make_clip(clip_l=False, clip_g=False), conditioning()
    before = _frozen(given)

    def fail(*_, **__):
        raise Injected

    monkeypatch.setattr(clip, what, fail)
    with pytest.raises(Injected):
        sd3.pack.negative(given, clip=clip, text="roof")
    assert _frozen(given) == before
    sd3.check()
    tally["exceptions"] += 1


# -- out of memory


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_comfyuis_own_retry_inside_attention(sd3, failures, monkeypatch, caplog, tally):
    """Split attention empties the cache, tries again, then in smaller steps: VSF's result is the same."""
    monkeypatch.setattr(mmdit, "optimized_attention", host_attention.attention_split)
    expected = sd3.run(sd3.patched)
    einsum, left = host_attention.einsum, [failures]

    def short_of_memory(*args):
        if left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("injected")
        return einsum(*args)

    monkeypatch.setattr(host_attention, "einsum", short_of_memory)
    assert_close(sd3.run(sd3.patched), expected)
    assert caplog.text.count("out of memory error") == failures and left == [0]
    assert_close(expected, sd3.vsf)
    monkeypatch.undo()
    sd3.check()
    tally["out of memory"] += 1


@pytest.mark.parametrize("nth", [1, 2, 3, 8])
def test_out_of_memory_in_our_merge(subject, nth, monkeypatch, tally):
    """ComfyUI must see it for what it is, to unload its models; the next run is as ever."""
    module = importlib.import_module(subject.pack.module.__name__ + ".nodes.host_attention")
    find, fault = module.lse_attention, Fault(nth, torch.OutOfMemoryError)

    def attend_of(*place):
        attend = find(*place)

        def short_of_memory(*args):
            fault()
            return attend(*args)

        return attend and short_of_memory

    monkeypatch.setattr(module, "lse_attention", attend_of)
    with pytest.raises(torch.OutOfMemoryError) as error:
        subject.run(subject.patched)
    assert isinstance(error.value, comfy.model_management.OOM_EXCEPTION)
    monkeypatch.undo()
    comfy.model_management.unload_all_models()  # what ComfyUI's executor does next
    subject.check()
    tally["out of memory"] += 1


# -- leaks


def ours(pack):
    """How many objects of the pack's classes are alive, by class; what belongs to the pack itself is not counted."""
    gc.collect()
    names = ("Run", "ForwardContext", "BlockContext", "TextStream", "LatentMap", "NegativeBatch", "HostAttention")
    counts, names = Counter(), (*names, "VSFPatch", "Settings", "Negative")
    for kind, count in Counter(map(type, gc.get_objects())).items():
        if kind.__name__ in names and str(kind.__module__).startswith(f"{pack.module.__name__}.nodes."):
            counts[kind.__name__] += count
    return {name: counts[name] for name in names}


def tensors():
    gc.collect()
    return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is torch.Tensor)


@pytest.mark.parametrize("end", ["done", "failed"])
def test_a_run_leaves_no_object(subject, end):
    before = ours(subject.pack)
    model = subject.pack.patch(subject.model, scale=2.0)
    if end == "failed":
        in_override("after")(model, Fault(2))
        with pytest.raises(Injected):
            subject.run(model)
    else:
        subject.run(model)
    after_run = ours(subject.pack)
    assert after_run == {**before, "VSFPatch": before["VSFPatch"] + 1, "Settings": before["Settings"] + 1}
    del model
    assert ours(subject.pack) == before


def test_nothing_piles_up_over_many_runs(subject, times, tally):
    """New settings, negatives and masks each time; every fifth run fails."""
    runs, warm_up = 40 * times, 10

    def one(i):
        width = subject.positive[0][0].shape[2]
        cond = subject.pack.negative(
            subject.positive, negative=[[text(2 + i % 7, i, width), {}]], mask=torch.rand(1, 9, 9)
        )
        model = subject.pack.patch(subject.model, scale=1.0 + i / 100)
        if i % 5 == 0:
            in_block_patch("after")(model, Fault(2))
        try:
            sample(model, cond, subject.negative, **{**subject.options, "steps": 2})
        except Injected:
            assert i % 5 == 0
        tally["runs leaked over"] += 1

    process = psutil.Process()
    for i in range(warm_up):
        one(i)
    objects, held, resident = ours(subject.pack), tensors(), process.memory_info().rss
    for i in range(warm_up, warm_up + runs):
        one(i)
    assert ours(subject.pack) == objects
    assert tensors() == held
    grown = process.memory_info().rss - resident
    assert grown < 16 * 2**20, f"{grown / 2**20:.1f} MB over {runs} runs"
