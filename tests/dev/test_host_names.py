"""The script that compares what this pack takes from ComfyUI with a tree of it, the real one and doctored ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hosting import host_names

SCRIPT = Path(host_names.__file__)
SAMPLERS, EXTENSION, FLUX = "comfy/samplers.py", "comfy/patcher_extension.py", "comfy/ldm/flux/model.py"
LIGHT, CONDS, WAN = "comfy/ldm/lightricks/model.py", "comfy/conds.py", "comfy/ldm/wan/model.py"


@pytest.fixture
def some_files(comfyui, tmp_path) -> Path:
    """A folder with some of ComfyUI's files alone."""
    for name in (SAMPLERS, EXTENSION, FLUX, LIGHT, CONDS, WAN):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((comfyui / name).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def edit(root: Path, name: str, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, (root / name).read_text(encoding="utf-8"))
    assert count, f"{name} has no {pattern}"
    (root / name).write_text(text, encoding="utf-8")


def found(root: Path) -> list[tuple[str, bool, str]]:
    return [tuple(finding) for finding in host_names.compare(root)[0]]


def test_the_real_tree_has_all_that_every_run_stands_on(comfyui):
    done = subprocess.run([sys.executable, str(SCRIPT), str(comfyui)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    looked = re.match(r"ComfyUI [\d.]+: (\d+) things looked for, \d+ are otherwise\n", done.stdout)
    assert looked and int(looked[1]) > 200 and "not looked for" not in done.stdout


def test_single_files_suffice(some_files):
    findings, looked, absent = host_names.compare(some_files)
    assert [f for f in findings if f.needed] == [] and 50 < looked < 150
    assert "comfy.sd" in absent and "comfy.samplers" not in absent


CHANGES = {
    "a constant is gone": (
        [(EXTENSION, r"\bCALC_COND_BATCH\b", "COMPUTE_CONDS")],
        ("missing", True, "comfy.patcher_extension.WrappersMP.CALC_COND_BATCH"),
    ),
    "a function is elsewhere": (
        [
            (SAMPLERS, r"\ndef _calc_cond_batch\(", "\ndef gone("),
            (CONDS, r"\Z", "\ndef _calc_cond_batch(model): pass\n"),
        ],
        ("moved", True, "comfy.samplers._calc_cond_batch is in comfy/conds.py"),
    ),
    "a class's method is gone": (
        [(SAMPLERS, r"def outer_sample\(", "def renamed(")],
        ("missing", True, "comfy.samplers.CFGGuider.outer_sample"),
    ),
    "an argument has another name": (
        [(SAMPLERS, r"(def outer_sample\(.*)latent_shapes", r"\1shapes")],
        ("arguments", True, "comfy.samplers.CFGGuider.outer_sample takes (.*shapes), not as listed: latent_shapes"),
    ),
    "an argument comes in between": (
        [(SAMPLERS, r"(def outer_sample\(self, noise, )", r"\1extra, ")],
        ("arguments", True, ".*not as listed: latent_image, sampler, sigmas"),
    ),
    "an argument is new": (
        [(SAMPLERS, r"(def outer_sample\(.*)latent_shapes=None", r"\1latent_shapes=None, extra=1")],
        ("new", True, "comfy.samplers.CFGGuider.outer_sample also takes extra"),
    ),
    "an instance's attribute has another name": (
        [(WAN, r"self\.text_embedding", "self.embedding")],
        ("missing", False, r"comfy.ldm.wan.model.WanModel().text_embedding"),
    ),
    "a word is another": (
        [(FLUX, "img_slice", "image_at")],
        ("missing", False, "comfy.ldm.flux.model: the word 'img_slice'"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(some_files, change):
    edits, (kind, needed, text) = CHANGES[change]
    before = found(some_files)
    for one in edits:
        edit(some_files, *one)
    new = [finding for finding in found(some_files) if finding not in before]
    pattern = text if ".*" in text else re.escape(text)
    assert any(
        (k, n) == (kind, needed) and re.fullmatch(pattern.replace("takes (.*shapes)", r"takes \(.*\)"), t)
        for k, n, t in new
    ), new
    assert {(k, n) for k, n, _ in new if n} <= {(kind, needed), ("new", True)}
    serious = needed and kind != "new"
    assert host_names.main([str(some_files)]) == int(serious)


def test_what_a_module_takes_from_another_is_there(some_files):
    """Imports, aliases and base classes are followed."""
    text = (some_files / SAMPLERS).read_text(encoding="utf-8")
    (some_files / "comfy" / "guiders.py").write_text(text, encoding="utf-8")
    (some_files / SAMPLERS).write_text(
        "from .guiders import CFGGuider as Base, _calc_cond_batch as batch\n"
        "class CFGGuider(Base):\n    pass\n_calc_cond_batch = batch\n"
    )
    assert [text for _, needed, text in found(some_files) if needed] == []


def test_a_folder_without_files_of_comfyuis(tmp_path, capsys):
    assert host_names.main([str(tmp_path)]) == 1
    assert "no file of ComfyUI's is there" in capsys.readouterr().err
    assert host_names.main([str(tmp_path / "nowhere")]) == 2 and host_names.main([]) == 2
