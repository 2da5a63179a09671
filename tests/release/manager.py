"""ComfyUI-Manager, as ComfyUI's tree pins it, on this pack: ``python -m release.manager CACHE_FOLDER``.

The pack is a git clone and Manager is offline: it lists, updates, disables and enables the clone. A pack that came from
the registry it can only list and disable without its online lists. Manager says "success" whatever happened, so what
counts is what is there afterwards.

Manager has a virtual environment of its own in the cache, ``manager-venv``, on top of the host's packages.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from hosting.client import ComfyClient
from hosting.errors import HostError
from hosting.host import LOCKS, fresh_venv, has_modules, install_locked, print_progress, remove, run_pip, venv_python
from hosting.server import FOLDERS, PACK_NAME, ComfyServer

from release import archive

NODE = "VSFModelPatch"
SECONDS = 60.0
AUTHOR = ("-c", "user.name=release", "-c", "user.email=release@localhost")


def check(cache: Path) -> str:
    """Runs it all and says which Manager did it; ``HostError`` names the step that failed."""
    tree = Path(os.environ["VSF_COMFYUI"])
    needs = tree / "manager_requirements.txt"
    if not needs.exists():
        raise HostError(f"{needs} is missing: this ComfyUI says nothing of ComfyUI-Manager's pip package")
    python = manager_python(cache / "manager-venv", needs)
    with tempfile.TemporaryDirectory(prefix="vsf-manager-") as name:
        manage(tree, python, Path(name))
    return f"lists, updates, disables and enables a git clone ({needs.read_text(encoding='utf-8').strip()})"


def manager_python(folder: Path, needs: Path) -> Path:
    """The interpreter of an environment with Manager, which sees the host's packages as well."""
    python, wanted = venv_python(folder), needs.read_text(encoding="utf-8").strip()
    if f"{wanted.replace('_', '-')} " not in (LOCKS / "manager.txt").read_text(encoding="utf-8"):
        raise HostError(f"{needs} wants {wanted}, which is not the one in {LOCKS / 'manager.txt'}: run `dev.py lock`")
    if not has_modules(python, ("comfyui_manager", "git", "github", "torch")):
        print_progress(f"installing {wanted}")
        fresh_venv(remove(folder))
        inside = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        (Path(inside) / "host.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install_locked(run_pip, python, "manager.txt", "--quiet")
    return python


def manage(tree: Path, python: Path, folder: Path) -> None:
    """Has Manager do everything to a clone of the newest commit."""
    origin, base = folder / f"{PACK_NAME}.git", folder / "base"
    clone, settings = base / "custom_nodes" / PACK_NAME, base / "user" / "__manager" / "config.ini"
    archive.git("init", "--quiet", "--bare", "--initial-branch=main", str(origin))
    archive.git("push", "--quiet", str(origin), "HEAD:refs/heads/main")
    for name in FOLDERS:
        (base / name).mkdir(parents=True)
    archive.git("clone", "--quiet", str(origin), str(clone))
    settings.parent.mkdir()
    settings.write_text("[default]\nnetwork_mode = offline\n")
    # in a base folder of its own: ComfyServer's holds a link to the pack, which Manager does not move
    arguments = ["--enable-manager", "--base-directory", str(base)]
    with ComfyServer(tree, python, clone, None, extra_args=arguments) as server:
        expect(server, "listing it", enabled=True, nodes=True, commit=head(clone))

        archive.git(*AUTHOR, "commit", "--quiet", "--allow-empty", "--message=newer", folder=clone)
        newer = head(clone)
        archive.git("push", "--quiet", folder=clone)
        archive.git("reset", "--quiet", "--hard", "HEAD~1", folder=clone)
        run(server, "update", {"node_name": PACK_NAME, "node_ver": "unknown"})
        expect(server, "updating it", enabled=True, nodes=True, commit=newer)

        run(server, "disable", {"node_name": PACK_NAME, "is_unknown": True})
        restart(server)
        expect(server, "disabling it", enabled=False, nodes=False, commit=newer)

        run(server, "enable", {"cnr_id": PACK_NAME})
        restart(server)
        expect(server, "enabling it", enabled=True, nodes=True, commit=newer)


def head(clone: Path) -> str:
    """The commit that a clone is at."""
    return archive.git("rev-parse", "HEAD", folder=clone).strip()


def restart(server: ComfyServer) -> None:
    """As people do it after every change."""
    server.kill()
    server.start()


def run(server: ComfyServer, kind: str, params: dict[str, Any]) -> None:
    """Queues a task of Manager's and waits for its end."""
    client, ui_id = ComfyClient(server.address), uuid.uuid4().hex
    task = {"ui_id": ui_id, "client_id": client.client_id, "kind": kind, "params": params}
    client._request("/v2/manager/queue/task", json.dumps(task).encode())
    client._request("/v2/manager/queue/start", b"{}")
    deadline = time.monotonic() + SECONDS
    while not json.loads(client._request(f"/v2/manager/queue/history?ui_id={ui_id}")).get("history"):
        if time.monotonic() > deadline:
            raise HostError(f"ComfyUI-Manager did not end its task {kind} within {SECONDS:.0f} s")
        time.sleep(0.2)


def expect(server: ComfyServer, after: str, *, enabled: bool, nodes: bool, commit: str) -> None:
    """What Manager and ComfyUI say of the pack now."""
    client = ComfyClient(server.address)
    listed = json.loads(client._request("/v2/customnode/installed")).get(PACK_NAME, {})
    found = {"enabled": listed.get("enabled"), "nodes": NODE in client.object_info(), "commit": listed.get("ver")}
    wanted = {"enabled": enabled, "nodes": nodes, "commit": commit}
    if found != wanted:
        raise HostError(f"after {after}, ComfyUI-Manager and ComfyUI say {found}, and not {wanted}")


if __name__ == "__main__":
    try:
        print(check(Path(sys.argv[1])))
    except HostError as error:
        sys.exit(f"FAILED  {error}")
