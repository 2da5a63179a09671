"""Runs of the pack on changed ComfyUIs, as a script that ``test_changed_host.py`` talks to.

For each line [tree, family, log] on standard input, a fork, with nothing of ComfyUI imported yet, runs ``run`` on that
tree, writes its log there, and answers with a line: what was printed, as a list of lines; null where that failed.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from hosting.interpreter import triton_interpreted  # noqa: E402

with triton_interpreted():  # what takes long to import and is not ComfyUI's
    import scipy.stats  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import transformers  # noqa: F401


def run(family: str) -> None:
    """Loads the pack and samples with and without it; prints "NODES n", then "CHANGED True" (not stock's picture) or
    "ERROR ..."."""
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import ROOT, load_pack, run_in_thread

    import nodes

    assert run_in_thread(nodes.load_custom_node(str(ROOT))), "ComfyUI took the pack for a broken one"
    print("NODES", sum(name.startswith("VSF") for name in nodes.NODE_CLASS_MAPPINGS))
    if "VSFModelPatch" not in nodes.NODE_CLASS_MAPPINGS:
        return
    from helpers import conditioning, load_flux, load_sd3, load_wan, sample, text

    load, width, pooled, size = {
        "sd3": (load_sd3, 64, 2048, (8, 12)),
        "flux": (load_flux, 64, 768, (8, 12)),
        "wan": (load_wan, 4096, 1, (2, 8, 12)),
    }[family]
    model, positive, pack = load(), conditioning(13, 1, width, pooled), load_pack()
    attached = pack.negative(positive, negative=[[text(5, 5, width), {}]])
    try:
        result = sample(pack.patch(model), attached, size=size, steps=2)
    except Exception as error:
        print("ERROR", type(error).__name__, error)
        return
    print("CHANGED", not torch.equal(result, sample(model, positive, size=size, steps=2)))


def answer(tree: str, family: str, log: str) -> None:
    """In the fork: the run, and the line about it."""
    os.environ["VSF_COMFYUI"] = tree
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    with redirect_stdout(StringIO()) as printed:
        run(family)
    print(json.dumps(printed.getvalue().splitlines()), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        if not (child := os.fork()):
            answer(*json.loads(line))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("null", flush=True)
