"""The release checklist, which changes nothing: ``dev.py release``, or ``python -m release.checklist CACHE_FOLDER``.

It does not run the tests: ``dev.py test`` does, before it.
comfy-cli has a virtual environment of its own in the cache, ``release-venv``: its packages are not ComfyUI's.
ComfyUI-Manager's is ``manager-venv``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hosting.errors import HostError
from hosting.host import ROOT, fresh_venv, has_modules, install_locked, print_progress, remove, run_pip, venv_python
from hosting.locks import COMFY_CLI

from release import archive, manager

QUIET = {"DO_NOT_TRACK": "1", "NO_COLOR": "1", "COLUMNS": "200"}
PASSED = "All validation checks passed successfully"


def main(arguments: list[str]) -> int:
    """Runs every check, prints a line for each, and fails if any did."""
    (cache,) = arguments
    with tempfile.TemporaryDirectory(prefix="vsf-release-") as folder:
        clone = Path(folder) / "ComfyUI-VSF"
        checks: dict[str, Callable[[], str]] = {
            "version": lambda: check_version(read("pyproject.toml"), read("CHANGELOG.md")),
            "git": lambda: check_clean(archive.git("status", "--porcelain")),
            "tag": lambda: check_tag(check_version(read("pyproject.toml"), read("CHANGELOG.md"))),
            "comfy node validate": lambda: validate(Path(cache), clone),
            "comfy node pack": lambda: pack(Path(cache), clone),
            "archive and old workflows": lambda: check_archive(clone / "node.zip"),
            "ComfyUI-Manager": lambda: manager.check(Path(cache)),
        }
        failed = 0
        for name, check in checks.items():
            try:
                print(f"ok      {name}: {check()}", flush=True)
            except HostError as error:
                failed += 1
                print(f"FAILED  {name}: {error}", flush=True)
    ready = "ready, if `dev.py test` passes too, which this did not run: tag this commit and publish"
    print(f"{failed} of {len(checks)} checks failed" if failed else ready)
    return min(failed, 1)


def read(name: str) -> str:
    """A text file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def check_version(project: str, changelog: str) -> str:
    """The version, stated by pyproject.toml and by the newest heading of the changelog, with its date."""
    stated = re.search(r'^version = "(\d+\.\d+\.\d+)"$', project, re.MULTILINE)
    newest = re.search(r"^## (.+)$", changelog, re.MULTILINE)
    heading = re.fullmatch(r"\[([^]]+)\] - \d{4}-\d\d-\d\d", newest[1]) if newest else None
    if stated is None or heading is None or stated[1] != heading[1]:
        raise HostError(
            f"pyproject.toml states {stated[1] if stated else 'no semantic version'} and CHANGELOG.md begins with "
            f"{newest[1] if newest else 'no heading'}: set the version, give the newest changes a heading"
        )
    if re.search(r"^## \[?unreleased", changelog, re.MULTILINE | re.IGNORECASE):
        raise HostError("CHANGELOG.md has unreleased changes below the newest version: give them to one")
    return stated[1]


def check_clean(status: str) -> str:
    """No change and no new file outside git: what is tested is what is tagged."""
    if status.strip():
        raise HostError(f"not everything is committed:\n{status.rstrip()}")
    return "clean"


def check_tag(version: str, folder: Path = ROOT) -> str:
    """The version's tag is free, or this very commit's: what was released once is never another thing."""
    tag = f"v{version}"
    if not archive.git("tag", "--list", tag, folder=folder).strip():
        return f"{tag} is free"
    if archive.git("rev-parse", f"{tag}^{{commit}}", folder=folder) != archive.git("rev-parse", "HEAD", folder=folder):
        raise HostError(f"{tag} is another commit: this needs a version of its own")
    return f"{tag} is this commit"


def comfy(cache: Path, clone: Path, command: str) -> str:
    """What the real comfy-cli prints, in a fresh clone of the newest commit."""
    python = venv_python(cache / "release-venv")
    if not has_modules(python, ("comfy_cli",)):
        print_progress(f"installing {COMFY_CLI[0]}")
        fresh_venv(remove(cache / "release-venv"))
        install_locked(run_pip, python, "comfy-cli.txt", "--quiet")
    if not clone.exists():
        archive.git("clone", "--quiet", str(ROOT), str(clone))
    called = [str(python), "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node", command]
    done = subprocess.run(called, cwd=clone, env={**os.environ, **QUIET}, capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"comfy node {command} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def validate(cache: Path, clone: Path) -> str:
    """`comfy node validate` without a warning."""
    printed = comfy(cache, clone, "validate")
    if PASSED not in printed or "warning" in printed.lower():
        raise HostError(f"comfy node validate has remarks:\n{printed}")
    return f"no remark ({COMFY_CLI[0]})"


def pack(cache: Path, clone: Path) -> str:
    """`comfy node pack` takes the files that the tests take."""
    comfy(cache, clone, "pack")
    names = zipfile.ZipFile(clone / "node.zip").namelist()
    if sorted(names) != archive.files():
        raise HostError(f"it took other files than the tests do: {sorted(set(names) ^ set(archive.files()))}")
    return f"{len(names)} files, {(clone / 'node.zip').stat().st_size:,} bytes"


def check_archive(packed: Path) -> str:
    """The archive's tests on the real archive: what is in it, a real ComfyUI with it alone, every old workflow."""
    command = [sys.executable, "-m", "pytest", "-p", "hosting.pytest_root", "-q", "tests/dev/test_archive.py"]
    env = {**os.environ, "VSF_ARCHIVE": str(packed)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode or "skipped" in last:
        raise HostError(f"the tests failed or were skipped:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    return last


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
