"""Many servers, of which some are unfit, die, are slow or fail: stand-ins that answer as ComfyUI does."""

import asyncio
import io
import json
import time
from collections import Counter
from threading import Thread

import pytest
from aiohttp import WSMsgType, web
from hosting.errors import HostError
from PIL import Image

from neggen import drawing, pairs, templates
from neggen.store import Store

PNG = io.BytesIO()
Image.new("RGB", (8, 8)).save(PNG, "PNG")


class Stub:
    """Draws every graph in ``seconds``; kind: "good", "refusing" (fails at each), "lacking" (has not all nodes)."""

    def __init__(self, kind="good", seconds=0.0, gpu="GPU A", dies_after=None):
        self.kind, self.seconds, self.gpu, self.dies_after = kind, seconds, gpu, dies_after
        self.asked, self.done, self.sockets, self.ready, self.nodes = Counter(), {}, {}, None, {}
        self.loop = asyncio.new_event_loop()
        started = asyncio.run_coroutine_threadsafe(self._start(), self.loop)
        Thread(target=self.loop.run_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{started.result(30)}"

    async def _start(self):
        app = web.Application()
        routes = {"/queue": self.queue, "/object_info": self.info, "/system_stats": self.stats, "/ws": self.ws}
        routes |= {"/history/{id}": self.history, "/view": self.view}
        app.add_routes([web.get(path, handler) for path, handler in routes.items()])
        app.add_routes([web.post("/prompt", self.prompt), web.post("/interrupt", self.queue)])
        self.turn = asyncio.Lock()
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    def close(self):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(30)

    async def queue(self, request):
        return web.json_response({"queue_running": [], "queue_pending": []})

    async def info(self, request):
        if self.kind == "lacking":
            return web.json_response({"KSampler": {"input": {"required": {}}}})
        return web.json_response({kind: {"input": {"required": {}}} for kind in KINDS})

    async def stats(self, request):
        devices = [{"name": self.gpu, "vram_total": 8, "vram_free": 5}]
        return web.json_response({"system": {"comfyui_version": "0.30.0", "pytorch_version": "2"}, "devices": devices})

    async def ws(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        async for message in socket:
            if message.type is WSMsgType.ERROR:
                break
        return socket

    async def prompt(self, request):
        body = await request.json()
        self.asked[json.dumps(body["prompt"], sort_keys=True)] += 1
        task = asyncio.ensure_future(self.draw(body["prompt_id"], body["client_id"]))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return web.json_response({"prompt_id": body["prompt_id"], "node_errors": {}})

    async def draw(self, prompt, client):
        async with self.turn:
            await asyncio.sleep(self.seconds)
            if self.dies_after is not None and len(self.done) >= self.dies_after:
                await self.runner.cleanup()
                return
            socket = self.sockets[client]
            if self.kind == "refusing":
                data = {"prompt_id": prompt, "node_type": "KSampler", "exception_message": "out of memory"}
                await socket.send_json({"type": "execution_error", "data": data})
                return
            self.done[prompt] = True
            await socket.send_json({"type": "executing", "data": {"prompt_id": prompt, "node": "1"}})
            await socket.send_json({"type": "executing", "data": {"prompt_id": prompt, "node": None}})

    async def history(self, request):
        prompt = request.match_info["id"]
        if prompt not in self.done:
            return web.json_response({})
        outputs = {"9": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}}
        status = {"status_str": "success", "messages": [["execution_start", {"timestamp": 0}]]}
        return web.json_response({prompt: {"outputs": outputs, "status": status}})

    async def view(self, request):
        return web.Response(body=PNG.getvalue())


TOY = templates.load("toy_sd3")
KINDS = {node["class_type"] for node in TOY.fill(TOY.runs[0], "a", "b", 1).values()}


@pytest.fixture
def stubs():
    made = []

    def make(*args, **kw):
        made.append(Stub(*args, **kw))
        return made[-1]

    yield make
    for stub in made:
        stub.close()


def planned(folder, pictures):
    store, template = Store(folder), templates.load("toy_sd3")
    store.plan(template, template.runs[:1], pairs.load("toy")[:1], range(pictures))
    return store


def test_many_servers(stubs, tmp_path, monkeypatch, capfd, times):
    """One refuses all, one dies, one is slow, one lacks a node: each picture is drawn once (--long: 2,000)."""
    pictures = 80 if times == 1 else 2000
    monkeypatch.setattr(drawing, "BREATH", 0.5)
    refusing, dying = stubs("refusing"), stubs(dies_after=3)
    good = [*(stubs() for _ in range(4)), stubs(seconds=0.05)]
    lacking = stubs("lacking")
    servers = [refusing, dying, *good, lacking]
    store = planned(tmp_path, pictures)
    assert drawing.draw(store, [stub.address for stub in servers], patience=1) == 0
    assert len(store.cells()) == pictures and not store.jobs()
    said = capfd.readouterr()
    assert f"{lacking.address} is left out: it has not the node" in said.out and not lacking.asked
    assert f"{refusing.address} failed at 3 pictures in a row" in said.err + said.out
    assert sum(refusing.asked.values()) <= 3 + 2 * 2, "a server that fails at all gets no more"
    drawn = sum((stub.asked for stub in good), Counter())
    assert max(drawn.values()) == 1 and len(drawn) >= pictures - 3
    assert f"{pictures} pictures on 7 servers, no time known yet" in said.out
    assert store.machines() == [("ComfyUI 0.30.0, PyTorch 2, GPU A", pictures)]
    store.close()


def test_a_failure_is_tried_once_more_elsewhere(stubs, tmp_path):
    one, other = stubs("refusing"), stubs("refusing")
    store = planned(tmp_path, 2)
    assert drawing.draw(store, [one.address, other.address], depth=1) == 2
    assert [set(stub.asked.values()) for stub in (one, other)] == [{1}, {1}]
    assert len(one.asked) == len(other.asked) == 2 and [job.attempts for job in store.jobs()] == [1, 1]
    store.close()


def test_servers_that_differ(stubs, tmp_path):
    one, other = stubs(gpu="GPU A"), stubs(gpu="GPU B")
    store = planned(tmp_path, 20)
    with pytest.raises(HostError, match="not alike.*GPU A.*GPU B.*--mixed"):
        drawing.draw(store, [one.address, other.address])
    assert not one.asked and not other.asked
    assert drawing.draw(store, [one.address, other.address], mixed=True) == 0
    assert {machine.rpartition(", ")[2] for machine, _ in store.machines()} == {"GPU A", "GPU B"}
    store.close()


def test_memory_counts_only_while_a_picture_runs(stubs, tmp_path, monkeypatch):
    """What a server uses while a picture waits is another's."""
    looks = []
    monkeypatch.setattr(drawing.ComfyClient, "memory", lambda self: looks.append(time.monotonic()) or 3)
    stub, store = stubs(seconds=0.6), planned(tmp_path, 2)
    start = time.monotonic()
    assert drawing.draw(store, [stub.address], depth=1) == 0
    assert looks and min(looks) - start > 0.6
    store.close()
