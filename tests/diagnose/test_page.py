"""The page opens in a browser without errors, draws every figure, and needs no network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantkit.diagnose.page import render, write_page
from tests.diagnose.report import small_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FIGURES = ("sites", "layers", "heat", "raster", "error", "drift", "noise", "pareto")


def dumped(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """The DOM after the page's script ran, and what the browser logged."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            *flags,
            "--dump-dom",
            page.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_every_figure_is_drawn_without_errors(tmp_path: Path) -> None:
    page = write_page(small_report(), tmp_path / "page.html")
    dom, log = dumped(page, tmp_path / "profile")
    assert "CONSOLE" not in log, log
    for name in FIGURES:
        figure = re.search(rf'<figure id="{name}".*?</figure>', dom, re.S)
        assert figure, f"{name} is missing"
        assert re.search(r"<(rect|polyline|path|circle)[ >]", figure[0]), f"{name} is empty"
        assert "NaN" not in figure[0], name
        assert "undefined" not in figure[0], name
    report = small_report()
    bars = len(re.findall('class="bar"', dom))
    assert bars == 2 * len(report["sets"])
    assert len(re.findall('class="cell"', dom)) == len(report["sites"])
    assert len(re.findall('class="point"', dom)) == len(report["pareto"])
    assert "Sparing" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_quick_report_has_no_layers_and_no_errors(tmp_path: Path) -> None:
    report = small_report()
    report["sets"] = [s for s in report["sets"] if s["group"] != "layer"]
    dom, log = dumped(write_page(report, tmp_path / "page.html"), tmp_path / "profile")
    assert "CONSOLE" not in log, log
    assert '<figure id="layers"' not in dom
    assert '<figure id="sites"' in dom


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    page = render(small_report())
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)
    addresses = set(re.findall(r"https?://[^\s\"']+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, not a place


def test_hostile_names_stay_text() -> None:
    report = small_report()
    report["checkpoint"] = "/models/</script><script>alert(1)</script>"
    page = render(report)
    assert "<script>alert" not in page
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert json.loads(data[1])["checkpoint"] == report["checkpoint"]


def test_infinite_numbers_become_gaps() -> None:
    report: dict[str, Any] = small_report()
    report["plain"]["perplexity"] = float("inf")
    report["noise"][0]["slope"] = float("nan")
    data = re.search(r'id="data">(.*?)</script>', render(report), re.S)
    assert data is not None
    read = json.loads(data[1])
    assert read["plain"]["perplexity"] is None
    assert read["noise"][0]["slope"] is None


def test_both_modes_have_colours() -> None:
    page = render(small_report())
    light = re.search(r":root \{(.*?)\}", page, re.S)
    dark = re.search(r'data-mode="dark"\] \{(.*?)\}', page, re.S)
    assert light is not None
    assert dark is not None
    names = set(re.findall(r"(--[\w-]+):", light[1]))
    assert names == set(re.findall(r"(--[\w-]+):", dark[1]))
