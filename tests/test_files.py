"""Files and folders that are complete or absent, under names that someone may have planted a link at."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_tide import files
from megatron_tide.files import TEMPORARY, AtomicFolder, appending, atomic_write, read_json, read_regular, remove_drafts


def test_a_link_at_the_temporary_name_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / f"{TEMPORARY}{os.getpid()}-report.json").symlink_to(victim)
    atomic_write(tmp_path / "report.json", b"{}")
    assert victim.read_bytes() == b"mine"
    assert (tmp_path / "report.json").read_bytes() == b"{}"
    assert not (tmp_path / "report.json").is_symlink()


def test_a_link_put_at_the_temporary_name_meanwhile_is_not_followed(tmp_path, monkeypatch):
    victim, create_new = tmp_path / "victim", files.create_new
    victim.write_bytes(b"mine")

    def overtaken(path):
        descriptor = create_new(path)
        path.unlink()
        path.symlink_to(victim)
        return descriptor

    monkeypatch.setattr(files, "create_new", overtaken)
    atomic_write(tmp_path / "report.json", b"{}")
    assert victim.read_bytes() == b"mine"


def test_a_link_at_a_folder_s_temporary_name_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").touch()
    folder = AtomicFolder(tmp_path / "out")
    folder.draft.symlink_to(victim)
    with folder as draft:
        assert draft.stat().st_mode & 0o077 == 0, "nobody else can plant a file's name there"
        (draft / "weights").write_bytes(b"new")
    assert (tmp_path / "out" / "weights").read_bytes() == b"new"
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "victim"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def fill(draft):
    """Half of it, and then something goes wrong."""
    (draft / "weights").write_bytes(b"ne")
    (draft / "weights" / "more").touch()


def test_what_stood_there_stays_when_filling_fails(tmp_path):
    out = tmp_path / "out"
    with AtomicFolder(out) as draft:
        (draft / "weights").write_bytes(b"old")
    with pytest.raises(NotADirectoryError), AtomicFolder(out) as draft:
        fill(draft)
    assert (out / "weights").read_bytes() == b"old"
    with AtomicFolder(out) as draft:
        (draft / "other").write_bytes(b"new")
    assert [path.name for path in out.iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_that_died_between_the_renames_loses_nothing(tmp_path):
    out = tmp_path / "out"
    with AtomicFolder(out) as draft:
        (draft / "weights").write_bytes(b"old")
    died = AtomicFolder(out)
    (died.open() / "weights").write_bytes(b"new")
    out.rename(tmp_path / f"{TEMPORARY}out.old")
    AtomicFolder(out).open()
    assert (out / "weights").read_bytes() == b"old"


def test_what_stood_there_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    with AtomicFolder(out) as draft:
        (draft / "weights").write_bytes(b"old")
    folder = AtomicFolder(out)
    (folder.open() / "weights").write_bytes(b"new")

    def full(path, target):
        if path == folder.draft:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        folder.commit()
    assert (out / "weights").read_bytes() == b"old"


def test_drafts_are_removed_by_their_start(tmp_path):
    for name in ("step-1", "step-2.old", "other"):
        (tmp_path / f"{TEMPORARY}{name}").mkdir()
    remove_drafts(tmp_path, "step-")
    assert [path.name for path in tmp_path.iterdir()] == [f"{TEMPORARY}other"]


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    assert read_regular(tmp_path / "file", 3) == b"123"
    for name in ("link", "fifo", "."):
        with pytest.raises(OSError, match=r"regular|symbolic"):
            read_regular(tmp_path / name, 3)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    path = tmp_path / "scores.json"
    make(path)
    before = path.lstat()
    with pytest.raises(OSError, match=r"scores\.json: not a regular file, and is not replaced"):
        atomic_write(path, b"{}")
    assert path.lstat() == before


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/none-of-it"])
def test_nothing_of_the_system_is_replaced(monkeypatch, path):
    monkeypatch.setattr(files, "create_new", lambda path: pytest.fail("it would be"))
    with pytest.raises(OSError, match="not a regular file"):
        atomic_write(Path(path), b"{}")


@pytest.mark.parametrize(
    ("name", "most"), [("config.json", 1 << 24), ("model.safetensors.index.json", 1 << 25), ("run.json", 1 << 27)]
)
def test_a_json_file_too_large_for_one_is_not_read(tmp_path, name, most):
    with (tmp_path / name).open("wb") as file:
        file.truncate(50 << 30)
    with pytest.raises(ValueError, match=f"{name}: cannot be read .*more than {most} bytes"):
        read_json(tmp_path / name)


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*answers\.jsonl'"),
        appending(tmp_path / "answers.jsonl"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
