"""`pack --dry-run`: what it foretells, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.step import Target, peak_memory
from quantkit.pack.job import PackOptions
from quantkit.pack.preview import preview
from tests.tiny import calibrate_tiny


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_tiny(tmp_path_factory.mktemp("forecast"))


@pytest.mark.parametrize(
    "options",
    [
        PackOptions("osc", device="cpu"),
        PackOptions("nvfp4", rounding="search", device="cpu"),
        PackOptions("mxfp4", sites={"mlp_out": "bf16"}, device="cpu"),
    ],
)
def test_forecast(calibrated: Path, tmp_path: Path, options: PackOptions) -> None:
    data, text = preview(calibrated, options, Target(tmp_path / "out"))
    assert 0 < data["seconds"] < 3600
    assert data["peak_memory_bytes"] <= peak_memory()
    assert "peak memory about" in text
    assert list(tmp_path.iterdir()) == []


def test_rounding_on_text_has_an_estimate_of_memory_alone(calibrated: Path, tmp_path: Path) -> None:
    options = PackOptions("mxfp4", rounding="gptq", device="cpu")
    data, _ = preview(calibrated, options, Target(tmp_path / "out"))
    assert "seconds" not in data
    assert data["peak_memory_bytes"] > peak_memory()
