"""Go's templates in Jinja: what a conversation becomes in them, by the rules that Ollama has for its own."""

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
    ("messages", "written"),
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
def test_a_turn_is_written_for_each_turn_and_the_last_one_is_begun(
    messages: list[dict[str, Any]], written: str
) -> None:
    assert render(TURN_TEMPLATE, *messages) == written


def test_a_conversation_that_is_over_is_written_to_its_end() -> None:
    assert render(TURN_TEMPLATE, HELLO, HI, begun=False) == "[user Hello]\n[assistant Hi.]\n"


def test_the_response_comes_last_where_a_template_does_not_say_where() -> None:
    assert render("{{ .Prompt }}: ", HELLO, HI, WHO) == "Hello: Hi.Who is 'it' {{ 🎬 }}?: "


def test_what_stands_behind_the_response_is_left_out_wherever_that_is() -> None:
    template = "{{ if .Prompt }}<{{ .Prompt }}>{{ .Response }}</a>{{ end }}</b>"
    assert render(template, HELLO, HI, WHO) == "<Hello>Hi.</a></b><Who is 'it' {{ 🎬 }}?>"


@pytest.mark.parametrize(
    ("messages", "more", "written"),
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
def test_a_template_that_goes_through_the_messages_itself(
    messages: list[dict[str, Any]], more: dict[str, Any], written: str
) -> None:
    told = [one for one in messages if one["role"] != "system"]
    assert render(CHAT_TEMPLATE, *messages, **more) == written
    assert render(CHAT_TEMPLATE, *told, **more) == written.replace("[system Be brief.]\n", "")


@pytest.mark.parametrize(
    ("template", "written"),
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
def test_what_go_has_for_it(template: str, written: str) -> None:
    assert render(template, HELLO, CALLS) == written


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
def test_what_jinja_cannot_say_is_named(template: str, reason: str) -> None:
    with pytest.raises(TemplateRefused, match=f"{reason}.*Send a template in Jinja"):
        to_jinja(template)


@pytest.mark.parametrize(
    "template",
    ["{{ if .Prompt }}" * 5000 + "{{ end }}" * 5000, "{{ if " + "(" * 5000 + ".Prompt" + ")" * 5000 + " }}{{ end }}"],
)
def test_what_is_nested_too_deeply_is_refused(template: str) -> None:
    with pytest.raises(TemplateRefused, match="nested too deeply"):
        to_jinja(template)
