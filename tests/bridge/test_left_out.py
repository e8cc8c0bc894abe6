"""What a chat template leaves out of a conversation is missed: texts, roles, names, thoughts, tools and their calls."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_tide.bridge import LeftOut, TextTokenizer, load_tokenizer
from tests.bridge.test_chat import controls, user, variant

CALLS = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": 'Bad "Ems"'}}}]
# In the manner of Qwen3's: three roles by name, tool calls and tools' answers; other roles are passed over.
TOOLS_TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role in ['system', 'user'] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{{ m.content.split('</think>')[-1] }}
{%- for call in m.tool_calls or [] %}{{ '{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n[' + m.content + ']<|im_end|>\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory: pytest.TempPathFactory, folders: Mapping[str, Path]) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("qwen") / "like"
    shutil.copytree(folders["student"], folder)
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE.strip(), encoding="utf-8")
    return load_tokenizer(folder)


def test_tools_and_calls_are_written_where_the_template_knows_them(qwen_like: TextTokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    talk = [
        {**user("Weather?")[0], "tools": tools},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "rain <|im_end|>"},
    ]
    rendered = qwen_like.render(talk)
    assert all(word in rendered for word in ("weather", "Bad", "[rain <|im_end|>]", '"parameters"'))
    assert len(controls(qwen_like, qwen_like.encode_prompt(rendered))) == 2 * 4 + 1


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ({"role": "developer", "content": "Be brief."}, "content of message 0"),
        ({"role": "developer", "content": "user"}, "content of message 0"),  # a word of the template itself
        ({"role": "function", "content": "42"}, "content of message 0"),
    ],
)
def test_what_a_template_leaves_out_is_refused(qwen_like: TextTokenizer, message: dict[str, Any], lost: str) -> None:
    with pytest.raises(LeftOut, match=lost) as refused:
        qwen_like.render([message, *user("Well?")])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "tools"])
def test_calls_and_tools_are_refused_where_the_template_does_not_know_them(
    tokenizers: Mapping[str, TextTokenizer], field: str
) -> None:
    calls = {"tool_calls": CALLS, "function_call": CALLS[0]["function"], "tools": [{"name": "weather"}]}
    with pytest.raises(LeftOut, match="weather"):
        tokenizers["student"].render([{"role": "user", "content": "Hi", field: calls[field]}, *user("Well?")])


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "tools"])
def test_calls_and_tools_are_missed_though_their_words_stand_elsewhere(
    tokenizers: Mapping[str, TextTokenizer], field: str
) -> None:
    function = {"name": "add", "arguments": {"a": 1}}
    calls = {"tool_calls": [{"function": function}], "function_call": function, "tools": [{"function": function}]}
    for said in (calls[field], *(["add"] if field != "tools" else [])):  # the second as JSON, say
        with pytest.raises(LeftOut, match="add"):
            tokenizers["student"].render([{"role": "user", "content": "add it", field: said}, *user("Well?")])


@pytest.mark.parametrize("arguments", [{"city": "Ems"}, '{"city": "Ems"}', {"n": 7}, {"a": [{"b": True}]}])
def test_arguments_of_calls_are_missed_though_their_words_stand_elsewhere(
    tmp_path: Path, folders: Mapping[str, Path], qwen_like: TextTokenizer, arguments: Any
) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
            "<|im_end|>{% endfor %}"
        )

    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    talk = [*user('Ems: 7, true, {"city": "Ems"}'), call, *user("Well?")]
    with pytest.raises(LeftOut, match="tool_calls of message 1"):
        variant(tmp_path, folders["student"], change).render(talk)
    assert qwen_like.render(talk)


def test_thoughts_of_earlier_turns_may_be_left_out(qwen_like: TextTokenizer) -> None:
    thought = {"role": "assistant", "content": "<think>Hm.</think>Yes.", "reasoning_content": "Hm."}
    rendered = qwen_like.render([*user("Now?"), thought, *user("Why?")], add_generation_prompt=True)
    assert "Hm." not in rendered
    assert "assistant\nYes.<|im_end|>" in rendered
    with pytest.raises(LeftOut, match="Hm"):
        qwen_like.render([*user("Now?"), thought])


FORGETS = "{% for m in messages %}<|im_start|>{{ m.content.split(SPLIT)[-1] }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("split", "text", "lost"),
    [
        ("'[/THINK]'", "Hm.[/THINK]Yes.", None),
        ("'[/THINK]'", "[THINK]Hm.[/THINK]Yes.", None),
        ("'[/THINK]'", "So:[THINK]Hm.[/THINK]Yes.", "So:"),  # before its thoughts
        ("'[/THINK]'", "[THINK]Hm.[/THINK]One.[THINK]Hm.[/THINK]Two.", "One."),
        ("'[/THINK]'", "Hm.[/THINK]One[/THINK]Two", "One"),
        ("'.'", "Write </think> last. Yes", "Write </think> last."),  # a mark that this template does not know
        ("'.'", "Hm.</think>Yes", "Hm."),
        ("'no'", "Hm.</think>Yes", None),  # written as text
    ],
)
def test_what_is_no_thought_is_looked_for_beside_thoughts(
    tmp_path: Path, folders: Mapping[str, Path], split: str, text: str, lost: str | None
) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = FORGETS.replace("SPLIT", split)

    tokenizer = variant(tmp_path, folders["student"], change)
    talk = [*user("Now?"), {"role": "assistant", "content": text}, *user("Why?")]
    if lost is None:
        assert text.rpartition("]")[2] in tokenizer.render(talk)
    else:
        with pytest.raises(LeftOut, match=f"leaves out '{lost}"):
            tokenizer.render(talk)


def test_thoughts_in_a_field_are_looked_for_where_a_template_knows_of_none(
    tokenizers: Mapping[str, TextTokenizer],
) -> None:
    for field in ("reasoning_content", "reasoning", "thinking"):
        thought = {"role": "assistant", "content": "Yes.", field: "Hm."}
        with pytest.raises(LeftOut, match=f"leaves out 'Hm.', {field} of message 1"):
            tokenizers["student"].render([*user("Now?"), thought, *user("Why?")])


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ({"role": "user", "content": "Hi", "name": "user"}, "leaves out 'user', name of message 0"),
        ({"role": "assistant", "content": "", "refusal": "I cannot."}, "refusal of message 0"),
        ({"role": "assistant", "content": "", "refusal": "Well"}, "refusal of message 0"),  # as the user says
        ({"role": "user", "content": "See", "images": [{"bytes": b"x"}]}, "images of message 0"),
        ({"role": "user", "content": "Hear", "audio": "a.wav"}, "audio of message 0"),
    ],
)
def test_fields_that_a_template_does_not_know_are_refused(
    qwen_like: TextTokenizer, message: dict[str, Any], lost: str
) -> None:
    with pytest.raises(LeftOut, match=lost):
        qwen_like.render([message, *user("Well?")])


def test_names_are_kept_where_the_template_writes_them_and_tools_are_named_by_their_calls(
    tmp_path: Path, folders: Mapping[str, Path], qwen_like: TextTokenizer
) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"

    named = [{"role": "user", "content": "Hi", "name": "Ann"}]
    assert "Ann: Hi" in variant(tmp_path, folders["student"], change).render(named)
    rain = {"role": "tool", "content": "rain", "name": "weather"}
    qwen_like.render([*user("Now?"), {"role": "assistant", "content": "", "tool_calls": CALLS}, rain, *user("Well?")])
    qwen_like.render([*user("Now?"), {"role": "assistant", "content": "<call>weather()</call>"}, rain])
    with pytest.raises(LeftOut, match="leaves out 'weather', name of message 1"):
        qwen_like.render([*user("Now?"), rain, *user("Well?")])


REPEATS = {
    "of the message before": "{% if loop.first or m.content != loop.previtem.content %}{{ m.content }}{% endif %}",
    "of any": "{% if m.content not in ns.all %}{{ m.content }}{% set ns.all = ns.all + m.content %}{% endif %}",
}


@pytest.mark.parametrize("rule", REPEATS.values(), ids=REPEATS)
@pytest.mark.parametrize(
    "texts", [("Hi", "Hi"), ("user", "user"), ("Yes, of course.", "Yes, of course.\n"), ("x", " x")]
)
def test_one_of_two_equal_messages_is_missed(
    tmp_path: Path, folders: Mapping[str, Path], qwen_like: TextTokenizer, rule: str, texts: tuple[str, str]
) -> None:
    def change(tokenizer: Any) -> None:
        start = "{% set ns = namespace(all='') %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        tokenizer.chat_template = start + rule.replace("m.content", "m.content.strip()") + "<|im_end|>{% endfor %}"

    talk = [*user(texts[0]), {"role": "assistant", "content": texts[1]}, *user("Well?")]
    forgetful = variant(tmp_path, folders["student"], change)
    with pytest.raises(LeftOut, match=f"leaves out '{texts[0]}', content of message 0"):
        forgetful.render(talk)
    assert forgetful.render([*talk[:1], *talk[2:]])
    assert qwen_like.render(talk)
    assert qwen_like.render([*talk, *talk])


def test_a_message_that_is_a_part_of_another_is_missed(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    def change(tokenizer: Any) -> None:
        start = "{% set ns = namespace(all='') %}{% for m in messages %}"
        tokenizer.chat_template = start + REPEATS["of any"] + "<|im_end|>{% endfor %}"

    forgetful = variant(tmp_path, folders["student"], change)
    with pytest.raises(LeftOut, match="leaves out 'the sum', content of message 1"):
        forgetful.render([*user("Return the sum."), {"role": "assistant", "content": "the sum"}, *user("Well?")])
