"""What is sent: a workload is a file for vLLM's benchmark client, and how much of its prompts could be reused.

Four kinds. ``sharegpt``: single turns, reuse only between runs. ``rounds``: whole chats, each turn's prompt holds the
last. ``documents``: a shared system prompt, long documents, several questions on each. ``trace``: a trace in Mooncake's
format, replayed with its times. All are seeded: the same arguments give the same bytes.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab.datasets.sharegpt import Encode, encoder, read_conversations, sample, sharegpt_file, shuffled
from kvlab.errors import ConfigError
from kvlab.hashing import block_hashes

KINDS = ("sharegpt", "rounds", "documents", "trace")
TRACE_BLOCK = 512  # tokens behind one hash id in Mooncake's traces
REUSE_BLOCK = 16  # tokens; the grain at which reuse is counted


@dataclass(frozen=True)
class Workload:
    """`args` are the client's; `reusable_tokens` of `prompt_tokens` begin a prompt as an earlier one began."""

    name: str
    args: tuple[str, ...]
    num_prompts: int
    prompt_tokens: int
    reusable_tokens: int
    num_duplicates: int
    prompt_lens: tuple[int, ...]

    @property
    def reusable_share(self) -> float:
        """Share of prompt tokens that a cache without limits could serve within one run, the first included."""
        return self.reusable_tokens / max(self.prompt_tokens, 1)


def make_workload(
    kind: str,
    folder: Path,
    *,
    tokenizer: str,
    path: str | None = None,
    num_prompts: int = 1024,
    seed: int = 0,
    output_len: int | None = None,
    max_prompt_tokens: int = 8192,
    sent: set[str] | None = None,
) -> Workload:
    """Write a workload's files into `folder`. `path` is the user's own ShareGPT file or trace. `sent` are first turns
    that ``sharegpt`` shall not send again; its own are added. Raises ConfigError."""
    check_kind(kind)
    if num_prompts < 1:
        raise ConfigError(f"num_prompts must be at least 1, got {num_prompts}")
    if kind == "trace":
        return _trace(folder, path, num_prompts, output_len, max_prompt_tokens)
    source = sharegpt_file(path)
    encode = encoder(tokenizer)
    if kind == "sharegpt":
        return _sharegpt(folder, source, encode, num_prompts, seed, output_len, set() if sent is None else sent)
    conversations = read_conversations(source)
    random.Random(seed).shuffle(conversations)
    make = rounds if kind == "rounds" else documents
    pairs = make(conversations, encode, num_prompts, seed=seed, max_prompt_tokens=max_prompt_tokens)
    out = folder / f"{kind}.jsonl"
    lines = (json.dumps({"prompt": text, "output_tokens": output_len or num_output}) for text, num_output in pairs)
    out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    args = ["--dataset-name", "custom", "--dataset-path", str(out), "--skip-chat-template", "--disable-shuffle"]
    args += ["--custom-output-len", "-1"]  # the file's own lengths; the default of 256 overrides them
    return _count(kind, args, [encode(text) for text, _ in pairs])


def check_kind(kind: str) -> None:
    """Raises ConfigError for a dataset there is none of."""
    if kind not in KINDS:
        raise ConfigError(f"dataset must be one of {', '.join(KINDS)}, got {kind!r}")


def rounds(
    conversations: Iterable[dict[str, Any]], encode: Encode, num_prompts: int, *, seed: int, max_prompt_tokens: int
) -> list[tuple[str, int]]:
    """Prompts and output lengths of chats of two turns or more, at most eight; a turn's prompt holds all before it.

    Chats take turns: sixteen are open at a time and answers are those of the record, so that every backend sees the
    same prompts whatever it generates.
    """
    chats: list[list[tuple[str, int]]] = []
    total = 0
    for entry in conversations:
        if total >= num_prompts:
            break
        text = ""
        turns: list[tuple[str, int]] = []
        said = entry["conversations"]
        for question, answer in zip(said[::2], said[1::2], strict=False):
            text += f"User: {question['value']}\nAssistant:"
            num_output = min(max(len(encode(answer["value"])), 4), 512)
            if len(turns) == 8 or len(encode(text)) > max_prompt_tokens:
                break
            turns.append((text, num_output))
            text += f" {answer['value']}\n"
        if len(turns) >= 2:
            chats.append(turns)
            total += len(turns)
    ordered: list[tuple[str, int]] = []
    waiting = list(reversed(chats))
    open_chats: list[list[tuple[str, int]]] = []
    while waiting or open_chats:
        while waiting and len(open_chats) < 16:
            open_chats.append(list(reversed(waiting.pop())))
        ordered += [chat.pop() for chat in open_chats]
        open_chats = [chat for chat in open_chats if chat]
    return ordered[:num_prompts]


def documents(
    conversations: Iterable[dict[str, Any]], encode: Encode, num_prompts: int, *, seed: int, max_prompt_tokens: int
) -> list[tuple[str, int]]:
    """One system prompt, long documents of about three quarters of `max_prompt_tokens`, four questions on each, mixed.

    A document is real text: answers of the record put together. 64 tokens are generated for each question.
    """
    system = "You answer questions about the document below. Quote it where you can; say so where it is silent.\n\n"
    texts = iter(
        [turn["value"] for entry in conversations for turn in entry["conversations"] if len(turn["value"]) > 200]
    )
    books: list[str] = []
    while len(books) * 4 < num_prompts:
        pieces: list[str] = []
        size = 0
        while size < max_prompt_tokens * 3 // 4:
            piece = next(texts, None)
            if piece is None:
                raise ConfigError(
                    f"the dataset has text for {len(books)} documents only; lower num_prompts or max_prompt_tokens"
                )
            ids = len(encode(piece))
            if size + ids <= max_prompt_tokens - 128:
                pieces.append(piece)
                size += ids
        books.append("\n\n".join(pieces))
    questions = ("What is it about?", "Which names occur in it?", "What is said first?", "What would you ask next?")
    asked = [(f"{system}{book}\n\nQuestion: {question}\nAnswer:", 64) for book in books for question in questions]
    random.Random(seed).shuffle(asked)
    return asked[:num_prompts]


def _sharegpt(
    folder: Path, source: Path, encode: Encode, num_prompts: int, seed: int, output_len: int | None, sent: set[str]
) -> Workload:
    """vLLM samples the file itself. It gets those conversations that it would look at, already in its order: the same
    requests come out, and the client need not read a hundred megabytes before each run."""
    conversations = [
        entry
        for entry in read_conversations(source)
        if not any(turn["value"] in sent for turn in entry["conversations"][:1])
    ]
    samples = sample(conversations, encode, num_prompts, seed=seed, output_len=output_len)
    looked_at = shuffled(conversations, seed)[: samples[-1].position + 1 if samples else None]
    out = folder / "sharegpt.json"
    out.write_text(json.dumps(looked_at), encoding="utf-8")
    args = ["--dataset-name", "sharegpt", "--dataset-path", str(out), "--disable-shuffle", "--seed", str(seed)]
    if output_len is not None:
        args += ["--sharegpt-output-len", str(output_len)]
    sent.update(one.prompt for one in samples)
    return _count("sharegpt", args, [one.token_ids for one in samples])


def _trace(
    folder: Path, path: str | None, num_prompts: int, output_len: int | None, max_prompt_tokens: int
) -> Workload:
    """The first `num_prompts` entries that fit, their times counted from the first; prompts are made of hash ids.

    vLLM seeds a block's random tokens by its hash id, through Python's ``hash``: the client runs with PYTHONHASHSEED=0.
    """
    if path is None or not Path(path).is_file():
        raise ConfigError(
            "dataset 'trace' needs a file in Mooncake's format"
            f" (timestamp, input_length, output_length, hash_ids), got {path!r}"
        )
    kept: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if len(kept) == num_prompts:
                break
            entry = json.loads(line)
            if entry["input_length"] <= max_prompt_tokens and entry["hash_ids"]:
                kept.append(entry)
    if not kept:
        raise ConfigError(f"{path!r} has no request of at most {max_prompt_tokens} tokens; raise max_prompt_tokens")
    start = kept[0]["timestamp"]
    for entry in kept:
        entry["timestamp"] -= start
        entry["output_length"] = output_len or entry["output_length"]
    out = folder / "trace.jsonl"
    out.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    args = ["--dataset-name", "timed_trace", "--dataset-path", str(out), "--disable-shuffle"]
    args += ["--timed-trace-chunk-hash-size", str(TRACE_BLOCK), "--timed-trace-sec-multiplier", "0.001"]
    lens = [min(entry["input_length"], len(entry["hash_ids"]) * TRACE_BLOCK) for entry in kept]
    seen: set[tuple[int, ...]] = set()
    reusable = 0
    for entry, size in zip(kept, lens, strict=True):
        full = [tuple(entry["hash_ids"][: n + 1]) for n in range(size // TRACE_BLOCK)]
        reusable += TRACE_BLOCK * _leading(full, seen)
    return Workload("trace", tuple(args), len(kept), sum(lens), reusable, 0, tuple(lens))


def _count(name: str, args: Sequence[str], prompts: Sequence[Sequence[int]]) -> Workload:
    if not prompts:
        raise ConfigError(f"dataset {name!r} gave no prompts of a length that fits")
    seen: set[Any] = set()
    reusable = sum(REUSE_BLOCK * _leading(block_hashes(list(ids), REUSE_BLOCK), seen) for ids in prompts)
    lens = tuple(len(ids) for ids in prompts)
    duplicates = len(prompts) - len({tuple(ids) for ids in prompts})
    return Workload(name, tuple(args), len(prompts), sum(lens), reusable, duplicates, lens)


def _leading(prefixes: Sequence[Any], seen: set[Any]) -> int:
    """How many of a prompt's growing prefixes were seen before; they are seen from now on."""
    known = next((n for n, prefix in enumerate(prefixes) if prefix not in seen), len(prefixes))
    seen.update(prefixes[known:])
    return known
