"""Publishes this folder with comfy-cli, in the Python that has it: ``TOKEN=... python tests/release/publish.py``.

The registry's token comes from the environment and reaches comfy-cli inside this process: a command line can be read by
whoever is on the machine.
"""

from __future__ import annotations

import os
import sys

from comfy_cli.__main__ import main

if __name__ == "__main__":
    token = os.environ.pop("TOKEN", "")  # and no child gets it
    if not token:
        sys.exit("TOKEN is not set: it is the registry's token")
    sys.argv = ["comfy", "--skip-prompt", "--no-enable-telemetry", "node", "publish", "--token", token]
    main()
