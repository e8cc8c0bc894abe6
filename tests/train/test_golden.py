"""Golden losses: a change that is meant as a refactor does not move them.

A change that is meant to move them writes the file anew, and says why in its commit:
    python -m tests.train.test_golden
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.runs import train_and_tell

GOLDEN = Path(__file__).with_name("golden.json")
CASES = {
    "bd3lm": {"strategy": "bd3lm"},
    "tide-cross": {"strategy": "tide-cross", "temperature": 4.0},
    "tide-shared": {"strategy": "tide-shared", "teacher_context": "block_causal"},
    "tide-bridge": {"strategy": "tide-bridge", "masking": "synchronous", "teacher_context": "staircase"},
}


def losses(chain, out, case):
    curve = run_on_ranks(train_and_tell, 1, chain.run(out, max_steps=5, **CASES[case]), timeout=200)[0]
    return {name: curve[name] for name in ("loss/denoise", "loss/distill")}


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_losses_did_not_move(chain, tmp_path, case):
    expected = json.loads(GOLDEN.read_text())[case]
    for name, values in losses(chain, tmp_path, case).items():
        assert values == pytest.approx(expected[name], rel=2e-4, abs=1e-6), name


def write() -> None:
    from tests.support.chain import make_chain

    with tempfile.TemporaryDirectory() as folder:
        chain = make_chain(Path(folder) / "chain")
        golden = {case: losses(chain, Path(folder) / case, case) for case in CASES}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    write()
    print(GOLDEN, file=sys.stderr)
