"""``python tests/bench quality ...`` runs quality.py, and so on."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    known = sorted(p.stem for p in here.glob("*.py") if p.stem in ("quality", "speed"))
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(f"usage: bench {{{','.join(known)}}} ...")
    name = sys.argv.pop(1)
    sys.path[:] = [str(here), *(p for p in sys.path if p != str(here))]
    runpy.run_path(str(here / f"{name}.py"), run_name="__main__")
