"""Hadamard matrices by construction, and the fast transform of a tensor's last dimension.

A matrix of size n is a Kronecker product of one Sylvester matrix (a power of two) and Paley
matrices, types I and II, over GF(p), GF(p^2) and GF(p^3). Nothing is shipped as a table; every
base matrix is checked, `H H^T = n I` in integers, when it is built.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from quantkit.errors import QuantkitError

RADIX = 128  # powers of two are applied as dense factors of at most this size


def rotate(x: Tensor, size: int) -> Tensor:
    """Multiply each run of `size` channels of the last dimension by the orthonormal Hadamard H.

    x [..., n] with n a multiple of `size`: `size == n` is the global transform, less is block form.
    Costs n * (sum of the factors of `size`) per row: no dense matrix above the factors is built.
    Rotating an activation and the weight [out, n] it meets leaves `x @ w.T` unchanged. Halves are
    computed in float32. Differentiable. Raises QuantkitError for a size that has no construction.
    """
    return _apply(x, size, transposed=False)


def rotate_back(x: Tensor, size: int) -> Tensor:
    """Undo `rotate`: multiply by H^T (Paley matrices are not symmetric)."""
    return _apply(x, size, transposed=True)


def _apply(x: Tensor, size: int, *, transposed: bool) -> Tensor:
    if size < 1 or x.shape[-1] % size:
        raise QuantkitError(f"a Hadamard of size {size} does not divide {x.shape[-1]} channels")
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    right = size
    for order in _dense_factors(size):
        right //= order
        h = _base(order, work.dtype, work.device)
        h = h if transposed else h.T
        # One row-major product where the factor is last, a batched one where it is not.
        work = work.reshape(-1, order) @ h.T if right == 1 else h @ work.reshape(-1, order, right)
    return work.reshape(x.shape).to(x.dtype)


def matrix(n: int) -> Tensor:
    """The Hadamard matrix of size n that `rotate` applies, entries +-1, float64 [n, n]."""
    result = torch.ones(1, 1, dtype=torch.float64)
    for order in _dense_factors(n):
        result = torch.kron(result, _signs(order).double())
    return result


@lru_cache(maxsize=4096)
def factors(n: int) -> tuple[int, ...] | None:
    """Orders whose Kronecker product has size n: Paley orders, then a power of two; None if none.

    Among all products the cheapest to apply: few passes, small dense factors.
    NOTE: packed weights are rotated by this very product; another choice for a size would make
    the checkpoints already packed with it wrong.
    """
    if n >= 1 and n & (n - 1) == 0:
        return (n,) if n > 1 else ()
    if n < 4 or n % 4:
        return None
    best: tuple[int, ...] | None = None
    for order in range(12, n + 1, 4):
        if n % order or order & (order - 1) == 0 or _field_order(order) is None:
            continue
        rest = factors(n // order)
        if rest is not None and (best is None or _cost((order, *rest)) < _cost(best)):
            best = (order, *rest)
    return best


def _cost(orders: tuple[int, ...]) -> int:
    """Multiplications per channel, and a charge for each pass over the tensor."""
    return sum(order + 8 if order & (order - 1) else 6 * order.bit_length() for order in orders)


def largest_size(n: int) -> int:
    """The largest constructible size that divides n: n itself, or the largest block form."""
    return next(size for size in range(n, 0, -1) if n % size == 0 and factors(size) is not None)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """A vector of n random signs, float64: `rotate(x * signs)` is a random Hadamard transform."""
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


@lru_cache(maxsize=256)
def _dense_factors(n: int) -> tuple[int, ...]:
    orders = factors(n)
    if orders is None:
        raise QuantkitError(
            f"no Hadamard matrix of size {n} can be constructed",
            f"use a block: the largest that divides it is {largest_size(n)}",
        )
    return _split(orders)


def _split(orders: tuple[int, ...]) -> tuple[int, ...]:
    """The orders with the power of two cut into dense factors of at most RADIX."""
    dense: list[int] = []
    for order in orders:
        while order & (order - 1) == 0 and order > RADIX:
            dense.append(RADIX)
            order //= RADIX
        if order > 1:
            dense.append(order)
    return tuple(dense)


@lru_cache(maxsize=256)
def _base(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (_signs(order).double() / order**0.5).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _signs(order: int) -> Tensor:
    """One base matrix, int64 [order, order], verified."""
    if order & (order - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.int64)
        while h.shape[0] < order:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    else:
        h = _paley(order)
    # float64 products of +-1 are exact, and fast where int64 products are not.
    if not torch.equal(h.double() @ h.double().T, order * torch.eye(order, dtype=torch.float64)):
        raise QuantkitError(f"the construction of a Hadamard matrix of size {order} is wrong")
    return h


def _field_order(order: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(p^k) whose Paley matrix has this order, or None.

    Type I needs q = order - 1 = 3 mod 4, type II needs q = order / 2 - 1 = 1 mod 4.
    """
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == remainder:
            for k in (1, 2, 3):
                p = round(q ** (1 / k))
                if p**k == q and p > 2 and all(p % d for d in range(2, int(p**0.5) + 1)):
                    return p, k
    return None


def _paley(order: int) -> Tensor:
    field = _field_order(order)
    if field is None:
        raise QuantkitError(f"no Paley construction has order {order}")
    character = _jacobsthal(*field)
    q = character.shape[0]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if q % 4 == 3 else 1
    conference[1:, 1:] = character
    identity = torch.eye(q + 1, dtype=torch.int64)
    if q % 4 == 3:
        return conference + identity
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(conference, plus) + torch.kron(identity, minus)


def _jacobsthal(p: int, k: int) -> Tensor:
    """[q, q] with the quadratic character of a_i - a_j over GF(p^k): 1 squares, -1 others, 0."""
    q = p**k
    place = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // place % p  # element i as a polynomial, [q, k]
    squares = ((_square(digits, p, _irreducible(p, k))) * place).sum(1)
    chi = torch.full((q,), -1, dtype=torch.int64)
    chi[squares] = 1
    chi[0] = 0
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return chi[(difference * place).sum(2)]


def _square(a: Tensor, p: int, modulus: list[int]) -> Tensor:
    """Squares of the polynomials a [q, k] modulo x^k + modulus[k-1] x^(k-1) + ... + modulus[0]."""
    k = a.shape[1]
    product = torch.zeros(a.shape[0], 2 * k - 1, dtype=torch.int64)
    for i in range(k):
        product[:, i : i + k] += a[:, i : i + 1] * a
    for top in range(2 * k - 2, k - 1, -1):
        for i, coefficient in enumerate(modulus):
            product[:, top - k + i] -= product[:, top] * coefficient
    return product[:, :k] % p


def _irreducible(p: int, k: int) -> list[int]:
    """Lower coefficients of a monic irreducible polynomial of degree k over GF(p), k <= 3."""
    if k == 1:
        return [0]
    x = torch.arange(p)
    for code in range(p**k):
        modulus = [code // p**i % p for i in range(k)]
        value = x**k + sum(c * x**i for i, c in enumerate(modulus))
        if bool((value % p != 0).all()):  # degrees 2 and 3: no root means irreducible
            return modulus
    raise QuantkitError(f"no irreducible polynomial of degree {k} over GF({p})")
