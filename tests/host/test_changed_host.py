"""A ComfyUI older than supported, or one whose seams changed: named where it happens, never half-applied.

Each test makes a tree of links to the real one in which single lines differ, and runs it in a process of its own.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hosting.client import ComfyClient
from hosting.server import ComfyServer

TREE = Path(os.environ["VSF_COMFYUI"])
ROOT = Path(__file__).resolve().parents[2]

MMDIT, FLUX, WAN = "comfy/ldm/modules/diffusionmodules/mmdit.py", "comfy/ldm/flux/model.py", "comfy/ldm/wan/model.py"
SAMPLERS, BASE = "comfy/samplers.py", "comfy/model_base.py"
GET_WRAPPERS = r"comfy\.patcher_extension\.get_all_wrappers\(comfy\.patcher_extension\.WrappersMP\.{}\b[^)]*\)"


def changed_tree(folder: Path, edits: list[tuple[str, str, str]]) -> Path:
    """The real tree but for ``edits``: (file, pattern, replacement); a pattern that is not there fails."""
    out = folder / "ComfyUI"
    link_children(TREE, out)
    for name, pattern, replacement in edits:
        for parent in reversed(Path(name).parents[:-1]):
            if (out / parent).is_symlink():
                (out / parent).unlink()
                link_children(TREE / parent, out / parent)
        text, count = re.subn(pattern, replacement, (out / name).read_text(encoding="utf-8"))
        assert count, f"{name} has no {pattern}"
        (out / name).unlink()
        (out / name).write_text(text, encoding="utf-8")
    return out


def link_children(real: Path, folder: Path) -> None:
    folder.mkdir()
    for entry in real.iterdir():
        (folder / entry.name).symlink_to(entry)


@pytest.fixture(scope="module")
def run_on():
    """What the script printed of a run on a tree, and its log."""
    # the tree's caches of compiled code are the real one's: nothing of a changed file may get there
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("on_changed_host.py"))]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as script:

        def run(tree: Path, family: str) -> tuple[list[str], str]:
            log = tree.with_name("log.txt")
            script.stdin.write(json.dumps([str(tree), family, str(log)]) + "\n")
            script.stdin.flush()
            lines = json.loads(script.stdout.readline())
            assert lines is not None, log.read_text()[-3000:]
            return lines, log.read_text()

        yield run
        script.stdin.close()


def test_the_unchanged_tree_works(tmp_path, run_on):
    """Else the other tests here would show nothing."""
    lines, _ = run_on(changed_tree(tmp_path, [(SAMPLERS, r"\A", "")]), "sd3")
    assert lines == ["NODES 6", "CHANGED True"]


CASES = {
    "block patches are not asked for": (
        "sd3",
        [(MMDIT, r'transformer_options\.get\("patches_replace", \{\}\)', "{}")],
        "no block of this model ran through ComfyUI's block patches",
    ),
    "the attention override is not asked for": (
        "wan",
        [("comfy/ldm/modules/attention.py", r'if "optimized_attention_override" in', 'if "renamed" in')],
        "double block 0 ran without the attention call over text",
    ),
    "a block's arguments have other names": (
        "flux",
        [(FLUX, r'"txt": txt', '"text": txt'), (FLUX, r'txt=args\["txt"\]', 'txt=args["text"]')],
        "double blocks hand their patches no 'txt'",
    ),
    "single blocks do not say where the image begins": (
        "flux",
        [(FLUX, r'transformer_options\["img_slice"\]', 'transformer_options["image_at"]')],
        "single blocks hand their patches no 'img_slice'",
    ),
    "blocks get no transformer_options": (
        "sd3",
        [(MMDIT, r'"vec": c_mod, "transformer_options": transformer_options', '"vec": c_mod')],
        "double blocks hand their patches no 'transformer_options'",
    ),
    "a model's attribute has another name": (
        "flux",
        [(FLUX, r"self\.hidden_size", "self.width")],
        "built otherwise .*no attribute 'hidden_size'",
    ),
    "OUTER_SAMPLE is not called": (
        "sd3",
        [(SAMPLERS, GET_WRAPPERS.format("OUTER_SAMPLE"), "[]")],
        "began past the wrappers of OUTER_SAMPLE",
    ),
    "CALC_COND_BATCH is not called": (
        "sd3",
        [(SAMPLERS, GET_WRAPPERS.format("CALC_COND_BATCH"), "[]")],
        "past the wrappers of CALC_COND_BATCH",
    ),
    "APPLY_MODEL is not called": (
        "wan",
        [(BASE, GET_WRAPPERS.format("APPLY_MODEL"), "[]")],
        "past the wrappers of APPLY_MODEL",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_changed_seam_is_named(tmp_path, case, run_on):
    family, edits, message = CASES[case]
    lines, _ = run_on(changed_tree(tmp_path, edits), family)
    assert lines[0] == "NODES 6" and len(lines) == 2
    assert re.match(rf"ERROR RuntimeError VSF: .*{message}", lines[1]), lines[1]


def test_a_seam_that_is_gone_keeps_the_nodes_away(tmp_path, run_on):
    files = [path for path in (*TREE.glob("comfy/*.py"), *TREE.glob("comfy_extras/*.py"))]
    users = [str(path.relative_to(TREE)) for path in files if "CALC_COND_BATCH" in path.read_text(encoding="utf-8")]
    tree = changed_tree(tmp_path, [(name, "CALC_COND_BATCH", "COMPUTE_CONDS") for name in users])
    lines, log = run_on(tree, "sd3")
    assert lines == ["NODES 0"]
    assert len(re.findall("VSF:", log)) == 1
    assert "needs comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, which this ComfyUI" in log


def used_of_comfyui(file: Path) -> set[str]:
    """What a file imports of ComfyUI, by dotted names; of a module that it imports whole, what it takes from it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules, used = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("comfy"):
            used |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            modules |= {n.asname or n.name: n.name for n in node.names if n.name.startswith("comfy")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            used |= {m + text.removeprefix(name) for name, m in modules.items() if text.startswith(name + ".")}
    return used


def test_all_that_is_used_by_name_is_looked_for(pack):
    check = importlib.import_module(pack.module.__name__ + ".nodes.host_check")
    needed = [f"{module}.{check.parsed(name)[0]}" for module, names in check.NEEDED.items() for name in names]
    files = sorted((ROOT / "nodes").rglob("*.py"))
    used = {name for file in files for name in used_of_comfyui(file)}
    assert {"comfy.conds.CONDRegular", "comfy_api.latest.io"} <= used

    def covered(name):
        return any(name == n or n.startswith(f"{name}.") or name.startswith(f"{n}.") for n in needed)

    assert sorted(name for name in used if not covered(name)) == []
    assert all(check._has(module, name) for module, names in check.NEEDED.items() for name in names)


def test_all_that_a_family_takes_from_its_model_is_listed(pack):
    """Classes of models and text encoders, and attributes of the network."""
    name = pack.module.__name__
    check = importlib.import_module(f"{name}.nodes.host_check")
    families = importlib.import_module(f"{name}.nodes.families").FAMILIES
    listed = [check.parsed(thing)[0] for things in check.WHERE_PRESENT.values() for thing in things]
    attributes = {thing.rpartition(".")[2] for thing in listed}
    models = {f"comfy.model_base.{thing}" for thing in check.WHERE_PRESENT["comfy.model_base"]}
    assert set().union(*(family.model_classes for family in families)) <= models
    encoders = [encoder for family in families for encoder in family.text_encoders]
    named = {encoder.model_class for encoder in encoders} | {encoder.tokenizer_class for encoder in encoders} - {None}
    assert len(named) > 15 and named <= set(listed)
    used = set()
    for file in (ROOT / "nodes" / "families").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("diffusion_model"):
                used.add(node.attr)
    assert len(used) > 20 and used - attributes == {"__class__"} & used


@pytest.mark.parametrize(
    "changed",
    [
        lambda conds, model, x_in, timestep, model_options: 0,
        lambda model, conds, x_in, sigma, timestep, model_options: 0,
        lambda model, conds, x_in, timestep: 0,
    ],
    ids=["two in other places", "one in between", "one gone"],
)
def test_a_function_with_other_arguments_keeps_the_nodes_away(pack, monkeypatch, caplog, changed):
    import comfy.samplers

    check = importlib.import_module(pack.module.__name__ + ".nodes.host_check")
    monkeypatch.setattr(
        comfy.samplers, "_calc_cond_batch", lambda model, conds, x_in, timestep, model_options, new=0: 0
    )
    assert check.is_supported()
    monkeypatch.setattr(comfy.samplers, "_calc_cond_batch", changed)
    caplog.clear()
    assert not check.is_supported() and len(caplog.records) == 1
    assert "comfy.samplers._calc_cond_batch(model, conds, x_in, timestep, model_options), which" in caplog.text


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.3.60", False), ("0.16.2", False), ("0.9.99", False), ("0.16.3", True), ("0.31.0rc1", True), ("1.0", True)]
    + [("nightly", True), (None, True)],
)
def test_which_versions_are_refused(pack, monkeypatch, caplog, version, supported):
    """Where ComfyUI states none that can be read, only what it has counts."""
    check = importlib.import_module(pack.module.__name__ + ".nodes.host_check")
    monkeypatch.setattr(check, "_version", lambda: version)
    caplog.clear()
    assert check.is_supported() is supported
    assert len(caplog.records) == (not supported)


def test_an_older_comfyui_starts_with_one_line_in_the_log(tmp_path):
    """The real server; all else of ComfyUI is as it was."""
    older = ("comfyui_version.py", r'__version__ = ".*"', '__version__ = "0.16.2"')
    # main.py is no link: Python looks for modules where the script really is
    tree = changed_tree(tmp_path, [older, ("main.py", r"\A", "")])
    with ComfyServer(tree, sys.executable, ROOT, None) as server:
        info = ComfyClient(server.address).object_info()
        log = server.log()
    assert "KSampler" in info and not any(name.startswith("VSF") for name in info)
    lines = [line for line in log.splitlines() if "VSF:" in line]
    assert len(lines) == 1 and "needs ComfyUI 0.16.3 or newer, and this is 0.16.2: update ComfyUI." in lines[0], log
    assert not [line for line in log.splitlines() if "IMPORT FAILED" in line and "ComfyUI-VSF" in line], log
