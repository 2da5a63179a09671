"""A picture that an engine spreads over several GPUs by tokens, below the attention that ComfyUI calls: refused in
every joint family by one sentence that says so. Models that FSDP shards by weights are known by their own class."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import spreading
import torch
from cases import CASES, DISTINCT

JOINT = [name for name in DISTINCT if not CASES[name].cross]
SAID = "Something spreads the picture over several GPUs"


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("streams", [("img",), ("img", "txt"), ("txt",)], ids=["picture", "both", "text"])
def test_a_share_of_the_tokens_is_refused(pack, case, model, streams):
    attached = pack.negative(case.prompt(), negative=case.negative())
    with pytest.raises(RuntimeError, match=SAID):
        case.run(spreading.spread(pack.patch(model), streams), attached, steps=1)


def test_two_ranks_that_gather_below_the_attention(tmp_path):
    """Two real processes (gloo): stock is the same picture there, and VSF is refused on both."""
    here = Path(spreading.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    ranks = [
        subprocess.Popen([sys.executable, str(here), str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    try:
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for rank in range(2):
        for name, found in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert found["off"] < 1e-5 and found["gathered"] > 0, (name, found)
            assert SAID in found["said"], (name, found)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["flux"])
def test_fsdp(pack, case, name, alone):
    """``fully_shard`` changes the class of the network and of its blocks; on the second queue the node sees that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = case.load()
    attached = pack.negative(case.prompt(), negative=case.negative())
    expected = case.run(pack.patch(model), attached, steps=1)
    network, mesh = model.model.diffusion_model, init_device_mesh("cpu", (1,))
    first = pack.patch(model)
    for block in network.double_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    assert type(network).__name__ == "FSDPFlux"
    for patched in (first, pack.patch(model)):
        with torch.no_grad():
            assert torch.equal(run_with_shards(case, patched, attached), expected)


def run_with_shards(case, patched, attached):
    from helpers import sample

    return sample(patched, attached, case.uncond(), size=case.sizes[0], channels=case.channels, steps=1)


def test_other_classes_are_still_refused(pack):
    """A class that only looks like FSDP's is none."""
    model = CASES["flux"].load()
    network = model.model.diffusion_model
    network.__class__ = type("FSDPFlux", (type(network),), {"__module__": "somewhere"})
    with pytest.raises(ValueError, match="models of class FSDPFlux"):
        pack.patch(model)
