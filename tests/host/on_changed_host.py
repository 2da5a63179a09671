"""One run of the pack on the ComfyUI that VSF_COMFYUI names, as a script: ``test_changed_host.py`` changes that one.

``python on_changed_host.py FAMILY`` prints "NODES n", then "CHANGED True" (the picture is not stock's) or "ERROR ...".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import ROOT, load_pack, run_in_thread  # noqa: E402

import nodes  # noqa: E402


def main(family: str) -> None:
    """Loads the pack and samples with and without it."""
    assert run_in_thread(nodes.load_custom_node(str(ROOT))), "ComfyUI took the pack for a broken one"
    print("NODES", sum(name.startswith("VSF") for name in nodes.NODE_CLASS_MAPPINGS))
    if "VSFModelPatch" not in nodes.NODE_CLASS_MAPPINGS:
        return
    import torch
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


if __name__ == "__main__":
    main(sys.argv[1])
