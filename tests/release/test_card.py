"""What of a run is published: no local path, no text of rows, one line per fact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tide.config import from_flat
from megatron_tide.files import sha256_file
from megatron_tide.hub import public_name
from megatron_tide.release import Options, Score, convert, write_scores
from megatron_tide.train.inputs import read_run_inputs
from tests.support.lab import Lab, write_checkpoint

convert_module = __import__("megatron_tide.release.convert", fromlist=["convert"])


@pytest.fixture(autouse=True)
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "check_parity", lambda *_: {"logit_rows": 0, "greedy_tokens": 0})


def change_run(checkpoint: Path, change: Any) -> None:
    content = json.loads((checkpoint / "trainer.json").read_text())
    change(content["run"])
    (checkpoint / "trainer.json").write_text(json.dumps(content))
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums["trainer.json"] = sha256_file(checkpoint / "trainer.json")
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def test_paths_and_rows_are_not_published(lab: Lab, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data, distilled=True)

    def change(run: dict[str, Any]) -> None:
        teacher, data = run["config"]["teacher"], run["data"]
        teacher["teacher_nvme"] = "/mnt/private disk/secret-nvme"
        teacher["teacher_deepspeed"] = "private/zero3.json"
        run["config"]["save"]["resume"] = "/home/secret-user/step-00000001"
        run["config"]["paths"]["data"] = "/home/secret user/my data"
        run["affects_loss"]["student"] = "~/secret-user/student"
        run["strategy"]["note"] = "first\n\n## Injected\r\nsecond\u2028third"
        data["refused_example"] = "sources.jsonl, line 3: secret-row text"
        data["sources"][0]["path"] = "C:\\Users\\secret-user\\rows.jsonl"
        data["student"]["name"] = "/home/secret-user/a b/student"
        data["counts"]["dropped"] = {"/home/secret-user/rows.jsonl\n# x": 3}
        data["secret-key"] = run["secret-key"] = "secret-value"

    change_run(checkpoint, change)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 3, "note": "secret-row", "loss/total": 1.5}) + "\n")
    convert(checkpoint, tmp_path / "out", Options(dtype="float32"))
    card, provenance = ((tmp_path / "out" / name).read_text() for name in ("README.md", "provenance.json"))
    for word in ("secret", "private", "/home", "/mnt", str(tmp_path), "nvme"):
        assert word not in card.lower(), word
        assert word not in provenance.lower(), word
    assert "\n## Injected" not in card
    assert "first ## Injected second third" in card
    assert "rows.jsonl" in provenance
    assert "| loss/total | 1.5 |" in card
    assert {line for line in card.splitlines() if line.startswith("#")} == {
        "# out",
        *(f"## {title}" for title in ("How to generate", "How it was trained", "Settings of the run", "Data")),
        *(f"## {title}" for title in ("Metrics at the last logged step", "Scores", "Limits", "Licence", "Citation")),
        "## Parity with the training weights",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"name": "x\n\n# y"},
        {"name": 'x"); import os; ("'},
        {"name": "x\\"},
        {"name": "<script>"},
        {"license_id": "mit\nbase_model: evil/model"},
        {"license_id": ""},
    ],
)
def test_a_name_or_licence_is_one_plain_line(lab: Lab, tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"--(name|license) ") as caught:
        convert(tmp_path / "nowhere", tmp_path / "out", Options(**options))
    assert "\n" not in str(caught.value)


def test_a_name_given_as_a_path_is_its_last_part(lab: Lab, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    for name, shown in {"/home/me/models/my-model": "my-model", "me/my-model": "me/my-model"}.items():
        convert(checkpoint, tmp_path / "out", Options(name=name, overwrite=True))
        assert f"\n# {shown}\n" in (tmp_path / "out" / "README.md").read_text()


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    expected = {
        "org/model-1": "org/model-1",
        "runs/model-1": "model-1",
        "/home/me/my models/model 1/": "model 1",
        "~/model": "model",
        "../model": "model",
        "a\nb": "a b",
        "C:\\me\\model": "model",
        "/home/alice": "~",
        "/Users/alice/": "~",
        "C:\\Users\\alice": "~",
        "/root": "~",
        "~alice": "~",
        str(Path.home()): "~",
        str(Path("/data", "root", "model")): "model",
        "alice@host:models": "models",
        "alice@host:/data/model": "model",
        "https://alice:word@host": "host",
        "https://host/rows.jsonl?X-Amz-Signature=1#2": "rows.jsonl",
        "file:%2F%2F%2Fhome%2Falice%2Fmodel": "model",
        "/data/hf_abcdefghijklmnopqrstuvwxyz0123456789": "(secret)",
        "HF_TOKEN=abc model": "(secret) model",
        "model@v2: 3 #4": "model@v2: 3 #4",
        "": "",
    }
    assert {name: public_name(name) for name in expected} == expected
    assert public_name("org/model-1", may_be_on_hub=False) == "model-1"


def test_a_local_path_is_no_hub_name_wherever_the_run_is_converted(lab: Lab, tmp_path: Path) -> None:
    """`runs/student` of another folder, or of another machine, looks like one."""
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data, distilled=True)

    def change(run: dict[str, Any]) -> None:
        run["model_folder"] = "/home/alice/private/student"
        run["config"]["paths"] |= {"student": "private/student", "teacher": "private/teacher"}
        run["local_paths"] = ["private/teacher"]
        contents = {"private/rows": "0" * 64, "org/rows": "0" * 16}
        run["data"]["sources"] = [{"path": path, "content": content} for path, content in contents.items()]

    change_run(checkpoint, change)
    convert(checkpoint, tmp_path / "out", Options(base_model=str(lab.student)))
    card, provenance = ((tmp_path / "out" / name).read_text() for name in ("README.md", "provenance.json"))
    assert "private" not in card + provenance
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["datasets"] == ["org/rows"]
    assert "base_model" not in front


def test_a_run_records_which_paths_are_local(chain: Any, tmp_path: Path) -> None:
    config = from_flat(chain.run(tmp_path / "run"))
    paths = config.paths
    assert read_run_inputs(config, 1).run["local_paths"] == [paths.student, paths.teacher, paths.data]


@pytest.mark.parametrize(
    ("license_id", "language"), [("mit", "no"), ("other: x", "on"), ("[mit", "y"), ("1.0", "null")]
)
def test_the_front_matter_is_read_back_as_it_was_given(
    lab: Lab, tmp_path: Path, license_id: str, language: str
) -> None:
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.student_data)
    convert(checkpoint, tmp_path / "out", Options(license_id=license_id, languages=(language,)))
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert (front["license"], front["language"]) == (license_id, [language])


def test_names_in_a_table_are_text(lab: Lab, tmp_path: Path) -> None:
    """Of metrics, which a run's folder may hold any of, and of counts."""
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data, distilled=True)
    odd = ["![x](https://evil/x.png)", "/home/alice/x", "a | b", "[x](mailto:x)"]
    change_run(
        checkpoint, lambda run: run["data"]["counts"].update(dict.fromkeys([*odd, "<b>", "![x](y)", "\\[x](y)"], 3))
    )
    line = {"step": 3, "loss/total": 1.5, "eval/f1@10": 2.5} | dict.fromkeys(odd, 9.5)
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    convert(checkpoint, tmp_path / "out", Options(dtype="float32"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert not [word for word in ("evil", "alice", "9.5", "<b>") if word in card]
    assert not re.search(
        r"(?<!\\)(\\\\)*\[\w*\]\(", card.partition("## How it was trained")[2].partition("## Parity")[0]
    )
    assert "| eval/f1@10 | 2.5 |" in card
    assert "a \\| b: 3" in card


def test_the_hub_reads_bases_data_language_and_scores(lab: Lab, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data, distilled=True)

    def change(run: dict[str, Any]) -> None:
        run["config"]["paths"] |= {"student": "org/start", "teacher": "org/teacher"}
        run["data"]["sources"] = [
            {"path": name} for name in ("org/texts", "/home/me/rows.jsonl", "org/more", "org/texts")
        ]

    change_run(checkpoint, change)
    out = tmp_path / "out"
    convert(checkpoint, out, Options(base_model=str(lab.student), repository="me/student", languages=("en", "de")))
    card = ModelCard.load(out / "README.md").data.to_dict()
    assert (card["base_model"], card["base_model_relation"]) == (["org/start"], "finetune")
    assert (card["datasets"], card["language"]) == (["org/texts", "org/more"], ["en", "de"])
    assert "model-index" not in card
    text = (out / "README.md").read_text()
    assert text.count('from_pretrained("me/student"') == 2
    assert "`org/teacher`" in text

    numbers = {"low": 1.0, "high": 2.0, "count": 160, "how": "greedy"}
    write_scores(out, [Score(task='a "quoted": task', metric="exact match, %", value=1.5, **numbers)])
    write_scores(out, [Score(task="bits", metric="bits per byte", value=2.25, **numbers)])
    write_scores(out, [Score(task='a "quoted": task', metric="exact match, %", value=1.75, **numbers)])
    read = ModelCard.load(out / "README.md").data
    assert read.model_name == "out"
    found = {(one.dataset_name, one.metric_type, one.metric_value) for one in read.eval_results}
    assert found == {('a "quoted": task', "exact match, %", 1.75), ("bits", "bits per byte", 2.25)}
    assert (out / "README.md").read_text().count("model-index:") == 1
    assert ModelCard.load(out / "README.md").data.to_dict()["base_model"] == ["org/start"]


def test_a_name_or_language_that_breaks_the_front_matter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--language"):
        convert(tmp_path / "nowhere", tmp_path / "out", Options(languages=("en\nlicense: mit",)))


def test_every_text_of_a_run_is_one_line_without_a_path(lab: Lab, tmp_path: Path) -> None:
    """Whatever field a path, a line end or markup comes in by."""
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data, distilled=True)
    hostile = "/home/secret-user/`x` <img src=x>: y\n## Injected\n- z: [1"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                f"{hostile}{key}" if key in ("counts", "note") else key: poisoned(one) for key, one in value.items()
            }
        if isinstance(value, list):
            return [poisoned(one) for one in value]
        return hostile if isinstance(value, str) else value

    def change(run: dict[str, Any]) -> None:
        kept = run["model_folder"], {side: dict(run["data"][side]) for side in ("student", "teacher")}
        run.update(poisoned({**run, "data": {**run["data"], "counts": {"note": hostile}}}))
        run["model_folder"] = kept[0]
        for side, names in kept[1].items():
            run["data"][side] |= {name: names[name] for name in ("fingerprint", "template_fingerprint")}

    change_run(checkpoint, change)
    content = json.loads((checkpoint / "trainer.json").read_text())
    content["state"]["note"] = hostile
    (checkpoint / "trainer.json").write_text(json.dumps(content))
    change_run(checkpoint, lambda run: None)
    convert(checkpoint, tmp_path / "out", Options(dtype="float32"))
    card, provenance = ((tmp_path / "out" / name).read_text() for name in ("README.md", "provenance.json"))
    for word in ("secret-user", "/home", "\n## Injected", "\n- z", "<img"):
        assert word not in card, word
    assert not [word for word in ("secret-user", "/home", "\\n") if word in provenance]
    assert "\\n" not in provenance
    front = yaml.safe_load(card.split("---\n")[1])
    assert all(isinstance(tag, str) for tag in front["tags"])
