"""Which channel of each group leaves the 4-bit path, by one of several criteria.

A group is `group` neighbouring channels of a site (the last may be shorter); every function takes
one number per channel and gives at most one channel per group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.formats import mxfp4

CRITERIA = ("mode", "magnitude", "energy", "error")


def best_of_groups(score: Tensor, group: int) -> Tensor:
    """The channel with the largest score of each group: ascending int64 (ties: the first).

    Groups without a positive score are bypassed. `score` [channels], any real dtype.
    """
    width = len(score)
    missing = -width % group
    table = functional.pad(score.double(), (0, missing), value=-1.0).view(-1, group)
    best, place = table.max(1)
    # `max` may give any of several equal entries; the first is wanted.
    place = (table == best[:, None]).int().argmax(1)
    channels = place + torch.arange(len(table)) * group
    return channels[best > 0]


def mode_of_argmax(hits: Tensor, group: int) -> Tensor:
    """OSC, Algorithm 1: the channel that most often was its group's maximum above T = 5 mean|x|.

    `hits` int64 [channels]: for how many tokens it was. A group whose maximum never was above T
    is bypassed.
    """
    return best_of_groups(hits, group)


def error_reduction(x: Tensor, rule: str = "even") -> Tensor:
    """By how much the squared MXFP4 error of a site's inputs falls when a channel is taken out.

    x [tokens, channels]. Float64 [channels]: the error of the channel's block as it is, less the
    error of the block with that channel zeroed before the scale is chosen. Channels are tried at
    the same place of every block at once, so the cost is 32 quantizations of x.
    """
    width, block = x.shape[1], mxfp4.BLOCK
    x = x.float()
    blocks = (len(x), width // block, block)
    before = (mxfp4.fake_quantize(x, rule) - x).view(blocks).square().sum(-1).sum(0)
    gain = torch.empty(width // block, block, dtype=torch.float64)
    for place in range(block):
        rest = x.view(blocks).clone()
        rest[:, :, place] = 0
        flat = rest.view(x.shape)
        after = (mxfp4.fake_quantize(flat, rule) - flat).view(blocks).square().sum(-1).sum(0)
        gain[:, place] = (before - after).double()
    return gain.flatten()
