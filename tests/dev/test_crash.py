"""A server that dies in the middle of a run, or runs out of memory in one: started again, or going on, it gives the
same pictures as before, and VSF has written nothing anywhere."""

import sys
from pathlib import Path

import pytest
from hosting.client import ComfyClient
from hosting.errors import PromptFailed, ServerDied
from hosting.server import ComfyServer
from hosting.toy_graphs import node, picture, stock, with_vsf

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
OUT_OF_MEMORY = """
import torch


class OutOfMemory:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "call": ("INT", {})}})

    def run(self, model, call):
        left = [call]

        def override(func, *args, **kw):
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("no room, as the test wants it")
            return func(*args, **kw)

        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return (model,)


NODE_CLASS_MAPPINGS = {"VSFTestOutOfMemory": OutOfMemory}
"""


@pytest.fixture(scope="module")
def server(comfyui, tiny_models, tmp_path_factory):
    faults = tmp_path_factory.mktemp("vsf_test_out_of_memory")
    (faults / "__init__.py").write_text(OUT_OF_MEMORY)
    packs = [TOY / "vsf_toy_text_encoder", faults]
    with ComfyServer(comfyui, sys.executable, ROOT, tiny_models, extra_nodes=packs) as server:
        yield server


def files(*folders):
    """Every file below, but for Python's own caches and Git's."""
    found = (path for folder in folders for path in Path(folder).rglob("*"))
    return {str(path) for path in found if not {"__pycache__", ".git"} & set(path.parts) and path.is_file()}


def test_killed_in_a_run_and_started_again(server, tally):
    client = ComfyClient(server.address)
    places = server.base, server.models, ROOT / "nodes", ROOT / "vsf_core", ROOT / "js"
    graph = stock("sd3")
    expected = picture(client, graph), picture(client, with_vsf(graph))
    assert expected[0] != expected[1]
    before = files(*places)
    endless = with_vsf(stock("sd3", seed=2))
    endless["sample"]["inputs"]["steps"] = 5000
    steps = []

    def kill_after_three_steps(_node, step, _steps):  # not every step is told
        steps.append(step)
        if step >= 3:
            server.kill()

    with pytest.raises(ServerDied):
        client.run(endless, kill_after_three_steps)
    assert 3 <= steps[-1] < 4000 and not server.is_running()
    assert files(*places) == before
    server.start()
    client = ComfyClient(server.address)
    assert (picture(client, graph), picture(client, with_vsf(graph))) == expected
    new = {Path(path).relative_to(server.base).parts[0] for path in files(*places) - before}
    assert new <= {"output"}, "files beside the two pictures"
    tally["servers killed"] += 1


@pytest.mark.parametrize("call", [1, 2, 5])
def test_out_of_memory_in_a_run(server, call, tally):
    """ComfyUI sees what it was, unloads its models and says so; the next graphs are as ever."""
    client, graph = ComfyClient(server.address), stock("sd3")
    expected = picture(client, graph), picture(client, with_vsf(graph))
    failing = with_vsf(stock("sd3"))
    failing["failing"] = node("VSFTestOutOfMemory", model=["model", 0], call=call)
    failing["patch"]["inputs"]["model"] = ["failing", 0]
    unloaded = server.log().count("Got an OOM, unloading all loaded models")
    with pytest.raises(PromptFailed, match="OutOfMemoryError: no room(.|\\n)*ran out of memory"):
        client.run(failing)
    assert server.log().count("Got an OOM, unloading all loaded models") == unloaded + 1
    again = {**graph, "sample": node("KSampler", **{**graph["sample"]["inputs"], "seed": 9})}
    picture(client, again)  # so that what follows comes from no cache
    assert (picture(client, graph), picture(client, with_vsf(graph))) == expected
    tally["out of memory"] += 1
