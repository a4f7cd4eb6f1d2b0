"""Templates of conversations: llama.cpp's are in Jinja, Ollama's in Go's language."""

import re

from cluster.errors import InvalidRequest

GO = re.compile(r"\{\{-?\s*(\.|\$|(if|range|else|end|with|define|block|template|and|or|not|eq|ne|len|index|slice)\b)")


class TemplateRefused(InvalidRequest):
    """This template cannot be used."""

    code = "TEMPLATE_REFUSED"


def as_jinja(template: str) -> str:
    """The template, if it is one that llama.cpp may understand."""
    from jinja2 import Environment, TemplateSyntaxError

    if "{%" not in template and GO.search(template):
        raise TemplateRefused(
            "This template is in Go's language, which Ollama uses. Send one in Jinja (tokenizer.chat_template of the "
            "model), or none: the model's own is used then."
        )
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)  # noqa: S701  (it is not rendered)
    except TemplateSyntaxError as error:
        raise TemplateRefused(f"The template is no Jinja: {error.message}, in line {error.lineno}.") from error
    return template
