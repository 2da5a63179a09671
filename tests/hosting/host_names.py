"""Compares what this pack takes from ComfyUI by name with a ComfyUI tree: ``python3 tests/hosting/host_names.py TREE``.

TREE may be a whole ComfyUI or a folder with some of its files at their places: what is in files that are not there is
not asked. Nothing of it is imported. The lists are in ``nodes/host_check.py``; printed is what is missing, what has
moved, which arguments are gone or have other places, and which are new. The exit status is 1 if something is missing
that every run stands on.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Finding(NamedTuple):
    """kind: missing, moved, arguments, new; needed: whether every run stands on it."""

    kind: str
    needed: bool
    text: str


def lists() -> ModuleType:
    """``nodes/host_check.py``, which imports nothing of ComfyUI's."""
    spec = importlib.util.spec_from_file_location("vsf_host_check", ROOT / "nodes" / "host_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tree:
    """A ComfyUI's files, read and never run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parsed = cache(self._parsed)

    def file(self, module: str) -> Path | None:
        """A module's file, if the folder has it."""
        place = self.root / Path(*module.split("."))
        return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)

    def _parsed(self, path: Path) -> ast.Module:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))

    def define(self, module: str, name: str, seen: frozenset = frozenset()) -> ast.AST | None:
        """What a top-level name of a module is: a definition, or whatever else binds it; looked up through imports of
        files that are there."""
        path = self.file(module)
        if path is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        for node in walked(self.parsed(path)):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name:
                return node
            if name in bound(node):
                value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
                same = self.define(module, value.id, seen) if isinstance(value, ast.Name) else None
                return same or node
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for one in node.names:
                    if (one.asname or one.name) == name:
                        source = self.source(module, path, node)
                        return (source and self.define(source, one.name, seen)) or node
        return None

    def source(self, module: str, path: Path, node: ast.Import | ast.ImportFrom) -> str | None:
        """The module that an import names."""
        if isinstance(node, ast.Import):
            return None
        parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1] if node.level else []
        return ".".join([*parts, *(node.module or "").split(".")]).strip(".")

    def classes(self, module: str, kind: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and those that it derives from, as far as files are there."""
        yield module, kind
        for base in kind.bases:
            words = ast.unparse(base).split(".")
            found = self.define(module, words[-1])
            if found is None and len(words) > 1:
                found, module = self.of_imported(module, words), module
            if isinstance(found, ast.ClassDef) and found is not kind:
                yield from self.classes(module, found)

    def of_imported(self, module: str, words: list[str]) -> ast.AST | None:
        """``words[-1]`` of a module that another one imports whole: comfy.x.Y, or x.Y after `from comfy import x`."""
        for source in (".".join(words[:-1]), f"comfy.{words[-2]}"):
            if self.file(source) is not None:
                return self.define(source, words[-1])
        return None

    def member(self, module: str, kind: ast.ClassDef, name: str, instance: bool) -> ast.AST | None:
        """A class's attribute, or one that its methods give to `self`."""
        for _, one in self.classes(module, kind):
            for node in one.body:
                if (isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name) or name in bound(node):
                    return node
            inner = (
                node for method in one.body if instance and isinstance(method, FUNCTIONS) for node in ast.walk(method)
            )
            if any(isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and n.attr == name for n in inner):
                return one
            given = (node for method in one.body if isinstance(method, FUNCTIONS) for node in ast.walk(method))
            if not instance and any(
                ast.unparse(n) == f"{one.name}.{name}" for n in given if isinstance(n, ast.Attribute)
            ):
                return one
        return None

    def places(self, name: str) -> list[str]:
        """The files that define a class or function of this name at their top level."""
        wanted = re.compile(rf"^(?:class|def|async def) {re.escape(name)}\b", re.MULTILINE)
        files = (path for path in sorted(self.root.rglob("*.py")) if "custom_nodes" not in path.parts)
        return [
            path.relative_to(self.root).as_posix()
            for path in files
            if wanted.search(path.read_text(encoding="utf-8", errors="replace"))
        ]


def walked(body: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, those in its ifs and tries too."""
    for node in ast.iter_child_nodes(body):
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from walked(node)


def bound(node: ast.AST) -> set[str]:
    """The names that an assignment binds."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's parameters, without self."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [one.arg for one in every if one.arg not in ("self", "cls")]


def find(tree: Tree, module: str, name: str) -> ast.AST | None:
    """What ``name`` of a module is; as in the lists."""
    name, instance = name.replace("().", "."), "()." in name
    first, *rest = name.split(".")
    found = tree.define(module, first)
    for part in rest:
        if not isinstance(found, ast.ClassDef):  # of a module that is imported whole: it is another file's
            return found
        found = tree.member(module, found, part, instance)
    return found


def compare(root: Path) -> tuple[list[Finding], int, list[str]]:
    """What differs, how many things were looked for, and the modules that the folder has no file of."""
    check, tree, findings, looked, absent = lists(), Tree(root), [], 0, []
    for needed, listed in ((True, check.NEEDED), (False, check.WHERE_PRESENT)):
        for module, things in listed.items():
            path = tree.file(module)
            if path is None:
                absent.append(module)
                continue
            looked += len(things)
            for thing in things:
                findings += [Finding(kind, needed, text) for kind, text in differs(tree, check, module, path, thing)]
    return findings, looked, absent


def differs(tree: Tree, check: ModuleType, module: str, path: Path, thing: str) -> Iterator[tuple[str, str]]:
    """How a thing of the lists is otherwise in this tree."""
    name, listed = check.parsed(thing)
    if name.startswith("'"):
        words = {n.value for n in ast.walk(tree.parsed(path)) if isinstance(n, ast.Constant)}
        if ast.literal_eval(name) not in words:
            yield "missing", f"{module}: the word {name}"
        return
    found = find(tree, module, name)
    if found is None:
        places = tree.places(name.partition(".")[0].removesuffix("()")) if "." not in name.replace("().", ".") else []
        yield ("moved", f"{module}.{name} is in {', '.join(places)}") if places else ("missing", f"{module}.{name}")
        return
    if isinstance(found, ast.ClassDef) and listed is not None:
        found = tree.member(module, found, "__init__", False)
    if listed is None or not isinstance(found, FUNCTIONS):
        return
    given = parameters(found)
    if wrong := check.misfits(listed, given):
        yield "arguments", f"{module}.{name} takes ({', '.join(given)}), not as listed: {', '.join(wrong)}"
    if new := [one for one in given if one not in {word.rstrip("?") for word in listed}]:
        yield "new", f"{module}.{name} also takes {', '.join(new)}"


def version_of(root: Path) -> str:
    """What the tree says that it is."""
    path = root / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', path.read_text(encoding="utf-8")) if path.is_file() else None
    return found[1] if found else "of unknown version"


def main(arguments: list[str]) -> int:
    """Prints the comparison."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python3 tests/hosting/host_names.py TREE (a ComfyUI folder)", file=sys.stderr)
        return 2
    findings, looked, absent = compare(Path(arguments[0]).resolve())
    print(f"ComfyUI {version_of(Path(arguments[0]))}: {looked} things looked for, {len(findings)} are otherwise")
    for kind, needed, text in sorted(findings, key=lambda finding: (not finding.needed, finding.kind)):
        print(f"  {kind:9} {'every run' if needed else 'in places'}  {text}")
    if absent:
        print(f"  not looked for, since these files are not there: {', '.join(absent)}")
    if looked == 0:
        print("  no file of ComfyUI's is there", file=sys.stderr)
    serious = [finding for finding in findings if finding.needed and finding.kind in ("missing", "moved", "arguments")]
    return 1 if serious or looked == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
