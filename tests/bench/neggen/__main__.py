"""The paper's benchmark on a ComfyUI of yours, or on the toy models.

    python3 dev.py bench neggen draw --out DIR [--server ADDRESS ...] [--template NAME] [--pairs ...] [--seeds N]

docs/neggen.md has the whole of it. Each command can be stopped at any point, and goes on where it was when run again.
"""

import argparse
import json
import os
import sys
from contextlib import closing, nullcontext, suppress
from pathlib import Path

from hosting.errors import HostError
from hosting.process import clean_up_on_signals
from hosting.server import ComfyServer

from neggen import drawing, forms, human, judging, pairs, templates, training
from neggen.elsewhere import NAMES, found
from neggen.endpoint import KEY_VARIABLE, Endpoint, Scores
from neggen.store import BadPicture, Cell, Store, opened
from neggen.words import plain

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
    chosen = pairs.load(options.pairs)
    if options.sample is not None:
        chosen = pairs.some(chosen, options.sample, options.seed)
    return chosen[: options.limit], seeds


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
            failed = drawing.draw(store, addresses, options.depth, options.patience, options.timeout, options.mixed)
        print(f"{len(store.cells())} of {len(store.cells(drawn=False))} pictures are in {store.folder}")
    return 1 if failed else 0


def take_in(options: argparse.Namespace) -> int:
    """Pictures that were made elsewhere, under a method's name."""
    chosen, seeds = planned(options)
    numbers = {pair: k for k, pair in enumerate(pairs.load(options.pairs), 1)}
    files = found(options.folder, options.files, {pair: numbers[pair] for pair in chosen}, seeds)
    failed = 0
    with closing(Store(options.out)) as store:
        for pair, seed, path in files:
            try:
                store.take_in(plain(options.name), pair, seed, path.read_bytes())
            except (BadPicture, OSError) as error:
                failed += 1
                print(f"{path}: {error}", flush=True)
    print(f"{len(files) - failed} of {len(chosen) * len(seeds)} pictures are in as {plain(options.name)!r}")
    return 1 if failed else 0


def the_judge(options: argparse.Namespace) -> tuple[str, Endpoint | None]:
    """A judge's name, and where it is when it is a model."""
    if not options.endpoint:
        return "toy detectors", None
    if not options.model:
        raise HostError("--endpoint needs --model, the name of the model there")
    prices, form = tuple(options.prices), forms.load(options.prompt)
    if not all(0 <= price < float("inf") for price in prices):
        raise HostError(f"--prices {prices}: expected two numbers, 0 or more")
    model = Endpoint(
        options.endpoint, options.model, options.key_variable, prices, timeout=options.answer_timeout, form=form
    )
    name = options.model if form.name == "ours" else f"{options.model}, prompt {form.name}"
    return plain(name, len(name)), model


def judge_missing(store: Store, options: argparse.Namespace, name: str, model: Endpoint | None) -> int:
    """Has everything judged that is drawn; gives the number of failures."""

    def enough() -> str:
        spent = model is not None and options.max_cost is not None and model.cost >= options.max_cost
        return f"{model.cost:.2f} is spent" if model and spent else ""

    def look(cell: Cell) -> tuple[Scores, str]:
        if model:
            return model.judge(store.path(cell.key), cell.pair)
        from neggen import toy_world

        return toy_world.judge(store.path(cell.key), cell.pair.prompt, cell.pair.missing_element), ""

    return judging.judge_all(store, name, look, options.at_once if model else 1, enough)


def seen(store: Store, cells: list[Cell]) -> list[tuple[tuple[int, int], pairs.Pair]]:
    """The size of each picture that can be read, and its pair."""
    out = []
    for cell in cells:
        with suppress(BadPicture):
            out.append((opened(store.path(cell.key)).size, cell.pair))
    return out


def confirm(options: argparse.Namespace) -> None:
    """Goes on only if that was said beforehand or is said now."""
    if not options.yes and not (sys.stdin.isatty() and input("go on? [y/N] ").lower() == "y"):
        raise HostError("nothing was sent; --yes goes on without asking")


def judge(options: argparse.Namespace) -> int:
    """By the toy's detectors, or by a model at an endpoint."""
    name, model = the_judge(options)
    with closing(Store(options.out)) as store:
        if model and (todo := seen(store, store.to_judge(name))):
            print(model.estimate(todo, options.at_once), flush=True)
            confirm(options)
        failed = judge_missing(store, options, name, model)
        if model:
            print(f"{model.tokens_in:,} tokens in, {model.tokens_out:,} out; cost {model.cost:.2f} at the given prices")
    return 1 if failed else 0


def search(options: argparse.Namespace) -> int:
    """Looks for the setting that removes most and still keeps what it should."""
    from neggen.search import Search, parse_ranges, search

    template, (chosen, seeds), (name, model) = templates.load(options.template), planned(options), the_judge(options)
    ranges = parse_ranges(options.range)
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
            drawing.draw(store, addresses, options.depth, options.patience, options.timeout, options.mixed)
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
        paths = report.write(
            *(store, options.out / "report", options.sheet, options.times, not options.no_paper),
            *(options.levels, options.positive_from),
        )
        print(*paths, sep="\n")
    return 0


def export(options: argparse.Namespace) -> int:
    """A judge's labels, as what models are trained on."""
    with closing(Store(options.out)) as store:
        target = options.to or options.out / "training"
        asked = training.Asked(options.judge, forms.load(options.prompt), options.validation, options.seed)
        print(training.write(store, target, asked))
    return 0


def count(text: str) -> int:
    """A number of things, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py bench neggen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=Path("bench-output/neggen"), metavar="DIR")
    what = argparse.ArgumentParser(add_help=False)
    what.add_argument("--pairs", default="toy", metavar="SOURCE", help="toy, ours, or a JSON or JSONL file")
    what.add_argument("--limit", type=count, metavar="N", help="only the first N pairs")
    what.add_argument("--sample", type=count, metavar="N", help="only N pairs, chosen by chance")
    what.add_argument("--seed", type=int, default=1, metavar="S", help="of that choice (1)")
    what.add_argument("--seeds", type=count, default=2, metavar="N", help="pictures of a pair (2)")
    what.add_argument("--first-seed", type=int, default=1, metavar="N", help="the first picture's seed (1)")
    servers = argparse.ArgumentParser(add_help=False)
    servers.add_argument("--server", action="append", default=[], metavar="ADDRESS", help="repeat it for several")
    servers.add_argument("--template", default="toy_sd3", metavar="NAME", help="a shipped one, or a .json file")
    servers.add_argument("--depth", type=count, default=2, metavar="N", help="graphs in a server's queue at a time (2)")
    servers.add_argument("--patience", type=float, default=600, metavar="S", help="wait so long for a lost server")
    servers.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds for one picture (3600)")
    servers.add_argument("--mixed", action="store_true", help="servers may differ in versions and GPU")
    judges = argparse.ArgumentParser(add_help=False)
    judges.add_argument("--endpoint", metavar="ADDRESS", help="OpenAI-compatible, such as http://127.0.0.1:8000/v1")
    judges.add_argument("--model", metavar="NAME", help="the model's name there; also the judge's in the report")
    judges.add_argument("--prompt", default="ours", metavar="FORM", help="ours, paper, or a JSON file with your own")
    judges.add_argument(
        "--key-variable", default=KEY_VARIABLE, metavar="NAME", help="environment variable with the key"
    )
    judges.add_argument("--prices", type=float, nargs=2, default=(0, 0), metavar=("IN", "OUT"), help="of 1e6 tokens")
    judges.add_argument("--max-cost", type=float, metavar="X", help="stop when so much is spent")
    judges.add_argument("--at-once", type=count, default=4, metavar="N", help="requests at a time (4)")
    judges.add_argument("--answer-timeout", type=float, default=120, metavar="S", help="seconds for one answer (120)")
    judges.add_argument("--yes", action="store_true", help="do not ask after the estimate")
    one = commands.add_parser("draw", parents=[common, what, servers], help="draw what is missing")
    one.add_argument("--run", action="append", default=[], metavar="[NAME=]METHOD:key=v,v", help="instead of the usual")
    one.add_argument("--only", nargs="+", metavar="NAME", help="of the runs, only these")
    one.set_defaults(work=draw)
    one = commands.add_parser("import", parents=[common, what], help="pictures that were made elsewhere")
    one.add_argument("folder", type=Path, metavar="FOLDER", help="with a picture for each pair and seed")
    one.add_argument("--name", required=True, metavar="METHOD", help="what the report calls them")
    one.add_argument("--files", default=NAMES, metavar="PATTERN", help=f"how they are named ({NAMES})")
    one.set_defaults(work=take_in)
    one = commands.add_parser("judge", parents=[common, judges], help="by the toy's detectors, or --endpoint's model")
    one.set_defaults(work=judge)
    one = commands.add_parser(
        "search", parents=[common, what, servers, judges], help="which setting for this checkpoint?"
    )
    one.add_argument("--method", default="vsf")
    one.add_argument("--fixed", nargs="*", default=[], metavar="key=value", help="settings that stay")
    one.add_argument("--range", nargs="+", default=["scale=0:8", "offset=-1:1"], metavar="key=LOW:HIGH")
    one.add_argument("--trials", type=count, default=20, metavar="N", help="settings to try in all (20)")
    one.set_defaults(work=search)
    one = commands.add_parser("human", parents=[common], help="a page on which you judge, blind")
    one.add_argument("--name", default="1", help="yours; each judge has a name")
    one.add_argument("--port", type=int, default=0)
    one.set_defaults(work=judge_by_hand)
    one = commands.add_parser("report", parents=[common], help="tables, plots and contact sheets: HTML, Markdown, CSV")
    one.add_argument("--sheet", type=int, default=12, metavar="N", help="pairs in the contact sheet (12)")
    one.add_argument("--times", action="store_true", help="also how long pictures took, in how much memory")
    one.add_argument("--no-paper", action="store_true", help="without the paper's own figures")
    one.add_argument("--levels", type=int, choices=(2, 3), default=0, help="2: a half counts as no; 3: no, half, yes")
    one.add_argument("--positive-from", default="", metavar="JUDGE", help="whose positive scores all tables have")
    one.set_defaults(work=write_report)
    one = commands.add_parser("export", parents=[common], help="a judge's labels as chats, to train a model on")
    one.add_argument("--judge", required=True, metavar="NAME", help="such as 'human 1'; the report has the names")
    one.add_argument("--prompt", default="ours", metavar="FORM", help="ours, paper, or a JSON file with your own")
    one.add_argument("--validation", type=float, default=0.1, metavar="SHARE", help="of the prompts, held out (0.1)")
    one.add_argument("--seed", type=int, default=1, metavar="S", help="of the choice of prompts (1)")
    one.add_argument("--to", type=Path, metavar="FOLDER", help="instead of DIR/training")
    one.set_defaults(work=export)
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
