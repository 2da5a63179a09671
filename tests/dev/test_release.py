"""What the registry reads of this repository, the form of its changelog, and the release checklist's own judgement."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hosting.errors import HostError
from PIL import Image, ImageChops, ImageStat
from release import archive, art, checklist, manager

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[2]
GPUS = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "GPU :: Apple Metal", "NPU :: Huawei Ascend"}
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
LOG = "# Changelog\n\n## [{}]{}\n\n### Added\n\n## [0.0.9] - 2026-01-01\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_registry_finds_what_it_reads():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = stated["project"], stated["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower() and project["dependencies"] == []
    assert project["license"] == "MIT" and set(project["urls"]) == {"Repository", "Issues"}
    systems, devices = (
        [line.removeprefix(start) for line in project["classifiers"] if line.startswith(start)]
        for start in ("Operating System :: ", "Environment :: ")
    )
    assert systems == ["OS Independent"] and devices and set(devices) <= GPUS
    assert len(systems) + len(devices) == len(project["classifiers"]), "one unknown value blanks its group"
    assert comfy["PublisherId"] and comfy["DisplayName"] and "web" not in comfy  # WEB_DIRECTORY serves the scripts
    start = project["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    icon, banner = (Image.open(ROOT / comfy[name].removeprefix(start)) for name in ("Icon", "Banner"))
    assert icon.width == icon.height <= 400
    assert banner.width * 9 == banner.height * 21


@pytest.mark.parametrize("name", ["icon", "banner"])
def test_icon_and_banner_are_what_the_script_draws(name):
    """But for how a version of the font's library draws, and details of the toy world."""
    drawn, kept = getattr(art, name)(), Image.open(ROOT / "docs" / "images" / f"{name}.png").convert("RGB")
    assert drawn.size == kept.size
    assert max(ImageStat.Stat(ImageChops.difference(drawn, kept)).mean) < 3


def faults(log: str) -> list[str]:
    """Where a changelog has not the form of keepachangelog.com."""
    intro, *versions = re.split(r"^## ", log, flags=re.MULTILINE)
    found = [] if intro.startswith("# Changelog\n") and versions else ["no title or no version"]
    numbers, dates = [], []
    for i, (heading, _, body) in enumerate(version.partition("\n") for version in versions):
        stated = re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading)
        if stated:
            numbers.append(tuple(map(int, stated.groups()[:3])))
            dates.append(stated[4])
        elif i or heading != "[Unreleased]":
            found.append(f"heading {heading!r}")
        before, *sections = re.split(r"^### ", body, flags=re.MULTILINE)
        names = [section.partition("\n")[0] for section in sections]
        if before.strip() or len(names) != len(set(names)) or not set(names) <= SECTIONS or (stated and not names):
            found.append(f"sections of {heading!r}: {names}")
        lines = [line for section in sections for line in section.partition("\n")[2].splitlines() if line]
        found += [f"no entry: {line!r}" for line in lines if not line.startswith(("- ", "  "))]
    found += ["versions out of order"] if any(a <= b for a, b in pairwise(numbers)) else []
    return found + (["dates out of order"] if any(a < b for a, b in pairwise(dates)) else [])


def test_the_changelog_keeps_its_form():
    assert faults(checklist.read("CHANGELOG.md")) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("# Changelog", "# Changes", "no title or no version"),
        ("[0.0.9]", "[0.0.9", "heading '[0.0.9 - 2026-01-01'"),
        ("[0.0.9] - 2026-01-01", "[Unreleased]", "heading '[Unreleased]'"),
        ("### Added", "### New", "sections of '[0.1.0] - 2026-02-01': ['New']"),
        ("- a", "a", "no entry: 'a'"),
        ("0.1.0", "0.0.9", "versions out of order"),
        ("2026-02", "2025-02", "dates out of order"),
    ],
)
def test_faults_of_a_changelog_are_found(old, new, fault):
    log = LOG.format("0.1.0", " - 2026-02-01").replace("### Added\n", "### Added\n- a\n  b\n") + "\n### Fixed\n- c\n"
    assert faults(log) == []
    assert faults(log.replace(old, new, 1)) == [fault]


def test_the_version_is_that_of_the_newest_changes():
    assert checklist.check_version('version = "0.1.0"\n', LOG.format("0.1.0", " - 2026-11-23")) == "0.1.0"


@pytest.mark.parametrize(
    ("version", "log"),
    [
        ("0.1.0", LOG.format("Unreleased", "")),
        ("0.1.0", LOG.format("0.2.0", " - 2026-11-23")),
        ("0.1.0", LOG.format("0.1.0", "")),
        ("0.1", LOG.format("0.1", " - 2026-11-23")),
        ("0.1.0", "# Changelog\n"),
    ],
)
def test_a_version_without_its_changes_is_no_release(version, log):
    with pytest.raises(HostError, match=r"pyproject\.toml states .* and CHANGELOG\.md begins with"):
        checklist.check_version(f'version = "{version}"\n', log)


def test_changes_outside_git_are_no_release():
    assert checklist.check_clean("\n") == "clean"
    with pytest.raises(HostError, match=r"not everything is committed:\n M README\.md"):
        checklist.check_clean(" M README.md\n")


def test_unreleased_changes_are_no_release():
    left = LOG.format("0.1.0", " - 2026-11-23") + "\n## [Unreleased]\n\n### Fixed\n- forgotten\n"
    with pytest.raises(HostError, match="unreleased changes below"):
        checklist.check_version('version = "0.1.0"\n', left)


def test_a_version_is_released_once(tmp_path):
    archive.git("init", "--quiet", str(tmp_path))
    commit = (*manager.AUTHOR, "commit", "--quiet", "--allow-empty", "--message=x")
    archive.git(*commit, folder=tmp_path)
    assert checklist.check_tag("1.0.0", tmp_path) == "v1.0.0 is free"
    archive.git(*manager.AUTHOR, "tag", "--annotate", "--message=x", "v1.0.0", folder=tmp_path)
    assert checklist.check_tag("1.0.0", tmp_path) == "v1.0.0 is this commit"
    archive.git(*commit, folder=tmp_path)
    with pytest.raises(HostError, match=r"v1\.0\.0 is another commit"):
        checklist.check_tag("1.0.0", tmp_path)
    assert checklist.check_tag("1.0.1", tmp_path) == "v1.0.1 is free"
