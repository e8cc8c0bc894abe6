"""What a GPU does for speed: sizes by its memory, switches by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tide import fast


def test_sizes_grow_with_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    small, medium, large = (fast.on_gpu(gib * fast.GIB) for gib in (8, 24, 79))
    assert large == fast.PieceSizes(logit_bytes=512 * fast.MIB, multiple=128, tokens=16384)
    assert small == fast.PieceSizes(logit_bytes=64 * fast.MIB, multiple=128, tokens=4096)
    assert small.logit_bytes < medium.logit_bytes < large.logit_bytes
    assert small.tokens < medium.tokens < large.tokens
    assert fast.piece_sizes(torch.device("cpu")) == fast.ON_CPU
    assert fast.piece_sizes(torch.device("cuda")) == large, "where there is none: tensors that stand in for its"
    monkeypatch.setenv(fast.VARIABLE, "head,layerwise")
    assert fast.on_gpu(79 * fast.GIB) == fast.ON_CPU


def test_parts_are_switched_off_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(fast.is_on(name) for name in fast.SWITCHES)
    monkeypatch.setenv(fast.VARIABLE, "masks, adam")
    assert [name for name in fast.SWITCHES if not fast.is_on(name)] == ["masks", "adam"]
    monkeypatch.setenv(fast.VARIABLE, "masks,speed")
    with pytest.raises(ValueError, match="unknown part 'speed'") as caught:
        fast.is_on("head")
    assert "\n" not in str(caught.value)


def test_the_readme_names_every_switch() -> None:
    readme = Path(fast.__file__).parents[1].joinpath("benchmarks/README.md").read_text(encoding="utf-8")
    assert all(f"`{fast.VARIABLE}={name}`" in readme for name in fast.SWITCHES)


def test_compiled_kernels_are_kept_where_nobody_else_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from megatron_tide.fast import keep_kernels_private

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_kernels_private()
    assert cache_dir() == str(tmp_path / "megatron_tide" / "torchinductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    keep_kernels_private()
    assert cache_dir() == str(tmp_path / "mine")
