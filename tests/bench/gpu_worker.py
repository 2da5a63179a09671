"""One process of `dev.py gpu`: the checks or the times, one after the other, each told on stdout as a line of JSON.

Usage: python gpu_worker.py JSON, by ``hosting/gpu.py``, which reads the lines. JSON: part ("checks" or "times"),
device ("gpu", or "cpu" to try this out without one), until (seconds since 1970), done (units to leave out), only
(names of models, or null). What else prints to stdout lands on stderr.
"""

import importlib
import json
import logging
import os
import platform
import subprocess
import sys
from typing import Any

import torch
from gpu_report import PathWords, Report
from sampling import open_comfyui

# -- what this machine is ---------------------------------------------------------------------------------------------


def build() -> str:
    """What PyTorch was built for."""
    version = torch.version
    kinds = {"CUDA": version.cuda, "ROCm": getattr(version, "hip", None), "XPU": getattr(version, "xpu", None)}
    built = [f"built for {kind} {number}" for kind, number in kinds.items() if number]
    return built[0] if built else "built without CUDA and ROCm"


def no_gpu() -> str | None:
    """A sentence that says that there is no GPU, and what to do; None if there is one."""
    kinds = [torch.cuda, getattr(torch, "xpu", None), torch.backends.mps, getattr(torch, "accelerator", None)]
    if any(kind is not None and kind.is_available() for kind in kinds):
        return None
    return (
        f"no GPU was found: torch {torch.__version__}, {build()}, sees none of NVIDIA, AMD, Intel or Apple here; "
        "install the GPU's driver, or set COMFYUI_PATH to a ComfyUI that runs on your GPU"
    )


def triton_version() -> str:
    """Its packages have several names."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return "none"


def driver() -> str | None:
    """NVIDIA's driver; ROCm, Intel and Apple have none that this could ask."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def facts(device: torch.device) -> dict[str, str]:
    """What the page says of the machine, in the order in which it is said."""
    import comfy.ldm.modules.attention as attention
    import comfy.model_management as management
    import comfyui_version

    is_cuda = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if is_cuda else management.get_torch_device_name(device)
    function = getattr(attention.optimized_attention, "__wrapped__", attention.optimized_attention)
    said = {
        "GPU": chip,
        "driver": driver() if is_cuda else None,
        "compute capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if is_cuda else None,
        "memory": f"{management.get_total_memory(device) / 2**30:.1f} GiB",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, {build()}",
        "cuDNN": str(torch.backends.cudnn.version()) if is_cuda else None,
        "Triton": triton_version(),
        "ComfyUI": f"{comfyui_version.__version__}, {function.__name__}",
    }
    return {name: text for name, text in said.items() if text is not None}


# -- the process ------------------------------------------------------------------------------------------------------


def part_named(name: str) -> Any:
    """The module of the checks, or of the times; they need ComfyUI."""
    return importlib.import_module(f"gpu_{name}")


def main() -> None:
    task = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # ComfyUI and libraries print, too
    on_cpu = task["device"] == "cpu"
    missing = None if on_cpu else no_gpu()
    if missing:
        print(json.dumps({"no_gpu": missing}), file=out, flush=True)
        return
    words = PathWords()
    logging.basicConfig(level=logging.INFO, handlers=[words])
    open_comfyui(on_cpu)
    from comfy.cli_args import args

    args.highvram = task["part"] == "times" and not on_cpu  # whole models stay where they are
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    report = Report(out, task["until"], device)
    report.tell(facts=facts(device))
    part = part_named(task["part"])
    units = part.units(task["only"])
    report.tell(units=units)
    for unit in (unit for unit in units if unit not in task["done"]):
        report.unit = unit
        if report.is_late():
            report.result("", "skipped", "time")
            continue
        part.run_unit(report, words, units)
        report.tell(end=unit)
    report.tell(done=True)
    os._exit(0)  # ComfyUI's models complain when they end with Python


if __name__ == "__main__":
    main()
