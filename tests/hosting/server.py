"""The real ComfyUI server as a context manager: own process group, own temporary folders, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from hosting.errors import PortTaken, ServerDied

FLAGS = (
    "--cpu",
    "--disable-auto-launch",
    "--use-pytorch-cross-attention",
    "--disable-api-nodes",
    *("--database-url", "sqlite:///:memory:"),
)
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
PACK_NAME = "ComfyUI-VSF"
NOT_COPIED = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "demo-output")
LOG_LINES = 30
START_SECONDS = 180.0
STOP_SECONDS = 10.0


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Refuses a port that another program has."""
    with socket.socket() as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise PortTaken(f"port {port} can't be used ({error}): choose another") from None


def place(pack: Path, target: Path) -> None:
    """Makes a pack's folder appear at `target`."""
    try:
        target.symlink_to(pack.resolve(), target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(pack, target, ignore=NOT_COPIED)


class ComfyServer:
    """A server of the given ComfyUI tree with `pack` in its custom_nodes and `models` as an extra models folder.

    `extra_nodes` are further folders for its custom_nodes.

    Use it in a `with` statement: it answers on `address` inside, and is gone, with all its files, afterwards.
    """

    def __init__(
        self,
        tree: Path | str,
        python: Path | str,
        pack: Path | str,
        models: Path | str | None,
        port: int | None = None,
        extra_args: Sequence[str] = (),
        extra_nodes: Sequence[Path] = (),
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.tree, self.python, self.pack = Path(tree), Path(python), Path(pack)
        self.models = Path(models) if models else None
        self.wanted_port, self.extra_args, self.extra_nodes = port, list(extra_args), list(extra_nodes)
        self.start_seconds, self.stop_seconds = start_seconds, STOP_SECONDS
        self.base: Path | None = None
        self.process: subprocess.Popen | None = None
        self.address = ""
        self._last_log = ""

    def __enter__(self) -> ComfyServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and returns once it answers; after `kill`, with the folders that it left."""
        if self.wanted_port:
            check_port(self.wanted_port)
        port = self.wanted_port or free_port()
        self.address = f"http://127.0.0.1:{port}"
        if self.base is None:
            self.base = self._make_base()
        command = [str(self.python), str(self.tree / "main.py"), *FLAGS, "--base-directory", str(self.base)]
        command += ["--listen", "127.0.0.1", "--port", str(port), *self._models_arguments(), *self.extra_args]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with (self.base / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.base,
                env={**env, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_it_answers()

    def _make_base(self) -> Path:
        """A new base folder with the packs in it."""
        base = Path(tempfile.mkdtemp(prefix="comfyui-vsf-"))
        for name in FOLDERS:
            (base / name).mkdir()
        for name, source in {PACK_NAME: self.pack, **{path.name: path for path in self.extra_nodes}}.items():
            place(source, base / "custom_nodes" / name)
        return base

    def _models_arguments(self) -> list[str]:
        """Names every folder below `models` to ComfyUI. The file is JSON, which is YAML too."""
        if self.base is None or self.models is None or not self.models.is_dir():
            return []
        names = sorted(entry.name for entry in self.models.iterdir() if entry.is_dir())
        config = self.base / "extra_model_paths.yaml"
        config.write_text(json.dumps({"vsf": {"base_path": str(self.models), **{name: name for name in names}}}))
        return ["--extra-model-paths-config", str(config)]

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if not self.is_running():
                raise ServerDied(f"the ComfyUI server ended while it started. {self._tail()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/system_stats", timeout=5):
                return
            time.sleep(0.2)
        raise ServerDied(f"the ComfyUI server did not answer within {self.start_seconds:.0f} s. {self._tail()}")

    def is_running(self) -> bool:
        """Whether the server's process is alive."""
        return self.process is not None and self.process.poll() is None

    def wait(self) -> None:
        """Returns when someone interrupts; raises if the server ends by itself."""
        if self.process is not None:
            self.process.wait()
            raise ServerDied(f"the ComfyUI server ended. {self._tail()}")

    def log(self) -> str:
        """Everything that the server has printed, also after it was stopped."""
        if self.base is not None:
            with contextlib.suppress(OSError):
                self._last_log = (self.base / "server.log").read_text(encoding="utf-8", errors="replace")
        return self._last_log

    def _tail(self) -> str:
        lines = self.log().strip().splitlines()[-LOG_LINES:] or ["(it printed nothing)"]
        return "Its last log lines:\n" + "\n".join(f"  {line}" for line in lines)

    def kill(self) -> None:
        """Ends the server at once, as a crash would, and keeps its folders."""
        if self.process is not None:
            self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            self.process.wait(self.stop_seconds)
            self.process = None

    def stop(self) -> None:
        """Ends the server and its children and deletes its folders. Safe to call twice."""
        if self.process is not None:
            self._signal(signal.SIGTERM)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(self.stop_seconds)
            finally:
                self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                self.process.wait(self.stop_seconds)
            self.process = None
        if self.base is not None:
            self.log()
            shutil.rmtree(self.base, ignore_errors=True)
            self.base = None

    def _signal(self, number: int) -> None:
        """Signals the whole process group, which outlives the server when a node started processes of its own."""
        assert self.process is not None
        if sys.platform == "win32":
            self.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
