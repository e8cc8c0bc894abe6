"""The same as `python -m megatron_tide convert-gguf`, from any folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_tide.__main__ import entry

entry("convert-gguf")
