"""Two Go templates, and a function that renders a Go template translated to Jinja."""

from typing import Any

from jinja2 import Environment

from serve.ollama.templates.chat_template import to_jinja

TURN_TEMPLATE = (
    "{{ if .System }}[system {{ .System }}]\n{{ end }}{{- if .Prompt }}[user {{ .Prompt }}]\n{{ end }}"
    "[assistant {{ .Response }}]\n"
)
CHAT_TEMPLATE = """
{{- /* Whoever reads this is no model. */ -}}
{{- if or .System .Tools }}[system {{ .System }}
{{- if .Tools }} tools
{{- range .Tools }} {{ .Function.Name }} {{ .Function.Parameters }}{{ end }}
{{- end }}]
{{ end }}
{{- range $i, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" "tool" }}[{{ $message.Role }} {{ .Content }}]
{{ else if eq .Role "assistant" }}[assistant
{{- if .Content }} {{ .Content }}{{ end }}
{{- range .ToolCalls }} call {{ .Function.Name }} {{ json .Function.Arguments }}{{ end }}
{{- if not $last }}]
{{ end }}
{{- end }}
{{- if and (ne .Role "assistant") $last }}[assistant {{ end }}
{{- end }}"""


def render(template: str, *messages: dict[str, Any], add_generation_prompt: bool = True, **variables: Any) -> str:
    """Render as llama.cpp and transformers do."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    template = to_jinja(template)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, **variables
    )
