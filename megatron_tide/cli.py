"""What every command of the project does with a user's mistake: one line on stderr and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Call ``main(argv)`` and exit with its status; ValueError and OSError become one line and status 2.

    A ValueError is the project's word for "the user can fix this"; anything else is a defect and keeps its traceback.
    ``MEGATRON_TIDE_TRACEBACK=1`` shows the traceback of those two as well.
    """
    try:
        status = main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("MEGATRON_TIDE_TRACEBACK") == "1":
            raise
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        status = EXIT_USER_ERROR
    sys.exit(status or 0)
