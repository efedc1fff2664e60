"""What a user names a prompt by: text, token ids, or what a writing returned."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from kvlab.errors import ConfigError

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]


def named(prompt: Prompt, tokenizer: Callable[[], Any], vocabulary: int) -> dict[str, Any]:
    """`prompt` as token ids of a model with so many, with its salt if it has one. Text takes the `tokenizer`.

    Raises
    ------
    ConfigError
        where it names none, or ids that the model has not: an engine may end at those
    """
    given: dict[str, Any] = {}
    if isinstance(prompt, str):
        ids: Any = tokenizer().encode(prompt)
    elif isinstance(prompt, Mapping):
        ids, given = prompt.get("prompt_token_ids"), {k: v for k, v in prompt.items() if k == "cache_salt"}
        if ids is None or set(prompt) - {"prompt_token_ids", "cache_salt", "prompt"}:
            raise ConfigError(f"a prompt must be prompt_token_ids and cache_salt, got {', '.join(prompt)}")
    else:
        ids = prompt
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes):
        raise ConfigError(f"a prompt must be text, token ids or what `write` returned, got {type(ids).__name__}")
    ids = list(ids)
    if wrong := [token for token in ids if isinstance(token, bool) or not isinstance(token, Integral)]:
        raise ConfigError(f"token ids must be whole numbers, got {wrong[0]!r}")
    if not ids:
        raise ConfigError("a prompt must hold at least one token, got none")
    if beyond := [token for token in ids if not 0 <= token < vocabulary]:
        raise ConfigError(f"token ids must be those of the model, 0 to {vocabulary - 1}; got {beyond[0]}")
    if not isinstance(given.get("cache_salt", ""), str):
        raise ConfigError(f"cache_salt must be text, got {type(given['cache_salt']).__name__}")
    return {"prompt_token_ids": [int(token) for token in ids], **given}
