"""Send prompts to a running server before traffic comes, so that its cache holds their KV."""

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab.errors import ConfigError
from kvlab.progress import Progress
from kvlab.serving.api import ApiServer, Prompt, prompt_tokens_of, row_of


@dataclass(frozen=True)
class Warmed:
    """What the server said of one prompt: its tokens, those whose KV kvlab loaded from a tier, and objects pinned. The
    latter two are None where the connector's setting `report` is off.
    What vLLM's own prefix cache held is not loaded."""

    prompt_tokens: int
    hit_tokens: int | None
    pinned_objects: int | None


def warm(
    prompts: Sequence[Prompt],
    *,
    url: str = "http://127.0.0.1:8000",
    model: str | None = None,
    pin: bool = False,
    ttl_s: float | None = None,
    cache_salt: str | None = None,
    api_key: str | None = None,
    concurrency: int = 4,
    timeout_s: float = 600.0,
) -> list[Warmed]:
    """Have the server at `url` compute `prompts` and one token each, and keep their KV.

    Parameters
    ----------
    prompts
        texts, lists of token ids, or lists of chat messages, as `read_prompts` gives them. A prompt serves later ones
        that begin with the same tokens.
    url
        of vLLM's API server, with or without ``/v1``.
    model
        as the server names it; by default the first that it lists.
    pin, ttl_s
        keep the prompts in the memory tier, and for how many seconds the pin lasts (see docs/guide/connector.md).
    cache_salt
        the salt of the requests that are to find them.
    api_key
        what the server's ``--api-key`` says.
    concurrency
        prompts on their way at a time.

    Raises
    ------
    ConfigError
        for prompts or a URL that cannot be sent
    StoreError
        where the server does not answer, or refuses

    Examples
    --------
    >>> warm(["You are a helpful assistant. " * 100], url="http://127.0.0.1:8000", pin=True)  # doctest: +SKIP
    [Warmed(prompt_tokens=601, hit_tokens=0, pinned_objects=3)]
    """
    if not 1 <= concurrency <= 1024:
        raise ConfigError(f"concurrency must be from 1 to 1024, got {concurrency}")
    if not prompts:
        raise ConfigError("there are no prompts to send; give at least one")
    if ttl_s is not None and not 0 < ttl_s < math.inf:
        raise ConfigError(f"ttl_s must be a number of seconds above 0, got {ttl_s}")
    if ttl_s is not None and not pin:
        raise ConfigError("ttl_s is how long a pin lasts: give pin=True as well")
    server = ApiServer(url, api_key, timeout_s)
    hints = {"pin": pin} | ({"ttl_s": ttl_s} if ttl_s is not None else {})
    body = {"model": model or server.first_model(), "max_tokens": 1, "temperature": 0}
    body["kv_transfer_params"] = {"kvlab": hints}
    if cache_salt is not None:
        body["cache_salt"] = cache_salt
    with Progress(len(prompts), "warming", unit="prompt") as bar, ThreadPoolExecutor(concurrency) as pool:
        waiting = [pool.submit(_send, server, prompt, body) for prompt in prompts]
        try:
            done = []
            for future in waiting:
                done.append(future.result())
                bar.step()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return done


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: ``.jsonl`` has one a line, as text, token ids, chat messages, or an object with ``prompt``
    or ``messages``; any other file is one prompt."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not UTF-8 text") from error
    if path.suffix != ".jsonl":
        if not text.strip():
            raise ConfigError(f"{str(path)!r} is empty")
        return [text]
    return list(_parsed(path, text.splitlines()))


def _parsed(path: Path, lines: Iterable[str]) -> Iterable[Prompt]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {number} of {str(path)!r} is not JSON") from error
        if isinstance(given, dict):
            given = given.get("messages", given.get("prompt"))
        is_list = isinstance(given, list) and given
        is_ids = is_list and all(isinstance(one, int) and not isinstance(one, bool) for one in given)
        is_chat = is_list and all(isinstance(one, dict) and "role" in one for one in given)
        if not (is_ids or is_chat or (isinstance(given, str) and given)):
            wanted = "text, token ids, chat messages, or an object with prompt or messages"
            raise ConfigError(f"line {number} of {str(path)!r} must be {wanted}")
        yield given


def _send(server: ApiServer, prompt: Prompt, body: dict[str, Any]) -> Warmed:
    answer = server.complete(prompt, body)
    row = row_of(answer)
    return Warmed(prompt_tokens_of(answer), row.get("hit_tokens"), row.get("pinned_objects"))
