"""Reading data sets: formats, mixtures with weights and filters, conversations, and the ways to get them wrong."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_tide.bridge.samples import read_samples
from megatron_tide.data.encode import EMPTY_PROMPT, EMPTY_RESPONSE, NO_ASSISTANT, split_response
from megatron_tide.data.sources import Mixture, open_mixture, read_mixture
from tests.data.conftest import conversation, write_jsonl

ROWS = [{"messages": conversation(n), "lang": ("python", "rust")[n % 2], "level": n % 4} for n in range(40)]
PAPER = Path(__file__).parents[2] / "recipes" / "mixtures" / "paper.json"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def _mixture(folder: Path, *sources: dict[str, Any]) -> Mixture:
    path = folder / "mixture.json"
    path.write_text(json.dumps({"sources": list(sources)}))
    return open_mixture([str(path)])


def _all(mixture: Mixture) -> list[list[dict[str, str]]]:
    return [mixture.conversation(position)[1] for position in range(len(mixture))]


def test_every_format_gives_the_same_conversations(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    write_jsonl(tmp_path / "lines" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "lines" / "train_tenth.jsonl", ROWS[:4])
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    expected = [row["messages"] for row in ROWS]
    for name in ("rows.jsonl", "rows.parquet", "saved", "splits", "lines", "hub"):
        assert _all(open_mixture([str(tmp_path / name)])) == expected, name
    both = open_mixture([str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.parquet")])
    assert _all(both) == expected * 2
    assert both.key.tolist() == list(range(80))


def test_a_part_of_a_conversation_in_a_column_that_is_not_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3", "id": 1}] * 3)
    columns = {"path": "rows.jsonl", "prompt_column": "instruction", "response_column": "output"}
    assert len(_mixture(tmp_path, columns)) == 3
    assert "column 'input' is not read; what it says belongs in instruction" in capsys.readouterr().err
    assert len(_mixture(tmp_path, {**columns, "filter": {"input": "1 2"}})) == 3
    assert not capsys.readouterr().err


def test_columns_are_mapped_and_filtered(tmp_path: Path) -> None:
    languages = ["python", "rust"] * 5
    rows = [{"instruction": f"q{n}", "output": f"```{x}\n{n}```", "tag": n} for n, x in enumerate(languages)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    columns = {"prompt_column": "instruction", "response_column": "output"}
    for path in ("pairs.jsonl", "pairs.parquet"):
        rules = {"output": {"contains": "python"}, "tag": [0, 2, 3]}
        mixture = _mixture(tmp_path, {"path": path, **columns, "filter": rules})
        assert _all(mixture) == [
            [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"```python\n{n}```"}]
            for n in (0, 2)
        ]
    assert len(_mixture(tmp_path, {"path": "pairs.jsonl", **columns, "filter": {"tag": 3}})) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_stands_beside_a_prompt_and_a_response_comes_with_the_prompt(tmp_path: Path, kind: str) -> None:
    row = {"q": "What is this?", "a": "A cat.", "images": [{"path": "a.png"}], "tools": '[{"name": "f"}]', "z": 1}
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        datasets.Dataset.from_list([row]).to_parquet(path)
    source = {"path": path.name, "prompt_column": "q", "response_column": "a"}
    (_, (asked, said)) = _mixture(tmp_path, source).conversation(0)
    assert asked == {"role": "user", "content": row["q"], "images": row["images"], "tools": [{"name": "f"}]}
    assert said == {"role": "assistant", "content": "A cat."}


@pytest.mark.parametrize("head", ["{", '{"licence": "MIT"}'])
def test_many_odd_rows_before_the_first_good_one_are_counted_as_any_others(tmp_path: Path, head: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{head}\n" * 150 + (json.dumps(ROWS[0]) + "\n") * 20_000)
    mixture = open_mixture([str(path)])
    assert (len(mixture), bool(mixture.error(149)), mixture.error(150)) == (20_150, True, "")


def test_one_odd_value_of_parquet_costs_its_row_alone(tmp_path: Path) -> None:
    """A text that is no UTF-8, as other programs write; a time that Python's cannot hold, in a column of no use."""
    texts = [b"py"] * 3000 + [b"\xff", b"rs"]
    buffers = pyarrow.array(texts, pyarrow.binary()).buffers()
    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": str(n)}] for n in range(3002)]
    columns = {
        "messages": messages,
        "lang": pyarrow.StringArray.from_buffers(len(texts), buffers[1], buffers[2]),
        "time": pyarrow.array([2**62] * len(texts), pyarrow.timestamp("us")),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    mixture = _mixture(tmp_path, {"path": "rows.parquet", "filter": {"lang": "py"}})
    assert len(mixture) == 3001  # what cannot be read is counted later
    assert [bool(mixture.error(n)) for n in (0, 2999, 3000)] == [False, False, True]
    said = pyarrow.StringArray.from_buffers(len(texts), buffers[1], buffers[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": said}), tmp_path / "text.parquet")
    assert read_samples([tmp_path / "text.parquet"])[2999:] == ["py", "rs"]


@pytest.mark.parametrize("where", ["rows.parquet", "folder"])
def test_files_of_equal_times_are_read_anew_where_their_content_changed(tmp_path: Path, where: str) -> None:
    """Two versions out of an archive, say: the cache of ``datasets`` goes by path and time."""
    file = tmp_path / where / "train.parquet" if where == "folder" else tmp_path / where
    file.parent.mkdir(exist_ok=True)
    for text in ("first", "other"):
        datasets.Dataset.from_list([{"messages": [{"role": "user", "content": text}]}]).to_parquet(file)
        os.utime(file, (1e9, 1e9))
        assert open_mixture([str(tmp_path / where)]).conversation(0)[1][0]["content"] == text


def test_weights_repeat_and_thin_out_rows_the_same_way_every_time(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": conversation(n), "n": n} for n in range(1000)])
    counts = {}
    for weight in (0.25, 1.0, 2.5):
        mixture = _mixture(tmp_path, {"path": "rows.jsonl", "weight": weight})
        counts[weight] = Counter(mixture.row.tolist())
        assert abs(len(mixture) - 1000 * weight) < 60
        assert _mixture(tmp_path, {"path": "rows.jsonl", "weight": weight}).row.tolist() == mixture.row.tolist()
    assert set(counts[0.25].values()) == {1}
    assert set(counts[1.0].values()) == {1}
    assert set(counts[2.5].values()) == {2, 3}
    quarter = set(counts[0.25])
    assert quarter <= {row for row, count in counts[2.5].items() if count == 3}  # more weight never takes a row away
    half = _mixture(tmp_path, {"path": "rows.jsonl", "weight": 0.5, "filter": {"n": list(range(500))}})
    assert max(half.row) < 500
    assert 200 < len(half) < 300


def test_limit_takes_from_every_source_and_keeps_keys(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": conversation(n), "name": name} for n in range(200)])
    mixture = _mixture(tmp_path, {"path": "a.jsonl"}, {"path": "b.jsonl"})
    limited = mixture.limited(40)
    assert len(limited) == 40
    assert 8 < Counter(limited.source.tolist())[0] < 32
    assert limited.key.tolist() == sorted(limited.key.tolist())
    for position, key in enumerate(limited.key):
        assert limited.conversation(position) == mixture.conversation(int(key))
    assert mixture.limited(400) is mixture
    assert set(mixture.limited(20).key) <= set(limited.key)


def test_blank_lines_are_no_rows_and_errors_name_the_line(tmp_path: Path) -> None:
    good = json.dumps({"messages": conversation(1)})
    (tmp_path / "rows.jsonl").write_text(f"\n{good}\n\n{good}\n{{\n")
    mixture = open_mixture([str(tmp_path / "rows.jsonl")])
    assert mixture.conversation(1)[1] == conversation(1)
    with pytest.raises(ValueError, match=r"rows\.jsonl:5: not valid JSON"):
        mixture.conversation(2)


def test_a_filter_lets_rows_through_that_cannot_be_read(tmp_path: Path) -> None:
    rows = [{"lang": "rust"}, {"messages": conversation(1), "lang": "python"}, {"messages": conversation(2)}]
    (tmp_path / "rows.jsonl").write_text("{oops\n" + "\n".join(json.dumps(row) for row in rows))
    mixture = _mixture(tmp_path, {"path": "rows.jsonl", "filter": {"lang": "python"}})
    assert mixture.row.tolist() == [0, 2]
    assert "rows.jsonl:1: not valid JSON" in mixture.error(0)
    assert mixture.error(1) == ""


BAD_ROWS = [
    ({"messages": "hello"}, r"rows\.jsonl:2: messages must be a list"),
    ({"messages": [{"role": "user"}, "x"]}, r"rows\.jsonl:2: messages must be a list"),
    ({"messages": [{"content": "x"}]}, r"rows\.jsonl:2: message 0: role and content must be text"),
    ({"messages": [{"role": "user", "content": 3}]}, r"rows\.jsonl:2: message 0: role and content must be text"),
    ({"text": "x"}, r"rows\.jsonl:2: no column 'messages'; it has text"),
    ([1], r"rows\.jsonl:2: a list, not an object"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_malformed_rows_are_named(tmp_path: Path, row: object, words: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": conversation(1)}, row])
    with pytest.raises(ValueError, match=words):
        _all(open_mixture([str(tmp_path / "rows.jsonl")]))


BAD_SOURCES = [
    ({"path": "rows.jsonl", "wieght": 2}, r"sources\[0\]: unknown field 'wieght'; the fields are path, name"),
    ({"path": "rows.jsonl", "weight": 0}, r"weight is 0; it must be above 0"),
    ({"path": "rows.jsonl", "weight": 1e12}, r"weight is 1000000000000.0; .* at most 1000"),
    ({"path": "rows.jsonl", "weight": "2"}, r"weight cannot be '2'"),
    ({"path": "rows.jsonl", "weight": True}, r"weight cannot be True"),
    ({"path": "rows.jsonl", "prompt_column": "a"}, r"prompt_column and response_column go together"),
    ({"path": "rows.jsonl", "filter": {"lang": {"like": "py"}}}, r"filter of 'lang' must be"),
    ({"path": "rows.jsonl", "filter": {"language": "py"}}, r"no column 'language'; it has messages, lang, level"),
    ({"path": "rows.jsonl", "messages_column": "chat"}, r"no column 'chat'; it has messages, lang, level"),
    ({"path": "rows.jsonl", "filter": {"lang": "cobol"}}, r"no row passes the filter; the first one has 'lang' '"),
    ({"path": "gone.jsonl"}, r"gone\.jsonl: no such file or folder"),
    ({"path": "./gone"}, r"gone: no such file or folder"),
    ({"path": "rows.csv"}, r"rows\.csv: unknown file type"),
    ({"path": "cut.parquet"}, r"cut\.parquet: cannot be read as a data set"),
    ({"path": "empty"}, r"empty: cannot be read as a data set"),
    ({"path": "nobody/nothing"}, r"nobody/nothing: cannot be read as a data set, split 'train'"),
    ({"split": "train"}, r"at least a \"path\""),
]


@pytest.mark.parametrize(("source", "words"), BAD_SOURCES)
def test_wrong_sources_are_refused_in_one_line(tmp_path: Path, source: dict[str, Any], words: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words) as caught:
        _mixture(tmp_path, source)
    assert "\n" not in str(caught.value)


NO_MIXTURES = ["", "[]", "{}", '{"sources": []}', '{"sources": [{"path": "x"}], "weights": [1]}', "\xff"]


def test_the_papers_preprocessed_data_are_refused_with_what_to_use(tmp_path: Path) -> None:
    """The columns of its two preprocessing scripts, saved as a data set of splits, as on the hub."""
    both = {"input_ids": [[1]], "labels": [[1]], "prompt_len": [0], "teacher_input_ids": [[1]]}
    for name, more in {
        "distill_llada2_sft": {"attention_mask": [[1]], "teacher_labels": [[1]], "ranges": [[0]]},
        "distill_wedlm_sft": {"align_student": [[0]], "align_teacher": [[0]]},
    }.items():
        datasets.DatasetDict({"train": datasets.Dataset.from_dict(both | more)}).save_to_disk(tmp_path / name)
        with pytest.raises(
            ValueError, match=r"token ids of another preprocessing .*use the data sets .*paper\.json"
        ) as no:
            open_mixture([str(tmp_path / name)])
        assert "\n" not in str(no.value)


@pytest.mark.parametrize("text", NO_MIXTURES)
def test_files_that_are_no_mixture_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mixture.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"mixture\.json"):
        open_mixture([str(path)])


def test_the_papers_mixture_names_its_four_data_sets() -> None:
    sources = read_mixture(str(PAPER))
    assert {source.path for source in sources} == {
        "allenai/tulu-3-sft-mixture",
        "HuggingFaceTB/smoltalk",
        "OpenCoder-LLM/opc-sft-stage1",
        "OpenCoder-LLM/opc-sft-stage2",
    }
    for source in sources:
        python_only = source.filter == {"output": {"contains": "python"}}
        assert python_only == source.path.startswith("OpenCoder-LLM/")


def _turns(*turns: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (_turns("sbe kind", "uhi", "ahello"), (_turns("sbe kind", "uhi"), "hello")),
        (_turns("u1", "a2", "u3", "a 4\n", "u5"), (_turns("u1", "a2", "u3"), " 4\n")),
        (_turns("u1"), NO_ASSISTANT),
        ([], NO_ASSISTANT),
        (_turns("a1"), EMPTY_PROMPT),
        (_turns("u1", "a \n"), EMPTY_RESPONSE),
    ],
)
def test_the_response_is_the_last_assistant_turn(messages: list[dict[str, str]], expected: object) -> None:
    assert split_response(messages) == expected


def test_tools_and_calls_are_read_for_the_template(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    messages = [*conversation(1)[:1], {"role": "assistant", "content": None, "tool_calls": calls, "weight": 1}]
    tools = [{"name": "weather"}]
    rows = [{"messages": messages, "tools": given} for given in (tools, json.dumps(tools), "[]", None, "not JSON")]
    mixture = open_mixture([str(write_jsonl(tmp_path / "calls.jsonl", rows))])
    found = [mixture.conversation(row)[1] for row in range(len(rows))]
    assert [talk[0].get("tools") for talk in found] == [tools, tools, None, None, "not JSON"]
    assert all(talk[1] == {"role": "assistant", "content": "", "tool_calls": calls} for talk in found)
