"""The parity gate: a release must compute, in a fresh process, exactly what the training weights compute.

Bounds: the training weights are fp32; cast to the release's precision they are the very same numbers, run by the same
kernels, so logits must be equal bit for bit and greedy answers token for token. Both run on the CPU, one after the
other, so that memory holds one copy of the model at a time.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import megatron_tide
from megatron_tide.bridge import TextTokenizer
from megatron_tide.models.families import ReleaseFiles
from megatron_tide.release import probe
from megatron_tide.training_checkpoint import GenerationIds, TrainingCheckpoint

REPOSITORY = Path(megatron_tide.__file__).resolve().parents[1]
# Variables that the fresh process gets.
_KEPT = {"PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "LANG", "TZ", "USER", "LOGNAME", "TMPDIR"}
_KEPT |= {"VIRTUAL_ENV", "CONDA_PREFIX", "SYSTEMROOT"}
_KEPT_STARTS = ("LC_", "PYTHON", "TORCH_", "ATEN_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", flags=re.I)
_PROMPTS = (
    "Hello!",
    "Write a Python function that returns the n-th Fibonacci number.\n\n    >>> fib(7)\n    13",
    "Zwölf Boxkämpfer jagen Viktor; 你好，世界 🙂\tüber den Deich. Why is that? " * 3,
)
CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in _PROMPTS]


def check_parity(
    release: Path,
    trained: TrainingCheckpoint,
    tokenizer: TextTokenizer,
    files: ReleaseFiles,
    ids: GenerationIds,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Compare ``release`` with the training weights cast to ``dtype``; the record of it, for parity.json.

    Raises:
        ValueError: names the first difference, or the error of the fresh process.
    """
    # First, with limits: the fresh process renders the same conversations with the same template, and has none.
    prompts = [probe.encoder(tokenizer)(messages) for messages in CONVERSATIONS]
    theirs = _ask_release(release, files, ids, dtype)
    ours = _run_training_weights(trained, prompts, ids, dtype)
    worst, rows, tokens = 0.0, 0, 0
    for name, expected in ours.items():
        found = theirs[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise _failed(f"{name} is {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}")
        if not torch.isfinite(expected.float()).all():
            raise _failed(f"the training weights give {name} that is not finite; the run has diverged")
        worst = max(worst, float((found - expected).abs().max()))
        if not torch.equal(found, expected):
            raise _failed(f"{name} differs from the training weights' (by up to {worst:.3g})")
        rows += len(found) if name.startswith("logits") else 0
        tokens += len(found) if name.startswith("tokens") else 0
    import transformers

    return {
        "compared_with": f"training weights of step {trained.step}, cast to {str(dtype).removeprefix('torch.')}",
        "bound": "logits and greedy tokens equal, bit for bit",
        "logit_rows": rows,
        "largest_logit_difference": worst,
        "greedy_tokens": tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def _failed(what: str) -> ValueError:
    return ValueError(f"parity gate: {what}; nothing was released")


def _run_training_weights(
    trained: TrainingCheckpoint, prompts: list[list[int]], ids: GenerationIds, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The training weights in the training module, by its own parameter names: no key table and no release code."""
    model = trained.model(dtype)
    return probe.run(model, prompts, block=ids.block_size, mask_id=ids.mask_token_id, **vars(ids))


def _ask_release(release: Path, files: ReleaseFiles, ids: GenerationIds, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory(prefix="tide-parity-") as scratch:
        request, answers = Path(scratch) / "request.json", Path(scratch) / "answers.safetensors"
        program = Path(scratch) / "code" / "probe.py"
        program.parent.mkdir()
        shutil.copyfile(probe.__file__, program)
        request.write_text(
            json.dumps(
                {
                    "folder": str(release.resolve()),
                    "auto_map": files.auto_map,
                    "dtype": str(dtype).removeprefix("torch."),
                    "block": ids.block_size,
                    "mask_id": ids.mask_token_id,
                    "conversations": CONVERSATIONS,
                    "threads": torch.get_num_threads(),
                }
            )
        )
        command = [sys.executable, str(program), str(request), str(answers)]
        pipes: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
        done = subprocess.run(command, cwd=scratch, env=_environment(files, scratch), **pipes)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
            raise _failed(f"a fresh process cannot load and run the release ({lines[-1].strip()})")
        return load_file(answers)


def _environment(files: ReleaseFiles, scratch: str) -> dict[str, str]:
    """Offline, with an empty home and cache, and of the user's variables only those that decide how Python and its
    kernels run: no token. This project is importable only if the release needs it.
    """
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != REPOSITORY]
    if not files.auto_map:
        paths.insert(0, str(REPOSITORY))
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in _KEPT or name.startswith(_KEPT_STARTS)) and not _SECRET.search(name)
    }
    own = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
    own |= {"HOME": scratch, "HF_HOME": f"{scratch}/hub", "PYTHONUSERBASE": site.getuserbase()}
    return kept | own | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
