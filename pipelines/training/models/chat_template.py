"""A chat template is a program in Jinja that comes with its model, and it runs in the process of the engine.

So it is rendered once before, in a process with limits. A template that exceeds them is refused, by name of its model.
"""

import json
import resource
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.errors import UnprocessableRequest

PROJECT = Path(__file__).parents[3]
CPU_SECONDS = 5
"""Of processor time. An ordinary template takes milliseconds."""
MEMORY_BYTES = 512 * 1024 * 1024
MAX_TEMPLATE_CHARACTERS = 500_000
MAX_OUTPUT_CHARACTERS = 1_000_000
"""The conversations below have a few hundred characters."""
TOO_MUCH_MEMORY, TOO_LONG, NOT_JINJA = 40, 41, 42
"""Exit codes of the process that renders."""

TOOL_CALL: dict[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."},
        {"role": "user", "content": "How is the weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "Rain", "name": "weather", "tool_call_id": "call00001"},
    ],
]


class ChatTemplateRefused(UnprocessableRequest):
    """The model's chat template would stop or fill the process that renders it."""

    code = "CHAT_TEMPLATE_REFUSED"


def check_chat_template(template: str, name: str) -> None:
    """Refuse a template that takes too much time or memory. It takes a moment: call it in a thread."""
    if template and (reason := _reason_to_refuse(template)):
        raise ChatTemplateRefused(f"The chat template of {name} is refused: {reason}.")


def check_folder(folder: Path, name: str) -> None:
    """Refuse a model in the format of transformers if one of its templates takes too much time or memory."""
    try:
        templates = read_chat_templates(folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ChatTemplateRefused(f"The chat templates of {name} cannot be read: {error!r}.") from error
    for template in templates.values():
        check_chat_template(template, name)


def read_chat_templates(folder: Path) -> dict[str, str]:
    """The templates of a model in the format of transformers by name. The usual one is `default`."""
    settings_file = folder / "tokenizer_config.json"
    found = json.loads(settings_file.read_text()).get("chat_template") if settings_file.exists() else None
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates["default"] = found
    elif found:
        templates = {entry["name"]: entry["template"] for entry in found}
    for file in [*folder.glob("additional_chat_templates/*.jinja"), *folder.glob("chat_template.jinja")]:
        templates["default" if file.parent == folder else file.stem] = file.read_text()
    return templates


@lru_cache(maxsize=64)
def _reason_to_refuse(template: str) -> str | None:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        return f"it has {len(template)} characters, and {MAX_TEMPLATE_CHARACTERS} are allowed"
    command = [sys.executable, "-P", "-m", __name__]
    done = subprocess.run(command, input=template.encode(), env={"PYTHONPATH": str(PROJECT)}, capture_output=True)
    if done.returncode == 0:
        return None
    reasons = {
        -signal.SIGXCPU: f"to render a short conversation took more than {CPU_SECONDS} s of processor time",
        TOO_MUCH_MEMORY: f"to render a short conversation took more than {MEMORY_BYTES // 2**20} MiB of memory",
        TOO_LONG: f"it renders a short conversation as more than {MAX_OUTPUT_CHARACTERS} characters",
        NOT_JINJA: f"it is not valid Jinja: {done.stdout.decode()}",
    }
    if done.returncode in reasons:
        return reasons[done.returncode]
    # Not cached: the machine may have had no memory left.
    raise ChatTemplateRefused(
        f"A chat template could not be tried: the process ended with {done.returncode}. "
        f"{done.stderr.decode(errors='replace')[-500:]}"
    )


def _render_with_limits(template: str) -> int:
    """Runs in the process that renders. Returns its exit code."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from jinja2 import TemplateSyntaxError

    try:
        compiled = _environment().from_string(template)
    except TemplateSyntaxError as error:
        sys.stdout.write(f"{error.message}, in line {error.lineno}")
        return NOT_JINJA
    except MemoryError:
        return TOO_MUCH_MEMORY
    try:
        return max(_render(compiled, messages, tools) for messages in CONVERSATIONS for tools in (None, TOOLS))
    except MemoryError:
        return TOO_MUCH_MEMORY


def _render(compiled: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> int:
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    length = 0
    try:
        for part in compiled.generate(messages=messages, tools=tools, **variables):
            length += len(part)
            if length > MAX_OUTPUT_CHARACTERS:
                return TOO_LONG
    except MemoryError:
        raise
    except Exception:  # a template may reject a conversation; only what rendering takes counts here
        return 0
    return 0


def _environment() -> Any:
    """As transformers has it."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what the assistant has generated. It changes nothing in the text."""

        tags: set[str] = {"generation"}  # noqa: RUF012  (declared so by Jinja)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    return environment


if __name__ == "__main__":
    sys.exit(_render_with_limits(sys.stdin.read()))
