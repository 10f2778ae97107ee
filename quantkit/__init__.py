"""W4A4 quantization of Hugging Face checkpoints."""

from typing import Any

from quantkit.runtime.on_import import register_with_transformers

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # `import quantkit` must stay free of torch: the command line starts through here.
    if name == "load":
        from quantkit.runtime.load import load

        return load
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")


register_with_transformers()
