"""Long conversations of real text: modules of this Python's standard library, each as one answer.

Longer than any length that is trained, so that every sample fills its sequence.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

from megatron_tide import cli
from megatron_tide.files import write_once

MODULES, CHARACTERS = 64, 12_000


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    arguments = parser.parse_args(argv)
    rows = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text) >= CHARACTERS and len(rows) < MODULES:
            question = {"role": "user", "content": f"Write the module {path.stem}."}
            rows.append({"messages": [question, {"role": "assistant", "content": text[:CHARACTERS]}]})
    write_once(arguments.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{arguments.out}: {len(rows)} conversations")


if __name__ == "__main__":
    cli.run(main)
