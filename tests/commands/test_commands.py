"""Every command: help that costs no heavy import, and one line with status 2 for a mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tide import cli, errors
from megatron_tide.__main__ import COMMANDS, command, main

REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST_HELP = {"cache": 182, "distill": 170, "evaluate": 85, "plan": 190}
HELP = """
import sys
from megatron_tide.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
heavy = {"torch", "transformers", "deepspeed", "datasets", "matplotlib", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""


def shown(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=REPOSITORY, env=environment)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main, list(argv))
    output = capsys.readouterr()
    assert stop.value.code == errors.EXIT_USER_ERROR
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_teaches_by_example_and_imports_nothing_heavy(name: str) -> None:
    done = shown("-c", HELP, name, "--help")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"usage: python -m megatron_tide {name}")
    assert lines[1] == (command(name).__doc__ or "").splitlines()[0]
    assert len(lines) < LONGEST_HELP.get(name, 75)
    examples = lines[lines.index("Examples:") + 1 :]
    assert any(name in line or "tools/" in line for line in examples)


NUMBERS = [
    (name, cli.flag_name(info), cli.kind_of(hint)[0])
    for name in COMMANDS
    for _, info, hint in cli.flags_of(command(name).Args)
    if cli.kind_of(hint)[0] in (int, float)
]


def checked(name: str, flag: str, word: str) -> None:
    """One flag, as the command line reads and checks it; whatever else is missing."""
    values = cli.given(command(name).Args, [flag, word], "", name)
    for _, info, _ in cli.flags_of(command(name).Args):
        found = values.get(info.name, [])
        for value in found if isinstance(found, list) else [found]:
            cli._check(info, value)


@pytest.mark.parametrize(("name", "flag", "kind"), NUMBERS, ids=str)
def test_a_number_that_cannot_be_is_refused_and_its_flag_named(name: str, flag: str, kind: type) -> None:
    odd = ["nan", "inf", "-inf", "1e308"] if kind is float else ["1.5", "nan"]
    for word in [*odd, str(10**30), "-7", "1" * 5000]:
        with pytest.raises(ValueError, match=rf"^{flag}\b") as error:
            checked(name, flag, word)
        assert len(str(error.value)) < 300, word


REPLACES = {
    f"{name} {cli.flag_name(info)}": info.metadata
    for name in COMMANDS
    for _, info, _ in cli.flags_of(command(name).Args)
    if info.metadata.get("writes") == "file"
}
READ_FIRST = {"convert-gguf OUT", "generate --json"}  # by the command, which replaces no other kind of file


@pytest.mark.parametrize("flag", sorted(REPLACES.keys() - READ_FIRST))
def test_a_file_is_replaced_only_by_the_command_that_wrote_it(flag: str, tmp_path: Path) -> None:
    path, about = tmp_path / "file", REPLACES[flag]
    for content in ("my notes", "[1, 2]", '{"mine": 1}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"^{path}: exists, and this command has not written it; "):
            cli._check_path(about, flag, path)
    for content in ("", *(json.dumps({key: 1}) for key in about["keys"])):
        path.write_text(content)
        cli._check_path(about, flag, path)
    assert len(REPLACES) - len(READ_FIRST) == 3


def test_without_a_command_all_of_them_are_listed() -> None:
    done = shown("-m", "megatron_tide")
    listed = [line.split()[0] for line in done.stdout.splitlines()[-len(COMMANDS) :]]
    assert listed == list(COMMANDS)
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "name", ["convert_to_hf.py", "evaluate.py", "generate.py", "inspect_bridge.py", "plan.py", "report.py"]
)
def test_the_scripts_are_the_same_commands(name: str) -> None:
    done = shown(f"tools/{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: python -m megatron_tide " in done.stdout


def test_launchers_start_the_trainer_as_a_module() -> None:
    done = shown("-m", "megatron_tide.distill", "--help")
    assert done.returncode == 0, done.stderr
    assert "--global-batch-size INT" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown argument --no-such-flag" in refusal(capsys, name, "--no-such-flag")
    for _, info, hint in cli.flags_of(command(name).Args):
        flag, (kind, *_) = cli.flag_name(info), cli.kind_of(hint)
        if info.metadata["kind"] in ("positional", "hidden"):
            continue
        if kind in (int, float):
            assert f"{flag}: invalid {kind.__name__} value: 'x'" in refusal(capsys, name, flag, "x")
        if kind is not bool:
            assert f"{flag}: expected" in refusal(capsys, name, flag)
        if kind is Path:
            assert f"{flag}: the path is empty" in refusal(capsys, name, flag, "")
        if info.metadata["choices"]:
            assert f"{flag}: invalid choice: 'x'" in refusal(capsys, name, flag, "x")


def test_commands_joined_by_then_run_in_turn_and_end_with_the_first_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    statuses = {"sample": 0, "report": 130, "corpus": 0}
    for name in statuses:
        monkeypatch.setattr(command(name), "run", lambda args, name=name: ran.append(name) or statuses[name])
    sample, corpus = ["sample", "--data", "d", "--out", "o"], ["corpus", "--out", "o"]
    assert main([*sample, "--then", *corpus]) == 0
    assert main([*sample, "--then", "report", "folder", "--then", *corpus]) == 130
    assert ran == ["sample", "corpus", "sample", "report"]
    assert "unknown argument --o" in refusal(capsys, *sample, "--then", "corpus", "--o", "x")
    assert "no such command" in refusal(capsys, *sample, "--then", "corpsu")
    for words in (["--then"], [*sample, "--then"], ["--then", *sample], [*sample, "--then", "--then", *corpus]):
        assert "--then needs a command before and after it" in refusal(capsys, *words)
    assert len(ran) == 4


def test_a_signal_ends_a_command_that_follows_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tide.train.loop import StopRequest

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    seen = []
    monkeypatch.setattr(command("sample"), "run", lambda args: StopRequest().install())
    monkeypatch.setattr(command("corpus"), "run", lambda args: seen.extend(map(signal.getsignal, before)))
    try:
        assert main(["sample", "--data", "d", "--out", "o", "--then", "corpus", "--out", "o"]) == 0
        assert seen == list(before.values())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_float_flags_are_finite(capsys: pytest.CaptureFixture[str], value: str) -> None:
    for flag in ("--adam-eps", "--epochs", "--lr", "--max-grad-norm"):
        given = ["--student", "s", "--data", "d", "--out", "o", f"{flag}={value}"]
        assert f"{flag} {value}: must be" in refusal(capsys, "distill", *given)


def test_a_misspelled_word_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean distill?" in refusal(capsys, "distil")
    assert "did you mean --global-batch-size?" in refusal(capsys, "distill", "--global-batch", "8")


def test_a_terminal_never_acts_on_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "bridge\x1b[2J\u202e")
    assert r"\x1b[2J\u202e" in line


HOSTILE = """
import logging, sys, threading, warnings
from tqdm import tqdm
from megatron_tide import cli, screen
tqdm.monitor_interval = 0  # no thread but those below
evil = "key\\x1b]52;c;eA==\\x07\\x1b[2J\\x9b1m\\u202e"
def main(argv):
    print(evil, file=sys.stdout)
    sys.stderr.writelines([evil])
    logging.getLogger("some.library").warning("token %s", evil)
    warnings.warn(evil)
    for _ in tqdm(range(2), desc=evil):
        pass
    thread = threading.Thread(target=lambda: {}[evil])
    thread.start()
    thread.join()
    print("\\x1b[1mcoloured\\x1b[0m")
    screen.plain(sys.stdout).write("\\x1b[K")
    raise eval(argv[0])(evil)
cli.run(main)
"""


@pytest.mark.parametrize("error", ["KeyError", "ValueError", "SystemExit"])
def test_a_terminal_acts_on_nothing_that_anyone_prints(error: str) -> None:
    """Libraries, warnings, logs, progress bars, threads, and errors that nobody catches."""
    done = shown("-c", HOSTILE, error)
    status = {"KeyError": 1, "ValueError": errors.EXIT_USER_ERROR, "SystemExit": 1}[error]
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    own = done.stdout.replace("\x1b[K", "", 1)
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(own + done.stderr)
    assert own == f"key{ESCAPED}\ncoloured\n"
    assert done.stderr.count(ESCAPED) >= 6, done.stderr


ESCAPED = r"\x1b]52;c;eA==\x07\x1b[2J\x9b1m\u202e"
