"""The model card: what the model is, how to use it, how the run made it (without local paths), and its scores.

The scores are one section, replaced whenever the model is measured again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import megatron_tide
from megatron_tide.choices import STRATEGIES
from megatron_tide.evaluate.parallelism import threshold_of
from megatron_tide.files import atomic_write, fingerprint, read_whole
from megatron_tide.hub import HUB_NAME, one_line, public_name, published
from megatron_tide.models.families import Family
from megatron_tide.training_checkpoint import GenerationIds, TrainingCheckpoint, TrainState

PAPER = "https://arxiv.org/abs/2604.26951"
TAGS = ("diffusion", "block-diffusion", "masked-diffusion")
HEADING = "## Scores"
PLACE = "## Parity"  # the section after the scores
NO_REPOSITORY = "NAME/REPO"  # in examples of a release that was not uploaded: where it will be
# What of a recorded run is published.
_RUN_KEYS: tuple[str, ...] = (
    "version",
    "config",
    "fingerprint",
    "affects_loss",
    "strategy",
    "phases",
    "bridge_fingerprint",
    "data_fingerprint",
)
_RUN_KEYS += ("model_folder", "total_steps")
_DATA_KEYS: tuple[str, ...] = (
    "format",
    "student",
    "teacher",
    "bridge",
    "sources",
    "limit",
    "shard_rows",
    "counts",
    "tokens",
    "coverage",
)
_DATA_KEYS += ("fingerprint",)
_ONE_LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\"\\`<>]+")
_INDEX = re.compile(r"^model-index:\n(?:(?: |- ).*\n)*", flags=re.M)
_NUMBER = re.compile(r"-?\d[\d.]*(e[+-]?\d+)?|nan|inf")
_METRIC = r"\w[\w.@-]*(/[\w.@-]+)*"  # a name of the logs
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
_SECTION = re.compile(rf"^{HEADING}\n.*?(?=^## |\Z)", flags=re.M | re.S)


def model_card(
    trained: TrainingCheckpoint,
    family: Family,
    ids: GenerationIds,
    parity: Mapping[str, Any],
    *,
    name: str,
    license_id: str,
    repository: str | None = None,
    languages: Sequence[str] = ("en",),
) -> str:
    """README.md of a release called ``name``; ``repository``: where on the hub it will be."""
    repository = repository or (name if HUB_NAME.fullmatch(name) else NO_REPOSITORY)
    name = name if HUB_NAME.fullmatch(name) else public_name(name)
    public = public_run(trained.run)
    metrics = {key: value for key, value in trained.metrics.items() if re.fullmatch(_METRIC, key, flags=re.A)}
    sections = [
        _front_matter(trained, license_id, languages),
        f"# {name}\n\n{_summary(trained, ids)}",
        _usage(repository, family, ids),
        _method(trained),
        _table("Settings of the run", _flat_settings(public["config"])),
        _table("Data", {key: value for key, value in public["data"].items() if value is not None}),
        _table("Metrics at the last logged step", metrics or {"none": "this run kept no metrics.jsonl"}),
        f"{HEADING}\n\nNot measured yet: `python -m megatron_tide evaluate --card` writes scores here.",
        _table("Parity with the training weights", parity or {"not checked": "converted with --skip-parity"}),
        _limits(license_id),
    ]
    return "\n\n".join(sections) + "\n"


def check_card_text(**texts: str) -> None:
    """ValueError for a name or licence that would break the card's front matter or its example."""
    for what, text in texts.items():
        if not _ONE_LINE.fullmatch(text):
            raise ValueError(f"--{what} {text!r}: must be one line without quotes, backslashes and angle brackets")


def public_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded run by a list of its keys: without local paths, text of rows and the list of its data shards."""
    kept = {key: run[key] for key in _RUN_KEYS if key in run}
    kept["data"] = {key: run["data"][key] for key in _DATA_KEYS if key in run["data"]}
    public: dict[str, Any] = published(kept, _local_paths(run))
    return public


def _local_paths(run: Mapping[str, Any]) -> set[str]:
    """Paths of a run that were folders or files where it ran, though they look like names on the hub."""
    local, student, begun = run.get("local_paths"), run["config"]["paths"]["student"], Path(run["model_folder"])
    found = {path for path in local if isinstance(path, str)} if isinstance(local, list) else set()
    if (
        begun.is_absolute() and Path(student).parts == begun.parts[-len(Path(student).parts) :]
    ):  # before it was recorded
        found.add(student)
    sources = run["data"].get("sources") or ()
    # The content of a file or folder is a sha256.
    return found | {one["path"] for one in sources if len(str(one.get("content"))) == 64 and "path" in one}


def public_state(trained: TrainingCheckpoint) -> dict[str, Any]:
    """The trainer's counters."""
    return {one.name: trained.state[one.name] for one in fields(TrainState)}


def _front_matter(trained: TrainingCheckpoint, license_id: str, languages: Sequence[str]) -> str:
    lines = ["---", f"license: {_yaml(license_id)}", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["language:", *(f"- {_yaml(language)}" for language in languages)]
    local = _local_paths(trained.run)
    if base := _hub_names(local, trained.run["config"]["paths"]["student"]):
        lines += ["base_model:", f"- {base[0]}", "base_model_relation: finetune"]
    sources = trained.run["data"].get("sources") or ()
    if sets := _hub_names(local, *(source.get("path") for source in sources)):
        lines += ["datasets:", *(f"- {name}" for name in sets)]
    strategy = trained.run["config"]["strategy"]["strategy"]
    tags = [*TAGS, *(["distillation"] if _distils(trained) else []), *([strategy] if strategy in STRATEGIES else [])]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join([*lines, "---"])


def _yaml(text: str) -> str:
    """``text`` as YAML reads it back, also ``no`` (Norwegian)."""
    return text if re.fullmatch(r"[a-z][\w.-]*", text, flags=re.A) and text not in _YAML_WORDS else json.dumps(text)


def _hub_names(local: Collection[str], *paths: Any) -> list[str]:
    names = dict.fromkeys(public_name(path) for path in paths if isinstance(path, str) and path not in local)
    return [name for name in names if HUB_NAME.fullmatch(name)]


def _distils(trained: TrainingCheckpoint) -> bool:
    built = trained.run["strategy"]
    return {built["chunk_objective"], built["distribution_objective"]} != {"none"}


def _summary(trained: TrainingCheckpoint, ids: GenerationIds) -> str:
    config = published(trained.run["config"], _local_paths(trained.run))
    texts = config["paths"]["student"], config["paths"].get("teacher") or "", config["strategy"]["strategy"]
    student, teacher, strategy = (_cell(text.replace("`", "'")) for text in texts)
    text = (
        f"A block diffusion language model: it generates blocks of {ids.block_size} tokens from left to right, and "
        f"several tokens of a block at a time, the most confident ones first.\n\n"
        f"- Base model (student): `{student}`\n"
    )
    if _distils(trained):
        text += f"- Teacher: `{teacher}`\n- Method: distillation with `{strategy}` ([TIDE]({PAPER}))\n"
    else:
        text += "- Method: masked denoising on data, without a teacher\n"
    return text + f"- Steps: {trained.step}, samples seen: {trained.state.get('samples_seen')}"


def _usage(name: str, family: Family, ids: GenerationIds) -> str:
    if not family.release.auto_map:
        return (
            f"## How to load it\n\nWeights, config and tokenizer in the public `{family.model_types[0]}` format:\n\n"
            f'```python\nfrom megatron_tide.models import load_model\n\nmodel = load_model("{name}")\n```'
        )
    loader = next(key for key in family.release.auto_map if key.startswith("AutoModelFor"))
    places = {
        "NAME": name,
        "LOADER": loader,
        "BLOCK": str(ids.block_size),
        "MASK": str(ids.mask_token_id),
        "EOS": str(ids.eos_token_id),
    }
    files = ["usage.md", *([family.release.serving] if family.release.serving else [])]
    texts = [(Path(__file__).parent / file).read_text(encoding="utf-8").rstrip() for file in files]
    return re.sub(r"\{([A-Z]+)\}", lambda found: places[found[1]], "\n\n".join(texts))


def _method(trained: TrainingCheckpoint) -> str:
    run = public_run(trained.run)
    rows = {
        **run["strategy"],
        "bridge fingerprint": run["bridge_fingerprint"] or "none (no teacher)",
        "data fingerprint": run["data_fingerprint"],
        "run fingerprint": run["fingerprint"],
        "trained with": f"megatron_tide {run.get('version', megatron_tide.__version__)}",
    }
    return _table("How it was trained", rows)


def _flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    sections = {section: values for section, values in config.items() if section != "paths"}
    return {flag: value for values in sections.values() for flag, value in values.items() if value is not None}


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"## {title}", "", "| | |", "|---|---|"]
    for key, value in rows.items():
        lines.append(f"| {_cell(key)} | {_cell(value)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{_cell(key)}: {_cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value) or "none"
    return re.sub(r"([\\|\[])", r"\\\1", one_line(str(value))).replace("<", "&lt;")


def _limits(license_id: str) -> str:
    return f"""## Limits

- It states falsehoods with confidence, repeats biases of its data and teacher, and had no safety tuning of its own.
- Deciding several tokens per pass is faster and loses quality; compare `tokens_per_step=1` before blaming the model.
- Prompts must be rendered with this folder's chat template; other templates were never trained on.
- Responses longer than those of the training data (see the settings above) were never trained on.

## Licence

{license_id}. The licences of the base model, the teacher and the data also apply.

## Citation

```bibtex
@article{{tide2026, title = {{Turning the TIDE}}, journal = {{arXiv preprint arXiv:2604.26951}}, year = {{2026}}}}
```"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured number with its 95 % interval, over ``count`` samples; ``how``: its settings."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    count: int
    how: str


def has_card(folder: str | Path) -> bool:
    """Whether ``folder`` is a release with a model card."""
    card = Path(folder) / "README.md"
    return card.is_file() and PLACE in _text(card)


def _text(card: Path) -> str:
    return read_whole(card).decode("utf-8", "replace")


def card_identity(folder: Path) -> str:
    """The sha256 in hex of a release's card without its scores; "" where it has none."""
    card = folder / "README.md"
    return fingerprint(_INDEX.sub("", _SECTION.sub("", _text(card)))) if card.is_file() else ""


def write_scores(folder: str | Path, scores: Sequence[Score]) -> None:
    """Write ``scores`` into the model card of the release ``folder``; they replace those of the same tasks and metrics.

    Raises:
        ValueError: ``folder`` is not a release.
    """
    card = Path(folder) / "README.md"
    if not has_card(folder):
        raise ValueError(f"{folder}: no model card to write scores into; the convert command creates one")
    lines = _kept(_text(card), {(_cell(score.task), _cell(score.metric)) for score in scores})
    lines += [
        f"| {_cell(s.task)} | {_cell(s.metric)} | {s.value:.4g} "
        f"| {s.low:.4g} to {s.high:.4g} | {s.count} | {_cell(s.how)} |"
        for s in scores
    ]
    _write_rows(card, lines)


def has_scores(folder: Path) -> bool:
    """Whether ``folder`` is a release with scores in its card."""
    return has_card(folder) and bool(_kept(_text(folder / "README.md"), set()))


def keep_scores(old: Path, new: Path) -> None:
    """Write the scores in the card of the release ``old`` into that of the release ``new``."""
    _write_rows(new / "README.md", _kept(_text(old / "README.md"), set()))


def _write_rows(card: Path, lines: list[str]) -> None:
    head = ["| task | metric | score | 95 % interval | samples | settings |", "|---|---|---|---|---|---|"]
    section = "\n".join([HEADING, "", *head, *lines]) + "\n\n"
    text = _SECTION.sub("", _text(card)).replace(PLACE, section + PLACE, 1)
    name = re.search(r"^# (.*)$", text, flags=re.M)
    index = _model_index(name[1] if name else NO_REPOSITORY, lines)
    text = _INDEX.sub("", text).replace("\n---\n", f"\n{index}---\n", 1)
    atomic_write(card, text.encode())


def _model_index(name: str, rows: Sequence[str]) -> str:
    """The scores of the card's table as the hub reads them, in YAML: every text is quoted."""
    lines = ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for row in rows:
        cells = row.replace("&lt;", "<").strip("| ").split(" | ")
        task, metric, value = (re.sub(r"\\(.)", r"\1", cell) for cell in cells[:3])
        lines += ["  - task:", "      type: text-generation", "    dataset:"]
        lines += [f"      name: {json.dumps(task)}", f"      type: {json.dumps(task)}", "    metrics:"]
        lines += [f"    - type: {json.dumps(metric)}", f"      name: {json.dumps(metric)}", f"      value: {value}"]
    return "\n".join(lines) + "\n"


def card_scores(content: Mapping[str, Any], path: str) -> list[Score]:
    """The scores of the model at ``path`` in the record of an evaluation (its ``--json``)."""
    scores = []
    settings = content.get("settings", {})
    for model in content.get("models", ()):
        if model["path"] != path:
            continue
        how = f"diffusion bound, {settings['mc_samples']} timesteps per {settings['likelihood_noise']}"
        how += f", seed {settings['seed']}, {settings['dtype']}"
        how += ", blocks begin at the answer" if settings.get("block_layout") == "answer" else ""
        task = f"held-out text ({Path(content['data']['folder']).name})"
        for metric in ("bits_per_byte", "masked_token_accuracy"):
            estimate = model[metric]
            scores.append(
                Score(task=task, metric=metric.replace("_", " "), count=model["samples"], how=how, **estimate)
            )
        if answers := model.get("completions"):
            share = {name: 100 * value for name, value in answers["both_share"].items()}
            task = f"completions ({Path(content['data']['folder']).name})"
            rule = settings["decoding"]
            how = f"greedy, {rule['min_new_tokens']} to {rule['max_new_tokens']} tokens, one per pass"
            how += ", end of text in order" if rule["eos_in_order"] else ""
            how += f"; mean {answers['mean_characters']:.0f} characters"
            metric = "parse as Python and say something, %"
            scores.append(Score(task=task, metric=metric, count=answers["count"], how=how, **share))
    for benchmark in content.get("benchmarks", ()):
        if benchmark["path"] != path:
            continue
        preset = benchmark["preset"]
        shots = "the task's own" if preset["few_shot"] is None else preset["few_shot"]
        how = f"{preset['task']}, {shots} shots, {preset['new_tokens']} tokens in {preset['steps']} passes"
        how += f", temperature {preset['temperature']:g}"
        if layout := benchmark.get("settings", {}).get("block_layout"):
            how += f", blocks begin at the {'start of the text' if layout == 'sequence' else layout}"
        for score in benchmark["scores"]:
            metric = score["metric"] if score["filter"] == "none" else f"{score['metric']} {score['filter']}"
            metric += threshold_of(benchmark)
            estimate = {name: 100 * score[name] for name in ("value", "low", "high")}
            scores.append(
                Score(task=benchmark["benchmark"], metric=f"{metric}, %", count=score["n"], how=how, **estimate)
            )
    return scores


def _kept(text: str, replaced: set[tuple[str, str]]) -> list[str]:
    """The rows of the card's table that are not measured again."""
    section = _SECTION.search(text)
    rows = [line for line in section[0].splitlines() if line.startswith("| ")] if section else []
    cells = [row.strip("| ").split(" | ") for row in rows]
    return [
        row
        for row, found in zip(rows, cells)
        if _NUMBER.fullmatch("".join(found[2:3])) and (*found[:2],) not in replaced
    ]
