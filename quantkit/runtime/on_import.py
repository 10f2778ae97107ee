"""Register with transformers when it is imported, without importing it.

`import quantkit` has to stay instant (the command line starts through it), and yet
`from_pretrained` has to know `quant_method: quantkit` afterwards, whichever of the two was imported
first. A finder in front of `sys.meta_path` waits for the one module that holds transformers' table
of methods, lets it load as ever, and then adds ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.quantizers.auto"  # where transformers keeps its quantization methods


def register_with_transformers() -> None:
    """Make `quant_method: quantkit` known to transformers now or when it is imported."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _After) for finder in sys.meta_path):
        sys.meta_path.insert(0, _After(TABLE, _register))


def _register() -> None:
    adapter = sys.modules.get("quantkit.runtime.huggingface")
    if adapter is not None and not hasattr(adapter, "register"):
        return  # it is what imports the table just now; it registers itself at its end
    try:
        importlib.import_module("quantkit.runtime.huggingface").register()
    except ImportError as error:  # a transformers of another age must still be importable
        warnings.warn(
            f"quantkit does not work with this transformers ({error}): "
            "pip install 'transformers>=5,<6'",
            stacklevel=2,
        )


class _After:
    """A finder that finds nothing itself and calls `then` once module `name` was executed."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with `then` behind its execution."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # so that the others answer, once
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute, then = loader.exec_module, self._then

        def execute_and_then(module: ModuleType) -> None:
            execute(module)
            then()

        loader.exec_module = execute_and_then  # of this spec's own loader, not of its class
        return spec
