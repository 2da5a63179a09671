"""What README, CONTRIBUTING and docs tell people: Python blocks run or are what the file that they name says, commands
are taken, citations are whole, and links lead somewhere. `dev.py demo` itself runs in test_demo.py; `dev.py test` runs
this."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from release.starts import start_of, starts

ROOT = Path(__file__).resolve().parents[2]
NAMED = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in NAMED}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "js" / "docs").rglob("*.md")]
FENCED = re.compile(r"^( *)```([^`\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, kind, dedent(block)) for page, text in TEXTS.items() for _, kind, block in FENCED.findall(text)]
RUN = [(page, block) for page, kind, block in BLOCKS if kind == "python"]
SHOWN = [(page, kind.split()[1], block) for page, kind, block in BLOCKS if kind.startswith("python ")]
"""Of the file that the fence names: "```python nodes/negative.py"."""
TYPED = [(page, block) for page, kind, block in BLOCKS if kind == ""]
CITED = [(page, block) for page, kind, block in BLOCKS if kind == "bibtex"]
JOINED = [text.replace("\\\n", " ") for text in TEXTS.values()]
COMMANDS = sorted({line for text in JOINED for line in re.findall(r"python3? dev\.py ([^`\n]+)", text)})
SCRIPTS = sorted({path for text in JOINED for path in re.findall(r"python3? (tests/[\w/]+\.py)", text)})


@pytest.fixture(scope="module")
def parse(dev):
    return dev.parse


@pytest.fixture(scope="module")
def parse_bench():
    """What `dev.py bench NAME` makes of its arguments, by its own parser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "bench")
        yield lambda name, rest: importlib.import_module({"neggen": "neggen.__main__"}.get(name, name)).parse(rest)


def test_there_is_something_to_run():
    assert len(RUN) >= 2 and len(SHOWN) >= 4 and len(CITED) >= 1 and len(COMMANDS) >= 10 and len(SCRIPTS) >= 2


def test_no_block_is_of_a_kind_that_nothing_here_looks_at():
    assert len(BLOCKS) == len(RUN) + len(SHOWN) + len(TYPED) + len(CITED), {kind for _, kind, _ in BLOCKS}
    for page, text in TEXTS.items():
        fences = re.findall(r"^[ >*-]*(?:```|~~~)", text, re.MULTILINE)
        assert len(fences) == 2 * sum(page == where for where, _, _ in BLOCKS), f"{page}: unknown fences"


@pytest.mark.parametrize(("page", "block"), TYPED)
def test_what_people_type_are_commands_of_dev_py(page, block):
    """Each of them is then among COMMANDS."""
    for line in block.replace("\\\n", " ").strip().splitlines():
        assert re.match(r"python3 dev\.py \w", line), line


@pytest.mark.parametrize(("page", "code"), RUN)
def test_python_block_runs(page, code, tmp_path):
    """As they say: with this folder on Python's path, and nothing else."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "block"), CITED)
def test_citation_is_whole(page, block):
    entries = re.split(r"^@", block, flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert re.match(r"\w+\{\w+,\n", entry) and entry.rstrip().endswith("\n}"), entry
        depth = 0
        for letter in entry.strip()[:-1]:
            depth += (letter == "{") - (letter == "}")
            assert depth >= 0, entry
        assert depth == 1, entry
        fields = dict(re.findall(r"^ +(\w+) *= \{(.*)\},?$", entry, re.MULTILINE))
        assert len(fields) == entry.strip().count("\n") - 1, entry
        assert all(fields.get(name) for name in ("author", "title", "year")), entry


def anchors(path: Path) -> set[str]:
    """What links can name in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_pictures_are_there(path):
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(<?([^)>\s]+)|(?:src|href)=\"([^\"]+)\"|^\[[^]]+\]: +(\S+)", text, re.MULTILINE)
    for link in ("".join(found) for found in links):
        if not re.match(r"https?://", link):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("page", "file", "code"), SHOWN)
def test_python_block_is_what_the_file_says(page, file, code):
    text = (ROOT / file).read_text(encoding="utf-8")
    if code.startswith('"""'):  # the whole of it
        assert code == text
    else:
        said, shown = ("\n".join(line.strip() for line in part.splitlines()) for part in (text, code))
        assert shown in said


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_taken(parse, parse_bench, line):
    words = shlex.split(line, comments=True)
    _, rest = parse(words)
    if words[0] == "bench":
        name, *options = rest
        assert (ROOT / "tests" / "bench" / f"{name}.py").exists() or (ROOT / "tests" / "bench" / name).is_dir()
        if options:
            parse_bench(name, options)
    elif words[0] == "test":
        assert all((ROOT / word).exists() for word in rest if "/" in word)
    else:
        assert rest == []


@pytest.mark.parametrize("path", SCRIPTS)
def test_script_is_there(path):
    assert (ROOT / path).exists()


def test_neggen_has_every_option_that_its_page_names(parse_bench, capsys):
    for command in ("draw", "import", "judge", "search", "human", "report", "export"):
        with pytest.raises(SystemExit):
            parse_bench("neggen", [command, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for page in ("neggen.md", "judge.md"):
        named = set(re.findall(r"(?<![\w-])--\w[\w-]*", TEXTS[page])) - {"--encoder", "--type", "--bench-nodes"}
        assert len(named) >= 8 and named <= known, named - known


def test_help_of_a_benchmark_is_its_own(parse):
    """`dev.py bench` hands it on: its own would hide what the benchmark can do."""
    for words in (["bench", "--help"], ["bench", "neggen", "-h"], ["bench", "neggen", "draw", "--help"]):
        assert parse(words)[1] == words[1:]


def test_readme_names_every_workflow():
    names = {path.stem.removeprefix("vsf_") for path in (ROOT / "workflows").glob("*.json")}
    assert {name for name in names if f"`{name}`" not in TEXTS["README.md"]} == set()
    table = TEXTS["README.md"].split("## What works")[1].split("## ")[0]
    listed = {word for line in table.splitlines() if line.startswith("| ") for word in re.findall(r"`(\w+)`", line)}
    assert listed <= names


def nodes_of(workflow):
    """The widgets of a workflow's nodes, and of its subgraphs', by type."""
    made = json.loads(workflow.read_text(encoding="utf-8"))
    graphs = [made, *made.get("definitions", {}).get("subgraphs", ())]
    return {node["type"]: node.get("widgets_values") for graph in graphs for node in graph["nodes"]}


def test_published_numbers_are_the_same_everywhere():
    """In the presets, their help page, docs/settings.md, the shipped workflows, and the benchmark's template."""
    presets = {row["preset"]: (row["scale"], row["offset"], row["layout"]) for row in starts()}
    quality, schnell = presets["quality"], presets["schnellLow"]
    assert (quality, presets["strong"]) == ((3.3, 0.2, "released"), (3.8, 0.2, "released"))
    assert (schnell, presets["schnellHigh"]) == ((3.5, 0.0, "released"), (6.0, 0.0, "released"))

    help_page = (ROOT / "js" / "docs" / "VSFModelPatch.md").read_text(encoding="utf-8")
    for label, name in (
        ("Quality (SD3.5)", "quality"),
        ("Strong (SD3.5)", "strong"),
        ("Hard", "hard"),
        ("Harder", "harder"),
    ):
        scale, offset, layout = presets[name]
        assert f"| {label} | {scale:g}, {offset:g} | {layout} |" in help_page
    assert "| 3.3, 0.2 | 3.3, 0.2, `layout` *released*: preset *Quality* |" in TEXTS["settings.md"]
    assert "| 3.5 to 6, `offset` 0, *released*, `extrapolation` 0: both Flux presets |" in TEXTS["settings.md"]

    for workflow in (ROOT / "workflows").glob("*.json"):  # each begins where the table says
        made = nodes_of(workflow)
        files = [str(made[kind][0]) for kind in ("UNETLoader", "CheckpointLoaderSimple") if kind in made]
        begin = start_of(*files)
        scale, offset, _, _, _, layout, *_ = made["VSFModelPatch"]
        if "tiny" not in workflow.name:
            assert (scale, offset, layout) == (begin["scale"], begin["offset"], begin["layout"]), workflow.name
    readme = TEXTS["README.md"].split("## Settings by model")[1].split("## ")[0]
    for row in starts():
        if row.get("files") or row["preset"] == "start":
            assert f"| {row['scale']:g}, {row['offset']:g}" in readme, row

    of_sd35 = [*(ROOT / "workflows").glob("*sd35*.json"), *(ROOT / "subgraphs").glob("*.json")]
    edit = ROOT / "workflows" / "vsf_generate_then_edit_flux_kontext.json"  # SD3.5's picture beside an edit of it
    of_schnell = list((ROOT / "workflows").glob("*flux_schnell*.json"))
    assert len(of_sd35) == 6 and len(of_schnell) == 2
    for workflow, preset in [*((w, quality) for w in (*of_sd35, edit)), *((w, schnell) for w in of_schnell)]:
        nodes = nodes_of(workflow)
        scale, offset, _, _, _, layout, *_ = nodes["VSFModelPatch"]
        assert (scale, offset, layout) == preset, workflow.name
        if preset == schnell:
            assert nodes["VSFNegativeConditioning"][2] == 0.0 and nodes["KSampler"][2] == 8, workflow.name
    for workflow in (ROOT / "workflows").glob("*wan21*causvid.json"):
        assert nodes_of(workflow)["ModelSamplingSD3"] == [3.0], workflow.name
