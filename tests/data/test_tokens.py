"""`--data`: every kind of source gives the tokens it should, or one line about why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.data.tokens import TokenBatch, load_tokens
from quantkit.errors import InputRejected, QuantkitError
from tests.tiny import tiny_tokenizer

WORDS = [f"Sentence number {i} of the text.\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(spec: str, tokenizer: Path, **changes: object) -> TokenBatch:
    return load_tokens(spec, tokenizer, **({"samples": None, "seq_len": 16} | changes))


def decoded(batch: TokenBatch, tokenizer: Path) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer).decode(batch.ids.flatten())


def test_sample_is_english_split_in_two(tokenizer: Path) -> None:
    train = load("sample", tokenizer, samples=64, seq_len=256)
    test = load("sample", tokenizer, samples=64, seq_len=256, held_out=True)
    assert train.ids.shape == test.ids.shape == (64, 256)
    assert train.ids.dtype == torch.int64
    assert " the " in decoded(train, tokenizer)
    assert not {tuple(row) for row in train.ids.tolist()} & {tuple(r) for r in test.ids.tolist()}


def test_sample_files_do_not_overlap() -> None:
    import quantkit.data

    folder = Path(quantkit.data.__file__).parent / "sample"
    train = "".join(p.read_text() for p in (folder / "train").glob("*.txt"))
    test = "".join(p.read_text() for p in (folder / "test").glob("*.txt"))
    paragraphs = {line for line in test.split("\n") if len(line) > 200}
    assert len(paragraphs) > 100
    assert not [line for line in paragraphs if line in train]
    assert "CC0" in (folder / "ORIGIN.txt").read_text()


def test_windows_are_drawn_by_the_seed_alone(tokenizer: Path) -> None:
    Path("text.txt").write_text("".join(WORDS))
    first = load("text.txt", tokenizer, samples=8, seed=3)
    torch.manual_seed(1)
    torch.rand(7)
    again = load("text.txt", tokenizer, samples=8, seed=3)
    other = load("text.txt", tokenizer, samples=8, seed=4)
    assert torch.equal(first.ids, again.ids)
    assert first.digest == again.digest
    assert first.digest != other.digest
    everything = load("text.txt", tokenizer)
    rows = {tuple(row) for row in everything.ids.tolist()}
    assert {tuple(row) for row in first.ids.tolist()} <= rows
    held_out = load("text.txt", tokenizer, samples=8, held_out=True)
    assert torch.equal(held_out.ids, everything.ids[:8])


def test_documents_are_separated(tokenizer: Path) -> None:
    Path("docs.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in ("abc", "de")))
    ids = load("docs.jsonl", tokenizer, seq_len=7).ids[0].tolist()
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer).encode
    end = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
    assert ids == [*encode("abc"), end, *encode("de"), end]


def make_sources() -> dict[str, str]:
    """The same 200 documents in every form; what to give as --data."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": WORDS, "other": ["x"] * len(WORDS)})
    Path("plain").mkdir()
    for i, word in enumerate(WORDS):
        Path("plain", f"{i:03d}.txt").write_text(word)
    lines = [json.dumps({"text": word, "n": 1, "other": "x"}) for word in WORDS]
    Path("lines.jsonl").write_text("\n".join(lines) + "\n")
    Path("list.json").write_text("[" + ",".join(lines) + "]")
    rows.to_parquet("rows.parquet")
    rows.save_to_disk("saved")
    datasets.DatasetDict({"test": rows.select(range(3)), "train": rows}).save_to_disk("dictionary")
    Path("splits", "data").mkdir(parents=True)
    rows.to_parquet("splits/data/train-00000-of-00001.parquet")
    rows.select(range(5)).to_parquet("splits/data/test-00000-of-00001.parquet")
    renamed = rows.remove_columns("other").rename_column("text", "body")
    renamed.to_parquet("renamed.parquet")
    return {
        "plain": "plain",
        "jsonl": "lines.jsonl:text",
        "json": "list.json",
        "parquet": "rows.parquet",
        "saved": "saved:text",
        "dictionary": "dictionary",
        "splits": "splits",
        "only column": "renamed.parquet",
    }


def test_all_local_forms_give_the_same_tokens(tokenizer: Path) -> None:
    sources = make_sources()
    batches = {form: load(spec, tokenizer) for form, spec in sources.items()}
    expected = batches["plain"]
    assert len(expected.ids) > 100
    for form, batch in batches.items():
        assert batch.digest == expected.digest, form
        assert "200 documents" in batch.description
        assert f"{len(batch.ids)} windows of 16" in batch.description
    short = load("splits", tokenizer, held_out=True)
    assert len(short.ids) < len(expected.ids) / 10


@pytest.mark.parametrize("form", ["parquet", "text", "saved"])
def test_local_wikitext_stands_in(form: str, tokenizer: Path) -> None:
    """A folder called wikitext is used without a network; its rows are lines of one text."""
    import datasets

    lines = ["", " = Title = \n", "", *WORDS]
    rows = datasets.Dataset.from_dict({"text": lines})
    if form == "parquet":
        Path("wikitext/wikitext-2-raw-v1").mkdir(parents=True)
        rows.to_parquet("wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet")
        rows.select(range(4)).to_parquet("wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet")
    elif form == "saved":
        datasets.DatasetDict({"train": rows}).save_to_disk("wikitext")
    else:
        Path("wikitext").mkdir()
        Path("wikitext/wiki.train.raw").write_text("not read: no known ending")
        Path("wikitext/train.txt").write_text("".join(lines))
        Path("wikitext/test.txt").write_text("other")
    batch = load("wikitext", tokenizer)
    assert "wikitext/" in batch.description
    assert "local" in batch.description
    assert decoded(batch, tokenizer).startswith(" = Title = \nSentence number 0")


def test_token_files(tokenizer: Path) -> None:
    ids = torch.arange(40, dtype=torch.int32).view(4, 10)
    save_file({"a": ids, "row": torch.arange(100)}, "tokens.safetensors")
    whole = load_tokens("tokens.safetensors:a", tokenizer, samples=3)
    assert torch.equal(whole.ids, ids[:3].long())
    halves = load_tokens("tokens.safetensors:a", tokenizer, samples=None, seq_len=5)
    assert torch.equal(halves.ids, ids.long().view(8, 5))
    row = load_tokens("tokens.safetensors:row", tokenizer, samples=None, seq_len=30)
    assert torch.equal(row.ids, torch.arange(90).view(3, 30))
    save_file({"only": ids}, "one.safetensors")
    assert load_tokens("one.safetensors", tokenizer, samples=None).ids.shape == (4, 10)
    for spec, problem in (
        ("tokens.safetensors:b", "no tensor 'b'"),
        ("tokens.safetensors", "no tensor"),
        ("none.safetensors:a", "no such file"),
    ):
        with pytest.raises(InputRejected, match=problem):
            load_tokens(spec, tokenizer, samples=2)
    with pytest.raises(InputRejected, match="shorter"):
        load_tokens("tokens.safetensors:a", tokenizer, samples=2, seq_len=11)
    bad = {
        "float": torch.ones(2, 4),
        "negative": torch.tensor([[1, -1]]),
        "cube": torch.ones(2, 2, 2, dtype=torch.int64),
        "empty": torch.zeros(0, 4, dtype=torch.int64),
        "bool": torch.ones(2, 4, dtype=torch.bool),
    }
    save_file(bad, "bad.safetensors")
    for key in bad:
        with pytest.raises(InputRejected, match="bad"):
            load_tokens(f"bad.safetensors:{key}", tokenizer, samples=1)
    Path("torn.safetensors").write_bytes(Path("bad.safetensors").read_bytes()[:50])
    with pytest.raises(InputRejected, match="torn"):
        load_tokens("torn.safetensors:float", tokenizer, samples=1)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("empty.txt", b"", "do not fill"),
        ("short.txt", b"abc", "do not fill"),
        ("latin.txt", b"caf\xe9 " * 30, "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "bad JSON"),
        ("rows.jsonl", b'{"a": "x", "b": "y"}\n', "no text in column"),
        ("number.jsonl", b"17\n", "columns"),
        ("deep.json", b"[" * 100_000, "bad JSON"),
        ("torn.parquet", b"PAR1 nothing", "torn.parquet"),
        ("torn.arrow", b"ARROW1 nothing", "torn.arrow"),
    ],
)
def test_bad_files(name: str, content: bytes, problem: str, tokenizer: Path) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(InputRejected, match=problem):
        load(name, tokenizer)


def test_other_refusals(tokenizer: Path, tmp_path: Path) -> None:
    Path("nothing").mkdir()
    for spec, problem in (
        ("nothing", "no text"),
        ("./gone", "no such"),
        ("gone.txt", "no such"),
        ("a:b:c:d:e", "more parts"),
        (":", "names no data"),
        ("x" * 5000, "xxx"),
    ):
        with pytest.raises(QuantkitError, match=problem):
            load(spec, tokenizer)
    Path("text.txt").write_text("".join(WORDS))
    with pytest.raises(InputRejected, match="no usable tokenizer") as caught:
        load("text.txt", tmp_path / "nothing")
    assert "tokens.safetensors:key" in (caught.value.hint or "")


def test_no_network_is_one_line_and_fast(tokenizer: Path) -> None:
    """In a process of its own: libraries read their endpoint once."""
    code = (
        "import sys; from pathlib import Path\n"
        "from quantkit.data.tokens import load_tokens\n"
        "from quantkit.errors import QuantkitError\n"
        "import time, datasets, huggingface_hub; start = time.monotonic()\n"
        "try: load_tokens('wikitext', Path(sys.argv[1]), samples=1)\n"
        "except QuantkitError as e: print(e.message, e.hint, time.monotonic() - start, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer)],
        env=hub_environment("http://127.0.0.1:9"),
        capture_output=True,
        text=True,
        check=True,
    )
    message, hint, seconds = done.stdout.splitlines()
    assert "cannot be reached" in message
    assert "sample" in hint
    assert "local" in hint
    assert float(seconds) < 10
    assert "Retrying" not in done.stderr


def test_core_works_without_datasets(tokenizer: Path) -> None:
    Path("text.txt").write_text("".join(WORDS))
    Path("lines.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in WORDS))
    save_file({"a": torch.ones(2, 16, dtype=torch.int64)}, "tokens.safetensors")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from pathlib import Path\n"
        "from quantkit.data.tokens import load_tokens\n"
        "from quantkit.errors import QuantkitError\n"
        "for spec in ('text.txt', 'lines.jsonl', 'tokens.safetensors:a', 'sample'):\n"
        "    load_tokens(spec, Path(sys.argv[1]), samples=2, seq_len=16)\n"
        "try: load_tokens('wikitext', Path(sys.argv[1]), samples=2)\n"
        "except QuantkitError as e: print(e.message)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer)],
        env=hub_environment("http://127.0.0.1:9"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout


def hub_environment(endpoint: str) -> dict[str, str]:
    import os

    own = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    home = {"HF_HOME": str(Path("hf").resolve()), "HF_ENDPOINT": endpoint}
    return own | home | {"PYTHONPATH": str(Path(__file__).parents[2])}
