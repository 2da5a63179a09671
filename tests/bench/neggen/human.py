"""Someone judges: a page on this machine that shows picture after picture, shuffled, without a word of its method."""

import json
import random
import secrets
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from neggen.store import BadPicture, Cell, Store, opened
from neggen.words import plain

PAGE = Path(__file__).with_name("human.html")


class Session:
    """One person's pictures in an order of their own, known to the page by tokens that say nothing."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.judge = store, f"human {plain(name)}"
        cells = {cell.key + cell.pair.id: cell for cell in store.cells()}
        order = sorted(cells)
        random.Random(self.judge).shuffle(order)
        self.cells: dict[str, Cell] = {secrets.token_urlsafe(9): cells[place] for place in order}

    def left(self) -> list[str]:
        """Tokens of what has no scores yet, in the session's order."""
        todo = {(cell.key, cell.pair.id) for cell in self.store.to_judge(self.judge)}
        return [token for token, cell in self.cells.items() if (cell.key, cell.pair.id) in todo]

    def show(self) -> str | None:
        """The token of the first of them whose picture can be seen; others are passed over, and said."""
        for token in self.left():
            try:
                opened(self.store.path(self.cells[token].key))
                return token
            except BadPicture as error:
                print(error, flush=True)
                del self.cells[token]
        return None

    def next(self) -> dict[str, Any]:
        """What the page shows now."""
        token = self.show()
        shown = {"done": len(self.cells) - len(self.left()), "total": len(self.cells)}
        if token is None:
            return shown
        pair = self.cells[token].pair
        return {**shown, "token": token, "questions": [pair.question_1, pair.question_2]}

    def picture(self, token: str) -> bytes:
        """The pixels alone: ComfyUI writes the whole graph into its files."""
        out = BytesIO()
        opened(self.store.path(self.cells[token].key)).save(out, "PNG")
        return out.getvalue()

    def score(self, token: str, scores: list[float]) -> None:
        """Keeps scores; raises ValueError for anything else."""
        if len(scores) != 3 or not all(isinstance(s, (int, float)) and 0 <= s <= 1 for s in scores):
            raise ValueError(f"expected three scores from 0 to 1, not {scores}")
        self.store.score(self.judge, self.cells[token], scores)

    def forget(self, token: str) -> None:
        """Takes scores back."""
        self.store.unscore(self.judge, self.cells[token])


def serve(session: Session, port: int, ready: Callable[[str], None]) -> None:
    """Serves the page on this machine alone until Ctrl-C; ``ready`` hears its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.is_foreign():
                return
            parts = self.path.strip("/").split("/")
            if self.path == "/":
                self.answer("text/html; charset=utf-8", PAGE.read_bytes())
            elif parts == ["next"]:
                self.answer("application/json", json.dumps(session.next()).encode())
            elif parts[0] == "picture" and parts[-1] in session.cells:
                try:
                    self.answer("image/png", session.picture(parts[-1]))
                except BadPicture as error:
                    self.send_error(404, str(error)[:100])
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            if self.is_foreign():
                return
            try:
                if self.headers.get("Content-Type") != "application/json":  # no other page's form can send this
                    raise ValueError("expected JSON")
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/forget":
                    session.forget(told["token"])
                else:
                    session.score(told["token"], told["scores"])
            except (ValueError, KeyError, TypeError) as error:
                return self.send_error(400, str(error)[:100])
            self.answer("application/json", json.dumps(session.next()).encode())

        def is_foreign(self) -> bool:
            """Refuses a request under any other name, such as one of another page's."""
            foreign = self.headers.get("Host") != f"127.0.0.1:{self.server.server_address[1]}"
            if foreign:
                self.send_error(403)
            return foreign

        def answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        ready(f"http://127.0.0.1:{server.server_address[1]}")
        server.serve_forever()
