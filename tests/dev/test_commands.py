"""dev.py as people run it: exit codes, one clear message instead of a traceback, nothing left running."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hosting import process
from hosting.host import venv_python

ROOT = Path(__file__).resolve().parents[2]
NEEDS_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals: it ends a process at once")


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy of what dev.py needs, with no model script, so that no models are made."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "tests" / "hosting", folder / "tests" / "hosting")
    shutil.copy(ROOT / "tests" / "requirements.txt", folder / "tests")
    shutil.copytree(ROOT / "tests" / "locks", folder / "tests" / "locks")
    shutil.copy(ROOT / "dev.py", folder)
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    return folder


@pytest.fixture
def start(repository, tmp_path):
    """Starts dev.py on an install; gives the process."""

    def run(*arguments: str, install: Path, **env: str) -> subprocess.Popen:
        own = {"COMFYUI_PATH": str(install), "COMFYUI_PYTHON": sys.executable}
        return subprocess.Popen(
            [sys.executable, str(repository / "dev.py"), *arguments],
            env={**os.environ, **own, "VSF_HOST_DIR": str(tmp_path / "cache"), "VSF_CHROMIUM": "chrome", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )

    return run


@pytest.fixture
def dead_install(tmp_path) -> Path:
    """A ComfyUI folder whose server dies at once."""
    tree = tmp_path / "ComfyUI"
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").write_text("raise SystemExit('the disk is on fire')")
    (tree / "comfyui_version.py").write_text('__version__ = "0.20.0"\n')
    return tree


def fails(command: subprocess.Popen, message: str) -> str:
    """Asserts a clean failure with one message."""
    _, error = command.communicate(timeout=60)
    assert command.returncode not in (0, None)
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert error.count("dev.py: ") == 1
    return error


def test_setup_prints_one_object_as_its_last_line(start, dead_install, tmp_path):
    command = start("setup", "--json", install=dead_install)
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 0
    assert json.loads(out.splitlines()[-1]) == {
        "python": sys.executable,
        "comfyui": {"version": "0.20.0", "path": str(dead_install)},
        "models": str(tmp_path / "cache" / "models"),
        "version": "1.2.3",
    }
    assert len(out.splitlines()) == 1


def test_a_server_that_dies_is_one_message(start, dead_install):
    assert "the disk is on fire" in fails(start("serve", install=dead_install), "ended while it started")


def test_a_taken_port_is_one_message(start, dead_install):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        fails(start("serve", "--port", port, install=dead_install), f"port {port} can't be used")


def test_a_wrong_install_is_one_message(start, tmp_path):
    fails(start("setup", install=tmp_path / "nowhere"), "nowhere is not a ComfyUI folder")


def test_a_version_needs_the_downloaded_trees(start, dead_install):
    fails(start("test", "--comfyui", "0.16.3", install=dead_install), "unset COMFYUI_PATH")


def test_missing_test_tools_are_one_message(start, dead_install, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("torch", "torchvision", "torchaudio", "aiohttp", "safetensors", "PIL"):
        (bare / f"{name}.py").touch()
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)})
    for file in bare.iterdir():
        shutil.copy(file, packages)
    python = str(venv_python(venv))
    command = start("test", install=dead_install, COMFYUI_PYTHON=python)
    fails(command, rf"test tools are missing there: {re.escape(python)} -m pip install -r .*requirements\.txt")


def test_no_benchmarks_yet(start, dead_install):
    fails(start("bench", install=dead_install), "no benchmarks yet")


def test_help_and_unknown_arguments(start, dead_install):
    out, _ = start("--help", install=dead_install).communicate(timeout=60)
    assert all(command in out for command in ("setup", "demo", "test", "bench", "gpu", "serve"))
    command = start("serve", "--prot", "1", install=dead_install)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 2 and "unknown arguments: --prot 1" in error


@NEEDS_SIGNALS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_serve_leaves_no_server(start, comfyui, number):
    command = start("serve", install=comfyui)
    address = re.search(r"http://127\.0\.0\.1:(\d+)", command.stdout.readline())
    assert address
    command.send_signal(number)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 130 and error.endswith("dev.py: stopped\n") and "Traceback" not in error
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(address[1]))) != 0


@NEEDS_SIGNALS
def test_a_child_that_a_signal_ends_is_reported(capfd):
    status = process.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert status == 137
    assert "dev.py: signal 9 ended" in capfd.readouterr().err
