"""Code that comes with a model is forgotten when the model is saved."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipelines.training.models import base_models
from pipelines.training.models.remote_code import forget_code


def test_a_saved_tokenizer_names_no_code(home: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(base_models.resolve("forgearr/tiny"))
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    described = {**json.loads(config.read_text()), "auto_map": {"AutoTokenizer": ["evil/code--tok.Evil", None]}}
    config.write_text(json.dumps(described))

    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved" / "tokenizer_config.json"
    assert "evil/code--tok.Evil" in saved.read_text()  # transformers keeps it

    forget_code(tmp_path / "saved")
    assert "evil" not in saved.read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("Hello").input_ids == tokenizer("Hello").input_ids
