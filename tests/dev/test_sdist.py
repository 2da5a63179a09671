"""How a source distribution is got: from the registry that pip is set to, compared with its hash, and never opened."""

import base64
import hashlib
import json
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hosting import sdist
from hosting.errors import HostError

NAME = "vsf_probe-1.0.tar.gz"
BACKEND = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
raise SystemExit("the build backend ran")
"""


@pytest.fixture
def archive(tmp_path) -> Path:
    """A source distribution whose build backend fails, should it run."""
    source = tmp_path / "vsf_probe-1.0"
    source.mkdir()
    (source / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n')
    (source / "b.py").write_text(BACKEND)
    path = tmp_path / "files" / NAME
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source, source.name)
    return path


@pytest.fixture
def serve(archive):
    """Starts a registry; gives its address and what it was asked: paths, and who asked."""
    servers = []

    def start(kind: str, files: str = "") -> tuple[str, list[tuple[str, str]]]:
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.path, self.headers.get("Authorization", "")))
                where = f"{files}/files/{NAME}#sha256=0"
                if self.path == f"/files/{NAME}":
                    self.answer("application/gzip", archive.read_bytes())
                elif self.path == "/simple/vsf-probe/" and kind == "json":
                    page = {"files": [{"filename": "vsf_probe-1.0-py3-none-any.whl", "url": "/x.whl"}, {"url": where}]}
                    self.answer("application/vnd.pypi.simple.v1+json", json.dumps(page).encode())
                elif self.path == "/simple/vsf-probe/" and kind == "html":
                    page = f'<a href="/files/vsf_probe-0.9.tar.gz">x</a><a href="{where}" data-x>y</a>'
                    self.answer("text/html", page.encode())
                else:
                    self.send_error(404)

            def answer(self, kind, body):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_address[1]}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def pip_set(monkeypatch):
    """Sets pip, and nothing else does; with ``really`` in its own file, which takes pip a while to say."""
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "CERT", "PROXY"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)

    def put(folder: Path, really: bool = False, **settings: str) -> None:
        settings = {name.replace("_", "-"): value for name, value in settings.items()}
        if not really:
            monkeypatch.setattr(sdist, "CERTIFICATES", "")
            monkeypatch.setattr(sdist, "pip_settings", lambda python: settings)
            return
        lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
        (folder / "pip.conf").write_text(f"[global]\n{lines}\n")
        for name, value in {"PIP_CONFIG_FILE": folder / "pip.conf", "HOME": folder, "XDG_CONFIG_DIRS": folder}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)

    return put


def fetch(archive: Path, target: Path, sha256: str | None = None) -> None:
    right = hashlib.sha256(archive.read_bytes()).hexdigest()
    sdist.fetch(Path(sys.executable), "vsf-probe", "1.0", sha256 or right, target)


@pytest.mark.parametrize("kind", ["json", "html"])
def test_it_comes_from_the_index_that_pip_is_set_to_and_is_not_opened(tmp_path, archive, serve, pip_set, kind):
    address, asked = serve(kind)
    pip_set(tmp_path, really=kind == "json", index_url=f"http://{address}/simple")
    fetch(archive, tmp_path / "out" / "got.tar.gz")
    assert (tmp_path / "out" / "got.tar.gz").read_bytes() == archive.read_bytes()
    assert [path for path, _ in asked] == ["/simple/vsf-probe/", f"/files/{NAME}"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["got.tar.gz"] and not list(tmp_path.rglob("ran"))


def test_a_login_goes_to_its_own_host_alone(tmp_path, archive, serve, pip_set):
    files, asked_files = serve("json")
    address, asked = serve("json", files=f"http://{files}")
    pip_set(tmp_path, index_url=f"http://me:pa%40ss@{address}/simple")
    fetch(archive, tmp_path / "got.tar.gz")
    assert asked == [("/simple/vsf-probe/", "Basic " + base64.b64encode(b"me:pa@ss").decode())]
    assert asked_files == [(f"/files/{NAME}", "")]


@pytest.mark.parametrize("place", ["extra index", "folder index", "folder of files"])
def test_other_places_that_pip_knows(tmp_path, archive, serve, pip_set, place):
    empty, _ = serve("empty")
    other, _ = serve("json")
    folder = tmp_path / "simple" / "vsf-probe"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(f'<a href="../../files/{NAME}#sha256=0">x</a>')
    more = {
        "extra index": {"index_url": f"http://{empty}/simple", "extra_index_url": f"http://{other}/simple"},
        "folder index": {"index_url": str(tmp_path / "simple")},
        "folder of files": {"no_index": "true", "find_links": str(archive.parent)},
    }[place]
    pip_set(tmp_path, **more)
    fetch(archive, tmp_path / "got.tar.gz")
    assert (tmp_path / "got.tar.gz").read_bytes() == archive.read_bytes()


def test_another_file_is_refused_and_not_kept(tmp_path, archive, serve, pip_set):
    address, _ = serve("json")
    pip_set(tmp_path, index_url=f"http://me:secret@{address}/simple")
    with pytest.raises(
        HostError, match=r"another file than the one that was tested(.|\n)*there yourself: .*got"
    ) as told:
        fetch(archive, tmp_path / "got.tar.gz", sha256="0" * 64)
    assert "secret" not in str(told.value) and not list(tmp_path.glob("got*"))


def test_what_was_tried_is_said(tmp_path, archive, serve, pip_set):
    address, _ = serve("empty")
    pip_set(tmp_path, index_url=f"http://{address}/simple")
    with pytest.raises(HostError, match=rf"{address}/simple/vsf-probe/: HTTP Error 404"):
        fetch(archive, tmp_path / "got.tar.gz")


def test_without_a_setting_it_is_the_index_that_pip_names(tmp_path, pip_set):
    pip_set(tmp_path, really=True)
    settings = sdist.pip_settings(Path(sys.executable))
    (page,) = sdist.pages(Path(sys.executable), settings, "vsf-probe")
    assert page.startswith("https://") and page.endswith("/simple/vsf-probe/")
