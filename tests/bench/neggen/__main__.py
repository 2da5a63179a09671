"""The paper's benchmark on a ComfyUI of yours, or on the toy models.

    python3 dev.py bench neggen draw --out DIR [--server ADDRESS ...] [--template NAME] [--pairs ...] [--seeds N]

docs/neggen.md has the whole of it. Each command can be stopped at any point, and goes on where it was when run again.
"""

import argparse
import os
import sys
from contextlib import closing, nullcontext
from pathlib import Path

from hosting.errors import HostError
from hosting.process import clean_up_on_signals
from hosting.server import ComfyServer

from neggen import drawing, pairs, templates
from neggen.store import Store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def toy_server(wanted: bool) -> ComfyServer | nullcontext[None]:
    """The real ComfyUI with the toy models and the benchmark's nodes, for who names no server."""
    if not wanted:
        return nullcontext()
    extra = [ROOT / "tests" / "toy" / "vsf_toy_text_encoder", HERE / "vsf_bench_methods"]
    return ComfyServer(os.environ["VSF_COMFYUI"], sys.executable, ROOT, os.environ["VSF_MODELS"], extra_nodes=extra)


def draw(options: argparse.Namespace) -> int:
    """Plans, and draws what is missing."""
    template = templates.load(options.template)
    runs = [template.check(run) for text in options.run for run in templates.parse_run(text)] or template.runs
    if options.only:
        unknown = sorted(set(options.only) - {run.name for run in runs})
        if unknown:
            raise HostError(f"--only {', '.join(unknown)}: there are {', '.join(run.name for run in runs)}")
        runs = [run for run in runs if run.name in options.only]
    chosen = pairs.load(options.pairs)[: options.limit]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    with closing(Store(options.out)) as store:
        store.plan(template, runs, chosen, seeds)
        with toy_server(not options.server) as server:
            addresses = [server.address] if server else options.server
            failed = drawing.draw(store, addresses, options.depth, options.patience, options.timeout)
        print(f"{len(store.cells())} of {len(store.cells(drawn=False))} pictures are in {store.folder}")
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench neggen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=Path("bench-output/neggen"), metavar="DIR")
    servers = argparse.ArgumentParser(add_help=False)
    servers.add_argument("--server", action="append", default=[], metavar="ADDRESS", help="repeat it for several")
    servers.add_argument("--template", default="toy_sd3", metavar="NAME", help="a shipped one, or a .json file")
    servers.add_argument("--pairs", default="toy", metavar="SOURCE", help="toy, ours, or a JSON or JSONL file")
    servers.add_argument("--limit", type=int, metavar="N", help="only the first N pairs")
    servers.add_argument("--seeds", type=int, default=2, metavar="N", help="pictures of a pair (2)")
    servers.add_argument("--first-seed", type=int, default=1, metavar="N")
    servers.add_argument("--depth", type=int, default=2, metavar="N", help="graphs in a server's queue at a time (2)")
    servers.add_argument("--patience", type=float, default=600, metavar="S", help="wait so long for a lost server")
    servers.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds for one picture (3600)")
    one = commands.add_parser("draw", parents=[common, servers], help="draw what is missing")
    one.add_argument("--run", action="append", default=[], metavar="[NAME=]METHOD:key=v,v", help="instead of the usual")
    one.add_argument("--only", nargs="+", metavar="NAME", help="of the runs, only these")
    one.set_defaults(work=draw)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; expected failures become one message and a non-zero exit."""
    options = parse(arguments)
    clean_up_on_signals()
    try:
        return options.work(options)
    except HostError as error:
        print(f"neggen: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("neggen: stopped; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
