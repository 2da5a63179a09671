"""Gets a source distribution from the registry that pip is set to, and never opens it. Standard library alone.

`pip download` would run the file's own build backend, whatever is in it. Here the file is fetched, compared with its
SHA-256 and kept. Asked are pip's own settings: index, extra indexes, links, certificate and proxy.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

from hosting.errors import HostError

SECONDS = 60.0
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
CERTIFICATES = "import pip._vendor.certifi as c; print(c.where())"


def fetch(python: Path, name: str, version: str, sha256: str, target: Path) -> None:
    """Writes the source distribution to `target`; HostError says what was tried if none has this hash."""
    settings, part = pip_settings(python), target.with_name(target.name + ".part")
    opener, tried = make_opener(python, settings), []
    target.parent.mkdir(parents=True, exist_ok=True)
    for page in pages(python, settings, name):
        try:
            for url in links(opener, page, name, version):
                download(opener, url, part)
                if sha256_of(part) == sha256:
                    part.replace(target)
                    return
                tried.append(f"{shown(url)}: another file than the one that was tested (its SHA-256 differs)")
        except (OSError, ValueError) as error:
            tried.append(f"{shown(page)}: {error}")
    part.unlink(missing_ok=True)
    raise HostError(
        f"{name} {version} could not be fetched (is the network reachable?). Tried, as pip is set:\n"
        + "\n".join(f"  {line}" for line in tried or ["no index: pip's settings name none"])
        + f"\nYou can put its .tar.gz there yourself: {target}"
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file; empty where there is none."""
    found = hashlib.sha256()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def pip_settings(python: Path) -> dict[str, str]:
    """What pip's files and the environment set, by name; the environment first, then `download`, then all commands."""
    listed = _pip(python, "config", "list")
    found = dict(re.findall(r"^(\S+?)=(['\"].*['\"])$", listed, re.MULTILINE))
    settings = {}
    for section in ("global.", "download.", ":env:."):
        for key, value in found.items():
            if key.startswith(section):
                settings[key.removeprefix(section)] = str(ast.literal_eval(value))
    return settings


def _pip(python: Path, *arguments: str) -> str:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, "COLUMNS": "400"}
    )
    if done.returncode:
        raise HostError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def pages(python: Path, settings: Mapping[str, str], name: str) -> Iterator[str]:
    """The addresses that may list the file."""
    if settings.get("no-index", "0").lower() not in ("1", "true", "yes", "on"):
        indexes = [settings.get("index-url") or _default_index(python), *settings.get("extra-index-url", "").split()]
        yield from (f"{as_url(index).rstrip('/')}/{name}/" for index in indexes)
    yield from map(as_url, settings.get("find-links", "").split())


def _default_index(python: Path) -> str:
    """As pip's own help names it."""
    found = re.search(r"--index-url.*?\(default\s+([^\s)]+)\)", _pip(python, "download", "--help"), re.DOTALL)
    if not found:
        raise HostError("pip names no default index: set one (PIP_INDEX_URL)")
    return found[1]


def as_url(place: str) -> str:
    """An address; pip takes paths too."""
    return place if re.match(r"[a-z]{2,}:", place) else Path(place).expanduser().resolve().as_uri()


def links(opener: urllib.request.OpenerDirector, page: str, name: str, version: str) -> Iterator[str]:
    """The addresses on a page whose file is the source distribution; a folder on the disk is a page of its files."""
    folder = Path(url2pathname(urlsplit(page).path)) if page.startswith("file:") else None
    if folder is not None and folder.is_dir():
        if not (folder / "index.html").is_file():
            found = [path.as_uri() for path in sorted(folder.iterdir())]
        else:
            found = _hrefs((folder / "index.html").read_text(encoding="utf-8"), folder.as_uri() + "/")
    else:
        with open_url(opener, page, ACCEPT) as answer:
            body, base = answer.read().decode("utf-8"), answer.url or page
            listed = "json" in answer.headers.get("Content-Type", "")
        found = [urljoin(base, one["url"]) for one in json.loads(body)["files"]] if listed else _hrefs(body, base)
    wanted = f"{normalised(name)}-{version}.tar.gz"
    for url in found:
        stem, dash, rest = unquote(urlsplit(url).path.rpartition("/")[2]).rpartition("-")
        if normalised(stem) + dash + rest == wanted:
            yield with_login(url, page)


class _Links(HTMLParser):
    """Collects what a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _hrefs(body: str, base: str) -> list[str]:
    parser = _Links()
    parser.feed(body)
    return [urljoin(base, link) for link in parser.found]


def normalised(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_login(url: str, page: str) -> str:
    """The address with the login of the page that named it, if both are on one host."""
    a, b = urlsplit(url), urlsplit(page)
    same = "@" in b.netloc and a.scheme == b.scheme and a.netloc == b.netloc.rpartition("@")[2]
    return urlunsplit(a._replace(netloc=b.netloc)) if same else url


def shown(url: str) -> str:
    """An address without a login in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))


def make_opener(python: Path, settings: Mapping[str, str]) -> urllib.request.OpenerDirector:
    """Opens addresses with pip's certificates and proxy."""
    context = ssl.create_default_context()
    if certificate := settings.get("cert"):
        path = Path(certificate).expanduser()
        context.load_verify_locations(**{"capath" if path.is_dir() else "cafile": str(path)})
    else:
        asked = subprocess.run([str(python), "-c", CERTIFICATES], capture_output=True, text=True)
        with contextlib.suppress(OSError):  # a pip without its own stands on the system's, as we then do
            context.load_verify_locations(cafile=asked.stdout.strip())
    proxy = settings.get("proxy")
    handlers = [urllib.request.ProxyHandler({"http": proxy, "https": proxy})] if proxy else []
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), *handlers)


def open_url(opener: urllib.request.OpenerDirector, url: str, accept: str = "*/*"):
    """The answer of an address; a login in it goes to its host alone, not to where that one points."""
    request = urllib.request.Request(shown(url), headers={"Accept": accept})
    login, at, _ = urlsplit(url).netloc.rpartition("@")
    if at:
        coded = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {coded}")
    return opener.open(request, timeout=SECONDS)


def download(opener: urllib.request.OpenerDirector, url: str, target: Path) -> None:
    """Writes what an address gives to a file."""
    with open_url(opener, url) as answer, target.open("wb") as file:
        shutil.copyfileobj(answer, file)
