"""The server starts, answers and leaves nothing behind; what goes wrong comes with ComfyUI's own text."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hosting.client import ComfyClient
from hosting.errors import PortTaken, PromptFailed, ServerDied
from hosting.server import ComfyServer, check_port, free_port

NEEDS_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals, process groups or ps")
PACK = """
class Fails:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"words": ("STRING", {})}})

    def run(self, words):
        raise ValueError(words)


class Steps:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"seconds": ("FLOAT", {})}})

    def run(self, seconds):
        import time

        from comfy.utils import ProgressBar

        bar = ProgressBar(3)
        for _ in range(3):
            time.sleep(seconds)
            bar.update(1)
        return ()


NODE_CLASS_MAPPINGS = {"VSFTestFails": Fails, "VSFTestSteps": Steps}
"""
GREEN = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0x00FF00}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "green"}},
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    (folder / "__init__.py").write_text(PACK)
    return folder


@pytest.fixture(scope="module")
def server(comfyui, pack, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    (models / "vae").mkdir()
    (models / "vae" / "tiny_test_vae.safetensors").touch()
    with ComfyServer(comfyui, sys.executable, pack, models) as running:
        yield running


@pytest.fixture
def client(server) -> ComfyClient:
    return ComfyClient(server.address)


def broken_tree(folder: Path, main: str) -> Path:
    (folder / "main.py").write_text(main)
    return folder


def test_pack_and_models_are_there(server, client):
    info = client.object_info()
    assert "VSFTestFails" in info
    assert "tiny_test_vae.safetensors" in info["VAELoader"]["input"]["required"]["vae_name"][0]
    assert "ComfyUI-VSF" in server.log()


def test_a_graph_runs_and_gives_its_picture(client):
    seen = []
    outputs = client.run(GREEN, lambda *event: seen.append(event))
    data = client.image(outputs["2"]["images"][0])
    assert data.startswith(b"\x89PNG")
    assert seen[-1] == ("2", 0, 0)


def test_progress_names_node_and_step(client):
    seen = []
    client.run({"9": {"class_type": "VSFTestSteps", "inputs": {"seconds": 0.3}}}, lambda *event: seen.append(event))
    assert seen == [("9", 0, 0), ("9", 1, 3), ("9", 2, 3), ("9", 3, 3)]


def test_a_refused_graph_says_which_input(client):
    graph = {**GREEN, "1": {"class_type": "EmptyImage", "inputs": {"width": 16}}}
    with pytest.raises(PromptFailed, match=r"EmptyImage \(node 1\): Required input is missing: height"):
        client.run(graph)


def test_an_unknown_node_is_named(client):
    with pytest.raises(PromptFailed, match="NoSuchNode"):
        client.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_a_partly_refused_graph_is_refused(client):
    graph = {**GREEN, "3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    with pytest.raises(PromptFailed, match=r"SaveImage \(node 3\): Required input is missing: images"):
        client.queue(graph)


def test_a_failing_node_gives_its_error(client):
    with pytest.raises(PromptFailed, match=r"VSFTestFails \(node 4\): ValueError: out of paint"):
        client.run({"4": {"class_type": "VSFTestFails", "inputs": {"words": "out of paint"}}})


def test_a_graph_that_takes_too_long_is_stopped(server, client):
    hasty = ComfyClient(server.address, timeout=1.5)
    with pytest.raises(PromptFailed, match="did not end within 2 s"):
        hasty.run({"5": {"class_type": "VSFTestSteps", "inputs": {"seconds": 2.0}}})
    assert client.run(GREEN)
    with urllib.request.urlopen(f"{server.address}/history") as answer:
        assert '"execution_interrupted"' in answer.read().decode()


def test_events_of_other_graphs_are_not_taken_for_its_own(client):
    client.queue({"6": {"class_type": "VSFTestSteps", "inputs": {"seconds": 0.5}}})
    client.queue({"7": {"class_type": "VSFTestFails", "inputs": {"words": "not mine"}}})
    seen = []
    outputs = client.run({**GREEN, "8": {**GREEN["2"]}}, lambda *event: seen.append(event[0]))
    assert set(outputs) == {"2", "8"} and not {"6", "7"} & set(seen)


def test_stop_leaves_nothing(comfyui, pack):
    server = ComfyServer(comfyui, sys.executable, pack, None)
    with server:
        base, process = server.base, server.process
        assert base is not None and process is not None and (base / "output").is_dir()
        address = server.address
    assert not base.exists() and process.poll() is not None
    assert "To see the GUI go to" in server.log()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=2)
    with pytest.raises(ServerDied, match="does not answer"):
        ComfyClient(address).object_info()
    server.stop()


def test_a_server_that_dies_shows_its_last_lines(tmp_path, pack):
    main = "for i in range(50): print('line', i)\nraise SystemExit('no such flag')"
    server = ComfyServer(broken_tree(tmp_path, main), sys.executable, pack, None)
    with pytest.raises(ServerDied, match=r"ended while it started(.*\n)*.*line 49\n.*no such flag") as death, server:
        pass
    assert "line 10" not in str(death.value)
    assert server.base is None


@NEEDS_SIGNALS
def test_a_server_that_says_nothing_is_given_up_and_killed(tmp_path, pack):
    main = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid())\ntime.sleep(99)"
    server = ComfyServer(broken_tree(tmp_path, main), sys.executable, pack, None, start_seconds=2)
    server.stop_seconds = 1
    with pytest.raises(ServerDied, match="did not answer within 2 s"), server:
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int(server.log().split()[0]), 0)


@NEEDS_SIGNALS
def test_processes_that_the_server_started_end_with_it(tmp_path, pack):
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    main = f"import subprocess, sys\nprint({child}.pid)"
    server = ComfyServer(broken_tree(tmp_path, main), sys.executable, pack, None)
    with pytest.raises(ServerDied), server:
        pass
    assert not is_alive(int(server.log().split()[0]))


def is_alive(pid: int) -> bool:
    """Whether a process still does something; one that nobody waited for counts as ended."""
    for _ in range(50):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return False
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return True


def test_a_taken_port_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} can't be used"):
            check_port(port)
        assert free_port() != port
    check_port(port)
