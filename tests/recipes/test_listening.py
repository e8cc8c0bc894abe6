"""What a training run on one machine lets others connect to: nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROBE = """
import os
from pathlib import Path
from megatron_tide.train.distributed import destroy_distributed, init_distributed

def listening(process):
    "Local addresses, in the hex of /proc, at which a process waits for connections."
    links = {str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()}
    tables = [Path(f"/proc/net/{kind}").read_text().splitlines()[1:] for kind in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return [line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in links]

world = init_distributed()
for who, process in (("rank", os.getpid()), ("launcher", os.getppid())):
    line = " ".join([who, str(world.size), *listening(process)])
    os.write(1, f"{line}\\n".encode())  # at once: ranks share the pipe
world.sum_over_ranks([0.0])
destroy_distributed()
"""
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's list of open ports"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_listens_beyond_this_machine(tmp_path: Path, ranks: int) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    line = f'source recipes/common.sh; launcher {ranks}; "${{LAUNCH[@]}}" {probe}'
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHON": sys.executable, **({"MASTER_ADDR": socket.gethostname()} if ranks == 1 else {})},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [words.split() for words in done.stdout.splitlines() if words.startswith(("rank", "launcher"))]
    assert [size for who, size, *_ in told if who == "rank"] == [str(ranks)] * ranks
    found = {address for _, _, *addresses in told for address in addresses}
    assert found == {"0100007F"}  # 127.0.0.1
