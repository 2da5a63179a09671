"""Stand-ins for what ComfyUI 0.33 and later do with a model's blocks on CUDA: an allocator that records each block, and
CUDA graphs that are replayed."""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
PACK = tuple(str(ROOT / folder) for folder in ("nodes", "vsf_core"))


def blocks_of(diffusion_model: Any) -> list:
    """The blocks, and whatever else the model has in lists."""
    of_unet = [module for module in diffusion_model.modules() if type(module).__name__ == "BasicTransformerBlock"]
    lists = (child for child in diffusion_model.children() if isinstance(child, torch.nn.ModuleList))
    return of_unet or [block for some in lists for block in some]


def maker() -> str | None:
    """Where in this pack the tensor at hand is made; None if others make it."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACK):
            return f"{Path(name).name}:{frame.f_lineno}"
        if not ("/torch/" in name or name == __file__):
            return None
        frame = frame.f_back
    return None


class AllocationRecorder(TorchDispatchMode):
    """outlived: where VSF made what was still alive when its block ended; left: how much, made in a pass by anyone, was
    alive after it besides what it gave.

    A block lasts until the next one begins, or the model ends: as ComfyUI's loops mark them, which is before a patch
    around the block runs. So where VSF has one, ``run_block``, that marks it."""

    def __init__(self, diffusion_model: Any, blocks: list) -> None:
        super().__init__()
        self.model, self._modules = diffusion_model, blocks
        self.outlived: list[str] = []
        self.left: list[int] = []
        self.blocks = 0
        self.paused = 0
        self._inside = False
        self._block: list[tuple[StorageWeakRef, str]] = []
        self._all: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        if self._inside and not self.paused:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                    self._note(StorageWeakRef(leaf.untyped_storage()))
        return out

    def _note(self, made: StorageWeakRef) -> None:
        self._all.append(made)
        who = maker()
        if who is not None:
            self._block.append((made, who))

    def _next(self, *_: Any) -> None:
        if self.blocks:  # what is made before the first one is for the whole model
            self.outlived += [who for made, who in self._block if not made.expired()]
        self._block = []
        self.blocks += 1

    def marking(self, run_block: Callable) -> Callable:
        """``run_block`` that marks where a block begins."""

        def marked(*args: Any) -> Any:
            self._next()
            return run_block(*args)

        return marked

    def _begin(self, *_: Any) -> None:
        self._inside, self._block, self._all, self.blocks = True, [], [], 0

    def _end(self, _model: Any, _given: Any, out: Any) -> None:
        self._next()
        self._inside = False
        given_back = {leaf.untyped_storage()._cdata for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        self.left.append(sum(not made.expired() and made.cdata not in given_back for made in self._all))

    def __enter__(self) -> "AllocationRecorder":
        self._handles = [self.model.register_forward_pre_hook(self._begin), self.model.register_forward_hook(self._end)]
        self._handles += [block.register_forward_pre_hook(self._next) for block in self._modules]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def pause(self, sync: bool = False) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


def prefetch_module(**names: Any) -> types.ModuleType:
    """One with these ``names`` to be put in the place of ``comfy.model_prefetch``."""
    module = types.ModuleType("comfy.model_prefetch")
    vars(module).update(names)
    return module


class GraphedBlocks:
    """Blocks that are replayed, as if ComfyUI had enabled that: each runs as ever once, then once while its graph is
    made, and from then on with all that its Python had when that was."""

    def __init__(self, diffusion_model: Any, blocks: list) -> None:
        self.model, self.blocks = diffusion_model, blocks
        self.warm: set = set()
        self.graphs: dict = {}
        self.replays = 0

    def __enter__(self) -> "GraphedBlocks":
        def ahead(_model: Any, given: tuple, named: dict) -> tuple[tuple, dict]:
            named["transformer_options"]["prefetch_dynamic_vbars"] = True  # as BaseModel does, behind all wrappers
            return given, named

        self._handle = self.model.register_forward_pre_hook(ahead, with_kwargs=True)
        for block in self.blocks:
            block.forward = self._replayed(block, block.forward)
        return self

    def _replayed(self, block: Any, forward: Any) -> Any:
        def run(*given: Any, transformer_options: dict, **named: Any) -> Any:
            if not transformer_options["prefetch_dynamic_vbars"]:
                return forward(*given, transformer_options=transformer_options, **named)
            if block in self.graphs:
                self.replays += 1
                transformer_options = self.graphs[block]
            elif block in self.warm:
                self.graphs[block] = transformer_options
            self.warm.add(block)
            return forward(*given, transformer_options=transformer_options, **named)

        return run

    def __exit__(self, *error: Any) -> None:
        self._handle.remove()
        for block in self.blocks:
            del block.forward
