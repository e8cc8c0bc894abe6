"""What one rank does for all, on two real ranks: a value, or one error, on each of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.ranks import run_on_ranks
from tests.test_screen import Panic, Wordless

pytestmark = pytest.mark.ranks


def outcomes() -> list[str]:
    from megatron_tide.train.distributed import destroy_distributed, init_distributed

    world = init_distributed()

    def fails(error: BaseException) -> None:
        raise error

    def here(rank: int) -> int:
        return fails(ValueError(f"rank {rank} has no disk")) if world.rank == rank else world.rank  # type: ignore[return-value]

    works = [
        lambda: world.on_main(lambda: {"read by": world.rank}),
        lambda: world.on_main(lambda: fails(ValueError("the file is corrupt"))),
        lambda: world.on_main(lambda: fails(PermissionError(13, "Permission denied", "x"))),
        lambda: world.on_main(lambda: fails(KeyError("name"))),
        lambda: world.on_all(lambda: here(1)),
        lambda: world.on_all(lambda: here(7)),
        lambda: world.on_main(lambda: fails(Panic("in Rust"))),
        lambda: world.on_all(lambda: fails(Wordless())),
    ]
    found = []
    for work in works:
        try:
            found.append(str(work()))
        except Wordless:
            found.append("Wordless")
        except (ValueError, OSError) as error:
            found.append(f"{'ValueError' if isinstance(error, ValueError) else 'OSError'}: {error}")
        except Panic as error:
            found.append(f"Panic: {error}")
        except (RuntimeError, KeyError) as error:
            found.append(str(error).removeprefix("KeyError: "))
    destroy_distributed()
    return found


def test_a_value_or_an_error_of_rank_0_reaches_all() -> None:
    first, second = run_on_ranks(outcomes, 2)
    assert first[:5] == second[:5]
    assert first[0] == "{'read by': 0}"
    assert first[1] == "ValueError: the file is corrupt"
    assert first[2].startswith("OSError: [Errno 13] Permission denied")
    assert first[4] == "ValueError: rank 1 has no disk"
    assert (first[5], second[5]) == ("0", "1")
    assert (first[6:], second[6:]) == (["Panic: in Rust", "Wordless"],) * 2


JOIN = "from megatron_tide.train.distributed import init_distributed as join; join()"


def test_a_process_that_a_group_of_one_starts_joins_a_group_of_its_own() -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    starts = f"{JOIN}; import subprocess, sys; subprocess.run([sys.executable, '-c', {JOIN!r}], check=True)"
    ended = subprocess.run([sys.executable, "-c", starts], env=own, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
