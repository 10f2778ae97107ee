"""Full disks, read errors, other runs: nothing half-written, and the same command continues."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.manifest import Step
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.safety import require_finite
from quantkit.checkpoint.step import Target, begin_step
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.errors import InputRejected
from tests.checkpoint.folders import contents, sharded


def write_all(output: Path, source_folder: Path) -> None:
    """A step that changes half of the tensors and adds some, in small shards."""
    source = open_checkpoint(source_folder)
    with CheckpointWriter(output, source, fingerprint={"a": 1}, max_shard_size=900) as writer:
        for name in source.names()[::2]:
            if not writer.done(name):
                writer.write(name, source.read(name).to(torch.float32) * 2)
        for i in range(3):
            writer.write(f"odd.{i}", torch.arange(5 + i, dtype=torch.uint8))
        writer.write_file("outliers.json", b"{}")
        writer.keep_rest()
        writer.finish(Step("x"))


class Failing:
    """Stands in for a system call and fails from the n-th call on, as a full disk does."""

    def __init__(self, real: object, after: int, code: int) -> None:
        self.real, self.left, self.code = real, after, code

    def __call__(self, *arguments: object, **options: object) -> object:
        if self.left <= 0:
            raise OSError(self.code, os.strerror(self.code))
        self.left -= 1
        return self.real(*arguments, **options)  # type: ignore[operator]


def attempt(output: Path, source: Path, code: int) -> bool:
    """Run the step; False when it failed with `code`, having left no output."""
    try:
        write_all(output, source)
    except OSError as error:
        if error.errno != code:
            raise
        return False
    return True


@pytest.mark.parametrize("call", ["write", "fsync", "link", "ftruncate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full disk", "write error"])
def test_a_write_that_fails_anywhere_leaves_no_output_and_can_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    folder = sharded(tmp_path / "in", shards=3)
    before = contents(folder)
    write_all(tmp_path / "whole", folder)
    expected = contents(tmp_path / "whole")
    out, failures = tmp_path / "out", 0
    for after in range(200):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, Failing(getattr(os, call), after, code))
            if attempt(out, folder, code) or out.exists():
                break  # at the latest: making the name itself durable failed
        failures += 1
    # A link that fails becomes a copy, so that call never ends a run.
    assert failures > 0 or call in {"link", "ftruncate"}
    assert contents(out) == expected
    assert contents(folder) == before
    assert not (tmp_path / "out.partial").exists()


def test_a_read_error_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(tmp_path / "in", shards=3)
    write_all(tmp_path / "whole", folder)
    for after in range(100):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", Failing(os.preadv, after, errno.EIO))
            if attempt(tmp_path / "out", folder, errno.EIO):
                break
        assert not (tmp_path / "out").exists()
    assert after > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


CONVERT = "import sys; from quantkit.cli import main; main(sys.argv[1:])"


def test_a_full_disk_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the system refuses the write half-way."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({f"t{i}": torch.ones(50_000) for i in range(8)}, folder / "pytorch_model.bin")

    def run(limit: int | None) -> subprocess.CompletedProcess[str]:
        def restrict() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.run(
            [sys.executable, "-c", CONVERT, "convert", str(folder)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            preexec_fn=restrict,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )

    done = run(limit=1_000_000)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: File too large: ")
    assert len(done.stderr.splitlines()) <= 2
    assert not (tmp_path / "m-safetensors").exists()
    done = run(limit=None)
    assert done.returncode == 0, done.stderr
    assert len(open_checkpoint(tmp_path / "m-safetensors").names()) == 8


def test_a_real_full_file_system(tmp_path: Path) -> None:
    """The same on a file system of 256 kB, where one can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs a privilege")
    try:
        source = open_checkpoint(sharded(tmp_path / "in"))

        def run() -> None:
            with CheckpointWriter(small / "out", source, fingerprint={}) as writer:
                for i in range(8):
                    writer.write(f"n{i}", torch.full((10_000,), float(i)))
                writer.keep_rest()
                writer.finish(Step("x"))

        with pytest.raises(OSError, match="No space left") as caught:
            run()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(small / "out.partial")
        assert not (small / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        run()
        assert open_checkpoint(small / "out").read("n7")[0] == 7
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_found(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(1000, dtype=dtype)
    require_finite("w", tensor)
    tensor[537] = bad
    with pytest.raises(InputRejected, match="w: 1 of 1000 values"):
        require_finite("w", tensor)


def test_finite_is_not_refused() -> None:
    require_finite("big", torch.full((1000,), 6e4, dtype=torch.float16))
    require_finite("huge", torch.full((1000,), 3e38))
    require_finite("double", torch.full((10,), 1e300, dtype=torch.float64))
    require_finite("eight", torch.ones(10).to(torch.float8_e4m3fn))
    require_finite("scale", torch.full((4,), 254, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    require_finite("codes", torch.ones(10, dtype=torch.uint8))
    require_finite("empty", torch.ones(0))
    with pytest.raises(InputRejected):
        require_finite("eight", torch.full((4,), float("nan")).to(torch.float8_e4m3fn))


def test_a_step_on_damaged_weights_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sharded(Path("model"))

    def run() -> None:
        with begin_step("x", "model", options={}, suffix="new", target=Target()) as step:
            step.writer.write("good", torch.ones(8))
            require_finite("layer.0.0", torch.tensor([float("nan")]))

    with pytest.raises(InputRejected):
        run()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_links_and_pipes_beside_the_weights_stay_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sharded(tmp_path / "in")
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to("../secret")
    (folder / "dangling.txt").symlink_to("gone")
    os.mkfifo(folder / "pipe.txt")
    (folder / "sub").mkdir()
    (folder / "sub" / "template.jinja").write_text("x")
    (folder / "sub" / "up").symlink_to("..")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    write_all(tmp_path / "out", folder)
    names = set(contents(tmp_path / "out"))
    assert "sub/template.jinja" in names
    assert not {n for n in names if "notes" in n or "pipe" in n or "dangling" in n or ".git" in n}
    assert "leaves the folder" in capsys.readouterr().err


def test_files_of_the_manifest_cannot_name_other_places(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        for name in ("../x", "/tmp/x", "a/../../x", ""):
            with pytest.raises(ValueError, match="outside"):
                writer.write_file(name, b"")
