"""Tokenization of conversations with several chat templates, and which tokens have a label."""

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

QUESTION = {"role": "user", "content": "Is Plex up?"}
ANSWER = {"role": "assistant", "content": "Yes, since Monday."}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "restart", "arguments": '{"service": "plex"}'},
}
TOOL = {"type": "function", "function": {"name": "restart", "parameters": {"type": "object", "properties": {}}}}

THINKING_DROPPED = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}
{%- else %}{{ message.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""A template that drops the thinking from all answers but the last."""

DIFFERENT_PROMPT = """{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'the assistant says: ' }}{% endif %}"""
"""A template whose generation prompt differs from the way it renders an answer."""


Template = Callable[[str | None], None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Template:
    """Sets another chat template for the duration of a test."""

    def change(text: str | None) -> None:
        monkeypatch.setattr(tokenizer, "chat_template", text)

    return change


def build(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shipped = files("configs") / "tiny"
    tiny.build(folder, (shipped / "chat_template.jinja").read_text(), (shipped / "corpus.txt").read_text())
    return folder


def learned_text(tokenizer: Any, encoding: tokenize.Encoding) -> str:
    return tokenizer.decode([label for label in encoding.labels if label != IGNORED])


def test_only_answers_and_their_end_tokens_have_labels(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "Still."}]
    (encoding,) = encode(tokenizer, messages)
    assert learned_text(tokenizer, encoding) == "Yes, since Monday.<|im_end|>Still.<|im_end|>"
    assert tokenizer.decode(encoding.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False).removesuffix(
        "\n"
    )
    pairs = zip(encoding.input_ids, encoding.labels, strict=True)
    assert all(label in {IGNORED, token} for token, label in pairs)
    assert encoding.learned_tokens == len(tokenizer("Yes, since Monday.<|im_end|>Still.<|im_end|>")["input_ids"])


def test_the_tokens_before_an_answer_equal_the_generation_prompt(tokenizer: Any) -> None:
    (encoding,) = encode(tokenizer, [QUESTION, ANSWER])
    start = next(index for index, label in enumerate(encoding.labels) if label != IGNORED)
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True)
    assert encoding.input_ids[:start] == prompt["input_ids"]


def test_a_tool_call_has_labels_and_its_result_has_none(tokenizer: Any) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "restarted in 9 s"}
    (encoding,) = encode(tokenizer, [QUESTION, called, result, ANSWER], [TOOL])
    assert learned_text(tokenizer, encoding) == (
        '<tool_call>\n{"name": "restart", "arguments": {"service": "plex"}}\n</tool_call><|im_end|>'
        "Yes, since Monday.<|im_end|>"
    )
    assert "restarted in 9 s" in tokenizer.decode(encoding.input_ids)
    assert "<tools>" in tokenizer.decode(encoding.input_ids)


def test_an_answer_that_is_rendered_differently_later_gets_its_own_encoding(tokenizer: Any, template: Template) -> None:
    template(THINKING_DROPPED)
    thought = {"role": "assistant", "content": "<think>look</think>Yes."}
    first, second = encode(tokenizer, [QUESTION, thought, QUESTION, ANSWER])
    assert learned_text(tokenizer, first) == "<think>look</think>Yes.<|im_end|>"
    assert learned_text(tokenizer, second) == "Yes, since Monday.<|im_end|>"
    assert "<think>" not in tokenizer.decode(second.input_ids)


def test_non_ascii_text_keeps_all_of_its_bytes(tokenizer: Any) -> None:
    (encoding,) = encode(tokenizer, [QUESTION, {"role": "assistant", "content": "Ja, größer: 日本 🙂"}])
    assert learned_text(tokenizer, encoding) == "Ja, größer: 日本 🙂<|im_end|>"


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "no chat template"), (DIFFERENT_PROMPT, "of an answer differently")]
)
def test_an_unusable_template_is_refused(tokenizer: Any, template: Template, text: str | None, reason: str) -> None:
    template(text)
    with pytest.raises(UnusableTokenizer, match=reason):
        encode(tokenizer, [QUESTION, ANSWER])


def test_the_shipped_samples_fit_the_tiny_model(tokenizer: Any) -> None:
    samples = parse_samples((files("configs") / "demo" / "homelab.jsonl").read_bytes(), "homelab.jsonl")
    assert len(samples) >= 40
    for sample in samples:
        assert isinstance(sample, Sample)
        document = sample.model_dump(exclude_none=True)
        encodings = encode(tokenizer, document["messages"], document.get("tools"))
        assert all(
            0 < encoding.learned_tokens < len(encoding.input_ids) <= tiny.CONTEXT_LENGTH for encoding in encodings
        )


def test_builds_of_the_tiny_model_are_identical(tmp_path: Path) -> None:
    first, second = build(tmp_path / "one"), build(tmp_path / "two")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.deep
def test_each_of_several_processes_builds_the_complete_tiny_model(tmp_path: Path) -> None:
    """Each build runs in a process that is part of a distributed training."""
    code = f"""
import sys
from pathlib import Path
from torch import distributed
from tests.pipelines.training.fine_tune.test_tokenize import build
distributed.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=int(sys.argv[1]), world_size=2)
build(Path("{tmp_path}") / sys.argv[1])
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, rank]) for rank in ("0", "1")]
    assert [process.wait(timeout=TIMEOUT) for process in processes] == [0, 0]
    names = [{file.name for file in (tmp_path / rank).iterdir()} for rank in ("0", "1")]
    assert names[0] == names[1] >= {"config.json", "model.safetensors", "tokenizer.json"}
