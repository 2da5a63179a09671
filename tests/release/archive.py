"""The archive that the registry hands out: git's files less .comfyignore, as `comfy node pack` takes them.

``python tests/release/archive.py`` (standard library) writes their names down, in ``tests/dev/archive.txt``.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from hosting.errors import HostError  # noqa: E402
from hosting.host import ROOT  # noqa: E402

SNAPSHOT = ROOT / "tests" / "dev" / "archive.txt"


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


def listed() -> list[str]:
    """The same as they were written down."""
    return SNAPSHOT.read_text(encoding="utf-8").splitlines()


def write(target: Path, names: list[str]) -> None:
    """Writes an archive of these files."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for name in names:
            out.write(ROOT / name, name)


if __name__ == "__main__":
    SNAPSHOT.write_text("".join(f"{name}\n" for name in files()), encoding="utf-8")
    print(SNAPSHOT)
