"""The numbers to begin with, by model, as js/starts.js has them for the frontend: one table for all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[2] / "js" / "starts.js"


def starts() -> list[dict[str, Any]]:
    """The rows, in their order."""
    rows = re.search(r"export const STARTS = (\[.*?\n\]);", TABLE.read_text(encoding="utf-8"), re.DOTALL)
    assert rows, "js/starts.js has no table"
    return json.loads(rows.group(1))


def start_of(*files: str) -> dict[str, Any]:
    """Where a model begins, by its files' names: the first row that knows one, else the last."""
    names, rows = " ".join(files).lower(), starts()
    return next((row for row in rows if row.get("files") and re.search(row["files"], names)), rows[-1])
