"""What runs inside people's ComfyUI executes no text, loads no pickles, and touches neither network nor files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "__init__.py", *ROOT.glob("nodes/**/*.py"), *ROOT.glob("vsf_core/**/*.py")]
HARMLESS = {
    "abc",
    "collections",
    "comfy",
    "comfy_api",
    "comfy_execution",
    "contextlib",
    "dataclasses",
    "functools",
    "importlib",
    "inspect",
    "itertools",
    "logging",
}
HARMLESS |= {
    "json",
    "math",
    "numbers",
    "numpy",
    "PIL",
    "re",
    "sys",
    "threading",
    "torch",
    "typing",
    "unicodedata",
    "weakref",
}
HARMLESS |= {"sageattention", "flash_attn", "xformers", "triton", "os.environ", "__future__"}
"""Modules, or names of modules, that the pack may import; of these, ``torch`` and ``comfy`` can read files."""
BUILTINS = {"eval", "exec", "compile", "open", "input", "breakpoint", "__import__"}
METHODS = {"load", "save", "load_torch_file", "load_state_dict_from_url", "download_url_to_file", "open"}
METHODS |= {"read_text", "write_text", "read_bytes", "write_bytes", "unlink", "mkdir", "system", "popen"}
IN_SCRIPTS = r"\beval\b|\bFunction\s*\(|\bimport\s*\(|\bXMLHttpRequest\b|\bWebSocket\b|\bfetch\s*\(|innerHTML|https?://"


def findings(source: str) -> list[str]:
    """What a Python source imports or calls beyond the above."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] not in HARMLESS]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            if node.module.split(".")[0] not in HARMLESS:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [name for name in names if name not in HARMLESS]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                found.append(node.func.id)
            if (
                isinstance(node.func, ast.Attribute)
                and node.func.attr in METHODS
                and ast.unparse(node.func) != "tl.load"
            ):
                found.append(node.func.attr)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python(path):
    assert not findings(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", list(ROOT.glob("js/**/*.js")), ids=lambda path: path.name)
def test_scripts(path):
    code = re.sub(r"^\s*(//|/?\*).*", "", path.read_text(encoding="utf-8"), flags=re.M)  # JSDoc's types say import(...)
    assert not re.findall(IN_SCRIPTS, code)


@pytest.mark.parametrize(
    "bad",
    ["import pickle", "from urllib.request import urlopen", "eval(x)", "torch.load(p)", "open('x')", "p.read_text()"],
)
def test_the_scan_finds_what_it_should(bad):
    assert findings(bad)
