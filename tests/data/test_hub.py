"""Data sets by Hub id, against a server on the loopback interface, then from the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.hub_server import serve
from tests.data.test_tokens import WORDS, hub_environment
from tests.tiny import tiny_tokenizer

CODE = """
import sys
from pathlib import Path
from quantkit.data.tokens import load_tokens
from quantkit.errors import QuantkitError
for spec in sys.argv[2:]:
    try:
        batch = load_tokens(spec, Path(sys.argv[1]), samples=None, seq_len=16)
        print(batch.digest, len(batch.ids), batch.description, sep='|')
    except QuantkitError as error:
        print('refused', error.message, error.hint, sep='|')
"""


def load(endpoint: str, *specs: str) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "tokenizer", *specs],
        env=hub_environment(endpoint),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in done.stdout.splitlines()]


def test_hub_ids_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained("tokenizer")
    for split, rows in (("train", WORDS), ("test", WORDS[:9])):
        table = datasets.Dataset.from_dict({"text": rows, "title": rows[::-1]})
        table.to_parquet(f"{split}.parquet")
    data = {split: Path(f"{split}.parquet").read_bytes() for split in ("train", "test")}
    files = {
        f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet": content
        for split, content in data.items()
    }
    configs = "".join(
        f"\n  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*" for split in data
    )
    card = f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:{configs}\n---\n"
    files["README.md"] = card.encode()
    with serve("Salesforce/wikitext", files) as (endpoint, asked):
        found = load(endpoint, "wikitext", "wikitext::test", "wikitext:::title", "wikitext:::none")
        assert any("parquet" in request for request in asked)
    assert [len(row) for row in found] == [3, 3, 3, 3], found
    train, test, title, refused = found
    assert "Salesforce/wikitext:wikitext-2-raw-v1:train" in train[2]
    assert int(test[1]) < int(train[1])
    assert len({train[0], test[0], title[0]}) == 3
    assert refused[0] == "refused"
    assert "text, title" in refused[2]
    # The server is gone: the cache has what was read before, and only that.
    again, gone = load(endpoint, "wikitext", "someone/else")
    assert again == train
    assert gone[0] == "refused"
    assert "cannot be reached" in gone[1]


def test_streamed_data_set_reads_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained("tokenizer")
    lines = "".join(json.dumps({"text": word}) + "\n" for word in WORDS)
    files = {"data/train.jsonl": lines.encode(), "README.md": b"---\n---\n"}
    with serve("someone/texts", files) as (endpoint, _):
        (row,) = load(endpoint, "someone/texts")
    assert "200 documents" in row[2]
