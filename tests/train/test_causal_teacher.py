"""An autoregressive teacher: prepared without a mask token, and scored on clean text by the position before a token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tide.bridge import Bridge, load_tokenizer
from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.evaluate import scoring_inputs
from megatron_tide.hosting.replicated import ReplicatedTeacher
from megatron_tide.models import load_model
from megatron_tide.train import build
from megatron_tide.train.inputs import read_run_inputs
from tests.hosting.backends import loader_of
from tests.support.ar_models import ar_folder
from tests.support.chain import BLOCK, PREPARING, conversations
from tests.support.commands import command

ALONE = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), print_rank0=print)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def run(request, chain, tmp_path_factory):
    """``run(**settings)``: the flags of a run with a plain causal model, which has no mask token, as the teacher."""
    root = tmp_path_factory.mktemp(request.param)
    texts = [message["content"] for row in conversations(48) for message in row["messages"]]
    teacher = ar_folder(root / "teacher", request.param, texts)
    student = chain.root / "student"
    Bridge.build(load_tokenizer(student), load_tokenizer(teacher), texts[1::2]).save(root / "bridge")
    flags = ["--data", str(chain.root / "corpus.jsonl"), *PREPARING, "--bridge", str(root / "bridge")]
    flags += ["--student", str(student), "--student-length", "96", "--student-block", str(BLOCK)]
    command("prepare")([*flags, "--teacher", str(teacher), "--teacher-length", "160", "--out", str(root / "data")])
    paths = {"teacher": str(teacher), "bridge": str(root / "bridge"), "data": str(root / "data")}
    return lambda **settings: chain.run(root / "out", **paths, **settings)


def loop_reference(run):
    """By sample key: log-probs of the next token, [length - 1, V], of transformers' own model on each sample alone."""
    model = AutoModelForCausalLM.from_pretrained(run["teacher"], dtype=torch.float32)
    data, found = PreparedData.open(run["data"]), {}
    for number in range(len(data)):
        sample = data.sample(number)
        ids = torch.from_numpy(sample.teacher.ids.astype("int64"))
        with torch.no_grad():
            found[tuple(ids.tolist())] = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return found


@pytest.mark.parametrize("strategy", ["tide-cross", "tide-shared", "tide-bridge"])
def test_rows_are_those_of_the_position_before(run, strategy):
    flags = run(strategy=strategy, teacher_context="causal")
    built, loader = loader_of(flags, ALONE)
    assert built.compdemo is None
    expected, teacher = loop_reference(flags), ReplicatedTeacher(load_model(flags["teacher"]), built)
    scored = 0
    for batch in loader(0):
        outputs, asked = teacher.score([batch])[0], batch.teacher
        length = asked.input_ids.shape[1]
        rows = []
        for row, gold in zip(asked.rows.tolist(), batch.teacher_targets.tolist(), strict=True):
            sequence, place = divmod(row, length)
            ids = tuple(asked.input_ids[sequence][asked.attention.valid[sequence]].tolist())
            assert ids[place + 1] == gold
            rows.append(expected[ids][place])
        scored += len(rows)
        rows_RV = torch.stack(rows)
        if built.needs_target_logprobs:
            wanted = rows_RV.gather(1, batch.teacher_targets[:, None])[:, 0]
            torch.testing.assert_close(outputs.target_logprobs, wanted, rtol=0, atol=1e-4)
        if built.needs_hidden:
            found = (outputs.hidden @ outputs.head_weight.T).log_softmax(-1)
            torch.testing.assert_close(found, rows_RV[batch.pair_teacher_index], rtol=0, atol=1e-4)
    assert scored > 50


def test_what_does_not_fit_is_refused_in_one_line(run, chain):
    flags = run()
    data = PreparedData.open(flags["data"])
    assert data.manifest["teacher"]["mask_id"] is None
    for context in ("full", "staircase"):
        with pytest.raises(ValueError, match="a teacher without a mask token: use --teacher-context causal"):
            read_run_inputs(from_flat(run(teacher_context=context)), 1)
        with pytest.raises(ValueError, match="without a mask token"):
            scoring_inputs(data, "teacher", context)
    assert scoring_inputs(data, "teacher", "causal").mask_id == -1
    masked = chain.run(chain.root / "nowhere", teacher_context="causal")
    with pytest.raises(ValueError, match=r"--teacher-context causal: .* is a llada2_moe model, which predicts the t"):
        build.check_shift(from_flat(masked), ALONE)


def test_a_tokenizer_alone_needs_a_mask(run, chain, tmp_path):
    """Without a config.json nothing says that the model knows none."""
    flags = run()
    for file in load_tokenizer(flags["teacher"])._source.files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    asked = ["--data", str(chain.root / "corpus.jsonl"), "--student", flags["student"], "--bridge", flags["bridge"]]
    with pytest.raises(ValueError, match="has no mask token"):
        command("prepare")([*asked, "--teacher", str(tmp_path), "--out", str(tmp_path / "out")])
