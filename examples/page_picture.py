"""A picture of a diagnosis page, small enough for a README.

    quantkit diagnose model-calibrated -o page.html
    python examples/page_picture.py page.html diagnosis.png --height 1400

Needs Chromium (`chromium` on PATH, or --browser) and Pillow.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

WIDTH = 1180


def picture(page: Path, browser: str, height: int, dark: bool, shot: Path) -> None:
    """Open the page in a headless browser and write what it shows."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={profile}", f"--window-size={WIDTH},{height}"),
            *("--virtual-time-budget=4000", f"--screenshot={shot.resolve()}"),
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            page.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    """Take the picture and reduce it to few colours."""
    from PIL import Image

    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--height", type=int, default=1400, help="pixels from the top of the page")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium-browser")
    asked = parser.parse_args()
    picture(asked.page, asked.browser, asked.height, asked.dark, asked.picture)
    few = Image.open(asked.picture).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    few.save(asked.picture, optimize=True)
    print(f"{asked.picture}: {asked.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
