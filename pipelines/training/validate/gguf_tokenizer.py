"""The tokenizer of a GGUF file, read without its weights: vocabulary, chat template and context length.

It has the interface of a transformers tokenizer that `fine_tune/tokenize.py:render` needs.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pipelines.training.export.quantize import BrokenModelFile

MAX_VALUE_BYTES = 1024


class GgufTokenizer:
    def __init__(self, path: str, template: str = "") -> None:
        """`template` replaces the chat template of the file."""
        import llama_cpp
        from llama_cpp._logger import set_verbose

        self._llama = llama_cpp
        set_verbose(False)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if model is None:
            raise BrokenModelFile(f"llama.cpp cannot load the vocabulary of {path}.")
        self._model = model
        self._vocabulary: Any = llama_cpp.llama_model_get_vocab(model)
        own_template: bytes | None = llama_cpp.llama_model_chat_template(model, None)
        self.chat_template = template or (own_template or b"").decode()
        self.name_or_path = path
        self.bos_token = self._token_text(llama_cpp.llama_vocab_bos(self._vocabulary))
        self.eos_token = self._token_text(llama_cpp.llama_vocab_eos(self._vocabulary))
        self.context_length = int(self._metadata(f"{self._metadata('general.architecture')}.context_length"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_model_free(self._model)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render a conversation as text, like the method of a transformers tokenizer."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[list(conversation)],  # pyright: ignore[reportArgumentType]
            tools=list(tools) if tools else None,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
        )
        return rendered[0][0]

    def tokenize(self, text: str) -> list[int]:
        return tokenize(self._vocabulary, text)

    def decode(self, tokens: Sequence[int]) -> str:
        token_array = (self._llama.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 16
        while True:
            text = ctypes.create_string_buffer(size)
            written = self._llama.llama_detokenize(self._vocabulary, token_array, len(tokens), text, size, False, False)  # pyright: ignore[reportArgumentType]
            if written >= 0:
                return text.raw[:written].decode(errors="replace")
            size = -written

    def _token_text(self, token: Any) -> str:
        return self._llama.llama_vocab_get_text(self._vocabulary, token).decode() if token >= 0 else ""

    def _metadata(self, key: str) -> str:
        value = ctypes.create_string_buffer(MAX_VALUE_BYTES)
        length = self._llama.llama_model_meta_val_str(self._model, key.encode(), value, MAX_VALUE_BYTES)  # pyright: ignore[reportArgumentType]
        if length < 0:
            raise BrokenModelFile(f"{self.name_or_path} has no {key} in its metadata.")
        return value.value.decode()


def tokenize(vocabulary: Any, text: str) -> list[int]:
    """Tokenize as a server does: special tokens in the text are recognized, and none is added."""
    import llama_cpp

    content = text.encode()
    size = len(content) + 8
    tokens = (llama_cpp.llama_token * size)()
    count = llama_cpp.llama_tokenize(vocabulary, content, len(content), tokens, size, False, True)
    return list(tokens[:count])
