"""Go's templates in Jinja: conversations are rendered by the same rules as in Ollama."""

from typing import Any

import pytest

from serve.ollama.templates.chat_template import TemplateRefused, to_jinja
from tests.serve.ollama.templates.go_templates import CHAT_TEMPLATE, TURN_TEMPLATE, render

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi."}
WHO = {"role": "user", "content": "Who is 'it' {{ 🎬 }}?"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "look", "arguments": {"room": "hall"}}}],
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([HELLO], "[user Hello]\n[assistant "),
        ([SYSTEM, HELLO], "[system Be brief.]\n[user Hello]\n[assistant "),
        ([HELLO, HI, WHO], "[user Hello]\n[assistant Hi.]\n[user Who is 'it' {{ 🎬 }}?]\n[assistant "),
        (
            [HELLO, SYSTEM, WHO],
            "[user Hello]\n[assistant ]\n[system Be brief.]\n[user Who is 'it' {{ 🎬 }}?]\n[assistant ",
        ),
        ([HELLO, HELLO], "[user Hello\n\nHello]\n[assistant "),
        ([HELLO, HI], "[user Hello]\n[assistant Hi.]\n[assistant "),
    ],
)
def test_a_turn_template_is_rendered_for_each_turn(messages: list[dict[str, Any]], rendered: str) -> None:
    assert render(TURN_TEMPLATE, *messages) == rendered


def test_a_finished_conversation_is_rendered_to_its_end() -> None:
    assert render(TURN_TEMPLATE, HELLO, HI, add_generation_prompt=False) == "[user Hello]\n[assistant Hi.]\n"


def test_without_a_response_field_the_response_comes_last() -> None:
    assert render("{{ .Prompt }}: ", HELLO, HI, WHO) == "Hello: Hi.Who is 'it' {{ 🎬 }}?: "


def test_text_after_the_last_response_is_left_out() -> None:
    template = "{{ if .Prompt }}<{{ .Prompt }}>{{ .Response }}</a>{{ end }}</b>"
    assert render(template, HELLO, HI, WHO) == "<Hello>Hi.</a></b><Who is 'it' {{ 🎬 }}?>"


@pytest.mark.parametrize(
    ("messages", "variables", "rendered"),
    [
        ([HELLO], {}, "[user Hello]\n[assistant "),
        (
            [SYSTEM, HELLO, HI, WHO],
            {},
            "[system Be brief.]\n[user Hello]\n[assistant Hi.]\n[user Who is 'it' {{ 🎬 }}?]\n[assistant ",
        ),
        (
            [HELLO, CALLS, {"role": "tool", "content": "dark"}],
            {"tools": [TOOL]},
            '[system  tools look {"type": "object"}]\n[user Hello]\n[assistant call look {"room": "hall"}]\n'
            "[tool dark]\n[assistant ",
        ),
        ([HELLO, HI], {}, "[user Hello]\n[assistant Hi."),
    ],
)
def test_a_template_with_a_loop_over_messages(
    messages: list[dict[str, Any]], variables: dict[str, Any], rendered: str
) -> None:
    without_system = [message for message in messages if message["role"] != "system"]
    assert render(CHAT_TEMPLATE, *messages, **variables) == rendered
    assert render(CHAT_TEMPLATE, *without_system, **variables) == rendered.replace("[system Be brief.]\n", "")


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{{ range .Messages }}{{ with .Content }}<{{ . }}>{{ else }}-{{ end }}{{ end }}", "<Hello>-"),
        (
            '{{ range $one := .Messages }}{{ if eq $one.Role "user" }}{{ continue }}{{ end }}{{ .Role }}{{ end }}',
            "assistant",
        ),
        ("{{ range .Messages }}{{ .Role }}{{ break }}{{ end }}", "user"),
        ('{{ $seen := "" }}{{ range .Messages }}{{ $seen = .Role }}{{ end }}{{ $seen }}', "assistant"),
        ("{{ $a := 1 }}{{ range .Messages }}{{ $a := 2 }}{{ end }}{{ $a }}", "1"),
        ("{{ (index .Messages 0).Role }} {{ len .Messages }} {{ .Messages | len }}", "user 2 2"),
        (
            "{{ range $i, $m := .Messages }}{{ range $j, $n := $.Messages }}{{ $i }}{{ $j }} {{ end }}{{ end }}",
            "00 01 10 11 ",
        ),
        ('{{ if and .Messages (not .Think) (gt (len .Messages) 1) }}`"`{{ `"` }}{{ "\\"\\n" }}{{ end }}', '`"`""\n'),
        ("a  {{- /* b */ -}}  c{{ .Messages | len }}", "ac2"),
    ],
)
def test_constructs_of_go_are_translated(template: str, rendered: str) -> None:
    assert render(template, HELLO, CALLS) == rendered


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ if .Prompt }}a", "'if' has no end"),
        ("{{ .Prompt }}{{ end }}", "'end' has no matching"),
        ("{{ .Prompt }}{{ else }}", "'else' has no matching"),
        ("{{ .Unheard }}", "'.Unheard' is not supported"),
        ("{{ $x }}{{ .Prompt }}", r"'\$x' is not supported"),
        ('{{ if eq .Prompt "a" }}{{ else range .Tools }}{{ end }}', "'else range' is not supported"),
        ('{{ printf "%s" .Prompt }}{{ .Prompt }}', "'printf' is not supported"),
        ("{{ eq .Prompt }}{{ .Prompt }}", "'eq' has the wrong number"),
        ("{{ .Prompt }}{{ (.Prompt }}", "parenthesis"),
        ("{{ .Prompt .Prompt }}", "'.Prompt' is unexpected"),
        ("{{ .Prompt | .Prompt }}", "only a function"),
        ("{{ .Prompt }}{{ # }}", "'#' is invalid"),
        ("{{ .Prompt }}{{ .Prompt", "is not closed"),
        ('{{ define "a" }}{{ .Prompt }}{{ end }}', "'define' is not supported"),
        ("{{ . }}{{ .Prompt }}", "is not supported"),
        ("{{ .Prompt }}{{ }}", "is empty"),
        ("{{ .Prompt }}" + "{{ " * 20_000 + '"', "is not closed"),
    ],
)
def test_an_unsupported_construct_is_named(template: str, reason: str) -> None:
    with pytest.raises(TemplateRefused, match=f"{reason}.*Send a template in Jinja"):
        to_jinja(template)


@pytest.mark.parametrize(
    "template",
    ["{{ if .Prompt }}" * 5000 + "{{ end }}" * 5000, "{{ if " + "(" * 5000 + ".Prompt" + ")" * 5000 + " }}{{ end }}"],
)
def test_a_deeply_nested_template_is_refused(template: str) -> None:
    with pytest.raises(TemplateRefused, match="nested too deeply"):
        to_jinja(template)
