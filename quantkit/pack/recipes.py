"""Recipes: a scheme name that stands for a format and the choices that serve it best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.pack.job import PackOptions


@dataclass(frozen=True)
class Recipe:
    """What a name stands for; an option the user gives goes before it."""

    format: str
    branch_bits: float | None
    branch: str = "fp8"
    criterion: str = "weighted"
    rounding: str = "gptq"
    hadamard: int = 0
    balance: bool = False


RECIPES: Mapping[str, Recipe] = {
    "w4a4": Recipe("nvfp4", branch_bits=0.25),
    "w4a4-mx": Recipe("mxfp4", branch_bits=0.25, hadamard=32),
    "w4a4-plain": Recipe("mxfp4", branch_bits=None, hadamard=32, balance=True),
}


PLANNED = "plan"  # the scheme's name when a site plan decides


def resolved(options: PackOptions) -> PackOptions:
    """The options with the recipe's choices, or the plain defaults, where the user made none."""
    if options.plan is not None:
        return replace(options, rounding=options.rounding or "rtn")
    recipe = RECIPES.get(options.scheme)
    if recipe is None:
        return replace(
            options,
            branch=options.branch or "bf16",
            rounding=options.rounding or "rtn",
            criterion=options.criterion or "weighted",
            balance=bool(options.balance),
        )
    return replace(
        options,
        branch=options.branch or recipe.branch,
        branch_bits=recipe.branch_bits if options.branch_bits is None else options.branch_bits,
        criterion=options.criterion or recipe.criterion,
        rounding=options.rounding or recipe.rounding,
        hadamard=recipe.hadamard if options.hadamard is None else options.hadamard,
        balance=recipe.balance if options.balance is None else options.balance,
    )
