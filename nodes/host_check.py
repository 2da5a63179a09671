"""Whether this ComfyUI has what the pack stands on; asked before anything else of ComfyUI is imported."""

import logging
from importlib import import_module
from itertools import takewhile

log = logging.getLogger(__name__)

OLDEST = (0, 16, 3)
"""The oldest ComfyUI that the pack is tested on."""

NEEDED = {
    "comfy.patcher_extension": ("WrappersMP.OUTER_SAMPLE", "WrappersMP.CALC_COND_BATCH", "WrappersMP.APPLY_MODEL"),
    "comfy.conds": ("CONDRegular", "CONDConstant", "CONDNoiseShape"),
    "comfy.ldm.modules.attention": ("optimized_attention",),
    "comfy.model_management": ("InterruptProcessingException", "OOM_EXCEPTION"),
    "comfy.nested_tensor": ("NestedTensor",),
    "comfy.utils": ("repeat_to_batch_size", "unpack_latents"),
    "comfy.latent_formats": ("Wan21",),
    "comfy.sd1_clip": ("escape_important", "token_weights", "unescape_important"),
    "comfy_execution.progress": ("ProgressHandler", "add_progress_handler", "get_progress_state"),
    "comfy_execution.utils": ("ExecutionContext", "get_executing_context"),
    "comfy_api.latest": ("ComfyExtension", "io.ComfyNode", "ui.PreviewText"),
}
"""By module, the attributes of each thing of ComfyUI's that is used by name."""


def is_supported() -> bool:
    """Whether the pack can work here; if not, one line in the log says why, and ComfyUI goes on without its nodes."""
    problem = _problem()
    if problem is not None:
        log.warning(f"VSF: {problem} Its nodes are not loaded; everything else works as ever.")
    return problem is None


def changed_host(found: str) -> RuntimeError:
    """The error for a place where ComfyUI, or another node, does not do what the pack stands on."""
    return RuntimeError(
        f"VSF: {found}, so the negative would have no effect. ComfyUI {_version() or '(version unknown)'}, or another "
        "node of this workflow, works in a way that this version of ComfyUI-VSF does not know. Update ComfyUI-VSF; "
        "until then bypass VSF Model Patch, or the other node. Please report it."
    )


def _problem() -> str | None:
    """What is wrong with this ComfyUI and what to do about it, or None."""
    stated = _version()
    oldest = ".".join(map(str, OLDEST))
    if () < _numbers(stated or "") < OLDEST:
        return f"ComfyUI-VSF needs ComfyUI {oldest} or newer, and this is {stated}: update ComfyUI."
    missing = [f"{module}.{name}" for module, names in NEEDED.items() for name in names if not _has(module, name)]
    if missing:
        return (
            f"ComfyUI-VSF needs {', '.join(missing)}, which this ComfyUI ({stated or 'of unknown version'}) does not "
            f"have. If it is older than {oldest}, update ComfyUI; else update ComfyUI-VSF, or report it."
        )
    return None


def _version() -> str | None:
    """What ComfyUI says it is, or None where it doesn't say."""
    return getattr(_imported("comfyui_version"), "__version__", None)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.3.60 is (0, 3, 60), 0.31.0rc1 is (0, 31); none where it is no version."""
    return tuple(map(int, takewhile(str.isdigit, version.split("."))))


def _has(module: str, name: str) -> bool:
    """Whether ``module`` can be imported and has the attribute ``name``, which may be dotted."""
    found = _imported(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None


def _imported(module: str) -> object | None:
    try:
        return import_module(module)
    except ImportError:
        return None
