"""`--data`: text or token ids to a rectangle of token windows, the same on every machine.

Documents are tokenized without special tokens, joined in order with the end-of-text token between
them, and cut into windows; calibration draws windows with its own generator, so a seed means the
same windows whatever else was random before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.data.sources import Pieces, open_source
from quantkit.errors import InputRejected

SEQ_LEN = 1024  # when neither the user nor a token file says
BATCH = 32  # pieces tokenized together
# Enough text to draw from: this many times what is drawn. More would only cost time.
OVERSAMPLE = 8


@dataclass(frozen=True)
class TokenBatch:
    """Windows of token ids [n, seq] int64, in words what they are, and the sha256 of the ids."""

    ids: torch.Tensor
    description: str
    digest: str


def load_tokens(
    spec: str,
    tokenizer_dir: Path,
    *,
    samples: int | None,
    seq_len: int | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> TokenBatch:
    """Make `samples` windows of `seq_len` tokens of what `--data SPEC` names.

    Text: windows do not overlap; which ones is drawn from `seed`. With `held_out` (evaluation) the
    test split is preferred and windows are taken from the start. A file of token ids: its rows in
    order, cut to `seq_len`. `samples` None takes all there are. Raises InputRejected when the data
    is empty, too short or not what it should be.
    """
    if (samples is not None and samples < 1) or (seq_len is not None and seq_len < 2):
        raise InputRejected("at least one sample of two tokens is needed")
    file, _, key = spec.partition(".safetensors")
    if _ and (not key or key.startswith(":")):
        windows, what = _from_file(Path(f"{file}.safetensors"), key[1:], seq_len)
        drawn = windows if samples is None else windows[:samples]
    else:
        seq_len = seq_len or SEQ_LEN
        source = open_source(spec, held_out=held_out)
        limit = None if samples is None else OVERSAMPLE * samples * seq_len
        stream, documents = _stream(source.pieces, tokenizer_dir, limit)
        available = len(stream) // seq_len
        if not available:
            raise InputRejected(
                f"{spec}: {len(stream)} tokens do not fill one window of {seq_len}",
                "give more text or a smaller --seq-len",
            )
        windows = stream[: available * seq_len].view(available, seq_len)
        drawn = windows if samples is None else windows[_choice(available, samples, seed, held_out)]
        more = "first " if limit is not None and len(stream) >= limit else ""
        what = f"{source.description}: {more}{documents} documents, {len(stream):,} tokens"
    drawn = drawn.contiguous()
    digest = hashlib.sha256(repr(tuple(drawn.shape)).encode() + drawn.numpy().tobytes()).hexdigest()
    asked = f" ({samples} asked for)" if samples is not None and len(drawn) < samples else ""
    words = f"{what}; {len(drawn)} windows of {drawn.shape[1]}{asked}, digest {digest[:12]}"
    return TokenBatch(drawn, words, digest)


def _choice(available: int, samples: int, seed: int, held_out: bool) -> torch.Tensor:
    if held_out or samples >= available:
        return torch.arange(min(samples, available))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:samples].sort().values


def _from_file(path: Path, key: str, seq_len: int | None) -> tuple[torch.Tensor, str]:
    """Read token ids [n, seq] (or one long row) and cut every row into windows of `seq_len`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputRejected(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as opened:
            keys = list(opened.keys())
            if not key and len(keys) == 1:
                key = keys[0]
            if key not in keys:
                shown = ", ".join(keys[:10])
                raise InputRejected(f"{path}: no tensor {key!r}", f"give {path}:KEY, of: {shown}")
            ids = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise InputRejected(f"{path}: {' '.join(str(error).split())[:160]}") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() > 2:
        raise InputRejected(f"{path}:{key} is {ids.dtype} {tuple(ids.shape)}, not token ids [n, s]")
    ids = ids.to(torch.int64)
    ids = ids[None] if ids.dim() < 2 else ids
    if not ids.numel() or int(ids.min()) < 0:
        raise InputRejected(f"{path}:{key} is empty or holds negative ids")
    length = seq_len or (ids.shape[1] if ids.shape[0] > 1 else min(ids.shape[1], SEQ_LEN))
    per_row = ids.shape[1] // length
    if not per_row:
        raise InputRejected(
            f"{path}:{key}: rows of {ids.shape[1]} tokens are shorter than {length}",
            f"give --seq-len {ids.shape[1]} or less",
        )
    windows = ids[:, : per_row * length].reshape(-1, length)
    return windows, f"token ids {path}:{key} {tuple(ids.shape)}"


def _stream(pieces: Pieces, tokenizer_dir: Path, limit: int | None) -> tuple[torch.Tensor, int]:
    """Tokenize pieces into one stream of at most `limit` tokens; gives it and the documents read.

    Stops reading at the limit, so that a very large data set costs what is used of it.
    """
    tokenizer = _tokenizer(tokenizer_dir)
    parts: list[torch.Tensor] = []
    total = documents = 0
    end = tokenizer.eos_token_id
    for batch in _batched(pieces):
        encoded = tokenizer([text for text, _ in batch], add_special_tokens=False)["input_ids"]
        for ids, (_, ends) in zip(encoded, batch, strict=True):
            documents += ends
            row = [*ids, end] if ends and end is not None else ids
            parts.append(torch.tensor(row, dtype=torch.int64))
            total += len(row)
        if limit is not None and total >= limit:
            break
    stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return stream[:limit], documents


def _batched(pieces: Pieces) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    """Load the checkpoint's tokenizer; no code of the checkpoint is run."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # A stream longer than the model's window is meant to be cut, not warned about.
    logging.get_logger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputRejected(
            f"{folder}: no usable tokenizer: {reason}",
            "give token ids instead of text: --data tokens.safetensors:key",
        ) from None
