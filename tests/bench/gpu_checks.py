"""Whether VSF on a GPU is what it is on the CPU: each family's tiny model in fp32, bf16 and fp16, by every path.

On the CPU all is computed in fp32, by the path that VSF chooses there. A GPU's result in some precision may be as far
from that as ``TIMES`` what stock ComfyUI's own is from its own on the CPU.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any
from unittest import mock

import torch
from gpu_report import DTYPES, FORCED, PATHS, TIMES, WORDS, NotRun, PathWords, Report, Unit, forced, require
from sampling import ROOT, load_pack
from torch import Tensor

sys.path.insert(1, str(ROOT / "tests" / "host"))

import gpu_heads  # noqa: E402
from cases import CASES, DISTINCT, SMOKE, Case, region  # noqa: E402
from helpers import relative  # noqa: E402

AT_LEAST = {"fp32": 2e-5, "bf16": 1.5e-2, "fp16": 2e-3}
"""An error that is always allowed: stock's own may happen to be small."""
GUIDANCE = 4.0
"""For models that take one. ComfyUI's own 3.5, times 1000, is no number of bf16: stock's error would hide others."""
LATE = {"start_percent": 0.999, "end_percent": 1.0}
"""A window in which no step is."""


@dataclass(frozen=True)
class Setting:
    """What a run is asked for. patch: inputs of VSF Model Patch, None without it; negatives: how many there are;
    size: which of the model's."""

    patch: Mapping[str, Any] | None = None
    negatives: int = 0
    masked: bool = False
    size: int = 0
    run: Mapping[str, Any] = field(default_factory=dict)

    def latent(self, case: Case, model: Any) -> Tensor:
        """The final one of a run."""
        pack, size = load_pack(), case.sizes[self.size]
        given = case.prompt(size=size, guidance=GUIDANCE)
        for k in range(self.negatives):
            node = {"mask": region(size)[1]} if self.masked else {"strength": 0.5 if k else 1.0}
            tokens = case.negative() if k == 0 else case.negative(4, 6)
            given = pack["VSFNegativeConditioning"].execute(positive=given, negative=tokens, **node).result[0]
        if self.patch is not None:
            usual = {"scale": 1.9 if case.cross else 3.3, "offset": 0.2}
            model = pack["VSFModelPatch"].execute(model=model, **{**usual, **self.patch}).result[0]
        return case.run(model, given, size=size, disable_pbar=True, **self.run).cpu()


STOCK, VSF = Setting(), Setting({}, 1)
OFF = {"patch alone": Setting({}), "negative alone": Setting(None, 1), "no step in the window": Setting(LATE, 1)}
SETTINGS = {
    "nag": Setting({"method": "nag", "nag_scale": 3.0, "nag_alpha": 0.5, "nag_tau": 1.2}, 1),
    "nasa": Setting({"method": "nasa", "nasa_scale": 0.3}, 1),
}
MORE = {
    "ong": Setting({"method": "ong", "ong_scale": 1.0}, 1),
    "a mask": Setting({}, 1, masked=True),
    "batch 2, cfg 2.5, odd size": Setting({}, 1, size=1, run={"batch": 2, "cfg": 2.5}),
    "two negatives": Setting({}, 2),
}
"""Of the models in ``SMOKE``: four of joint attention, three of cross-attention."""
STOCK_OF = {id(one): replace(one, patch=None, negatives=0) for one in MORE.values() if one.run}
"""What to compare stock ComfyUI in, where that is no run like ``STOCK``."""


def units(only: list[str] | None) -> list[Unit]:
    """The most telling models first. All precisions of a model stand together, for they share what the CPU made."""
    names = [*SMOKE, *(name for name in (*DISTINCT, "qwen-image, padding") if name not in SMOKE)]
    names = [gpu_heads.NAME, *names]
    return [[name, dtype] for name in names if only is None or name in only for dtype in DTYPES]


def loaded(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A tiny model that computes on the device in this precision, whatever ComfyUI would choose."""
    import comfy.model_management as management

    with (
        mock.patch.object(management, "get_torch_device", return_value=device),
        mock.patch.object(management, "unet_dtype", return_value=dtype),
        mock.patch.object(management, "unet_manual_cast", return_value=None),
    ):
        return CASES[name].load()


class OnCPU:
    """A model's latents on the CPU, each made when it is first asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.latents: dict[int, Tensor] = {}

    @cached_property
    def model(self) -> Any:
        return loaded(self.name, torch.device("cpu"), torch.float32)

    def latent(self, setting: Setting) -> Tensor:
        if id(setting) not in self.latents:
            with forced(None):
                self.latents[id(setting)] = setting.latent(CASES[self.name], self.model)
        return self.latents[id(setting)]


@cache
def _on_cpu() -> list[OnCPU]:
    return []


def on_cpu(name: str) -> OnCPU:
    """The one of this model; that of another model before it is given up."""
    kept = _on_cpu()
    if not kept or kept[0].name != name:
        kept[:] = [OnCPU(name)]
    return kept[0]


class Checks:
    """All that is asked of a model in one precision. The check of stock comes first: others need what it finds."""

    def __init__(self, name: str, dtype: str, device: torch.device, words: PathWords) -> None:
        self.name, self.dtype, self.device, self.words = name, dtype, device, words
        self.stock: Tensor | None = None
        self.stock_repeats = True
        self.path = ""
        """In the log's words, how the last run here computed its attention."""

    @cached_property
    def model(self) -> Any:
        return loaded(self.name, self.device, DTYPES[self.dtype])

    def all(self) -> dict[str, Callable[[], dict]]:
        more = {**SETTINGS, **(MORE if self.name in SMOKE else {})}
        return {
            "stock": self.run_stock,
            "off": self.off,
            "VSF": self.vsf,
            **{path: partial(self.compare, VSF, path) for path in PATHS},
            **{name: partial(self.compare, setting) for name, setting in more.items()},
        }

    def latent(self, setting: Setting) -> Tensor:
        latent = setting.latent(CASES[self.name], self.model)
        self.path = self.words.last
        return latent

    def twice(self, setting: Setting) -> tuple[Tensor, bool, str]:
        """A latent, whether a run gives it to the bit again, and a note: some models' first run differs by itself."""
        first, second = self.latent(setting), self.latent(setting)
        if torch.equal(first, second):
            return second, True, ""
        third = self.latent(setting)
        return third, torch.equal(second, third), "the very first run differed from the next one"

    def run_stock(self) -> dict:
        self.stock, self.stock_repeats, note = self.twice(STOCK)
        if not torch.isfinite(self.stock).all():
            self.stock = None
            raise NotRun(f"stock ComfyUI's own latent is not finite in {self.dtype}")
        return {"text": note if self.stock_repeats else "stock ComfyUI differs from run to run"}

    def off(self) -> dict:
        """Bit-identical, unless stock's own runs are not."""
        stock = self.known_stock()
        differ = [name for name, setting in OFF.items() if not torch.equal(self.latent(setting), stock)]
        if differ and self.stock_repeats:
            raise AssertionError(f"not bit-identical to stock: {', '.join(differ)}")
        return {}

    def vsf(self) -> dict:
        latent, repeats, note = self.twice(VSF)
        if not repeats and self.stock_repeats:
            raise AssertionError("two runs of one seed differ, although stock's do not")
        if relative(on_cpu(self.name).latent(VSF), on_cpu(self.name).latent(STOCK)) < 1e-4:
            raise AssertionError("the negative has no effect on the CPU: this check could not fail")
        return {**self.near(latent, VSF), "text": note}

    def compare(self, setting: Setting, path: str | None = None) -> dict:
        require(path, self.device)
        with forced(path):
            return self.near(self.latent(setting), setting)

    def near(self, latent: Tensor, setting: Setting) -> dict:
        """How far the latent is from the CPU's, beside stock's own in such a run; an error if that is too far."""
        plain, path = STOCK_OF.get(id(setting), STOCK), self.path
        stock = self.known_stock() if plain is STOCK else self.latent(plain)
        own = relative(stock, on_cpu(self.name).latent(plain))
        if (way := os.environ.get(FORCED)) and not path.startswith((*WORDS[way], "two cross-attentions")):
            raise AssertionError(f"{FORCED}={way} did not force it; attention: {path}")
        error, allowed = relative(latent, on_cpu(self.name).latent(setting)), max(TIMES * own, AT_LEAST[self.dtype])
        if not error <= allowed:
            raise AssertionError(
                f"{error:.1e} from the CPU's result where stock's own is {own:.1e} and {allowed:.1e} is allowed; "
                f"attention: {path}"
            )
        return {"error": error, "stock": own, "path": path}

    def known_stock(self) -> Tensor:
        if self.stock is None:
            raise NotRun("nothing to compare with: see stock")
        return self.stock


def run_unit(report: Report, words: PathWords, units: list[Unit]) -> None:
    """Each check of the unit that there is time for."""
    name, dtype = report.unit
    heads = gpu_heads.Heads(dtype, report.device)
    todo = heads.all() if name == gpu_heads.NAME else Checks(name, dtype, report.device, words).all()
    report.tell(unit=report.unit, checks=list(todo))
    for check, call in todo.items():
        if report.is_late():
            report.result(check, "skipped", "time")
        elif (found := report.attempt(check, call)) is not None:
            report.result(check, "ok", **found)
