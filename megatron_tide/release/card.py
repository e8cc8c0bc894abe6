"""The model card: what the model is, how to use it, and how it was made, from what the run recorded. No local path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron_tide
from megatron_tide.models.families import Family
from megatron_tide.release.export import Generation
from megatron_tide.release.scores import HEADING
from megatron_tide.training_checkpoint import TrainingCheckpoint

PAPER = "https://arxiv.org/abs/2604.26951"
DENOISING_ONLY = "bd3lm"
TAGS = ("diffusion", "block-diffusion", "masked-diffusion")


def model_card(
    trained: TrainingCheckpoint,
    family: Family,
    knobs: Generation,
    parity: Mapping[str, Any],
    *,
    name: str,
    license_id: str,
) -> str:
    """README.md of a release called ``name``."""
    sections = [
        _front_matter(trained, license_id),
        f"# {name}\n\n{_summary(trained, knobs)}",
        _usage(name, family, knobs),
        _method(trained),
        _table("Knobs of the run", _flat_knobs(trained.run["config"])),
        _data(trained),
        _table("Metrics at the last logged step", trained.metrics or {"none": "this run kept no metrics.jsonl"}),
        f"{HEADING}\n\nNot measured yet: `python tools/evaluate.py` does, and writes them here with `--card`.",
        _table("Parity with the training weights", parity),
        _limits(license_id),
    ]
    return "\n\n".join(sections) + "\n"


def public_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded run without where things lay on the machine that trained it (nor the list of its data shards)."""
    data = {key: value for key, value in run["data"].items() if key != "shards"}
    return {key: _public(value) for key, value in {**run, "data": data}.items()}


def public_name(value: str) -> str:
    """Of a path on this machine the last part; a hub name, or text that is no path, as it is."""
    if "/" not in value or any(character.isspace() for character in value):
        return value
    is_hub_name = value.count("/") == 1 and not value.startswith((".", "/", "~")) and not Path(value).exists()
    return value if is_hub_name else Path(value).name


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return public_name(value) if isinstance(value, str) else value


def _front_matter(trained: TrainingCheckpoint, license_id: str) -> str:
    paths = trained.run["config"]["paths"]
    bases = [name for key in ("student", "teacher") if "/" in (name := public_name(paths.get(key) or ""))]
    lines = ["---", f"license: {license_id}", "library_name: transformers", "pipeline_tag: text-generation"]
    if bases:
        lines += ["base_model:", *(f"- {name}" for name in bases)]
    strategy = trained.run["config"]["strategy"]["strategy"]
    tags = [*TAGS, *(["distillation"] if strategy != DENOISING_ONLY else []), strategy]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join([*lines, "---"])


def _summary(trained: TrainingCheckpoint, knobs: Generation) -> str:
    paths, strategy = trained.run["config"]["paths"], trained.run["config"]["strategy"]["strategy"]
    student, teacher = public_name(paths["student"]), public_name(paths.get("teacher") or "")
    text = (
        f"A block diffusion language model: it writes blocks of {knobs.block_size} tokens from left to right, and "
        f"inside a block several tokens at a time, in whatever order it is surest of.\n\n"
        f"- Base model (student): `{student}`\n"
    )
    if strategy != DENOISING_ONLY:
        text += f"- Teacher: `{teacher}`\n- Method: distillation with `{strategy}` ([TIDE]({PAPER}))\n"
    else:
        text += "- Method: masked denoising on data, without a teacher\n"
    return text + f"- Steps: {trained.step}, samples seen: {trained.state.get('samples_seen')}"


def _usage(name: str, family: Family, knobs: Generation) -> str:
    if not family.release.auto_map:
        return (
            f"## How to load it\n\nWeights, config and tokenizer in the public `{family.model_types[0]}` format:\n\n"
            f'```python\nfrom megatron_tide.models import load_model\n\nmodel = load_model("{name}")\n```'
        )
    return f"""## How to generate

Needs torch and transformers (4.57 or newer) only.

```python
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto").eval()
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Write a haiku about the tide."}}], add_generation_prompt=True, tokenize=False
)
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
output = model.generate(inputs["input_ids"], max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

| argument of `generate` | meaning |
|---|---|
| `max_new_tokens` | longest answer; it ends earlier at the end-of-text token |
| `tokens_per_step` | tokens decided in each pass of the model (default 1: the most careful) |
| `threshold` | also decide every token whose probability exceeds this, e.g. 0.9: faster |
| `steps` | passes for the whole answer, instead of `tokens_per_step` |
| `streamer` | transformers' `TextStreamer(tokenizer)`: prints block after block |
| `temperature`, `seed` | 0 (default) takes the likeliest token; above it, tokens are drawn, reproducibly |

Blocks hold {knobs.block_size} tokens. Token ids: mask {knobs.mask_token_id}, end of text {knobs.eos_token_id}."""


def _method(trained: TrainingCheckpoint) -> str:
    run = trained.run
    rows = {
        **run["strategy"],
        "bridge fingerprint": run["bridge_fingerprint"] or "none (no teacher)",
        "data fingerprint": run["data_fingerprint"],
        "run fingerprint": run["fingerprint"],
        "trained with": f"megatron_tide {run.get('version', megatron_tide.__version__)}",
    }
    return _table("How it was trained", rows)


def _data(trained: TrainingCheckpoint) -> str:
    manifest = public_run(trained.run)["data"]
    return _table("Data", {key: value for key, value in manifest.items() if value is not None})


def _flat_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    sections = {section: values for section, values in config.items() if section != "paths"}
    return {knob: value for values in sections.values() for knob, value in values.items() if value is not None}


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"## {title}", "", "| | |", "|---|---|"]
    for key, value in rows.items():
        lines.append(f"| {_cell(key)} | {_cell(value)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value) or "none"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _limits(license_id: str) -> str:
    return f"""## Limits

- It states falsehoods with confidence, repeats biases of its data and teacher, and had no safety tuning of its own.
- Deciding several tokens a pass is faster and loses quality; compare `tokens_per_step=1` before blaming the model.
- Prompts must be rendered with this folder's chat template; other templates were never trained on.
- Responses longer than those of the training data (see the knobs above) were never trained on.

## Licence

{license_id}. The licences of base model, teacher and data hold beside it.

## Citation

```bibtex
@article{{tide2026, title = {{Turning the TIDE}}, journal = {{arXiv preprint arXiv:2604.26951}}, year = {{2026}}}}
```"""
