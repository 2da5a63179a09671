"""``python tests/bench quality ...`` runs quality.py, and so on."""

import runpy
import sys
from pathlib import Path

KNOWN = ("beyond", "neggen", "quality", "speed")

if __name__ == "__main__":
    here = str(Path(__file__).resolve().parent)
    if len(sys.argv) < 2 or sys.argv[1] not in KNOWN:
        sys.exit(f"usage: bench {{{','.join(KNOWN)}}} ...")
    name = sys.argv.pop(1)
    sys.path[:] = [here, *(p for p in sys.path if p != here)]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
