"""``python tests/bench quality ...`` runs quality.py, and so on; --help behind a name is that benchmark's own."""

import runpy
import sys
from pathlib import Path

KNOWN = {
    "beyond": "formulas that might be better than VSF's, on the toys",
    "embeddings": "what a text encoder makes of a negation: cosines and PCA",
    "neggen": "the paper's benchmark, on your own ComfyUI or on a toy",
    "quality": "how well each method removes things, on the toys",
    "speed": "how long each method takes",
}

if __name__ == "__main__":
    here = str(Path(__file__).resolve().parent)
    if len(sys.argv) < 2 or sys.argv[1] not in KNOWN:
        lines = "".join(f"\n  {name:11} {what}" for name, what in KNOWN.items())
        usage = f"usage: dev.py bench NAME ...; dev.py bench NAME --help says more{lines}"
        if sys.argv[1:2] in (["-h"], ["--help"]):
            print(usage)
            sys.exit(0)
        sys.exit(usage)
    name = sys.argv.pop(1)
    sys.path[:] = [here, *(p for p in sys.path if p != here)]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
