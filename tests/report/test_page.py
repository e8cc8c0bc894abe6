"""The page: every section, what is missing by name, nothing fetched, and only its own file replaced."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape

import pytest

from megatron_tide import cli
from megatron_tide.report.page import build_page
from megatron_tide.report.run_folder import read_runs
from tests.support.commands import command
from tests.support.launch import REPOSITORY

pytestmark = pytest.mark.slow  # a recipe's folder is made first: two training runs, scores, an inference benchmark

SECTIONS = ["scores", "runs", "loss", "tidal", "chunks", "timestep", "time", "inference", "completions", "alignment"]
FIGURES = [
    "scores",
    "loss-1",
    "tidal-1",
    "chunks-bridged",
    "timestep-1",
    "time",
    "stages-tiny",
    "alignment-tiny",
]


def figures(html):
    return [unescape(name) for name in re.findall(r'<figure id="figure-([^"]*)"', html)]


def notes(html):
    return [unescape(text) for text in re.findall(r'<p class="note">(.*?)</p>', html)]


def cells(html, section):
    """The text of a section's table rows, cell by cell."""
    body = html.split(f'<section id="{section}">')[1].split("</section>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
    return {unescape(row[0]): [unescape(cell) for cell in row[1:]] for row in rows if row}


@pytest.fixture(scope="module")
def written(recipe, tmp_path_factory):
    """A page of the recipe, in a folder of its own."""
    out = tmp_path_factory.mktemp("page") / "report"
    assert command("report")([str(recipe), "--out", str(out)]) == 0
    return out


def test_every_section_and_picture_is_there(written):
    html = (written / "index.html").read_text()
    assert re.findall(r'<section id="(\w+)">', html) == SECTIONS
    assert [path.name for path in written.iterdir()] == ["index.html"]
    assert figures(html) == FIGURES
    assert len(re.findall(r'<img src="data:image/png;base64,[^"]+" alt="[^"]+">', html)) == len(FIGURES) - 1
    assert notes(html) == []


def test_nothing_is_fetched(written):
    html = (written / "index.html").read_text()
    assert "<script" not in html
    assert set(re.findall(r'(?:src|href)="([^"#]{0,5})', html)) == {"data:", ""}
    assert "url(" not in html
    assert "@import" not in html


def test_tables_hold_the_numbers(written, recipe):
    html = (written / "index.html").read_text()
    trained, scored, timed = (cells(html, section) for section in ("runs", "scores", "time"))
    assert trained["bridged"][:6] == ["tide-bridge", "bernoulli kl", "forward kl", "mix, weight", "yes", "5"]
    assert trained["baseline"][0] == "bd3lm"
    assert trained["baseline"][-1] == "–"
    last = [json.loads(line) for line in (recipe / "bridged" / "metrics.jsonl").read_text().splitlines()]
    denoise = [row["loss/denoise"] for row in last if "loss/denoise" in row][-2:]
    assert trained["bridged"][-2] == f"{sum(denoise) / 2:.4f}"
    models = {model["name"]: model for model in json.loads((recipe / "scores.json").read_text())["models"]}
    assert scored["teacher"][1].startswith(f"{models['teacher']['bits_per_byte']['value']:.4f} [")
    assert scored["bridged"][2].startswith(f"{models['bridged']['minus']['start']['value']:+.4f} [")
    assert scored["bridged"][3].startswith(f"{models['bridged']['minus']['baseline']['value']:+.4f} [")
    assert scored["bridged"][5] == f"{models['bridged']['completions']['both']}/4"
    assert timed["baseline"][3] == "100%"


def test_the_inference_benchmark_stands_beside_the_published_one(written, recipe):
    shown = cells((written / "index.html").read_text(), "inference")
    measured = json.loads((recipe / "inference_benchmark.json").read_text())
    assert shown["student, a2d-qwen3"][0] == f"{measured['student']['parameters']:,}"
    assert shown["teacher, LLaDA2.0-mini 16B"] == ["31.3 GB", "32.55"]
    assert shown["teacher / student"] == ["22.4 times", "5.2 times"]  # the last row of that name


def test_what_a_model_wrote_is_text(written):
    html = (written / "index.html").read_text()
    assert "Add &lt;b&gt;two&lt;/b&gt; &amp; three." in html
    assert "<b>" not in html


def test_hostile_names_and_texts_are_escaped(own_copy):
    """Markup, terminal escapes, bidirectional overrides and lone surrogates, in names, texts and error messages."""
    hostile = "<img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}\x1b]0;title\x07\u202e\ud800"
    shown = "&lt;img src=x onerror=alert(1)&gt;&#34;&#39;&amp;{{ 7 * 7 }}\\x1b]0;title\\x07\\u202e"
    (own_copy / "bridged").rename(own_copy / hostile[: -len("\ud800")].replace("/", ""))
    stamp = own_copy / ".stages" / "bridge.json"
    stamp.rename(stamp.with_name(f"{hostile.replace('/', '')[:-1]}.json"))
    for number, line in enumerate(("scores.json", "completions.jsonl")):
        text = (own_copy / line).read_text()
        old = "start" if number == 0 else "Count."
        (own_copy / line).write_text(text.replace(json.dumps(old), json.dumps(hostile)))
    html = build_page(read_runs([own_copy]))
    assert html.count(shown) > 10
    assert "<img src=x" not in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", html)
    assert f"{shown}\\ud800" in html
    html.encode()


def test_missing_pieces_are_named(own_copy, tmp_path):
    for file in ("scores.json", "completions.jsonl", "inference_benchmark.json"):
        (own_copy / file).unlink()
    (own_copy / "baseline" / "run.json").unlink()
    shutil.rmtree(own_copy / "bridged")
    assert notes(build_page(read_runs([own_copy]))) == [
        "no scores.json here: python -m megatron_tide evaluate writes it",
        "baseline: no run.json that can be read, so its flags are not known",
        "no training run here uses TIDAL (--tidal mix or weight, or a strategy that has it)",
        "no training run here scores chunks (--chunk-objective, or a strategy that has one)",
        "no inference_benchmark.json here: python -m megatron_tide inference-benchmark writes it",
        "no completions.jsonl here: python -m megatron_tide generate --json writes it",
        "tiny: no training run here has a bridge (--bridge), so there is nothing to align",
    ]


def test_scores_alone_make_a_page(recipe, tmp_path):
    (tmp_path / "scores.json").write_text((recipe / "scores.json").read_text())
    page = build_page(read_runs([tmp_path]))
    assert figures(page) == ["scores", "timestep-1"]
    assert notes(page)[:2] == [
        "no metrics.jsonl here or one folder below: python -m megatron_tide distill writes it",
        "no loss was logged: python -m megatron_tide distill writes metrics.jsonl",
    ]


def test_a_run_of_an_older_version_and_a_bridge_that_is_gone(own_copy, chain):
    path = own_copy / "bridged" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if "_probability/" not in name} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    for described in own_copy.glob("*/run.json"):
        described.write_text(described.read_text().replace(str(chain.root / "bridge"), "gone/bridge"))
    found = notes(build_page(read_runs([own_copy])))
    assert found[0] == "bridged: logged by a version without the chunk/teacher_probability bins"
    assert found[1].startswith("tiny: gone/bridge: no bridge here")
    shutil.copytree(
        chain.root / "bridge", own_copy / "bridge"
    )  # beside the run, as in a recipe's folder that was moved
    assert notes(build_page(read_runs([own_copy]))) == found[:1]


def test_runs_beside_each_other(recipe, own_copy):
    scores = json.loads((own_copy / "scores.json").read_text())
    scores["data"]["fingerprint"] = "of other data"
    (own_copy / "scores.json").write_text(json.dumps(scores))
    (own_copy / "inference_benchmark.json").unlink()
    other = own_copy.rename(own_copy.with_name("other"))
    html = build_page(read_runs([recipe, other]))
    assert "<h1>Distillation report: tiny against other</h1>" in html
    assert {"tiny/bridged", "other/bridged"} <= cells(html, "runs").keys()
    assert {"tiny/teacher", "other/teacher"} <= cells(html, "scores").keys()
    assert {"chunks-tiny/bridged", "chunks-other/bridged", "alignment-other"} <= set(figures(html))
    assert notes(html) == [
        "these runs were scored on other data or settings: compare within a run, not across",
        "other: no inference_benchmark.json here: python -m megatron_tide inference-benchmark writes it",
    ]


def test_it_touches_nothing_but_its_page(own_copy):
    out = own_copy / "report"
    assert command("report")([str(own_copy)]) == 0
    before = (out / "index.html").read_text()
    (own_copy / "scores.json").unlink()
    names = ["notes.txt", "../completions.jsonl", str(own_copy / "bridged" / "run.json"), "index.html"]
    (out / "notes.txt").write_text("mine")
    files = f'<meta name="files" content="{" ".join(names)}">'  # an earlier version removed what such a line names
    (out / "index.html").write_text(before.replace("<meta charset", f"{files}<meta charset"))
    assert command("report")([str(own_copy)]) == 0
    for name in names:
        assert (out / name).is_file()
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "notes.txt"]
    assert (out / "notes.txt").read_text() == "mine"
    assert figures((out / "index.html").read_text()) == [name for name in FIGURES if name != "scores"]


@pytest.mark.parametrize("content", ["<p>my page</p>", b"\xff\xfe"])
def test_a_page_of_someone_else_stays(recipe, tmp_path, content):
    page = tmp_path / "index.html"
    page.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = page.read_bytes()
    with pytest.raises(ValueError, match=r"holds index.html, which no report wrote"):
        command("report")([str(recipe), "--out", str(tmp_path)])
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_a_link_in_a_run_does_not_say_where_the_page_goes(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n')
    (tmp_path / "run" / "report").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="report: a link; remove it, or give its folder as --out"):
        command("report")([str(tmp_path / "run")])
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "nowhere: no such folder; give a recipe's folder (runs/NAME) or a training run's"),
        (["EMPTY"], "EMPTY: nothing to report: no metrics.jsonl here or one folder below, and no scores.json, "),
        (["RECIPE", "RECIPE"], "given twice; name each run once"),
        (["RECIPE", "--out", "FILE"], "FILE: a file, not a folder; take another --out"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, capsys, argv, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    real = {"EMPTY": str(tmp_path / "empty"), "RECIPE": str(recipe), "FILE": str(tmp_path / "file")}
    with pytest.raises(SystemExit) as ended:
        cli.run(command("report"), [real.get(word, word) for word in argv])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word, path in real.items():
        said = said.replace(word, path)
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "empty" / "report").exists()


def test_the_command(recipe, tmp_path):
    line = [
        sys.executable,
        str(REPOSITORY / "tools" / "report.py"),
        str(recipe / "baseline"),
        "--out",
        str(tmp_path / "page"),
    ]
    finished = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{tmp_path}/page/index.html: 10 sections, 4 figures\n"
    assert finished.stderr == ""
