"""Templates of conversations: llama.cpp's are in Jinja, Ollama's in Go's language."""

import re

from cluster.errors import InvalidRequest
from serve.ollama.templates import go_to_jinja
from serve.ollama.templates.go_parser import NotTranslatable

GO_TEMPLATE = re.compile(
    r"\{\{-?\s*(\.|\$|(if|range|else|end|with|define|block|template|and|or|not|eq|ne|len|index|slice)\b)"
)


class TemplateRefused(InvalidRequest):
    """This template cannot be used."""

    code = "TEMPLATE_REFUSED"


def to_jinja(template: str) -> str:
    """The template, as llama.cpp may understand it."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        if "{%" not in template and GO_TEMPLATE.search(template):
            template = go_to_jinja.to_jinja(template)
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)  # noqa: S701  (it is not rendered)
    except NotTranslatable as error:
        raise TemplateRefused(
            f"The template is in Go's language, as Ollama's are, and cannot be said in Jinja: {error} "
            "Send one in Jinja (tokenizer.chat_template of the model), or none: the model's own is used then."
        ) from error
    except TemplateSyntaxError as error:
        raise TemplateRefused(f"The template is no Jinja: {error.message}, in line {error.lineno}.") from error
    except RecursionError as error:
        raise TemplateRefused("The template is nested too deeply.") from error
    return template
