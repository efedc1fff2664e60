"""Every command that README.md and the guide show runs, or is checked as far as it can be without a server."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvlab.__main__ import COMMANDS, main
from kvlab.connectors import vllm_config
from tests.support.examples import ROOT, SHOWN, blocks, commands, commands_with_variables, serve_lines, with_files

RUN = ("size", "store", "simulate", "config")  # these subcommands need neither an engine nor a download
PIP = {"pip", "uv"}
NAMES_FILES = {"conda": "-f", "docker": "-f"}  # programs that are not run, and the flag of a file of the checkout
OTHERS = {
    "apt-get",
    "curl",
    "python",
    "memcached",
    "mooncake_master",
    "mooncake_client",
    "redis-server",
}  # other systems' servers, see stores
SHELL = {"head", "install", "chmod"}  # writes files below /etc/kvlab: run below a temporary folder


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def is_shown(page, program):
    return any(words[0] == program for words in commands(page))


@pytest.mark.parametrize("page", [page for page in SHOWN if is_shown(page, "kvlab")], ids=name_of)
def test_kvlab_commands_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for variables, words in commands_with_variables(page):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if words[0] == "kvlab" and (words[1] in RUN or words[1].startswith("-")):
            given = [with_files(word, tmp_path).replace("file:///", f"file://{tmp_path}/") for word in words[1:]]
            assert main(given) == 0, shlex.join(words)
        elif words[0] == "kvlab":
            assert words[1] in COMMANDS, shlex.join(words)
            ours = words[: words.index("--")] if "--" in words else words
            flags = {word for word in ours if word.startswith("--")}
            assert flags <= flags_of(words[1]), shlex.join(words)


def flags_of(subcommand):
    done = subprocess.run([sys.executable, "-m", "kvlab", subcommand, "--help"], capture_output=True, text=True)
    return set(re.findall(r"--[a-z-]+", done.stdout))


def test_what_is_shown_is_a_program_that_is_checked():
    known = {"kvlab", "make", "vllm", *PIP, *NAMES_FILES, *OTHERS, *SHELL}
    shown = {(name_of(page), words[0]) for page in SHOWN for words in commands(page)}
    assert sorted(name for name in shown if not name[1].startswith("/") and name[1] not in known) == []


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*SHOWN, ROOT / "CONTRIBUTING.md"]:
        named = re.findall(r"(?:`|^)make (?:[A-Z]+=\S+ )?([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= targets, name_of(page)


def test_subcommands_that_the_text_names_exist():
    for page in [*SHOWN, ROOT / "CONTRIBUTING.md"]:
        named = re.findall(r"`kvlab ([a-z]+)", page.read_text(encoding="utf-8"))
        assert set(named) <= {*COMMANDS, "config"}, name_of(page)


def test_extras_that_are_installed_exist():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for page in SHOWN:
        for words in commands(page):
            if words[0] in PIP or words[0].startswith("/"):
                named = re.findall(r"\[([\w,-]+)\]", shlex.join(words))
                assert {each for group in named for each in group.split(",")} <= extras, shlex.join(words)


def test_files_that_commands_name_exist():
    for page in SHOWN:
        for why, text in blocks(page, "bash"):
            for words in (shlex.split(line) for line in text.splitlines() if line.split()[0] in NAMES_FILES):
                assert (ROOT / words[words.index(NAMES_FILES[words[0]]) + 1]).is_file(), (why, words)


@pytest.mark.parametrize(("page", "words"), serve_lines(), ids=lambda value: "" if type(value) is list else value.stem)
def test_the_json_of_a_server_is_what_vllm_config_returns(page, words, tmp_path):
    given = json.loads(with_files(words[words.index("--kv-transfer-config") + 1], tmp_path))
    assert given == vllm_config(**given["kv_connector_extra_config"])


@pytest.mark.parametrize("page", [page for page in SHOWN if is_shown(page, "head")], ids=name_of)
def test_files_that_a_page_makes_are_as_kvlab_wants_them(page, tmp_path):
    (tmp_path / "etc").mkdir(mode=0o700)
    for why, text in blocks(page, "bash"):
        if why is None and "/etc/kvlab" in text and "vllm serve" not in text:
            (tmp_path / "etc" / "kvlab").mkdir(exist_ok=True)
            subprocess.run(["bash", "-ec", text.replace("/etc/kvlab", f"{tmp_path}/etc/kvlab")], check=True)
            vllm_config([f"file://{tmp_path}/kv?size=1MiB&auth={tmp_path}/etc/kvlab/key"])


def test_scripts_that_the_text_names_exist():
    for page in SHOWN:
        for path in re.findall(r"\b((?:scripts|benchmarks|deploy|tests)/[\w./-]+\.\w+)", page.read_text()):
            assert (ROOT / path).exists(), (name_of(page), path)


def test_the_published_table_is_that_of_its_file():
    rows = json.loads((ROOT / "data/published/a100.json").read_text())["rows"]
    mean = {(row["backend"], row["run"]): row["ttft_ms"]["mean"] for row in rows}
    text = (ROOT / "docs/guide/reproduce.md").read_text(encoding="utf-8")
    for backend in ("memory", "disk", "redis", "none"):
        first, second = mean[backend, 1], mean[backend, 2]
        assert f"| {backend} | {first:.2f} | {second:.2f} | {second / first - 1:+.0%} |" in text


def test_commands_run_by_the_program_of_the_environment():
    """`kvlab` in the environment is `kvlab.__main__`, which the tests above call."""
    done = subprocess.run([sys.executable, "-m", "kvlab", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert Path(ROOT / "kvlab" / "__main__.py").exists()
