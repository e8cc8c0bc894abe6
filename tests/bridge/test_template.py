"""Chat templates: rendered as transformers renders them, and never without an end."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_tide.bridge import TemplateLimit, load_tokenizer, template, template_worker
from megatron_tide.bridge.train_tokenizers import STUDENT_TEMPLATE, TEACHER_TEMPLATE
from megatron_tide.data.encode import Encoder, TokenizerSettings
from megatron_tide.release import parity
from tests.bridge.test_left_out import TOOLS_TEMPLATE

CHAT = [
    {"role": "system", "content": 'Be <b>brief</b> & "exact".'},
    {"role": "user", "content": " a\n\nb \u2028 世界 \ud83d"},
    {
        "role": "assistant",
        "content": "<think>\nHm.\n</think>\n\nc",
        "reasoning": "So.",
        "tool_calls": [{"a": [1, None]}],
    },
    {"role": "user", "content": ["x", {"type": "text", "text": "y"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1.5, "b": True, "ü": "<|im_end|>"}}}]
THINKING = """{% set ns = namespace(tool=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.tool and m.role == "user" and m.content is string and not(m.content.startswith('<r>')) %}
        {%- set ns.tool = false %}{% set ns.last = index %}
    {%- endif %}
{% endfor %}
{% for m in messages if m.content is string %}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- if '</think>' in m.content %}
    {{- ((m.content.split('</think>')|first).rstrip('\\n').split('<think>')|last).lstrip('\\n') }}
  {%- endif %}{{ m.thinking }}|{{ m.reasoning_content }}
  {%- if loop.last or loop.index0 > ns.last %}{% continue %}{% endif %}
{% else %}none{% endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
"""
SAME = {
    "student": STUDENT_TEMPLATE,
    "teacher": "{% set messages = messages[:3] %}" + TEACHER_TEMPLATE,
    "tools": "{% set messages = messages[:2] %}" + TOOLS_TEMPLATE.strip(),
    "thinking": THINKING,
    "generation": "{% for m in messages %}{% set x = 1 %}{% generation %}{% set x = 2 %}[{{ m.content }}]"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "macro": "{% macro say(m, end='!') %}[{{ m['content'][-1] }}{{ end * 3 }}]{% endmacro %}\n"
    "{% for m in messages %}\n    {{ say(m) }}{% if loop.index == 2 %}{% break %}{% endif %}\n{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2, sort_keys=true) }}{% endfor %}"
    "{{ tools | tojson }}{{ tools | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "names": "{{ documents }}{{ tools is none }}{{ eos_token }}{{ bos_token is defined }}{{ add_generation_prompt }}"
    "{{ strftime_now is defined }}{{ strftime_now('%Y')[:2] }}{{ dict(a=1)['a'] }}{{ undefined_name }}",
    "filters": "{% set x %}{{ messages | length }}{% endset %}{{ x | upper | replace('4', 'four') }}"
    "{{ '%s-%5d' % ('a', 7) }}{{ messages | map(attribute='role') | join(',') }}{{ 'a{}'.format(1) }}"
    "{{ '<a>' | e }}{{ 7 / 2 }}{{ 7 // 2 }}",
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "enable_thinking": False}], ids=["plain", "tools"])
@pytest.mark.parametrize("add", [True, False])
def test_a_rendering_is_that_of_transformers(name: str, more: dict[str, Any], add: bool) -> None:
    names: dict[str, Any] = {"add_generation_prompt": add, "eos_token": "E", **more}
    ((expected,), _) = render_jinja_template(conversations=[CHAT], chat_template=SAME[name], **names)
    assert template.render(SAME[name], CHAT, **names) == expected


REJECTED = {
    "{{ raise_exception('No\n system') }}": "No system$",
    "{{ 1 // 0 }}": "ZeroDivisionError: integer division",
    "{{ messages[0].role[99].x.y }}": "no element 99",
    "{{ messages | sum }}": "TypeError",
    "{{ {}['a'].b }}": "has no attribute",
    "{{ 'x'.encode('utf-7').decode('ascii').nope() }}": "nope",
    "{{ '%d' % 'x' }}": "TypeError",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% set ns = namespace(_x=1) %}": "cannot hold",
    "{% include 'x' %}": "no loader",
    "{% if x %}": "Unexpected end",
    "{{ x | nofilter }}": "nofilter",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ " + "(" * 9000 + ")" * 9000 + " }}": "RecursionError",
    "{{ '9' * 5000 | int }}{{ 10 ** 5000 }}": "ValueError",
}
ENDLESS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": r"\d s;",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": r"\d s;",
    "{{ 9 ** (9 ** 9) % 10 }}": r"\d s;",
    "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}": "MiB",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}": "",
    "{{ 'x' * 9999999999 }}": "MiB",
    "{{ [0] * 9999999999 }}": "MiB",
    "{{ '%9999999999d' % 1 }}": "MiB",
    "{{ [1] | tojson(indent=9999999999) }}": "MiB",
    "{{ 'x' | center(9999999999) }}": "MiB",
    "{% set a = 'x' * 60000 %}{{ a | replace('x', a) }}": "MiB",
    "{{ 'x' * 9999999 }}": "characters",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A renderer with a tenth of the time and a quarter of the memory."""
    source = Path(template_worker.__file__).read_text(encoding="utf-8")
    quicker = source.replace("SECONDS = 3.0", "SECONDS = 0.3").replace("MEMORY = 1 << 29", "MEMORY = 1 << 27")
    assert quicker.count("0.3") == 1
    assert quicker.count("1 << 27") == 1
    (tmp_path / "worker.py").write_text(quicker, encoding="utf-8")
    monkeypatch.setattr(template, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(template, "_RENDERER", template._Renderer())


def with_template(folder: Path, base: Path, text: str) -> Path:
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder


def test_what_a_template_does_wrong_is_one_line(folders: Mapping[str, Path], tmp_path: Path) -> None:
    for number, (text, word) in enumerate(REJECTED.items()):
        tokenizer = load_tokenizer(with_template(tmp_path / f"t{number}", folders["student"], text))
        with pytest.raises(
            ValueError, match=rf"t{number}: the chat template rejects the conversation: .*{word}"
        ) as error:
            tokenizer.render([{"role": "user", "content": "Hi"}])
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


def test_a_template_without_an_end_is_one_line(folders: Mapping[str, Path], tmp_path: Path, quick: None) -> None:
    for number, (text, word) in enumerate(ENDLESS.items()):
        tokenizer = load_tokenizer(with_template(tmp_path / f"t{number}", folders["student"], text))
        with pytest.raises(TemplateLimit, match=rf"t{number}: the chat template does not end: it .*{word}") as error:
            tokenizer.render([{"role": "user", "content": "Hi"}])
        assert "\n" not in str(error.value)
    assert template.render("{{ messages[0].content }}", [{"content": "Hi"}]) == "Hi"


def test_long_conversations_are_within_the_limits(quick: None) -> None:
    long = [{"role": "user", "content": "a <b> " * 1_000_000}] + [{"role": "user", "content": "x"}] * 5000
    assert len(template.render(STUDENT_TEMPLATE, long)) > 6_000_000


def test_rendering_goes_on_where_the_process_was_ended_or_forked() -> None:
    said = [{"content": "Hi"}]
    assert template.render("{{ messages[0].content }}", said) == "Hi"
    process = template._RENDERER._process
    assert process is not None
    process.kill()
    assert template.render("{{ messages[0].content }}", said) == "Hi"
    child = os.fork()
    if not child:
        os._exit(template.render("{{ messages[0].content }}", said) != "Hi")
    assert os.waitpid(child, 0)[1] == 0
    assert template.render("{{ messages[0].content }}", said) == "Hi"
    started = template._RENDERER._process
    assert started is not None
    assert started.pid != process.pid


def test_values_that_are_no_json_are_named_and_deep_ones_refused() -> None:
    assert template.render("{{ messages[0].image }}", [{"image": b"x"}]) == "<bytes>"
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        template.render("", [{"role": "user", "content": deep}])
    for odd in ("f", [1], {"name": "f"}):
        with pytest.raises(ValueError, match="tools must be a list of objects"):
            template.render("", [], tools=odd)
    with pytest.raises(ValueError, match="a message must be an object, not str"):
        template.render("", ["x"])


def test_a_release_is_not_rendered_without_limits(folders: Mapping[str, Path], tmp_path: Path, quick: None) -> None:
    """The parity gate renders here first, before the release's own process does."""
    endless = next(iter(ENDLESS))
    tokenizer = load_tokenizer(with_template(tmp_path / "t", folders["student"], endless))
    nothing: Any = None
    with pytest.raises(TemplateLimit, match="t: the chat template does not end"):
        parity.check_parity(tmp_path / "t", nothing, tokenizer, nothing, nothing, nothing)


def test_many_are_rendered_as_each_alone(folders: Mapping[str, Path], tmp_path: Path, quick: None) -> None:
    """Long ones and wrong ones among them, and more than a pipe takes at once."""
    text = "{% for m in messages %}{% if m.content == 'never' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    text += "{% endfor %}{% endfor %}{% endif %}{{ m.content }}{{ 1 // m.content | length }}<|im_end|>{% endfor %}"
    tokenizer = load_tokenizer(with_template(tmp_path / "t", folders["student"], text))
    contents = [
        "a",
        "<|im_end|>",
        "",
        "b" * 100_000,
        *map(str, range(100)),
        "\ud800",
        "c" * 20_000,
        "d" * 20_000,
        "e <|",
    ]
    talks: list[list[Any]] = [[{"role": "user", "content": content}] for content in contents]
    talks[50:50] = [[{"role": "user", "content": "x", "name": "n"}], ["no message"]]
    found = tokenizer.render_all(talks)
    assert len(found) == len(talks)
    for talk, one in zip(talks, found):
        if isinstance(one, ValueError):
            with pytest.raises(type(one)) as error:
                tokenizer.render(talk)
            assert str(error.value) == str(one)
        else:
            assert one == tokenizer.render(talk)
            assert one.content == tokenizer.render(talk).content
    assert sum(isinstance(one, ValueError) for one in found) == 4  # and the one whose length decides
    endless = [*talks[:3], [{"role": "user", "content": "never"}], *talks[:2]]
    kinds = [type(one) if isinstance(one, ValueError) else str for one in tokenizer.render_all(endless)]
    assert kinds == [str, ValueError, ValueError, TemplateLimit, str, ValueError]


def test_a_template_without_an_end_stops_preparing_data(
    tmp_path: Path, folders: Mapping[str, Path], quick: None
) -> None:
    """Not one row of a million after the other."""
    text = "{% if messages[0].content == 'Hi' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    text += "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    student = load_tokenizer(with_template(tmp_path / "t", folders["student"], text))
    encoder = Encoder(student=TokenizerSettings(tokenizer=student, length=64, block=8))
    encoder.student.describe()
    with pytest.raises(TemplateLimit, match="t: the chat template does not end"):
        encoder.encode_rows([(1, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}])])


def test_the_limit_of_time_holds_under_a_parent_that_ignores_its_signal(quick: None) -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        with pytest.raises(TemplateLimit, match="takes more than"):
            template.render(next(iter(ENDLESS)), [])
    finally:
        signal.signal(signal.SIGPROF, before)


def test_the_process_that_renders_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PYTHON_KEYRING_TOKEN"):
        monkeypatch.setenv(name, "secret-value")
    template._RENDERER.close()  # it starts again
    assert template.render("{{ messages[0].content }}", [{"content": "a"}]) == "a"
    process = template._RENDERER._process
    assert process is not None
    assert b"secret-value" not in Path(f"/proc/{process.pid}/environ").read_bytes()
