"""README.md: its figure is that of the rows, what it prints is printed, and README.zh-CN.md says the same."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from kvlab.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
sys.path.insert(0, str(ROOT / "scripts"))
import readme_pictures  # noqa: E402


@pytest.fixture(scope="module")
def english():
    return ENGLISH.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chinese():
    return CHINESE.read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_figure_is_that_of_the_rows(mode):
    drawn = (ROOT / "docs" / "images" / f"ttft-{mode}.svg").read_text(encoding="utf-8")
    texts = re.findall(r">([^<>]+)</t(?:ext|span)>", drawn)
    bars = readme_pictures.measured()
    assert [text for text in texts if re.fullmatch(r"[\d,]+ ms", text)] == [
        readme_pictures.label(ms) for *_, ms in bars
    ]
    assert readme_pictures.title(bars).split("<br>")[0] in texts


def test_the_answer_of_the_size_calculator_is_the_one_printed(english, capsys):
    (command,) = [line for line in english.splitlines() if line.startswith("kvlab size ")]
    assert main(shlex.split(command)[1:]) == 0
    (shown,) = [text for kind, text in BLOCK.findall(english) if kind == "text"]
    assert shown.strip() == capsys.readouterr().out.strip()


def test_numbers_of_the_text_are_those_of_the_rows(english):
    """One request of 15,000 tokens, by backend."""
    rows = [line.split(",") for line in (ROOT / "data/measured/gpu_ttft.csv").read_text().splitlines()]
    ms = {row[0]: round(float(row[2])) for row in rows[1:] if row[1] == "15000"}
    said = english[english.index("One request of 15,000 tokens") :].split("\n")[0]
    for backend, words in {"none": "{} ms computed", "vllm-offload": "{} from Off", "lmcache": "{} from LMC"}.items():
        assert words.format(ms[backend]) in said
    assert f"{ms['kvlab']} from kvlab, {ms['vllm-prefix']} from vLLM" in said


def test_every_notebook_is_in_the_gallery(english):
    named = set(re.findall(r"\(notebooks/([\w.]+)\)", english))
    assert named == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_both_languages_have_the_same_code(english, chinese):
    assert BLOCK.findall(chinese) == BLOCK.findall(english)


def test_both_languages_have_the_same_links(english, chinese):
    def links(text):
        return sorted(target for target in LINK.findall(text) if not target.startswith("README"))

    assert links(chinese) == links(english)


def test_both_languages_have_the_same_numbers_and_names(english, chinese):
    def numbers(text):
        text = LINK.sub("]", BLOCK.sub("", text))
        return sorted(re.findall(r"\d+(?:[.,]\d+)*|`[^`]+`", text))

    assert numbers(chinese) == numbers(english)


def test_both_languages_have_the_same_sections(english, chinese):
    levels = [[len(mark) for mark in re.findall(r"^(#+) ", BLOCK.sub("", text), re.M)] for text in (english, chinese)]
    assert levels[0] == levels[1]


def test_it_can_be_read_at_a_sitting(english):
    assert len(english.splitlines()) < 150


def test_the_json_is_what_vllm_config_returns(english):
    from kvlab.connectors import vllm_config

    (line,) = [line for line in english.splitlines() if line.startswith("vllm serve")]
    given = json.loads(shlex.split(line)[-1])
    assert given == vllm_config(**given["kv_connector_extra_config"])
    (asked,) = [line for line in english.splitlines() if line.startswith("kvlab config")]
    assert shlex.split(asked)[2:] == given["kv_connector_extra_config"]["tiers"]
