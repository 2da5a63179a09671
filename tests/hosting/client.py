"""A small client for a running ComfyUI: queue a graph, follow it over the websocket, fetch its pictures."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from threading import Thread
from typing import Any

import aiohttp

from hosting.errors import PromptFailed, ServerDied

Prompt = dict[str, dict[str, Any]]
# Called with the node's id, the step that is done and the number of steps; (id, 0, 0) when a node starts.
OnProgress = Callable[[str, int, int], None]


class ComfyClient:
    """Talks to one server. Every call has a time limit and fails with ComfyUI's own text."""

    def __init__(self, address: str, timeout: float = 120.0) -> None:
        self.address, self.timeout = address.rstrip("/"), timeout
        self.client_id = uuid.uuid4().hex

    def object_info(self) -> dict[str, Any]:
        """The schema of every node the server knows."""
        return json.loads(self._request("/object_info"))

    def queue(self, prompt: Prompt, prompt_id: str | None = None) -> str:
        """Queues an API-format graph and gives its prompt id; raises PromptFailed when ComfyUI refuses any of it.

        prompt_id: a UUID of the caller's, who can then ask for it later.
        """
        body = {"prompt": prompt, "client_id": self.client_id, **({"prompt_id": prompt_id} if prompt_id else {})}
        answer = json.loads(self._request("/prompt", json.dumps(body).encode()))
        if answer.get("node_errors"):
            raise PromptFailed(refusal_text({"error": "some outputs were refused", **answer}))
        return answer["prompt_id"]

    def is_queued(self, prompt_id: str) -> bool:
        """Whether a prompt runs now or waits."""
        queue = json.loads(self._request("/queue"))
        return any(prompt_id == item[1] for item in queue["queue_running"] + queue["queue_pending"])

    def history(self, prompt_id: str) -> dict[str, Any]:
        """What the server remembers of a finished prompt: its outputs and its status."""
        return json.loads(self._request(f"/history/{prompt_id}")).get(prompt_id, {})

    def image(self, ref: dict[str, str]) -> bytes:
        """The bytes of a picture that an output names."""
        keys = ("filename", "subfolder", "type")
        return self._request("/view?" + urllib.parse.urlencode({key: ref[key] for key in keys if key in ref}))

    def memory(self) -> int:
        """Bytes in use on the server's devices, by whomever; a device that is a CPU counts the machine's."""
        devices = json.loads(self._request("/system_stats"))["devices"]
        return sum(device["vram_total"] - device["vram_free"] for device in devices)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stops the graph that runs now; with an id, only if it is that one."""
        self._request("/interrupt", json.dumps({"prompt_id": prompt_id} if prompt_id else {}).encode())

    def run(
        self, prompt: Prompt, on_progress: OnProgress | None = None, prompt_id: str | None = None
    ) -> dict[str, Any]:
        """Queues a graph, waits for its end and gives the outputs by node id; ``prompt_id`` as in ``queue``."""
        followed = asyncio.wait_for(self._run(prompt, on_progress or (lambda *_: None), prompt_id), self.timeout)
        try:
            return run_in_thread(followed)
        except asyncio.TimeoutError:
            self.interrupt(prompt_id)
            raise PromptFailed(f"the graph did not end within {self.timeout:.0f} s") from None
        except aiohttp.ClientError as error:
            raise ServerDied(f"the websocket of {self.address} failed: {error}") from None

    async def _run(self, prompt: Prompt, on_progress: OnProgress, prompt_id: str | None) -> dict[str, Any]:
        url = f"{self.address.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            prompt_id = await asyncio.to_thread(self.queue, prompt, prompt_id)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    if follow(event["type"], event["data"], prompt_id, on_progress):
                        return (await asyncio.to_thread(self.history, prompt_id)).get("outputs", {})
        raise ServerDied("the server closed the websocket before the graph ended")

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(self.address + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise PromptFailed(refusal_text(json.loads(text)) if text.startswith("{") else f"{error}: {text}") from None
        except OSError as error:
            raise ServerDied(f"{self.address}{path} does not answer: {error}") from None


def run_in_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine in an event loop of its own, so that it works beside another one (a browser driver's).

    The thread is a daemon: Ctrl-C ends the wait at once.
    """
    result: Future[Any] = Future()

    def work() -> None:
        try:
            result.set_result(asyncio.run(coroutine))
        except BaseException as error:
            result.set_exception(error)

    Thread(target=work, daemon=True).start()
    return result.result()


def follow(kind: str, data: dict[str, Any], prompt_id: str, on_progress: OnProgress) -> bool:
    """Handles one websocket event; says whether the graph has ended, raises if it failed."""
    if data.get("prompt_id") != prompt_id:
        return False
    if kind == "execution_error":
        where = f"{data.get('node_type')} (node {data.get('node_id')})"
        raise PromptFailed(f"{where}: {data.get('exception_type')}: {str(data.get('exception_message')).strip()}")
    if kind == "execution_interrupted":
        raise PromptFailed(f"interrupted in {data.get('node_type')} (node {data.get('node_id')})")
    if kind == "executing" and data.get("node") is not None:
        on_progress(str(data["node"]), 0, 0)
    if kind == "progress" and data.get("node") is not None:
        on_progress(str(data["node"]), int(data["value"]), int(data["max"]))
    return kind == "executing" and data.get("node") is None


def refusal_text(answer: dict[str, Any]) -> str:
    """ComfyUI's refusal of a graph as text: the error, then each node's errors."""
    error = answer.get("error", {})
    lines = [error if isinstance(error, str) else f"{error.get('message')} {error.get('details', '')}".strip()]
    for node_id, node in (answer.get("node_errors") or {}).items():
        for one in node.get("errors", []):
            lines.append(f"  {node.get('class_type')} (node {node_id}): {one.get('message')}: {one.get('details')}")
    return "\n".join(lines)
