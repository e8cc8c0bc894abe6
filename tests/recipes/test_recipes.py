"""The recipes: every command they would run is one that the tools understand; the quickstart runs whole, and once."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from benchmarks.quickstart import main as quickstart_figures
from megatron_tide.__main__ import main
from tests.support.launch import REPOSITORY, run_command

LARGE = ("distill_16b_to_0.6b.sh", "distill_8b_to_0.6b.sh", "distill_ar_to_0.6b.sh")
SMALL = {
    "TEACHER_STEPS": "6",
    "STUDENT_STEPS": "6",
    "DISTILL_STEPS": "3",
    "SHORT_STEPS": "2",
    "EVAL_SAMPLES": "6",
    "COMPLETIONS": "3",
}


def run(recipe, *arguments, timeout=240, **environment):
    return subprocess.run(
        ["bash", str(REPOSITORY / "recipes" / recipe), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd="/",
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def commands(recipe, *arguments, **environment):
    """{stage: words of its command} of a dry run."""
    finished = run(recipe, *arguments, DRY_RUN="1", **environment)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    return {name.removeprefix("# "): shlex.split(line) for name, line in zip(lines[::2], lines[1::2])}


@pytest.mark.parametrize("recipe", LARGE)
def test_large_recipes_chain_bridge_data_distil_convert_report(recipe):
    stages = commands(recipe, NPROC="4")
    assert [name.partition("-")[0] for name in stages] == ["sample", "bridge", "data", "train", "convert", "report"]
    training = next(words for name, words in stages.items() if name.startswith("train"))
    assert training[training.index("--nproc-per-node") + 1] == "4"


def test_the_teacher_answers_first_in_a_stage_of_its_own():
    stages = commands(LARGE[0], "--max-steps", "9", CACHE="1", HOSTING="zero3_cpu", NAME="mine", RUNS="elsewhere")
    assert list(stages) == ["sample", "bridge", "data", "cache", "train-tide-cross", "convert", "report"]
    assert check_answered_first(stages, "cache", "train-tide-cross") == ("zero3_cpu", "elsewhere/mine/cache")


def test_every_distillation_of_the_quickstart_may_read_answers():
    stages = commands("quickstart.sh", CACHE="yes")
    for strategy, folder in (("tide-bridge", "cache"), ("tide-cross", "cache-tide-cross")):
        assert check_answered_first(stages, folder, f"train-{strategy}") == (None, f"runs/quickstart/{folder}")
    distilling = [name for name, words in commands("quickstart.sh").items() if name in stages and words != stages[name]]
    assert distilling == ["train-tide-bridge", "train-tide-cross"]


def check_answered_first(stages, asking, training):
    """(hosting, folder) of the stage that asks the teacher what a training needs, and no more than that."""
    from megatron_tide import cli, distill
    from megatron_tide.commands import cache

    assert list(stages).index(asking) == list(stages).index(training) - 1
    asking, training = stages[asking], stages[training]
    asked = cli.parse(cache, asking[asking.index("cache") + 1 :]).run
    trained = cli.parse(distill, training[training.index("megatron_tide.distill") + 1 :]).run
    assert (trained.teacher.teacher_hosting, trained.paths.teacher) == ("cached", "")
    assert asked.paths.out == trained.teacher.teacher_cache
    assert asked.loss_flags() == trained.loss_flags()
    return asked.teacher.teacher_hosting, asked.paths.out


@pytest.mark.parametrize("recipe", [*LARGE, "quickstart.sh", "adapt_ar_to_bd3lm.sh", "on_policy.sh", "real_small.sh"])
def test_every_command_is_understood(recipe):
    from megatron_tide import cli, distill
    from megatron_tide.__main__ import command, split_commands

    checked = 0
    for words in commands(recipe, ROUNDS="2").values():
        if "megatron_tide.distill" in words:
            assert cli.parse(distill, words[words.index("megatron_tide.distill") + 1 :]).run.paths.out
        elif "megatron_tide" in words:
            for name, *flags in split_commands(words[words.index("megatron_tide") + 1 :]):
                cli.parse(command(name), flags)
        elif (script := next((w for w in words if w.endswith(".py")), None)) is not None:
            assert (REPOSITORY / script).is_file()
        else:
            continue
        checked += 1
    assert checked >= 3


def test_paper_is_the_default_and_flags_pass_through():
    from megatron_tide import cli, distill
    from megatron_tide.config import DistillConfig

    def config(*arguments):
        words = commands("distill_16b_to_0.6b.sh", *arguments)["train-tide-cross"]
        return cli.parse(distill, words[words.index("megatron_tide.distill") + 1 :]).run

    plain = config()
    assert plain.train == DistillConfig().train
    assert plain.strategy == DistillConfig().strategy
    assert config("--preset", "paper") == plain
    assert config("--preset", "ours").strategy.masking == "synchronous"
    assert config("--lr", "1e-4").train.lr == 1e-4


@pytest.mark.parametrize(
    ("said", "exported"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "old:1"}, "old:1"),
        ({"PYTORCH_ALLOC_CONF": "a:2"}, "a:2"),
    ],
)
def test_ranks_get_an_allocator_that_fragments_less(said, exported):
    unset = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    shown = ["bash", "-c", "source recipes/common.sh && printenv PYTORCH_ALLOC_CONF"]
    done = subprocess.run(shown, cwd=REPOSITORY, env={**unset, **said}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == exported


def test_settings_come_from_the_environment():
    stages = commands("distill_16b_to_0.6b.sh", STRATEGY="tide-bridge", NAME="mine", RUNS="elsewhere")
    words = stages["train-tide-bridge"]
    assert words[words.index("--out") + 1] == "elsewhere/mine/tide-bridge"
    assert words[words.index("--strategy") + 1] == "tide-bridge"


def test_one_rank_per_gpu_as_many_as_divide_the_batch(tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\nfor number in 0 1 2 3 4 5; do echo "GPU $number: Toy (UUID: GPU-$number)"; done\n')
    fake.chmod(0o755)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}

    def ranks(recipe, stage, **more):
        words = commands(recipe, **{**here, **more})[stage]
        return words[words.index("--nproc-per-node") + 1] if "--nproc-per-node" in words else "1"

    large = "distill_16b_to_0.6b.sh", "train-tide-cross"
    assert ranks(*large) == "4"  # 64 samples in micro-batches of 4
    assert ranks(*large, CUDA_VISIBLE_DEVICES="3,5") == "2"
    assert ranks(*large, CUDA_VISIBLE_DEVICES="") == "1"
    assert ranks(*large, NPROC="6") == "6"
    assert ranks("quickstart.sh", "train-tide-bridge") == "1"  # one micro-batch
    assert "note: 4 of 6 GPUs" in run(large[0], DRY_RUN="1", **here).stderr


def test_requirements_that_are_as_they_were_last_installed_are_not_installed_again(tmp_path):
    python, log = tmp_path / ".venv/bin/python", tmp_path / "log"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$*" in *"-r "*) echo "$*" >>{log};; esac\n')
    python.chmod(0o755)
    (tmp_path / "more.txt").write_text("ruff==1\n")

    def installs(version, *files):
        (tmp_path / "requirements.txt").write_text(f"torch=={version}\n")
        line = (
            f'source recipes/common.sh; cd {tmp_path}; REPO=$PWD; PYTHON=$REPO/.venv/bin/python; setup_environment "$@"'
        )
        log.write_text("")
        subprocess.run(["bash", "-c", line, "bash", "requirements.txt", *files], cwd=REPOSITORY, check=True, timeout=60)
        return len(log.read_text().splitlines())

    assert [installs(1), installs(1)] == [1, 0]
    assert [installs(1, "more.txt"), installs(1, "more.txt"), installs(1)] == [1, 0, 0]
    assert [installs(2), installs(2, "more.txt")] == [1, 0]
    assert installs(1) == 1, "another one was installed since"


def test_only_leaves_the_other_stages_out():
    shown = run("distill_16b_to_0.6b.sh", DRY_RUN="1", ONLY="bridge train").stdout.splitlines()
    kept = [line.removeprefix("# ") for line in shown if line.startswith("# ") and "skipped" not in line]
    assert kept == ["bridge", "train-tide-cross"]
    assert [line for line in shown if "skipped" in line] == [
        f'# {name}: skipped (ONLY="bridge train")' for name in ("sample", "data", "convert", "report")
    ]
    assert len(shown) == 4 + 2 * 2


@pytest.mark.parametrize(("recipe", "stage"), [("quickstart.sh", "corpus"), ("on_policy.sh", "answer-1")])
def test_the_last_lines_of_a_recipe_belong_to_its_report(recipe, stage, tmp_path):
    """Where ONLY leaves the report out, what it would read need not be there."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/told\n[ "$1" != recipes/ranks.py ] || echo 0 1\n')
    python.chmod(0o755)
    for only, reports in ((stage, False), (f"{stage} report", True)):
        (tmp_path / "told").write_text("")
        assert run(recipe, ONLY=only, PYTHON=str(python), RUNS=str(tmp_path)).returncode == 0
        told = (tmp_path / "told").read_text()
        assert f"/{stage}.json" in told
        assert ("/report.py" in told) == reports


def test_only_refuses_a_stage_that_is_not_there():
    refused = run("distill_16b_to_0.6b.sh", DRY_RUN="1", ONLY="sample trian")
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "error: ONLY=\"sample trian\": this recipe has no stage 'trian'; DRY_RUN=1 lists them"
    )


def test_a_stage_says_its_place_among_those_that_run(tmp_path):
    script = tmp_path / "mine.sh"
    common = shlex.quote(str(REPOSITORY / "recipes" / "common.sh"))
    lines = [f"NAME=mine; source {common}", 'EXPECTED_SECONDS="one=1 two=60 three=600"', "shift"]
    script.write_text("\n".join([*lines, *(f"stage {name} true $*" for name in ("one", "two", "three"))]))
    places = {"": ["  [1/3]  about 11 min left", "  [2/3]", "  [3/3]"], "two three": ["  [1/2]", "  [2/2]"]}
    for only, expected in places.items():
        done = run(script, "first", "second", RUNS=str(tmp_path / only), ONLY=only)
        assert done.returncode == 0, done.stderr
        shown = [line for line in done.stdout.splitlines() if "  [" in line]
        assert len(shown) == len(expected)
        for line, name, place in zip(shown, only.split() or ("one", "two", "three"), expected):
            assert line.startswith(f"== {name}{place}")
            assert line.endswith(" left")


def test_srun_starts_the_ranks_when_it_is_asked_for():
    options = {"LAUNCHER": "srun", "NNODES": "2", "NPROC": "4", "SRUN_FLAGS": "--cpu-bind=none"}
    words = commands("distill_16b_to_0.6b.sh", **options)["train-tide-cross"]
    launch = words[: words.index("-m")]
    flags = ["--nodes=2", "--ntasks-per-node=4", "--kill-on-bad-exit=0", "--wait=30", "--cpu-bind=none"]
    assert launch == ["srun", *flags, "bash", "slurm/rank.sh", sys.executable]
    refused = run("distill_16b_to_0.6b.sh", DRY_RUN="1", LAUNCHER="mpirun")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "error: LAUNCHER=mpirun: use torchrun or srun"


@pytest.mark.parametrize(("word", "trusted"), [("1", True), ("true", True), ("0", False), ("false", False)])
def test_trust_takes_zero_one_and_words(word, trusted):
    words = commands("distill_16b_to_0.6b.sh", TRUST_REMOTE_CODE=word)["bridge"]
    assert ("--trust-remote-code" in words) == trusted


def test_the_students_block_size_is_a_setting_of_the_data():
    recipe = "distill_16b_to_0.6b.sh"
    assert "--student-block" not in commands(recipe)["data"]
    words = commands(recipe, STUDENT_BLOCK="8")["data"]
    assert words[words.index("--student-block") + 1] == "8"


@pytest.mark.parametrize(
    ("setting", "value", "flag", "stages"),
    [
        ("TEACHER_BLOCK", "4", "--teacher-block", ["data"]),
        ("STUDENT_MASK", "<m>", "--student-mask", ["bridge", "data"]),
        ("TEACHER_MASK", "<t>", "--teacher-mask", ["bridge", "data"]),
        ("COVERAGE_FLOOR", "0.9", "--coverage-floor", ["bridge", "data"]),
        ("RELEASE_DTYPE", "float32", "--dtype", ["convert"]),
    ],
)
def test_what_a_stage_asks_for_is_a_setting_of_the_chain(setting, value, flag, stages):
    """Empty, the folder or the command decides."""
    recipe = "distill_16b_to_0.6b.sh"
    assert not [name for name, words in commands(recipe).items() if flag in words and name in stages]
    found = commands(recipe, **{setting: value})
    assert [name for name, words in found.items() if flag in words and words[words.index(flag) + 1] == value] == stages
    rounds = commands("on_policy.sh", ROUNDS="1", **{setting: value})
    given = [name for name, words in rounds.items() if flag in words and words[words.index(flag) + 1] == value]
    assert set(stages) <= {name.removesuffix("-1") for name in given}


@pytest.mark.parametrize(
    ("recipe", "name", "meaning"),
    [
        (LARGE[0], "TRUST_REMOTE_CODE", "1 runs Python code that comes with the hub folders, 0 does not"),
        (LARGE[0], "CACHE", "1 asks the teacher before the training, in a stage of its own, 0 during it"),
        ("study.sh", "H9", "1 adds the comparison of on-policy rounds, 0 does not"),
    ],
)
def test_a_switch_refuses_another_word(recipe, name, meaning):
    refused = run(recipe, DRY_RUN="1", **{name: "maybe"})
    assert refused.returncode == 2
    assert refused.stderr.strip() == f"error: {name}=maybe: {meaning}"


def test_an_exported_cdpath_changes_nothing(tmp_path):
    (tmp_path / "recipes").mkdir()
    for script in ("recipes/quickstart.sh", "slurm/chain.sh"):
        finished = subprocess.run(
            ["bash", script, *(["distill_16b_to_0.6b"] if "chain" in script else [])],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1", "CDPATH": f"{tmp_path}:{REPOSITORY}"},
        )
        assert finished.returncode == 0, finished.stderr
        assert str(tmp_path) not in finished.stdout


def test_a_terminal_never_acts_on_an_error_line():
    """Control characters, of UTF-8 too, bytes of no character, marks of direction; words of any script stay."""
    refused = run("quickstart.sh", "\x1b]0;x\x07\x1b[2J \x9b2J \u202eb é日😀 \udc9b1m é\udc9b")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: unknown argument '?]0;x??[2J ?2J ?b é日😀 ?1m é?': ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["RUNS", "ONLY", "NAME"])
def test_names_that_are_printed_hold_nothing_that_a_terminal_acts_on(name):
    for script in ("recipes/quickstart.sh", "slurm/chain.sh"):
        words = ["bash", script, *(["distill_16b_to_0.6b"] if "chain" in script else [])]
        environment = {**os.environ, "DRY_RUN": "1", name: "a\x9b2J", "PYTHON": sys.executable}
        refused = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
        assert refused.returncode == 2
        assert "a?2J" in refused.stderr
        assert "\x9b" not in refused.stdout + refused.stderr


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        *(("quickstart.sh", f"{word}_STEPS") for word in ("TEACHER", "STUDENT", "DISTILL", "SHORT")),
        *(("real_small.sh", name) for name in ("BATCH", "ADAPT_STEPS", "MC_SAMPLES", "COMPLETIONS")),
        *(("study.sh", name) for name in ("DISTILL_STEPS", "BATCH")),
        *(("on_policy.sh", name) for name in ("ROUNDS", "STEPS", "BATCH", "SAMPLES")),
        *((LARGE[0], name) for name in ("NPROC", "NNODES")),
    ],
)
def test_a_number_is_no_program(recipe, name, tmp_path):
    """What bash calculates with, it first evaluates."""
    refused = run(recipe, DRY_RUN="1", **{name: f"PATH[$(touch {tmp_path}/ran)]"})
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert name in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("launcher", ["../recipes/common", "job", "rank", "/tmp/x"])
def test_only_a_launcher_is_sourced(launcher):
    refused = run(LARGE[0], DRY_RUN="1", NPROC="2", LAUNCHER=launcher)
    assert refused.returncode == 2
    assert refused.stderr.strip() == f"error: LAUNCHER={launcher}: use torchrun or srun"


def test_quickstart_refuses_an_unknown_argument():
    refused = run("quickstart.sh", "--frsh")
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "error: unknown argument '--frsh': recipes/quickstart.sh takes only --fresh (settings: top of the file)"
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a whole, small quickstart, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    finished = run("quickstart.sh", timeout=1400, RUNS=str(runs), **SMALL)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    yield runs / "quickstart", finished.stdout
    shutil.rmtree(runs)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_whole_and_small(quickstart, tmp_path, monkeypatch):
    folder, printed = quickstart
    report = json.loads((folder / "report.json").read_text())
    strategies = ["bd3lm", "bd3lm-short", "tide-cross", "tide-bridge"]
    assert set(report["scores"]) == {"start", *strategies, "teacher"}
    assert all(len(model["completions"]["texts"]) == 3 == len(report["prompts"]) for model in report["scores"].values())
    assert report["peak_process_bytes"] < 6 * 2**30
    quickstart_figures([str(folder), "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["runs"][0]["minus"]["tide-bridge"]["bd3lm"] == report["scores"]["tide-bridge"]["minus"]["bd3lm"]
    assert "bits per byte" in printed
    assert "page: " in printed
    page = (folder / "report" / "index.html").read_text()
    assert "figure-chunks-tide-bridge" in page
    assert "no scores.json" not in page
    inference = json.loads((folder / "inference_benchmark.json").read_text())
    for side in ("student", "teacher"):
        assert inference[side]["tokens"] == inference["settings"]["new_tokens"]
    assert {"config.json", "model.safetensors", "README.md", "parity.json"} <= {
        path.name for path in (folder / "hf").iterdir()
    }
    again = run("quickstart.sh", timeout=300, RUNS=str(folder.parent), **SMALL)
    assert again.returncode == 0
    assert again.stdout.count("already done, skipped") == len(report["stages"])
    monkeypatch.chdir(tmp_path)  # where some of them write
    for number, words in enumerate(readme_commands_on("runs/quickstart")):
        on_this_run = [word.replace("runs/quickstart", str(folder)) for word in command_of(words)]
        if "--tasks" in words:
            on_this_run += ["--limit", "4"]  # of 164 problems
        shown = run_command(main, on_this_run, tmp_path / str(number))
        assert shown.status == 0, (words, shown.printed[-2000:])


def command_of(words):
    """The words behind ``python -m megatron_tide`` that a command line of the README stands for."""
    if words[:3] == ["python", "-m", "megatron_tide"]:
        return words[3:]
    script = (REPOSITORY / words[1]).read_text(encoding="utf-8")
    return [re.search(r'entry\("([a-z-]+)"\)', script)[1], *words[2:]]


def readme_commands_on(folder):
    """The README's python commands that work on what the quickstart made."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), flags=re.S)
    lines = [line.split(" #")[0] for block in blocks for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith("python ") and folder in line]
    assert len(found) >= 6
    return found
