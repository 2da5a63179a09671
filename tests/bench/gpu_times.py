"""What a negative costs on a GPU: whole models of random weights that fit on it, as ``speed.py`` builds them.

Each shape gets an equal part of the time that is left. Its methods run in turns, in an order that changes; a figure is
the median of a method's time divided by the plain model's of the same round.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import speed
import torch
from gpu_report import PATHS, NotRun, PathWords, Report, Unit, forced, require
from sampling import load_pack

SHAPES = (
    *("Qwen-Image 1024x1024", "Flux 1024x1024", "Flux 512x512", "SD3.5-Large 1024x1024", "SD3.5-Large 512x512"),
    *("Z-Image 1024x1024", "SDXL 1024x1024", "Wan 1.3B 832x480x33"),
)
"""The biggest models first; shapes of one model together, since it stays loaded."""
METHODS = {
    "plain": ("plain", None),
    "VSF": ("VSF", None),
    **{path: ("VSF", path) for path in PATHS},
    "nag": ("NAG, one pass", None),
    "nasa": ("NASA, one pass", None),
    "NAGuidance": ("NAG, ComfyUI's", None),
    "CFG": ("CFG", None),
}
"""Of the page: ``speed.py``'s name of it, and the path that is forced."""
SELDOM = ("reference", "NAGuidance", "CFG")
"""Methods that run in one round of four, and may need more memory than there is."""
BESIDES = 2 * 2**30
"""Bytes that a model needs beside its weights."""
RUN_SECONDS, FEWEST_STEPS, MOST_STEPS, ROUNDS = 0.3, 2, 8, 9


def management() -> Any:
    """ComfyUI's, which is not to be imported before its command line is set."""
    import comfy.model_management

    return comfy.model_management


@dataclass
class Loaded:
    """The model of the last shape, and the methods with it."""

    key: Any = None
    methods: Mapping[str, speed.Method] = field(default_factory=dict)

    def give_up(self) -> None:
        self.key, self.methods = None, {}
        management().unload_all_models()
        management().cleanup_models_gc()
        management().soft_empty_cache()


@cache
def kept() -> Loaded:
    return Loaded()


def precision(device: torch.device) -> str:
    """The half precision that ComfyUI would choose."""
    return "bf16" if device.type == "cpu" or management().should_use_bf16(device) else "fp16"


def units(only: list[str] | None) -> list[Unit]:
    dtype = precision(management().get_torch_device())
    return [[name, dtype] for name in (*SHAPES, "tiny") if (name != "tiny" if only is None else name in only)]


def methods_of(shape: speed.Shape, dtype: str, report: Report) -> Mapping[str, speed.Method]:
    """The methods with the shape's whole model. Raises ``NotRun`` if that does not fit."""
    if report.is_late():
        raise NotRun("time")
    key = (shape.family, shape.config, shape.all_blocks, dtype)
    if kept().key != key:
        kept().give_up()
        needed = 2 * sum(math.prod(weight.shape) for weight in speed.weights(shape, True).values())
        free = management().get_free_memory(report.device)
        if 1.05 * needed + BESIDES > free:
            raise NotRun(f"memory: {needed / 2**30:.0f} GiB of weights, {free / 2**30:.0f} GiB free")
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        model = speed.build(shape, half, True)
        kept().key, kept().methods = key, speed.all_methods(shape, model, load_pack())
        del model
    return kept().methods


def timed(method: speed.Method, path: str | None, shape: speed.Shape, steps: int) -> float:
    with forced(path):
        return speed.run(method, shape, steps)


def warmed_up(name: str, method: speed.Method, shape: speed.Shape, device: torch.device) -> tuple[int | None]:
    """The peak of a method's memory, None where the device does not tell; what runs only once has run then."""
    path = METHODS[name][1]
    require(path, device)
    try:
        with forced(path):
            if name == "plain" or device.type == "mps":
                speed.run(method, shape, 1)
            return (None if device.type == "mps" else speed.peak_bytes(method, shape),)
    except management().OOM_EXCEPTION:
        if name not in SELDOM:
            raise
    raise NotRun("out of memory")


def run_unit(report: Report, words: PathWords, units: list[Unit]) -> None:
    """Measures a shape, in its part of the time."""
    name, dtype = report.unit
    now, shape, device = time.time(), speed.SHAPES[name], report.device
    until = now + (report.until - now) / (len(units) - units.index(report.unit))
    report.tell(unit=report.unit, checks=["model", *METHODS])
    given = report.attempt("model", partial(methods_of, shape, dtype, report))
    if given is None:
        return
    calls: dict[str, Callable[[int], float]] = {}
    peaks: dict[str, int | None] = {}
    paths: dict[str, str] = {}
    for method, (theirs, path) in METHODS.items():
        if theirs not in given:
            report.result(method, "skipped", "not in this ComfyUI")
        elif time.time() > until and method != "plain":
            report.result(method, "skipped", "time")
        else:
            words.last = ""
            peak = report.attempt(method, partial(warmed_up, method, given[theirs], shape, device))
            if peak is not None:
                calls[method] = partial(timed, given[theirs], path, shape)
                peaks[method], paths[method] = peak[0], words.last
    tell_rows(report, rounds(report, calls, until), peaks, paths)


def rounds(report: Report, calls: Mapping[str, Callable[[int], float]], until: float) -> dict[str, list]:
    """name -> seconds a step in each round, None where a method was left out; without those that failed."""
    step = report.attempt("plain", partial(calls["plain"], FEWEST_STEPS)) if "plain" in calls else None
    if step is None:
        return {}
    steps = min(MOST_STEPS, max(FEWEST_STEPS, round(RUN_SECONDS * FEWEST_STEPS / step)))
    often = [name for name in calls if name not in SELDOM]
    times: dict[str, list[float | None]] = {name: [None] * ROUNDS for name in calls}
    for k, names in enumerate(speed.plan(list(calls), ROUNDS, often)):
        for name in (name for name in names if name in times):
            if time.time() > until and (k or name != "plain"):
                return times
            seconds = report.attempt(name, partial(calls[name], steps))
            if seconds is None:
                del times[name]
            else:
                times[name][k] = seconds / steps
    return times


def tell_rows(
    report: Report, times: Mapping[str, list], peaks: Mapping[str, int | None], paths: Mapping[str, str]
) -> None:
    """A result a method; those that had no turn beside the plain model are told, too."""
    plain = times.get("plain", [])
    for name, seconds in times.items():
        both = [t for t, p in zip(seconds, plain, strict=True) if t and p]
        if not both:
            report.result(name, "skipped", "time")
            continue
        row = speed.row({}, seconds, plain)
        memory = None
        if peaks[name] is not None and peaks.get("plain"):
            memory = peaks[name] / peaks["plain"]
        middle = sorted(both)[len(both) // 2]
        report.result(name, "ok", seconds=middle, memory=memory, path=paths[name], **row)
