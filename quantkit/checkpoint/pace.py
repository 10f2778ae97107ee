"""How long this machine takes for what every step does with bytes: digests and durable writes."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

from quantkit.checkpoint.reader import CHUNK, Checkpoint

SAMPLE = 64 * 2**20


def running() -> float:
    """Seconds since this process was started, imports included; 0 where that is not known."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def hash_rate() -> float:
    """Bytes a second of one thread's sha256."""
    piece = bytes(CHUNK)
    started = time.perf_counter()
    for _ in range(SAMPLE // CHUNK):
        hashlib.sha256(piece)
    return SAMPLE / (time.perf_counter() - started)


def digest_seconds(source: Checkpoint) -> float:
    """Seconds for the digest of a checkpoint's weights: none when it is recorded."""
    if source.knows_digests():
        return 0.0
    threads = min(8, os.cpu_count() or 1)
    return sum(info.nbytes for info in source.tensors.values()) / (threads * hash_rate())


def write_rate(folder: Path) -> float:
    """Bytes a second that reach the disk below `folder`, by a file that leaves nothing behind."""
    while not folder.is_dir():
        folder = folder.parent
    piece = os.urandom(CHUNK)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(SAMPLE // CHUNK):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return SAMPLE / (time.perf_counter() - started)
