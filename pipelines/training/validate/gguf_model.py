"""Run a GGUF model in this process with llama-cpp-python's low-level API: tokens, logits and greedy generation."""

from collections.abc import Callable, Sequence
from typing import Any, Self

from pipelines.training.export.quantize import BrokenModelFile
from pipelines.training.validate.gguf_tokenizer import tokenize

BATCH_TOKENS = 512


class GgufModel:
    def __init__(self, path: str, context: int, threads: int) -> None:
        import llama_cpp
        from llama_cpp._logger import set_verbose

        self._llama = llama_cpp
        set_verbose(False)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if model is None:
            raise BrokenModelFile(f"llama.cpp cannot load {path}.")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch = context, BATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = threads
        llama_context = llama_cpp.llama_init_from_model(model, parameters)
        if llama_context is None:
            llama_cpp.llama_model_free(model)
            raise BrokenModelFile(f"llama.cpp cannot run {path} with {context} tokens of context.")
        self._model, self._context = model, llama_context
        self._vocabulary: Any = llama_cpp.llama_model_get_vocab(model)
        self.vocabulary_size: int = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._context_size = context

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        return tokenize(self._vocabulary, text)

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> Any:
        """The logits of the token after each of these positions, as a matrix."""
        import numpy

        self._clear_memory()
        rows = numpy.empty((len(positions), self.vocabulary_size), dtype=numpy.float32)
        row_by_position = {position: row for row, position in enumerate(positions)}
        for start in range(0, len(ids), BATCH_TOKENS):
            chunk = ids[start : start + BATCH_TOKENS]
            logit_indices = [number for number in range(len(chunk)) if start + number in row_by_position]
            self._decode(chunk, start, logit_indices)
            for number in logit_indices:
                rows[row_by_position[start + number]] = self._logits_at(number)
        return rows

    def generate(self, ids: Sequence[int], max_tokens: int, should_stop: Callable[[], bool]) -> list[int] | None:
        """The continuation by greedy decoding; None if it was interrupted."""
        self._clear_memory()
        for start in range(0, len(ids), BATCH_TOKENS):
            chunk = ids[start : start + BATCH_TOKENS]
            self._decode(chunk, start, [len(chunk) - 1])
        generated: list[int] = []
        token = int(self._logits_at(-1).argmax())
        while not self._llama.llama_vocab_is_eog(self._vocabulary, token):
            generated.append(token)
            if len(generated) == max_tokens or len(ids) + len(generated) >= self._context_size:
                break
            if should_stop():
                return None
            self._decode([token], len(ids) + len(generated) - 1, [0])
            token = int(self._logits_at(-1).argmax())
        return generated

    def _clear_memory(self) -> None:
        memory: Any = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_clear(memory, True)

    def _decode(self, ids: Sequence[int], start: int, logit_indices: Sequence[int]) -> None:
        batch = self._llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for number, token in enumerate(ids):
                batch.token[number] = token
                batch.pos[number] = start + number
                batch.n_seq_id[number] = 1
                batch.seq_id[number][0] = 0
                batch.logits[number] = False
            for number in logit_indices:
                batch.logits[number] = True
            if failure := self._llama.llama_decode(self._context, batch):
                raise BrokenModelFile(f"llama.cpp cannot run the model: llama_decode returned {failure}.")
        finally:
            self._llama.llama_batch_free(batch)

    def _logits_at(self, number: int) -> Any:
        import numpy

        pointer = self._llama.llama_get_logits_ith(self._context, number)
        return numpy.ctypeslib.as_array(pointer, shape=(self.vocabulary_size,))
