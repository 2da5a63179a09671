"""Pictures through the real server, with the drawing process and the server killed in the middle."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from threading import Thread

import pytest
from hosting.errors import HostError, ServerDied
from hosting.server import free_port
from PIL import Image

from neggen import drawing, pairs, templates
from neggen.conftest import RUNS, new_server
from neggen.store import Store

BENCH = Path(__file__).resolve().parents[1]


def command(out, server, *more):
    """The command line that draws what ``planned`` plans."""
    runs = [word for run in RUNS for word in ("--run", run)]
    line = [sys.executable, str(BENCH), "neggen", "draw", "--out", str(out), "--server", server.address]
    return [*line, "--limit", "2", "--seeds", "1", *runs, *more]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def drawn(folder):
    return len(list((folder / "pictures").glob("*.png")))


def test_stopped_and_killed_and_nothing_is_done_twice_or_lost(server, tmp_path):
    """Ctrl-C once, as a terminal sends it, then `kill -9`."""
    out, env = tmp_path / "out", {**os.environ, "PYTHONPATH": str(BENCH.parent)}
    before = server.log().count("got prompt")
    for goal, how in ((2, signal.SIGINT), (5, signal.SIGKILL)):
        process = subprocess.Popen(command(out, server), env=env, stderr=subprocess.PIPE, text=True)
        wait_until(lambda goal=goal: drawn(out) >= goal)
        process.send_signal(how)
        start, told = time.monotonic(), process.communicate(timeout=30)[1]
        assert time.monotonic() - start < 5 and "Traceback" not in told
        if how == signal.SIGINT:
            assert process.returncode == 130 and "stopped; run the same command again to go on" in told
    subprocess.run(command(out, server), env=env, check=True, timeout=120)
    store = Store(out)
    assert len(store.cells()) == 10 and drawn(out) == 9 and not store.jobs()
    assert server.log().count("got prompt") - before == 9
    for cell in store.cells():
        assert Image.open(store.path(cell.key)).size == (256, 256)
    loaded = {cell.key for cell in store.cells() if cell.seconds is None}
    assert len(loaded) == 1, "one picture took the model's load, and is not timed; all others are"
    assert any(cell.memory for cell in store.cells()), "nobody looked at the memory"
    pictures = {cell.run: store.path(cell.key).read_bytes() for cell in store.cells() if cell.pair.prompt == "a house"}
    assert len(set(pictures.values())) == len(RUNS), "two methods drew the same"
    store.close()


def test_a_server_that_dies_and_comes_back(server, planned, monkeypatch):
    monkeypatch.setattr(drawing, "BREATH", 0.5)

    def kill_and_start():
        wait_until(lambda: drawn(planned.folder) >= 2)
        server.kill()
        time.sleep(1)
        server.start()

    killer = Thread(target=kill_and_start)
    killer.start()
    dead = f"http://127.0.0.1:{free_port()}"
    assert drawing.draw(planned, [dead, server.address + "/"], patience=120) == 0
    killer.join()
    assert len(planned.cells()) == 10 and drawn(planned.folder) == 9
    assert Counter(server for (server,) in planned._do("SELECT server FROM pictures")) == {server.address: 9}


@pytest.mark.long
def test_two_servers_share_the_work(server, planned):
    with new_server() as other:
        assert drawing.draw(planned, [server.address, other.address], depth=1) == 0
        asked = [one.log().count("got prompt") for one in (server, other)]
    shares = Counter(address for (address,) in planned._do("SELECT server FROM pictures"))
    assert set(shares) == {server.address, other.address} and sum(shares.values()) == 9
    assert asked[1] == shares[other.address], "a picture was asked for twice"
    alone = Store(planned.folder.with_name("alone"))
    template = templates.load("toy_sd3")
    alone.plan(template, planned.runs(), pairs.load("toy")[:2], [1])
    assert drawing.draw(alone, [server.address]) == 0
    for job in planned.cells():
        with Image.open(planned.path(job.key)) as one, Image.open(alone.path(job.key)) as same:
            assert one.tobytes() == same.tobytes(), "the servers draw differently"


def test_no_server(planned, monkeypatch):
    monkeypatch.setattr(drawing, "BREATH", 0.3)
    with pytest.raises(ServerDied, match="start one and run the same command again"):
        drawing.draw(planned, [f"http://127.0.0.1:{free_port()}"], patience=0)
    assert len(planned.jobs()) == 9


def test_what_a_server_refuses(server, tmp_path, capfd):
    store, template = Store(tmp_path), templates.load("flux_schnell")
    store.plan(template, template.runs[:1], pairs.load("ours")[:2], [1])
    with pytest.raises(HostError, match="no server has what these pictures need"):
        drawing.draw(store, [server.address])
    assert capfd.readouterr().out.count("flux1-schnell.safetensors (UNETLoader, unet_name)") == 1, "said once"
    assert [job.attempts for job in store.jobs()] == [0, 0]


def test_one_process_a_folder(planned):
    with Store(planned.folder).alone(), pytest.raises(HostError, match="another process draws into"):
        drawing.draw(planned, ["http://127.0.0.1:9"])
