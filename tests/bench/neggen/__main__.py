"""The paper's benchmark on a ComfyUI of yours, or on the toy models.

    python3 dev.py bench neggen draw --out DIR [--server ADDRESS ...] [--template NAME] [--pairs ...] [--seeds N]

docs/neggen.md has the whole of it. Each command can be stopped at any point, and goes on where it was when run again.
"""

import argparse
import json
import os
import sys
from contextlib import closing, nullcontext
from pathlib import Path

from hosting.errors import HostError
from hosting.process import clean_up_on_signals
from hosting.server import ComfyServer
from PIL import Image

from neggen import drawing, human, judging, pairs, templates
from neggen.endpoint import KEY_VARIABLE, Endpoint
from neggen.store import Cell, Store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def toy_server(wanted: bool) -> ComfyServer | nullcontext[None]:
    """The real ComfyUI with the toy models and the benchmark's nodes, for who names no server."""
    if not wanted:
        return nullcontext()
    extra = [ROOT / "tests" / "toy" / "vsf_toy_text_encoder", HERE / "vsf_bench_methods"]
    return ComfyServer(os.environ["VSF_COMFYUI"], sys.executable, ROOT, os.environ["VSF_MODELS"], extra_nodes=extra)


def planned(options: argparse.Namespace) -> tuple[list[pairs.Pair], range]:
    """The pairs and seeds that are asked for."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return pairs.load(options.pairs)[: options.limit], seeds


def draw(options: argparse.Namespace) -> int:
    """Plans, and draws what is missing."""
    template = templates.load(options.template)
    runs = [template.check(run) for text in options.run for run in templates.parse_run(text)] or template.runs
    if options.only:
        unknown = sorted(set(options.only) - {run.name for run in runs})
        if unknown:
            raise HostError(f"--only {', '.join(unknown)}: there are {', '.join(run.name for run in runs)}")
        runs = [run for run in runs if run.name in options.only]
    with closing(Store(options.out)) as store:
        store.plan(template, runs, *planned(options))
        with toy_server(not options.server) as server:
            addresses = [server.address] if server else options.server
            failed = drawing.draw(store, addresses, options.depth, options.patience, options.timeout)
        print(f"{len(store.cells())} of {len(store.cells(drawn=False))} pictures are in {store.folder}")
    return 1 if failed else 0


def the_judge(options: argparse.Namespace) -> tuple[str, Endpoint | None]:
    """A judge's name, and where it is when it is a model."""
    if not options.endpoint:
        return "toy detectors", None
    if not options.model:
        raise HostError("--endpoint needs --model, the name of the model there")
    prices = tuple(options.prices)
    model = Endpoint(options.endpoint, options.model, options.key_variable, prices, timeout=options.answer_timeout)
    return options.model, model


def judge_missing(store: Store, options: argparse.Namespace, name: str, model: Endpoint | None) -> int:
    """Has everything judged that is drawn; gives the number of failures."""

    def enough() -> str:
        spent = model is not None and options.max_cost is not None and model.cost >= options.max_cost
        return f"{model.cost:.2f} is spent" if model and spent else ""

    def look(cell: Cell) -> tuple[tuple[float, float, float], str]:
        if model:
            return model.judge(store.path(cell.key), cell.pair)
        from neggen import toy_world

        return toy_world.judge(store.path(cell.key), cell.pair.prompt, cell.pair.missing_element), ""

    return judging.judge_all(store, name, look, options.at_once if model else 1, enough)


def confirm(options: argparse.Namespace) -> None:
    """Goes on only if that was said beforehand or is said now."""
    if not options.yes and not (sys.stdin.isatty() and input("go on? [y/N] ").lower() == "y"):
        raise HostError("nothing was sent; --yes goes on without asking")


def judge(options: argparse.Namespace) -> int:
    """By the toy's detectors, or by a model at an endpoint."""
    name, model = the_judge(options)
    with closing(Store(options.out)) as store:
        todo = [(Image.open(store.path(cell.key)).size, cell.pair) for cell in store.to_judge(name)]
        if model and todo:
            print(model.estimate(todo, options.at_once), flush=True)
            confirm(options)
        failed = judge_missing(store, options, name, model)
        if model:
            print(f"{model.tokens_in:,} tokens in, {model.tokens_out:,} out; cost {model.cost:.2f} at the given prices")
    return 1 if failed else 0


def search(options: argparse.Namespace) -> int:
    """Looks for the setting that removes most and still keeps what it should."""
    from neggen.search import Search, search

    template, (chosen, seeds), (name, model) = templates.load(options.template), planned(options), the_judge(options)
    ranges = {}
    for text in options.range:
        key, _, ends = text.partition("=")
        try:
            low, high = (float(end) for end in ends.split(":"))
        except ValueError:
            raise HostError(f"--range {text}: expected NAME=LOW:HIGH, such as scale=0:8") from None
        ranges[key] = (low, high)
    (fixed,) = templates.parse_run(":".join([options.method, *options.fixed]))
    if model:
        size = tuple(template.slots.get(side, 1024) for side in ("width", "height"))
        most = [(size, pair) for pair in chosen] * (len(seeds) * (options.trials + 1))
        print(f"at most {model.estimate(most, options.at_once)}", flush=True)
        confirm(options)
    asked = Search(template, options.method, fixed.settings, ranges, chosen, seeds, name)
    with closing(Store(options.out)) as store, toy_server(not options.server) as server:
        addresses = [server.address] if server else options.server

        def measure() -> None:
            drawing.draw(store, addresses, options.depth, options.patience, options.timeout)
            judge_missing(store, options, name, model)

        answer = search(store, asked, options.trials, measure)
    print(json.dumps(answer, indent=1))
    if not answer["keeps_enough"]:
        print("no setting that was tried keeps enough of the object and the quality; this one comes closest")
    return 0


def judge_by_hand(options: argparse.Namespace) -> int:
    """A page for someone to judge on."""
    with closing(Store(options.out)) as store:
        session = human.Session(store, options.name)
        if not session.cells:
            raise HostError(f"{options.out} has no pictures yet")
        human.serve(session, options.port, lambda address: print(f"open {address}  (Ctrl-C ends it)", flush=True))
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Tables, plots and contact sheets of what is there."""
    from neggen import report

    with closing(Store(options.out)) as store:
        for path in report.write(store, options.out / "report", options.sheet, options.times, not options.no_paper):
            print(path)
    return 0


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
    judges = argparse.ArgumentParser(add_help=False)
    judges.add_argument("--endpoint", metavar="ADDRESS", help="OpenAI-compatible, such as http://127.0.0.1:8000/v1")
    judges.add_argument("--model", metavar="NAME", help="the model's name there; also the judge's in the report")
    judges.add_argument(
        "--key-variable", default=KEY_VARIABLE, metavar="NAME", help="environment variable with the key"
    )
    judges.add_argument("--prices", type=float, nargs=2, default=(0, 0), metavar=("IN", "OUT"), help="of 1e6 tokens")
    judges.add_argument("--max-cost", type=float, metavar="X", help="stop when so much is spent")
    judges.add_argument("--at-once", type=int, default=4, metavar="N", help="requests at a time (4)")
    judges.add_argument("--answer-timeout", type=float, default=120, metavar="S", help="seconds for one answer (120)")
    judges.add_argument("--yes", action="store_true", help="do not ask after the estimate")
    one = commands.add_parser("draw", parents=[common, servers], help="draw what is missing")
    one.add_argument("--run", action="append", default=[], metavar="[NAME=]METHOD:key=v,v", help="instead of the usual")
    one.add_argument("--only", nargs="+", metavar="NAME", help="of the runs, only these")
    one.set_defaults(work=draw)
    one = commands.add_parser("judge", parents=[common, judges], help="by the toy's detectors, or --endpoint's model")
    one.set_defaults(work=judge)
    one = commands.add_parser("search", parents=[common, servers, judges], help="which setting for this checkpoint?")
    one.add_argument("--method", default="vsf")
    one.add_argument("--fixed", nargs="*", default=[], metavar="key=value", help="settings that stay")
    one.add_argument("--range", nargs="+", default=["scale=0:8", "offset=-1:1"], metavar="key=LOW:HIGH")
    one.add_argument("--trials", type=int, default=20, metavar="N", help="settings to try in all (20)")
    one.set_defaults(work=search)
    one = commands.add_parser("human", parents=[common], help="a page on which you judge, blind")
    one.add_argument("--name", default="1", help="yours; each judge has a name")
    one.add_argument("--port", type=int, default=0)
    one.set_defaults(work=judge_by_hand)
    one = commands.add_parser("report", parents=[common], help="tables, plots and contact sheets: HTML, Markdown, CSV")
    one.add_argument("--sheet", type=int, default=12, metavar="N", help="pairs in the contact sheet (12)")
    one.add_argument("--times", action="store_true", help="also how long pictures took, in how much memory")
    one.add_argument("--no-paper", action="store_true", help="without the paper's own figures")
    one.set_defaults(work=write_report)
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
