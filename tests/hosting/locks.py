"""Writes the lists that dev.py installs from: `python3 dev.py lock`, after a change of what stands here.

tests/locks/ and tests/types/package-lock.json name every package, its version and the SHA-256 of each of its files, for
Linux, Windows and macOS and Python 3.10 to 3.13. Versions that are listed already stay; with --upgrade all are the
newest that fit. uv, which resolves them, asks the index that UV_DEFAULT_INDEX names.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from hosting import process
from hosting.errors import HostError
from hosting.host import LOCKS, OLDEST_PYTHON, ROOT, TEST_TOOLS, TYPES, Host, run_npm

TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# From transformers 5 on, ComfyUI's tokenizers of HunyuanVideo and Flux.2 Dev do not read their vocabularies.
TRANSFORMERS_4 = ("transformers==4.57.3", "tokenizers==0.22.1", "huggingface-hub==0.36.0")
COMFY_CLI = ("comfy-cli==1.23.0",)
HEADING = "# Written by `python3 dev.py lock` (tests/hosting/locks.py says from what). Not to be edited.\n"


def write(host: Host, upgrade: bool) -> None:
    """Writes all of them; `host` is of the newest ComfyUI."""
    with_host = ("--constraints", str(LOCKS / "host.txt"))  # ComfyUI-Manager runs on the host's packages
    compile_list(host.python, "host.txt", (*TORCH,), [host.tree / "requirements.txt", TEST_TOOLS], upgrade)
    compile_list(host.python, "transformers-4.txt", TRANSFORMERS_4, [], upgrade, "--no-deps")
    compile_list(host.python, "comfy-cli.txt", COMFY_CLI, [], upgrade)
    compile_list(host.python, "manager.txt", (), [host.tree / "manager_requirements.txt"], upgrade, *with_host)
    options = [
        "--package-lock-only",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--omit-lockfile-registry-resolved",
    ]
    run_npm(host.python, ["install", "--prefix", str(TYPES), *options])


def compile_list(
    python: Path, name: str, wanted: tuple[str, ...], files: list[Path], upgrade: bool, *options: str
) -> None:
    """Resolves requirements, and those of files, to one list with hashes."""
    with tempfile.TemporaryDirectory(prefix="vsf-lock-") as folder:
        listed, out = Path(folder, "wanted.in"), Path(folder, "out.txt")
        listed.write_text("\n".join(wanted))
        if (LOCKS / name).exists():
            out.write_text((LOCKS / name).read_text())
        command = [str(python), "-m", "uv", "pip", "compile", str(listed), *map(str, files), "--output-file", str(out)]
        command += ["--universal", "--python-version", ".".join(map(str, OLDEST_PYTHON)), "--generate-hashes"]
        command += ["--quiet", "--no-header", "--no-annotate", *(["--upgrade"] if upgrade else []), *options]
        if process.run(command, cwd=str(ROOT)):
            raise HostError(f"uv could not make {name} (is the network reachable?)")
        (LOCKS / name).write_text(HEADING + out.read_text(), encoding="utf-8")
