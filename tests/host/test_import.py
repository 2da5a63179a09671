"""What loading the pack costs in a ComfyUI that has loaded its own nodes: no module but its own, and little time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
MILLISECONDS = 250
"""Bound of the median; it was 30 to 65 on two cores. What makes it grow is an import, which the other test names."""
LOAD = """
import asyncio, json, sys, time
from comfy.cli_args import args
args.cpu = True
import utils.extra_config  # as main.py: later on, "utils" is another module in older versions
import nodes, server
asyncio.run(nodes.init_builtin_extra_nodes())
pack, took, new = sys.argv[1], [], None
for _ in range(5):
    before = set(sys.modules)
    start = time.process_time()
    assert asyncio.run(nodes.load_custom_node(pack))
    took.append(1000 * (time.process_time() - start))
    found = set(sys.modules) - before
    new = sorted(found) if new is None else new
    for name in found:
        del sys.modules[name]
assert "VSFModelPatch" in nodes.NODE_CLASS_MAPPINGS
print(json.dumps({"took": took, "new": new}))
"""


def test_loading_imports_nothing_but_the_pack_and_is_quick():
    tree = os.environ["VSF_COMFYUI"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(ROOT)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": tree},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    own = [name for name in found["new"] if name == str(ROOT) or name.startswith(f"{ROOT}.")]
    assert len(own) > 20 and found["new"] == own
    assert median(found["took"]) < MILLISECONDS
