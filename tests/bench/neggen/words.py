"""Words that others give (servers, models, files), made fit to be shown, kept and named after."""

import hashlib
import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: object, most: int = 500) -> str:
    """At most so many characters, without lone surrogates and without what a terminal would take for a command."""
    return CONTROL.sub(" ", str(text).encode(errors="replace").decode())[:most]


def slug(name: str) -> str:
    """A file name for any name, and no other name's: its letters and digits, and a digest."""
    letters = re.sub(r"\W+", "-", name, flags=re.ASCII).strip("-")[:40]
    return f"{letters}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:6]}".lstrip("-")
