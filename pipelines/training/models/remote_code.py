"""Models may come with Python code, and name it in their configs. None of it runs.

transformers asks before it runs such code, but llama.cpp's converter answers yes for some architectures. So the names
are removed from the configs of every model that is saved here, and the converter's process cannot load code at all.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from cluster.errors import UnprocessableRequest

CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json")
CODE_FIELD = "auto_map"


class ModelHasCode(UnprocessableRequest):
    """The model comes with code of its own, which Forgearr does not run."""

    code = "MODEL_HAS_CODE"


def forget_code(folder: Path) -> None:
    """Remove the names of code from the configs of a saved model."""
    for name in CONFIG_FILES:
        file = folder / name
        if not file.exists():
            continue
        config: dict[str, Any] = json.loads(file.read_text())
        if config.pop(CODE_FIELD, None) is not None:
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def refuse_code() -> None:
    """From now on, loading code that comes with a model is an error in this process."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.get_cached_module_file = _refuse
    dynamic_module_utils.get_class_in_module = _refuse


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ModelHasCode(
        f"The model comes with code of its own ({CODE_FIELD} in its configs), which is not run here. Train a model "
        "whose architecture transformers has itself."
    )
