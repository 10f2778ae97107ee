"""The table of plans: rows are kept, and made only once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny import calibrate_tiny

ROOT = Path(__file__).parent.parent.parent


def test_rows_are_made_kept_and_averaged(tmp_path: Path) -> None:
    folder = calibrate_tiny(tmp_path)
    command = [
        *(sys.executable, str(ROOT / "examples" / "plan_table.py"), str(folder), str(folder)),
        *("--data", "sample", "--windows", "2", "--bits", "5", "--samples", "2", "--trials", "2"),
        *("--rows", "plan, rtn; nvfp4, rtn", "-o", str(tmp_path / "out")),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table) == ["plan, rtn", "nvfp4, rtn"]
    assert all(len(found) == 2 for found in table.values())
    assert all(one["bits"] <= 5 for one in table["plan, rtn"])
    # both calibrations are the same one here
    assert table["nvfp4, rtn"][0] == table["nvfp4, rtn"][1]
    kept = tmp_path / "out" / "calibration 1" / "nvfp4, rtn.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"excess_nll": 9.0}))
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "9.0000" in again.stdout
    assert done.stdout.count("\n") == again.stdout.count("\n")
    # simulated together they are what packing each gave
    shutil.copytree(tmp_path / "out" / "calibration 0", tmp_path / "sim" / "calibration 0")
    for row in table:
        (tmp_path / "sim" / "calibration 0" / f"{row}.json").unlink()
    command[-1] = str(tmp_path / "sim")
    options = ["--together", "--runs", "0"]
    subprocess.run([*command, *options], env=environment, capture_output=True, check=True)
    simulated = json.loads((tmp_path / "sim" / "table.json").read_text())
    for row, (packed, _) in table.items():
        (one,) = simulated[row]
        assert one["bits"] == packed["bits"]
        assert abs(one["excess_nll"] - packed["excess_nll"]) < 2e-3
