"""Checks a chat template, and translates it if it is in Go's language, as Ollama's are. llama.cpp needs Jinja."""

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
    """The template in Jinja. It is parsed, but not rendered: llama.cpp may still reject it."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        if "{%" not in template and GO_TEMPLATE.search(template):
            template = go_to_jinja.to_jinja(template)
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)  # noqa: S701  (it is not rendered)
    except NotTranslatable as error:
        raise TemplateRefused(
            f"The template is in Go's language and cannot be translated to Jinja: {error} Send a template in Jinja "
            "(tokenizer.chat_template of the model), or none: then the model's own is used."
        ) from error
    except TemplateSyntaxError as error:
        raise TemplateRefused(f"The template is not valid Jinja: {error.message}, in line {error.lineno}.") from error
    except RecursionError as error:
        raise TemplateRefused("The template is nested too deeply.") from error
    return template
