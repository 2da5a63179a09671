"""The archive that the registry hands out: git's files less .comfyignore, as `comfy node pack` takes them."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

from hosting.errors import HostError
from hosting.host import ROOT


def git(*arguments: str, folder: Path = ROOT) -> str:
    """What a git command prints; ``HostError`` with git's own words when it fails."""
    command = ["git", "-c", "safe.directory=*", "-C", str(folder), *arguments]  # whoever owns the clone
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    except OSError as error:
        raise HostError(f"git does not run ({error}): this needs git and a clone of the repository") from error
    if done.returncode:
        raise HostError(f"git {' '.join(arguments)} failed (is this a git clone?): {done.stderr.strip()}")
    return done.stdout


def files() -> list[str]:
    """Paths in the archive, with forward slashes, relative to the repository."""
    ignored = git("ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore").split("\0")
    return sorted(set(git("ls-files", "-z").split("\0")) - set(ignored) - {""})


def write(target: Path) -> None:
    """Writes the archive as a zip file."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for name in files():
            out.write(ROOT / name, name)
