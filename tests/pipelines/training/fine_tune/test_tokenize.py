"""Conversations as tokens: which of them are learned, by the chat templates of several models."""

import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.data.parsing import parse_samples
from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune import tokenize
from pipelines.training.fine_tune.tokenize import IGNORED, UnusableTokenizer, encode
from pipelines.training.models import tiny
from tests.support.waiting import TIMEOUT

ASKED = {"role": "user", "content": "Is Plex up?"}
ANSWERED = {"role": "assistant", "content": "Yes, since Monday."}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "restart", "arguments": '{"service": "plex"}'},
}
TOOL = {"type": "function", "function": {"name": "restart", "parameters": {"type": "object", "properties": {}}}}

FORGETFUL = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}
{%- else %}{{ message.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Of all answers but the last it tells only what was said after thinking."""

FICKLE = """{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'the assistant says: ' }}{% endif %}"""
"""It asks for an answer in other words than it tells one."""


Template = Callable[[str | None], None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Template:
    """Gives the tokenizer another chat template for the time of a test."""

    def change(text: str | None) -> None:
        monkeypatch.setattr(tokenizer, "chat_template", text)

    return change


def build(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shipped = files("configs") / "tiny"
    tiny.build(folder, (shipped / "chat_template.jinja").read_text(), (shipped / "corpus.txt").read_text())
    return folder


def learned(tokenizer: Any, encoding: tokenize.Encoding) -> str:
    return tokenizer.decode([label for label in encoding.labels if label != IGNORED])


def test_only_answers_are_learned_and_what_ends_them(tokenizer: Any) -> None:
    talk = [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED, ASKED, {**ANSWERED, "content": "Still."}]
    (encoding,) = encode(tokenizer, talk)
    assert learned(tokenizer, encoding) == "Yes, since Monday.<|im_end|>Still.<|im_end|>"
    assert tokenizer.decode(encoding.input_ids) == tokenizer.apply_chat_template(talk, tokenize=False).removesuffix(
        "\n"
    )
    pairs = zip(encoding.input_ids, encoding.labels, strict=True)
    assert all(label in {IGNORED, token} for token, label in pairs)
    assert encoding.learned_tokens == len(tokenizer("Yes, since Monday.<|im_end|>Still.<|im_end|>")["input_ids"])


def test_what_is_read_before_an_answer_is_what_it_will_be_asked_with(tokenizer: Any) -> None:
    (encoding,) = encode(tokenizer, [ASKED, ANSWERED])
    first = next(at for at, label in enumerate(encoding.labels) if label != IGNORED)
    asked = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True)
    assert encoding.input_ids[:first] == asked["input_ids"]


def test_a_tool_call_is_learned_and_its_result_only_read(tokenizer: Any) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "restarted in 9 s"}
    (encoding,) = encode(tokenizer, [ASKED, called, result, ANSWERED], [TOOL])
    assert learned(tokenizer, encoding) == (
        '<tool_call>\n{"name": "restart", "arguments": {"service": "plex"}}\n</tool_call><|im_end|>'
        "Yes, since Monday.<|im_end|>"
    )
    assert "restarted in 9 s" in tokenizer.decode(encoding.input_ids)
    assert "<tools>" in tokenizer.decode(encoding.input_ids)


def test_an_answer_that_is_told_differently_later_is_learned_by_itself(tokenizer: Any, template: Template) -> None:
    template(FORGETFUL)
    thought = {"role": "assistant", "content": "<think>look</think>Yes."}
    first, second = encode(tokenizer, [ASKED, thought, ASKED, ANSWERED])
    assert learned(tokenizer, first) == "<think>look</think>Yes.<|im_end|>"
    assert learned(tokenizer, second) == "Yes, since Monday.<|im_end|>"
    assert "<think>" not in tokenizer.decode(second.input_ids)


def test_a_text_that_is_no_ascii_keeps_all_of_its_bytes(tokenizer: Any) -> None:
    (encoding,) = encode(tokenizer, [ASKED, {"role": "assistant", "content": "Ja, größer: 日本 🙂"}])
    assert learned(tokenizer, encoding) == "Ja, größer: 日本 🙂<|im_end|>"


@pytest.mark.parametrize(("text", "reason"), [(None, "no chat template"), (FICKLE, "of an answer differently")])
def test_a_template_that_cannot_be_learned_from_is_refused(
    tokenizer: Any, template: Template, text: str | None, reason: str
) -> None:
    template(text)
    with pytest.raises(UnusableTokenizer, match=reason):
        encode(tokenizer, [ASKED, ANSWERED])


def test_all_that_ships_fits_the_tiny_model(tokenizer: Any) -> None:
    samples = parse_samples((files("configs") / "demo" / "homelab.jsonl").read_bytes(), "homelab.jsonl")
    assert len(samples) >= 40
    for sample in samples:
        assert isinstance(sample, Sample)
        told = sample.model_dump(exclude_none=True)
        encodings = encode(tokenizer, told["messages"], told.get("tools"))
        assert all(
            0 < encoding.learned_tokens < len(encoding.input_ids) <= tiny.CONTEXT_LENGTH for encoding in encodings
        )


def test_the_tiny_model_is_the_same_wherever_it_is_built(tmp_path: Path) -> None:
    one, two = build(tmp_path / "one"), build(tmp_path / "two")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_the_tiny_model_is_whole_whichever_of_several_processes_builds_it(tmp_path: Path) -> None:
    """In another process, which takes part in a training as its second one."""
    code = f"""
import sys
from pathlib import Path
from torch import distributed
from tests.pipelines.training.fine_tune.test_tokenize import build
distributed.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=int(sys.argv[1]), world_size=2)
build(Path("{tmp_path}") / sys.argv[1])
"""
    both = [subprocess.Popen([sys.executable, "-c", code, rank]) for rank in ("0", "1")]
    assert [process.wait(timeout=TIMEOUT) for process in both] == [0, 0]
    names = [{file.name for file in (tmp_path / rank).iterdir()} for rank in ("0", "1")]
    assert names[0] == names[1] >= {"config.json", "model.safetensors", "tokenizer.json"}
