"""What README and docs tell people to run: every Python block runs, every dev.py command line is one that it takes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (path.name, code)
    for path in PAGES
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
]
TEXTS = [path.read_text(encoding="utf-8") for path in PAGES]
COMMANDS = sorted({line for text in TEXTS for line in re.findall(r"python3? dev\.py ([^`\n]+)", text)})


@pytest.fixture(scope="module")
def parse(dev):
    return dev.parse


def test_there_is_something_to_run():
    assert BLOCKS and len(COMMANDS) >= 6


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_python_block_runs(page, code):
    exec(compile(code, page, "exec"), {"__name__": "__main__"})  # noqa: S102


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_taken(parse, line):
    words = line.split()
    _, rest = parse(words)
    if words[0] == "bench":
        assert (ROOT / "tests" / "bench" / f"{rest[0]}.py").exists() or (ROOT / "tests" / "bench" / rest[0]).is_dir()
    else:
        assert rest == []
