"""llama.cpp's convert_hf_to_gguf.py as it comes, but for the tokenizer of forgearr/tiny, which it does not know.

`PYTHONPATH=LLAMA_CPP/gguf-py:LLAMA_CPP python bare_converter.py MODEL --outfile FILE --outtype q8_0`
"""

import runpy
from importlib import import_module
from typing import Any

base: Any = import_module("conversion.base")


def guess(*_: Any) -> str:
    return "gpt-2"


base.TextModel.get_vocab_base_pre = guess
runpy.run_module("convert_hf_to_gguf", run_name="__main__")
