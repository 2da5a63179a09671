"""The demo: `dev.py demo` as people run it, other families' graphs on a real server, and the parts of its pictures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hosting import demo
from hosting.errors import HostError
from hosting.server import ComfyServer
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
WORKFLOW = ROOT / "workflows" / "vsf_tiny_demo.json"
PROMPT = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a house"}},
    "2": {"class_type": "VSFNegativeConditioning", "inputs": {"positive": ["1", 0], "text": "a roof"}},
    "3": {"class_type": "VSFModelPatch", "inputs": {"scale": 3.3000000000000003, "offset": 0.2}},
}


@pytest.fixture(scope="module")
def server(comfyui, tiny_models):
    with ComfyServer(comfyui, sys.executable, ROOT, tiny_models, extra_nodes=[TOY / "vsf_toy_text_encoder"]) as server:
        yield server


def assert_differ(shown: str, kind: str, frames: int) -> None:
    """What a demo printed ends with the paths of its three pictures, and these are not the same ones."""
    paths = [Path(line) for line in shown.splitlines()[-3:]]
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in ("before", "after", "side-by-side")]
    before, after, both = (demo.unrolled(Image.open(path)) for path in paths)
    assert len(before) == len(after) == len(both) == frames
    assert before[0].size == after[0].size and before[0].tobytes() != after[0].tobytes()
    assert both[0].width > 2 * demo.SMALLEST_WIDTH
    for picture in (*before, *after):
        assert any(low != high for low, high in picture.getextrema())
    assert len({picture.tobytes() for picture in before}) == (1 if frames == 1 else 4), "a frame a latent frame"
    assert "with VSF: KSampler step" in shown


def test_the_command_that_people_type(comfyui, tiny_models, tmp_path):
    """`python3 dev.py demo`, on the ComfyUI under test."""
    assert "\npython3 dev.py demo\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    env = {**os.environ, "COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": sys.executable}
    command = [sys.executable, str(ROOT / "dev.py"), "demo", "--out", str(tmp_path / "new" / "out")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_differ(done.stdout, "png", 1)


@pytest.mark.parametrize(
    ("family", "kind", "frames"),
    [
        ("flux", "png", 1),
        pytest.param("wan", "webp", 13, marks=pytest.mark.long),
    ],
)
def test_demo_of_another_family(server, tmp_path, capsys, family, kind, frames):
    status = demo.main([server.address, str(TOY / "demo" / f"{family}.json"), str(tmp_path)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert_differ(shown.out, kind, frames)


def test_a_failing_demo_is_one_message(tmp_path, capsys):
    assert demo.main(["http://127.0.0.1:9", str(WORKFLOW), str(tmp_path)]) == 1
    assert "dev.py: the demo failed: http://127.0.0.1:9/object_info does not answer" in capsys.readouterr().err


def test_captions_come_from_the_graph():
    assert demo.captions(PROMPT) == (
        "before\nprompt: a house\nno negative prompt",
        "after\nprompt: a house\nnegative: a roof\nscale 3.3, offset 0.2",
    )


def test_a_graph_without_vsf_has_no_captions():
    with pytest.raises(HostError, match="0 VSFNegativeConditioning nodes"):
        demo.captions({"1": PROMPT["1"]})


@pytest.mark.parametrize(("width", "enlarged"), [(32, 384), (100, 400), (384, 384), (1024, 1024)])
def test_tiny_pictures_are_enlarged_by_a_whole_factor(width, enlarged):
    assert demo.enlarged(Image.new("RGB", (width, width))).size == (enlarged, enlarged)


def test_side_by_side_holds_both_pictures_and_a_caption_that_fits():
    red, blue = Image.new("RGB", (400, 300), "red"), Image.new("RGB", (400, 300), "blue")
    sheet = demo.side_by_side(red, blue, ("short", "a long caption of many words " * 8))
    margin = demo.MARGIN
    assert sheet.getpixel((margin, margin)) == (255, 0, 0)
    assert sheet.getpixel((margin * 2 + 400, margin)) == (0, 0, 255)
    assert sheet.getpixel((sheet.width - margin // 2, sheet.height // 2)) == (255, 255, 255)
    below = sheet.crop((0, margin + 300, sheet.width, sheet.height))
    assert below.getextrema()[0][0] < 100 and below.height > 5 * demo.FONT_SIZE
