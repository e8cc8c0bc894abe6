"""A lock of DeepSpeed's op builder goes when nobody holds it, and never before."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_tide import ds_ops
from megatron_tide.ds_ops import YOUNG_SECONDS, clear, refuse_missing_compiler, refuse_missing_disk_tools


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "op" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def age(lock: Path) -> None:
    long_ago = time.time() - 10 * YOUNG_SECONDS
    os.utime(lock, (long_ago, long_ago))


def test_one_that_a_killed_build_left_goes_at_once(lock: Path) -> None:
    age(lock)
    clear(lock)
    assert not lock.exists()


def test_a_young_one_is_left_to_its_holder(lock: Path) -> None:
    held = []

    def load() -> None:
        time.sleep(0.5)
        held.append(lock.exists())
        lock.unlink()

    holder = threading.Thread(target=load)
    holder.start()
    clear(lock)
    holder.join()
    assert held == [True]


def test_one_of_a_build_under_way_is_waited_for(lock: Path) -> None:
    age(lock)
    with subprocess.Popen(["sleep", "1"], cwd=lock.parent) as build:
        clear(lock)
        assert build.poll() is not None
    assert not lock.exists()


def test_what_triton_needs_is_asked_for_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(ds_ops.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"no Python.h in .*apt-get install python3-dev"):
        refuse_missing_compiler()
    (tmp_path / "Python.h").touch()
    refuse_missing_compiler()
    monkeypatch.setenv("CC", "nosuchcompiler")
    with pytest.raises(ValueError, match="CC=nosuchcompiler is no program: Triton"):
        refuse_missing_compiler()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no C compiler: Triton.*apt-get install gcc"):
        refuse_missing_compiler()


def test_what_a_teacher_on_disk_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "nosuchcompiler")
    with pytest.raises(ValueError, match="needs the headers of libaio: apt-get install libaio-dev"):
        refuse_missing_disk_tools()
    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io" / "async_io.so").touch()  # compiled already
    refuse_missing_disk_tools()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for home, said in ((None, "CUDA_HOME is not set"), (str(tmp_path), "there is no bin/nvcc in CUDA_HOME=")):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
        with pytest.raises(ValueError, match=f"needs the CUDA toolkit .*{said}.*--teacher-hosting zero3_cpu"):
            refuse_missing_disk_tools()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    refuse_missing_disk_tools()


def test_a_tiny_attention_is_compiled_once_at_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy/80")
    monkeypatch.setattr(ds_ops, "compile_with", lambda code, *_: compiled.append(code))
    for _ in range(2):
        ds_ops._try_attention(tmp_path)
    assert compiled == [ds_ops.TINY_ATTENTION]
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"attention does not compile \(.*\); it needs a GPU; log: "):
        ds_ops.compile_with(ds_ops.TINY_ATTENTION, "attention", "a GPU", tmp_path / "attention.log")
