"""Write blackwell_scale_layout.json: offsets of scales as CuTe gives them (needs nvcc)."""

from __future__ import annotations

import json
from pathlib import Path

from quantkit.kernels import jit
from tests.kernels.test_scale_layout import CUTE

SHAPES = ((1, 1), (33, 5), (130, 9))


def main() -> None:
    library = jit.load(CUTE, "scale_layout", "sm_90a")
    cases = [
        {
            "rows": rows,
            "blocks": blocks,
            "offsets": [
                [library.offset32(rows, blocks * 32, row, block * 32) for block in range(blocks)]
                for row in range(rows)
            ],
        }
        for rows, blocks in SHAPES
    ]
    data = {"cutlass": jit.find_cutlass()[1], "cases": cases}
    Path(__file__).with_name("blackwell_scale_layout.json").write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
