"""A release in an environment that holds torch and transformers and nothing else of ours, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.generate import complete, from_text
from megatron_tide.models import load_model
from megatron_tide.release import Options, convert
from tests.support.lab import Lab, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
PINS = dict(line.split("==") for line in (REPOSITORY / "requirements.txt").read_text().split() if "==" in line)
OLDEST, NEWEST = "4.57.6", "5.24.0"
TORCHAO = "torchao==0.18.0"
QUESTIONS = ["Hello!", "Write a function.\n\n" * 5]
BASE_FLAGS = {"max_new_tokens": 20, "tokens_per_step": 2}

PROGRAM = """
import importlib.util, json, sys, warnings

warnings.simplefilter("error", FutureWarning)  # of what a release uses and a later version will not have
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TextStreamer, __version__, pipeline

for name in ("megatron_tide", "deepspeed", "datasets", "sentencepiece"):
    assert importlib.util.find_spec(name) is None, name
torch.set_num_threads(1)
folder, questions, options, quantizes = json.loads(sys.stdin.read())
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
how = {"trust_remote_code": True, "dtype": torch.float32}
model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
assert type(AutoModel.from_pretrained(folder, **how)).__name__ == type(model).__name__
write = pipeline("text-generation", model=folder, return_full_text=False, **how)
answers = []
for question in questions:
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = model.generate(**inputs, streamer=streamer, **options)
    answers.append(output[0, inputs["input_ids"].shape[1]:].tolist())
    # Greedy, too, where a pipeline's own defaults would draw.
    assert write(chat, **options)[0]["generated_text"] == tokenizer.decode(answers[-1], skip_special_tokens=True)
    state = model(**inputs, use_cache=True)
    assert state.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    model.set_attn_implementation("eager")
    assert model.generate(**inputs, **options).tolist() == output.tolist()
if quantizes:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        small = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
        quantize_(small, config)
        assert small.lm_head.weight.__class__ is not torch.nn.Parameter
        assert small.generate(**inputs, **options).shape[1] > inputs["input_ids"].shape[1]
print()
print(json.dumps({"transformers": __version__, "answers": answers}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh virtual environment with torch."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install(folder / "bin" / "python", f"torch=={PINS['torch']}", "numpy")
    return folder / "bin" / "python"


def install(python: Path, *packages: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *packages]
    subprocess.run(command, check=True, timeout=400, env=environment, cwd=python.parent)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_loads_and_writes_the_same_tokens(lab: Lab, python: Path, tmp_path: Path) -> None:
    """Under the oldest transformers we name, the pinned and the newest; both shapes of students; at last in 8 bits."""
    torch.set_num_threads(1)
    expected = {}
    for shape, start in (("qwen3", lab.student), ("llama", lab.llama(tmp_path / "start"))):
        release = tmp_path / shape
        convert(
            write_checkpoint(lab, tmp_path / f"{shape}-run", start=start, data=lab.student_data), release, Options()
        )
        tokenizer = load_tokenizer(release)
        prompts = [from_text(tokenizer, question).ids for question in QUESTIONS]
        answers = complete(load_model(release), tokenizer, prompts, batch_size=1, **BASE_FLAGS)
        expected[release] = [answer.ids for answer in answers]
    for version in (OLDEST, PINS["transformers"], NEWEST):
        install(python, f"transformers=={version}", *([TORCHAO] if version == NEWEST else []))
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        for release, answers in expected.items():
            done = subprocess.run(
                [str(python), "-c", PROGRAM],
                input=json.dumps([str(release), QUESTIONS, BASE_FLAGS, version == NEWEST]),
                capture_output=True,
                text=True,
                env=environment,
                cwd=tmp_path,
                timeout=240,
            )
            assert done.returncode == 0, (version, release.name, done.stderr[-2000:])
            told = json.loads(done.stdout.splitlines()[-1])
            assert told == {"transformers": version, "answers": answers}
