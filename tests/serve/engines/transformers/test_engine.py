"""The transformers engine, on a folder with forgearr/tiny: batching, sampling, adapters, and errors."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.settings import EngineSettings, get_settings
from serve.engines.collect import collect
from serve.engines.local.engine import LocalEngine
from serve.engines.local.pool import MB
from serve.engines.model_header import ModelUnreadable
from serve.engines.protocol import (
    ContextExceeded,
    EngineBusy,
    EngineFailed,
    EngineRequest,
    ModelFolder,
    ModelTooLarge,
    RequestRefused,
    TextTooLong,
)
from serve.engines.transformers.model import TransformersModel
from serve.engines.transformers.replica import TransformersLoader
from serve.engines.transformers.sampling import Sampler, Sampling
from serve.engines.transformers.text_stream import REPLACEMENT_CHARACTER, IncrementalDecoder, OutputParser
from tests.support.app_server import unload_models
from tests.support.small_models import write_folder
from tests.support.waiting import eventually, eventually_async

HELLO: EngineRequest = {"messages": [{"role": "user", "content": "Hello"}]}
GREEDY = {**HELLO, "temperature": 0}
NOW = datetime.now(UTC)
CONTEXT = 2048

Settings = Callable[..., EngineSettings]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model_folder(folder: Path) -> ModelFolder:
    return ModelFolder(str(folder), "forgearr/tiny", NOW)


@pytest.fixture(scope="module")
def adapted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """An adapter that changes the completions of the model."""
    target = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(target))
    return ModelFolder(str(target), str(folder), NOW)


@pytest.fixture
def settings(home: Path) -> Settings:
    def build(**changes: Any) -> EngineSettings:
        small = {"slots": 2, "queue": 2, "context": CONTEXT, "threads": 1, "memory_mb": 1024}
        return get_settings().engines.model_copy(update=small | changes)

    return build


class Engines:
    """The engines of a test, which unload their models at its end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._engines: list[LocalEngine[TransformersModel]] = []

    def make(self, **changes: Any) -> LocalEngine[TransformersModel]:
        settings = self._settings(**changes)
        engine = LocalEngine(settings, TransformersLoader(settings))
        self._engines.append(engine)
        return engine

    async def close(self) -> None:
        for engine in self._engines:
            await unload_models(engine)


@pytest.fixture
async def engines(settings: Settings) -> AsyncIterator[Engines]:
    engines = Engines(settings)
    yield engines
    await engines.close()


async def collect_chat(
    engine: LocalEngine[TransformersModel], request: EngineRequest, source: ModelFolder
) -> dict[str, Any]:
    return await collect(engine.chat("tiny", request, source))


def content(completion: dict[str, Any]) -> str:
    return completion["choices"][0]["message"]["content"]


def generate_directly(folder: Path, count: int, model: Any = None) -> tuple[str, int]:
    """The completion by transformers' own `generate`, and the number of tokens of the prompt."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(HELLO["messages"], add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    generated = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=count)[0][prompt.shape[1] :]
    # An incomplete character at the end is dropped.
    return tokenizer.decode(generated, skip_special_tokens=True).rstrip(REPLACEMENT_CHARACTER), prompt.shape[1]


async def test_a_completion_is_that_of_transformers(engines: Engines, model_folder: ModelFolder, folder: Path) -> None:
    expected, prompt_tokens = generate_directly(folder, 24)
    engine = engines.make()
    completion = await engine.complete("tiny", {**GREEDY, "max_tokens": 24}, model_folder)
    assert content(completion) == expected
    assert completion["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 24,
        "total_tokens": prompt_tokens + 24,
    }
    assert completion["choices"][0]["finish_reason"] == "length"
    assert (await collect_chat(engine, {**GREEDY, "max_tokens": 24}, model_folder))["choices"] == completion["choices"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of each step of a model."""
    sizes: list[int] = []
    step = Sampler.__call__

    def counting_step(self: Sampler, scores: Any, arguments: torch.Tensor) -> Any:
        sizes.append(len(scores))
        return step(self, scores, arguments)

    monkeypatch.setattr(Sampler, "__call__", counting_step)
    return sizes


async def test_requests_are_batched(
    engines: Engines, model_folder: ModelFolder, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step serves the whole batch: six completions of 20 tokens in four slots take far fewer than 120 steps."""
    engine = engines.make(slots=4)
    alone = content(await engine.complete("tiny", {**GREEDY, "max_tokens": 20}, model_folder))
    steps.clear()
    requests = [{"messages": [{"role": "user", "content": "Hello" * count}], "temperature": 0} for count in range(1, 7)]
    step = Sampler.__call__

    def step_once_the_slots_are_taken(self: Sampler, scores: Any, arguments: torch.Tensor) -> Any:
        if not steps:
            eventually(lambda: len(self.by_request_id) == 4)
        return step(self, scores, arguments)

    monkeypatch.setattr(Sampler, "__call__", step_once_the_slots_are_taken)
    completions = await asyncio.gather(
        *(engine.complete("tiny", {**request, "max_tokens": 20}, model_folder) for request in requests)
    )
    assert content(completions[0]) == alone
    assert len({content(completion) for completion in completions}) > 1
    assert sum(steps) == 120
    assert len(steps) <= 60
    assert max(steps) == 4


async def test_the_same_seed_gives_the_same_completion(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make()
    request = {**HELLO, "max_tokens": 16, "temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0}
    texts = [content(await engine.complete("tiny", {**request, "seed": seed}, model_folder)) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


async def test_generation_ends_at_a_stop_sequence(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make()
    text = content(await engine.complete("tiny", {**GREEDY, "max_tokens": 24}, model_folder))
    # Tokens are words here, and this stop sequence crosses the border of two tokens.
    stop = text[9:14]
    short = await engine.complete("tiny", {**GREEDY, "max_tokens": 24, "stop": ["never", stop]}, model_folder)
    assert content(short) == text.partition(stop)[0]
    assert short["choices"][0]["finish_reason"] == "stop"
    assert short["usage"]["completion_tokens"] < 24


async def test_a_prompt_is_completed(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make()
    completion = await engine.complete(
        "tiny", {"prompt": "Hello", "max_tokens": 5, "temperature": 0, "logprobs": 2}, model_folder
    )
    (choice,) = completion["choices"]
    assert choice["text"]
    logprobs = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in logprobs) == choice["text"]
    assert all(len(token["top_logprobs"]) == 2 for token in logprobs)
    # The likeliest token was taken.
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0 for token in logprobs)


async def test_logit_bias_and_penalties(engines: Engines, model_folder: ModelFolder, folder: Path) -> None:
    engine = engines.make()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    (token,) = tokenizer("Why")["input_ids"]
    request = {**GREEDY, "max_tokens": 4, "logit_bias": [[token, 1000]]}
    assert content(await engine.complete("tiny", request, model_folder)) == "WhyWhyWhyWhy"
    other = await engine.complete("tiny", {**request, "presence_penalty": 2000}, model_folder)
    assert content(other).count("Why") == 1


async def test_a_disconnected_client_leaves_the_batch(
    engines: Engines, model_folder: ModelFolder, steps: list[int]
) -> None:
    engine = engines.make(slots=1, queue=1)
    async with aclosing(engine.chat("tiny", {**GREEDY, "logit_bias": [[2, -1000]]}, model_folder)) as left:
        await anext(left)
    before = len(steps)
    await engine.complete("tiny", {**GREEDY, "max_tokens": 3}, model_folder)
    assert len(steps) < before + 100  # the first completion had room for two thousand
    cancelled = asyncio.create_task(engine.complete("tiny", GREEDY, model_folder))
    await eventually_async(lambda: engine.loaded_models[0].users)
    cancelled.cancel()
    with suppress(asyncio.CancelledError):
        await cancelled
    assert engine.loaded_models[0].users == 0
    # There is one slot: a request waits while a long completion runs in it.
    async with aclosing(engine.chat("tiny", GREEDY, model_folder)) as stream:
        await anext(stream)
        waiting = asyncio.create_task(engine.complete("tiny", {**GREEDY, "max_tokens": 3}, model_folder))
        await eventually_async(lambda: engine.loaded_models[0].users == 2)
        with pytest.raises(EngineBusy):
            await engine.complete("tiny", HELLO, model_folder)
        for _ in range(3):
            await anext(stream)
        assert not waiting.done()
    assert (await waiting)["usage"]["completion_tokens"] == 3


async def test_a_failed_step_fails_only_its_batch(
    engines: Engines, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines.make()
    request = {**GREEDY, "max_tokens": 3}
    expected = content(await engine.complete("tiny", request, model_folder))

    def out_of_memory(*_: object) -> int:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(Sampling, "sample", out_of_memory)
        errors = await asyncio.gather(
            *(engine.complete("tiny", request, model_folder) for _ in range(2)), return_exceptions=True
        )
    assert all(isinstance(error, EngineFailed) and "out of memory" in str(error) for error in errors)
    assert content(await engine.complete("tiny", request, model_folder)) == expected


async def test_an_adapter_changes_the_completion(
    engines: Engines, model_folder: ModelFolder, adapted: ModelFolder
) -> None:
    engine = engines.make()
    request = {**GREEDY, "max_tokens": 16}
    plain = content(await engine.complete("plain", request, model_folder))
    changed = content(await engine.complete("adapted", request, adapted))
    assert plain != changed
    base, adapter = Path(adapted.base_model), str(adapted.address)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert changed == generate_directly(base, 16, model)[0]


async def test_models_in_4_bits_need_less_memory(
    engines: Engines, model_folder: ModelFolder, adapted: ModelFolder
) -> None:
    small, large = engines.make(load_in_4bit=True), engines.make()
    for source, name in ((model_folder, "plain"), (adapted, "adapted")):
        completion = await small.complete(name, {**GREEDY, "max_tokens": 8}, source)
        assert completion["usage"]["completion_tokens"] == 8
    await large.load("plain", model_folder)
    assert small.loaded_models[0].bytes < large.loaded_models[0].bytes


async def test_a_too_large_model_is_refused_with_its_sizes(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make(memory_mb=64, slots=64)
    with pytest.raises(ModelTooLarge, match=r"tiny needs \d+ MB \(11 MB of weights, and 64 slots of 2048 tokens\)"):
        await engine.complete("tiny", HELLO, model_folder)
    assert engine.loaded_models == []


async def test_the_least_recently_used_model_is_unloaded(engines: Engines, model_folder: ModelFolder) -> None:
    probe = engines.make()
    await probe.load("one", model_folder)
    engine = engines.make(memory_mb=2 * probe.loaded_models[0].bytes // MB + 1)
    for name in ("one", "two", "one", "three"):
        await engine.load(name, model_folder)
    assert [held.reference for held in engine.loaded_models] == ["one", "three"]


async def test_a_long_conversation_is_refused(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make(context=256)
    long: EngineRequest = {"messages": [{"role": "user", "content": "Hello you " * 300}]}
    with pytest.raises(ContextExceeded, match=r"has \d{3,} tokens; with the answer, the model allows 256"):
        await engine.complete("tiny", long, model_folder)
    ended = await engine.complete("tiny", {**GREEDY, "logit_bias": [[1, -1000], [2, -1000]]}, model_folder)
    assert ended["usage"]["total_tokens"] == 256
    assert ended["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"response_format": {"type": "json_object"}}, "does not support response_format"),
        ({"mirostat": 2}, "does not support mirostat"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
            "cannot force tool calls",
        ),
        ({"messages": [{"role": "user"}]}, "do not fit the model's template"),
        ({"prompt": ""}, "the prompt is empty"),
    ],
    ids=["schema", "option", "forced call", "no content", "nothing"],
)
async def test_unsupported_options_are_refused(
    engines: Engines, model_folder: ModelFolder, extra: dict[str, Any], reason: str
) -> None:
    engine = engines.make()
    with pytest.raises(RequestRefused, match=reason):
        await engine.complete("tiny", {**HELLO, **extra}, model_folder)
    assert await engine.complete("tiny", {**HELLO, "max_tokens": 1}, model_folder)


async def test_a_folder_without_a_model_is_refused(engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnreadable, match="cannot read the model tiny"):
        await engines.make().complete("tiny", HELLO, ModelFolder(str(tmp_path), "forgearr/tiny", NOW))


async def test_embeddings(engines: Engines, model_folder: ModelFolder, folder: Path) -> None:
    engine = engines.make(context=256)
    embeddings = await engine.embed("tiny", ["Hello", "Hello you"], model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Hello you", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        mean = model.base_model(prompt).last_hidden_state[0].mean(0)
    assert embeddings.vectors[1] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert embeddings.tokens == len(tokenizer("Hello")["input_ids"]) + prompt.shape[1]
    with pytest.raises(TextTooLong):
        await engine.embed("tiny", ["Hello you " * 300], model_folder)


async def test_the_header_of_a_folder_is_read(engines: Engines, model_folder: ModelFolder) -> None:
    header = await engines.make().describe("tiny", model_folder)
    assert (header.architecture, header.layers, header.hidden_size, header.context) == ("llama", 4, 256, 2048)
    assert header.kv_width == 2 * 2 * 64
    assert header.vocab_size == 2048
    assert "tool_call" in header.template


@pytest.mark.parametrize("text", ["Schöne Grüße 👋🏽 aus 東京!", "a\n\n b", " Hello, world "])
def test_characters_are_never_split(folder: Path, text: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    decoder = IncrementalDecoder(tokenizer.decode)
    parts = [decoder.feed(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(parts) == text
    assert not any(REPLACEMENT_CHARACTER in part for part in parts)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tool_calls_are_parsed(size: int) -> None:
    text = 'I look.\n<tool_call>\n{"name": "find", "arguments": {"title": "Dune"}}\n</tool_call>'
    parser = OutputParser([], with_tools=True)
    output = "".join(parser.feed(text[start : start + size]) for start in range(0, len(text), size))
    rest, (call,) = parser.flush()
    assert (output.strip(), rest) == ("I look.", "")
    assert call["function"] == {"name": "find", "arguments": '{"title": "Dune"}'}


def test_an_incomplete_tool_call_is_text() -> None:
    parser = OutputParser(["END"], with_tools=True)
    assert [parser.feed(part) for part in ("a <tool_", "call> nothing", " EN")] == ["a ", "", ""]
    assert parser.flush() == ("<tool_call> nothing EN", [])
