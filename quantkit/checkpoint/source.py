"""Where a checkpoint lies: a local folder, the Hub cache, or the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantkit import console
from quantkit.checkpoint.reader import INDEX, SINGLE
from quantkit.checkpoint.safety import inside, plain_name, read_json
from quantkit.errors import InputRejected, QuantkitError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?|[\w.-]+(@[\w./-]+)?")
# No pickles and no code are fetched: they would not be read.
_FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*")


def resolve(source: str | Path) -> Path:
    """The folder of a checkpoint given as a path or a Hub id (`owner/name`, `owner/name@revision`).

    A local folder wins over a Hub id of the same name. Raises InputRejected when there is neither,
    QuantkitError when the Hub cannot be reached and its cache lacks the model.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputRejected(f"{text}: not a folder", "give the folder of a checkpoint")
    looks_local = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.endswith("/")
    if looks_local or not _HUB_ID.fullmatch(text) or "/" not in text:
        raise InputRejected(
            f"{text}: no such folder", "give the folder of a checkpoint, or a Hub id owner/name"
        )
    return _from_hub(text)


def _from_hub(text: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = text.partition("@")
    revision_or_none = revision or None
    try:
        folder = snapshot_download(
            name, revision=revision_or_none, allow_patterns=list(_FETCHED), local_files_only=True
        )
        if _complete(Path(folder)):
            return Path(folder)
    except LocalEntryNotFoundError:
        pass
    if os.environ.get("HF_HUB_OFFLINE") in {"1", "true", "True", "ON", "YES"}:
        raise QuantkitError(
            f"{text}: not in the Hub cache, and HF_HUB_OFFLINE is set",
            "give a local folder, or unset HF_HUB_OFFLINE",
        )
    console.note(f"fetching {text} from the Hub")
    try:
        return Path(
            snapshot_download(name, revision=revision_or_none, allow_patterns=list(_FETCHED))
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise QuantkitError(
            f"{text}: no such folder here, and the Hub did not give it: {reason}",
            "give a local folder, or check the name and the network",
        ) from None


def _complete(folder: Path) -> bool:
    """Whether a cached snapshot has its weights (a configuration alone is often cached)."""
    if not (folder / INDEX).exists():
        return (folder / SINGLE).exists() or any(folder.glob("*.bin"))
    data = read_json(inside(folder, INDEX))
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return all((folder / plain_name(file, folder / INDEX)).exists() for file in files)
