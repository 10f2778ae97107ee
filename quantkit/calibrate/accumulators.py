"""What is kept of a site's inputs: small states that grow by `update` and join by `merge`.

`merge` is associative: counts, maxima, tails and hits exactly so, sums to float64 rounding. It
joins batches, ranks and resumed runs alike. All take tiles [channels, tokens], because every
statistic but the group maxima runs along the tokens of a channel, and those are reductions over
leading dimensions, which vectorise best that way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from quantkit.errors import InputRejected

GROUPS = (32, 64, 128)
_KEY_BITS = 7  # of a channel's place inside 128 channels, the largest group


@dataclass
class Moments:
    """Token count, mean and central sums of powers per channel, float64 [channels]."""

    count: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    m2: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    m3: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    m4: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @classmethod
    def of(cls, values: torch.Tensor, room: torch.Tensor | None = None) -> Moments:
        """Measure a float32 tile [channels, tokens], which is overwritten (as is `room`, alike).

        Sums run in float32 over one tile of values already centred, then in float64.
        """
        n = values.shape[1]
        centre = values.mean(1)
        values.sub_(centre[:, None])
        square = torch.mul(values, values, out=room)
        # The float32 centre is a rounded mean; what it missed is taken out in float64.
        first = values.sum(1).double()
        s2 = square.sum(1).double()
        s3 = values.mul_(square).sum(1).double()
        s4 = square.mul_(square).sum(1).double()
        d = first / n
        return cls(
            n,
            centre.double() + d,
            (s2 - n * d * d).clamp_(min=0),
            s3 - 3 * d * s2 + 2 * n * d * d * d,
            (s4 - 4 * d * s3 + 6 * d * d * s2 - 3 * n * d * d * d * d).clamp_(min=0),
        )

    def merge(self, other: Moments) -> Moments:
        """Join two disjoint sets of tokens (Pébay 2008, equations 2.1 and 3.1)."""
        if not self.count or not other.count:
            return self if self.count else other
        na, nb = float(self.count), float(other.count)
        n = na + nb
        d = other.mean - self.mean
        r = d / n
        return Moments(
            self.count + other.count,
            self.mean + nb * r,
            self.m2 + other.m2 + na * nb * d * r,
            self.m3
            + other.m3
            + na * nb * (na - nb) * d * (r * r)
            + 3 * r * (na * other.m2 - nb * self.m2),
            self.m4
            + other.m4
            + na * nb * (na * na - na * nb + nb * nb) * d * r * r * r
            + 6 * (r * r) * (na * na * other.m2 + nb * nb * self.m2)
            + 4 * r * (na * other.m3 - nb * self.m3),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Central moments, averaged over tokens, and the energy (sum of squares)."""
        n = max(self.count, 1)
        return {
            "count": torch.tensor(self.count),
            "mean": self.mean,
            "energy": self.m2 + self.count * self.mean**2,
            "m2": self.m2 / n,
            "m3": self.m3 / n,
            "m4": self.m4 / n,
        }


@dataclass
class Magnitude:
    """Sums of |x|: per channel in float64, and in total as parts that are summed exactly."""

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    parts: tuple[float, ...] = ()

    @classmethod
    def of(cls, magnitudes: torch.Tensor) -> Magnitude:
        """Measure |x| of a float32 tile [channels, tokens]."""
        total = magnitudes.sum(1).double()
        return cls(magnitudes.shape[1], total, (float(total.sum()),))

    def merge(self, other: Magnitude) -> Magnitude:
        """Join two disjoint sets of tokens."""
        if not self.count or not other.count:
            return self if self.count else other
        return Magnitude(
            self.count + other.count, self.total + other.total, self.parts + other.parts
        )

    def mean(self) -> float:
        """Mean |x| over all tokens and channels: the same float for any order of merging."""
        elements = self.count * len(self.total)
        return math.fsum(self.parts) / elements if elements else 0.0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Mean |x| per channel."""
        return {"abs_mean": self.total / max(self.count, 1)}


class Tail:
    """The `k` largest |x| of every channel, as bit patterns (ordered like the numbers)."""

    def __init__(self, k: int, dtype: torch.dtype, room: int = 4096) -> None:
        self.k, self.dtype, self.room = k, dtype, max(room, k)
        self._buffer: torch.Tensor | None = None  # [channels, k + room], the first `_used` filled
        self._used = 0

    def place(self, channels: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Give the [channels, tokens] to be filled with bit patterns of |x|: already taken in."""
        if self._buffer is None:
            size = (channels, self.k + self.room)
            self._buffer = torch.empty(size, dtype=pattern_dtype(self.dtype), device=device)
        if self._used + tokens > self._buffer.shape[1]:
            self._settle()
        start, self._used = self._used, self._used + tokens
        return self._buffer[:, start : self._used]

    def update(self, patterns: torch.Tensor) -> None:
        """Take in bit patterns of |x| [channels, tokens]."""
        for part in patterns.split(self.room, dim=1):
            self.place(part.shape[0], part.shape[1], part.device).copy_(part)

    def merge(self, other: Tail) -> Tail:
        """Join two disjoint sets of tokens."""
        joined = Tail(self.k, self.dtype, self.room)
        for tail in (self, other):
            if tail._buffer is not None:
                joined.update(tail._settle())
        return joined

    def _settle(self) -> torch.Tensor:
        """Move the `k` largest to the front and forget the rest; gives them in no order."""
        assert self._buffer is not None
        used, k = self._used, self.k
        if used > k:
            filled = self._buffer[:, :used]
            if filled.device.type == "cpu":
                # A vectorised selection in place, many times faster than torch.topk.
                filled.numpy().partition(used - k, axis=1)
                kept = filled[:, used - k :].clone()
            else:
                values = filled.view(self.dtype).topk(k, dim=1, sorted=False).values
                kept = values.view(filled.dtype)
            self._buffer[:, :k] = kept
            self._used = k
        return self._buffer[:, : self._used]

    def state_dict(self, k: int | None = None) -> dict[str, torch.Tensor]:
        """`tail` [channels, k] descending, in the dtype of the inputs, and `absmax` float32."""
        if self._buffer is None:
            return {}
        kept = self._settle()
        if k is not None and k < kept.shape[1]:
            kept = Tail._of(kept, k, self.dtype)
        ordered = kept.sort(dim=1, descending=True).values.contiguous().view(self.dtype)
        return {"tail": ordered, "absmax": ordered[:, 0].float()}

    @staticmethod
    def _of(patterns: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
        tail = Tail(k, dtype)
        tail.update(patterns)
        return tail._settle()

    def __getstate__(self) -> dict[str, object]:
        kept = None if self._buffer is None else self._settle().cpu().clone()
        return {"k": self.k, "dtype": self.dtype, "room": self.room, "kept": kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["k"], state["dtype"], state["room"])  # type: ignore
        if isinstance(state["kept"], torch.Tensor):
            self.update(state["kept"])


@dataclass
class GroupMaxima:
    """Per token and group of 32 channels: the largest |x| and where it is, as one integer.

    OSC's threshold (arXiv 2604.12782) needs the mean over all tokens, so the maxima are kept (a
    thirty-second of the inputs) until it is known; `Hits.of` then counts.
    """

    channels: int
    dtype: torch.dtype
    keys: list[torch.Tensor] = field(default_factory=list)  # each [groups of 32, tokens]

    def update(self, patterns: torch.Tensor, room: torch.Tensor | None = None) -> None:
        """Take in bit patterns of |x| [channels, tokens]; `room`, alike, may be overwritten."""
        wide = torch.int32 if patterns.itemsize == 2 else torch.int64
        place = torch.arange(self.channels, device=patterns.device) % (1 << _KEY_BITS)
        # Larger value first, then the smaller channel: what argmax would choose.
        lowest_first = ((1 << _KEY_BITS) - 1 - place).to(wide)
        if room is None:
            room = torch.empty(patterns.shape, dtype=wide, device=patterns.device)
        keys = room.view(wide).copy_(patterns).mul_(1 << _KEY_BITS).add_(lowest_first[:, None])
        self.keys.append(_grouped_max(keys, 32))

    def merge(self, other: GroupMaxima) -> GroupMaxima:
        """Join two disjoint sets of tokens."""
        return GroupMaxima(self.channels, self.dtype, self.keys + other.keys)


@dataclass
class Hits:
    """For each group size: how often a channel was its group's maximum above the threshold.

    `hits[G]` int64 [channels], `qualify[G]` int64 [groups]: tokens whose maximum was above it.
    """

    hits: dict[int, torch.Tensor]
    qualify: dict[int, torch.Tensor]

    @classmethod
    def of(cls, maxima: GroupMaxima, threshold: float) -> Hits:
        """Count the maxima |x| > threshold (OSC, 2604.12782, section 3 and algorithm 1)."""
        width = maxima.channels
        hits = {g: torch.zeros(width, dtype=torch.int64) for g in GROUPS}
        qualify = {g: torch.zeros(-(-width // g), dtype=torch.int64) for g in GROUPS}
        mask = (1 << _KEY_BITS) - 1
        lowest = (_pattern_below(threshold, maxima.dtype) + 1) << _KEY_BITS
        for some in range(0, len(maxima.keys), 64):
            keys = torch.cat(maxima.keys[some : some + 64], dim=1)
            for g in GROUPS:
                if g > 32:
                    keys = _grouped_max(keys, 2)
                above = keys >= lowest
                qualify[g] += above.sum(1).cpu()
                group = torch.arange(len(keys), device=keys.device)
                block = group * g // (mask + 1) * (mask + 1) + mask
                channel = (block.to(keys.dtype)[:, None] - (keys & mask))[above]
                hits[g] += torch.bincount(channel, minlength=width).cpu()
        return cls(hits, qualify)

    def merge(self, other: Hits) -> Hits:
        """Join counts made with the same threshold over disjoint sets of tokens."""
        return Hits(
            {g: self.hits[g] + other.hits[g] for g in GROUPS},
            {g: self.qualify[g] + other.qualify[g] for g in GROUPS},
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`hits32`, `qualify32` and so on."""
        found = {f"hits{g}": self.hits[g] for g in GROUPS}
        return found | {f"qualify{g}": self.qualify[g] for g in GROUPS}


def _grouped_max(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Maximum over runs of `size` rows; a last shorter run is filled up with nothing."""
    missing = -len(keys) % size
    if missing:
        keys = torch.cat([keys, keys.new_full((missing, keys.shape[1]), -1)])
    return keys.view(-1, size, keys.shape[1]).amax(1)


def _pattern_below(threshold: float, dtype: torch.dtype) -> int:
    """The bit pattern of the largest number of `dtype` not above `threshold`."""
    near = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    pattern = int(near.view(pattern_dtype(dtype)))
    return pattern - 1 if float(near) > threshold else pattern


def pattern_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer type whose order is that of non-negative numbers of `dtype`."""
    return {2: torch.int16, 4: torch.int32}[dtype.itemsize]


class Scratch:
    """Memory used again and again: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Give a tensor of any content; the last one of this name must be done with."""
        size = shape[0] * shape[1] * dtype.itemsize
        held = self._held.get(name)
        if held is None or held.numel() < size or held.device != device:
            held = self._held[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return held[:size].view(dtype).view(shape)


# Elements of a tile: what fits the second-level cache, or keeps a GPU busy.
TILE = {"cpu": 1 << 18, "cuda": 1 << 25}


@dataclass
class SiteAccumulator:
    """Everything measured at one site."""

    key: str
    channels: int
    dtype: torch.dtype
    moments: Moments
    magnitude: Magnitude
    tail: Tail
    maxima: GroupMaxima

    @classmethod
    def empty(
        cls, key: str, channels: int, dtype: torch.dtype, k: int, room: int = 4096
    ) -> SiteAccumulator:
        """Begin a site whose inputs are [tokens, channels] of `dtype`; keep a tail of `k`.

        `room`: inputs held for one selection of the largest; less memory, more selections.
        """
        dtype = torch.float32 if dtype == torch.float64 else dtype
        return cls(
            key,
            channels,
            dtype,
            Moments(),
            Magnitude(),
            Tail(k, dtype, room),
            GroupMaxima(channels, dtype),
        )

    def update(self, x: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Take in inputs [tokens, channels], a tile that stays in the cache at a time."""
        if not len(x):
            return
        scratch = scratch or Scratch()
        tile = min(max(TILE[x.device.type] // self.channels, 32), self.tail.room)
        for part in x.to(self.dtype).split(tile):
            shape = (self.channels, len(part))
            turned = scratch.take("turned", shape, self.dtype, x.device)
            turned.copy_(part.t())
            values = scratch.take("values", shape, torch.float32, x.device)
            room = scratch.take("room", shape, torch.float32, x.device)
            values.copy_(turned)
            bits = turned.view(pattern_dtype(self.dtype))
            patterns = bits.bitwise_and_(torch.iinfo(bits.dtype).max)
            self.tail.place(*shape, x.device).copy_(patterns)
            self.magnitude = self.magnitude.merge(Magnitude.of(torch.abs(values, out=room)))
            self.moments = self.moments.merge(Moments.of(values, room))
            wide = scratch.take("wide", shape, torch.int64, x.device) if bits.itemsize > 2 else room
            self.maxima.update(patterns, wide)

    def merge(self, other: SiteAccumulator) -> SiteAccumulator:
        """Join two disjoint sets of tokens."""
        return SiteAccumulator(
            self.key,
            self.channels,
            self.dtype,
            self.moments.merge(other.moments),
            self.magnitude.merge(other.magnitude),
            self.tail.merge(other.tail),
            self.maxima.merge(other.maxima),
        )

    def state_dict(self, k: int | None = None) -> dict[str, torch.Tensor]:
        """All statistics but the hits; the tail cut to `k`. InputRejected for NaN or infinity."""
        state = self.moments.state_dict() | self.magnitude.state_dict() | self.tail.state_dict(k)
        if "absmax" in state and not bool(state["absmax"].isfinite().all()):
            raise InputRejected(
                f"{self.key}: activations are NaN or infinite",
                "the weights before it are damaged, or --dtype float32 is needed",
            )
        return {name: tensor.cpu() for name, tensor in state.items()}
