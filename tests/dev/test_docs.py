"""What README and docs tell people: Python blocks run or are what the file that they name says, commands are taken."""

import importlib
import re
import shlex
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
FENCED = re.compile(r"^( *)```python *(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
"""A block, and the file that it is from: "```python nodes/negative.py"; without one it is to be run."""
BLOCKS = [(page, file, dedent(code)) for page, text in TEXTS.items() for _, file, code in FENCED.findall(text)]
RUN = [(page, code) for page, file, code in BLOCKS if not file]
SHOWN = [(page, file, code) for page, file, code in BLOCKS if file]
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
    assert len(RUN) >= 2 and len(SHOWN) >= 4 and len(COMMANDS) >= 10 and len(SCRIPTS) >= 2


@pytest.mark.parametrize(("page", "code"), RUN)
def test_python_block_runs(page, code):
    exec(compile(code, page, "exec"), {"__name__": "__main__"})  # noqa: S102


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
    for command in ("draw", "judge", "search", "human", "report"):
        with pytest.raises(SystemExit):
            parse_bench("neggen", [command, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--[\w-]+", TEXTS["neggen.md"]))
    assert len(named) >= 10 and named <= known


def test_readme_names_every_workflow():
    names = {path.stem.removeprefix("vsf_") for path in (ROOT / "workflows").glob("*.json")}
    assert {name for name in names if f"`{name}`" not in TEXTS["README.md"]} == set()
    table = TEXTS["README.md"].split("## What works")[1].split("## ")[0]
    listed = {word for line in table.splitlines() if line.startswith("| ") for word in re.findall(r"`(\w+)`", line)}
    assert listed <= names
