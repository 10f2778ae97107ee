"""Several processes as a launcher starts them, forked from this one: nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _one(rank: int, size: int, port: int, work: Callable[[], object]) -> None:
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work()


def run_ranks(size: int, work: Callable[[], object]) -> list[int]:
    """Run `work` in `size` processes at once; returns their exit codes."""
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [context.Process(target=_one, args=(r, size, port, work)) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [int(process.exitcode or 0) for process in ranks]
