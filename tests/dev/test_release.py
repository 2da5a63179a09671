"""What the registry reads of this repository, and the release checklist's own judgement."""

import sys
from pathlib import Path

import pytest
from hosting.errors import HostError
from PIL import Image
from release import checklist

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[2]
GPUS = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "GPU :: Apple Metal", "NPU :: Huawei Ascend"}
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
