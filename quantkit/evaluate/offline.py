"""Find out quickly whether the Hub answers, so that a missing network is not a long wait."""

from __future__ import annotations

import os
import socket
import sys
from functools import cache
from urllib.parse import urlsplit

SECONDS = 3.0


@cache
def hub_reachable() -> bool:
    """Whether a connection to the Hub opens within `SECONDS`; no when HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # only the proxy knows; the libraries will find out
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "huggingface.co", port), SECONDS).close()
    except OSError:
        return False
    return True


def go_offline_if_unreachable() -> bool:
    """Without a Hub, make the Hub libraries use their caches at once; returns whether it is so."""
    if hub_reachable():
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The libraries read the variable when they are imported; some may have been already.
    for module, names in (
        ("huggingface_hub.constants", ("HF_HUB_OFFLINE",)),
        ("datasets.config", ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")),
    ):
        if module in sys.modules:
            for name in names:
                setattr(sys.modules[module], name, True)
    return True
