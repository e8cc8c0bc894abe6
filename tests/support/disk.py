"""Whether a teacher can be hosted on disk here: DeepSpeed's disk I/O is compiled against libaio's header."""

from __future__ import annotations

from pathlib import Path

import pytest

HAS_DISK_IO = Path("/usr/include/libaio.h").exists()
needs_disk_io = pytest.mark.skipif(not HAS_DISK_IO, reason="libaio-dev is not installed")
