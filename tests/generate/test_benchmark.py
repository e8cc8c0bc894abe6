"""What benchmarks/generate.py compares: the plain way writes our tokens, and the causal model is transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import generate
from benchmarks.generate import BLOCK, autoregressive_model, case, our_flops
from megatron_tide.models import fresh_model
from tests.support.models import tiny_student_config


def test_the_ways_that_are_compared() -> None:
    config = {**tiny_student_config(vocab_size=200), "initializer_range": 0.3}
    model = fresh_model(config, 0).eval()
    causal = autoregressive_model(model, config)
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(causal(ids).logits, model(ids, mask).logits)
    measured = case(model, causal, batch=2, prompt=BLOCK, new=2 * BLOCK)
    assert measured["identical_tokens"]
    assert measured["ours"]["passes"] == measured["plain"]["passes"] == measured["ar"]["passes"] == 2 * BLOCK
    assert 2.3 < measured["threshold"]["tokens_a_pass"] < 2.7
    assert our_flops(model, 2, BLOCK, BLOCK) < our_flops(model, 2, BLOCK, 2 * BLOCK) / 1.5
    for name in ("plain", "ar_one_token", "ar_threshold"):
        assert measured[f"speedup_{name}"] > 0


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured stays as it is; and nothing of another machine gets in among it."""
    shape, file = tmp_path / "config.json", tmp_path / "generate.json"
    shape.write_text(json.dumps(tiny_student_config(vocab_size=200)))
    monkeypatch.setattr(generate, "CONFIG", shape)
    flags = ["--json", str(file), "--prompt", str(BLOCK), "--new", str(BLOCK), "--dtype", "float32"]
    generate.main([*flags, "--batch", "2"])
    (first,) = json.loads(file.read_text())["cases"]
    generate.main([*flags, "--batch", "1", "2", "--go-on"])
    record = json.loads(file.read_text())
    assert [entry["batch"] for entry in record["cases"]] == [1, 2]
    assert record["cases"][1] == first
    file.write_text(json.dumps({**record, "machine": {**record["machine"], "cores": 1000}}))
    with pytest.raises(ValueError, match=r"generate\.json: its machine is not that of this run; leave --go-on out"):
        generate.main([*flags, "--batch", "3", "--go-on"])
    with pytest.raises(ValueError, match=r"--go-on: .* give --json FILE as well"):
        generate.main(["--go-on"])
