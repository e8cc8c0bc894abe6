"""The status of a command in the background is never lost, whenever signals come."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = """
source recipes/await.sh
command='trap "ended=1" USR1; echo ready; while [[ -z ${ended:-} ]]; do sleep 0.01; done; exit 77'
trap 'kill -s USR1 "$child" 2>/dev/null' USR1
bash -c "$command" &
child=$!
await "$child"
"""


@pytest.mark.timeout(100)
def test_signals_to_a_script_and_its_command_at_once_do_not_lose_the_status():
    """``wait`` in a loop lost one in ten of these."""
    for _ in range(8):
        scripts = [
            subprocess.Popen(
                ["bash", "-c", SCRIPT], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            for _ in range(8)
        ]
        for script in scripts:
            assert script.stdout is not None
            assert script.stdout.readline() == "ready\n"
            os.killpg(script.pid, signal.SIGUSR1)
        assert [script.wait(30) for script in scripts] == [77] * len(scripts)
        for script in scripts:
            script.stdout.close()
