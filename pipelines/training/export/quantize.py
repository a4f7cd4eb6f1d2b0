"""Steps of an export that need llama.cpp: quantize a model, and verify that a GGUF file works.

The export runs them in a process of their own (jobs/execution/isolated.py).
"""

import ctypes
import hashlib
import math
import re
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import ForgearrError
from jobs.execution.isolated import OnProgress

LLAMA_FTYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bf16": 32}
"""Values of llama.cpp's enum llama_ftype."""
PROBE_TEXT = "Which of my shows are missing episodes?\n"
ERROR = 4
"""llama.cpp's log level."""
PROBE_CONTEXT = 64


class BrokenModelFile(ForgearrError):
    """A GGUF file cannot be used."""

    code = "MODEL_FILE_BROKEN"


class QuantizationFailed(ForgearrError):
    """llama.cpp could not quantize the model."""

    code = "QUANTIZATION_FAILED"


def finish(
    source: str, files: list[dict[str, str]], adapter: str | None, threads: int, report: OnProgress
) -> list[dict[str, Any]]:
    """Quantize `source` into each of these files, except `source` itself, and verify all of them.

    Returns, for each file and then for the adapter: its SHA-256, the seconds that it took, and the number of tensors
    that are stored in another type. A file is hashed while the next one is quantized.
    """
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as executor:
        hashes: list[Future[str]] = []
        for number, file in enumerate(files):
            path, quantization = file["path"], file["quantization"]

            def report_file(fraction: float, phase: str, number: int = number) -> None:
                report((number + fraction) / len(files), phase)

            started = time.monotonic()
            fallbacks = 0 if path == source else _quantize(source, path, quantization, threads, report_file)
            hashes.append(executor.submit(_hash, path))
            verify_file(path, threads, report_file)
            results.append({"seconds": time.monotonic() - started, "fallbacks": fallbacks})
        if adapter is not None:
            started = time.monotonic()
            hashes.append(executor.submit(_hash, adapter))
            verify_file(files[0]["path"], threads, report, adapter)
            results.append({"seconds": time.monotonic() - started, "fallbacks": 0})
        return [{**file_result, "sha256": digest.result()} for file_result, digest in zip(results, hashes, strict=True)]


def verify_file(path: str, threads: int, report: OnProgress, adapter: str | None = None) -> None:
    """Load a file, check its vocabulary, and evaluate one token. Raises BrokenModelFile."""
    from llama_cpp import Llama

    report(1, f"verifying {Path(adapter or path).name}")
    with _capture_log() as lines:
        try:
            model = Llama(
                path, n_ctx=PROBE_CONTEXT, n_threads=threads, n_gpu_layers=0, verbose=False, lora_path=adapter
            )
        except (ValueError, RuntimeError) as error:
            raise BrokenModelFile(f"llama.cpp cannot load {adapter or path}: {_errors(lines) or error}") from error
        tokens = model.tokenize(PROBE_TEXT.encode(), add_bos=False)
        decoded = model.detokenize(tokens).decode()
        if decoded.strip() != PROBE_TEXT.strip():
            raise BrokenModelFile(f"The vocabulary of {path} is wrong: it turns {PROBE_TEXT!r} into {decoded!r}.")
        try:
            model.eval(tokens[:1])  # one token is enough to run every layer
        except RuntimeError as error:
            raise BrokenModelFile(f"{path} cannot be run: {_errors(lines) or error}") from error
        logits = model._ctx.get_logits_ith(-1)  # pyright: ignore[reportPrivateUsage]
        if not all(math.isfinite(logits[token]) for token in range(model.n_vocab())):
            raise BrokenModelFile(f"{adapter or path} computes logits that are not finite.")
        model.close()


def _quantize(source: str, path: str, quantization: str, threads: int, report: OnProgress) -> int:
    """Returns the number of tensors that are stored in another type than the requested one."""
    import llama_cpp

    report(0, f"quantizing to {quantization}")
    parameters: Any = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = LLAMA_FTYPES[quantization], threads

    def on_line(line: str) -> None:
        if step := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
            report(int(step[1]) / int(step[2]), f"quantizing to {quantization}")

    with _capture_log(on_line) as lines:
        failed = llama_cpp.llama_model_quantize(source.encode(), path.encode(), parameters)
    if failed:
        raise QuantizationFailed(f"llama.cpp could not quantize to {quantization}: {_errors(lines)}")
    return sum("falling back to" in line for _, line in lines)


def _hash(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _capture_log(on_line: Callable[[str], None] = lambda _: None) -> Generator[list[tuple[int, str]]]:
    """Collect the log of llama.cpp: pairs of level and text."""
    import llama_cpp

    lines: list[tuple[int, str]] = []

    @llama_cpp.llama_log_callback
    def callback(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace")
        lines.append((level, line.strip()))
        on_line(line)

    _callbacks.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    yield lines


_callbacks: list[Any] = []
"""References to all callbacks: llama.cpp may call them until the process ends."""


def _errors(lines: list[tuple[int, str]]) -> str:
    """The first two errors. Later ones are usually consequences."""
    return " ".join([line for level, line in lines if level == ERROR][:2])
