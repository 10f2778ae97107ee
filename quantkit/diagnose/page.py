"""A diagnosis as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

TEMPLATE = "page.html"


def render(report: dict[str, Any]) -> str:
    """The page of a report of `diagnose`: the numbers as JSON inside, drawn by its own script."""
    template = resources.files("quantkit.diagnose").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # "</script>" or "<!--" inside a string would end the element; < is legal JSON for <
    data = json.dumps(_finite(report), separators=(",", ":"), default=str).replace("<", "\\u003c")
    title = escape(f"{Path(report['checkpoint']).name}: where 4 bits lose accuracy")
    return template.replace("{{title}}", title).replace("{{data}}", data)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, which the page shows as a gap."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_page(report: dict[str, Any], path: Path) -> Path:
    """Write the page, whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(render(report), encoding="utf-8")
    temporary.replace(path)
    return path
