"""What does a codec cost in words? Each prompt twice to a running server: computed, then as a hit that was decoded."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from kvlab.errors import ConfigError, StoreError
from kvlab.progress import Progress
from kvlab.serving.api import ApiServer, Prompt, is_chat, prompt_tokens_of, row_of

TOP = 20  # tokens of a distribution, the most that vLLM tells by default


@dataclass(frozen=True)
class Compared:
    """A prompt's answer from decoded KV against the computed one. `hit_tokens`: of the prompt, which kvlab loaded.
    `kl`: nats by which the first token's distribution moved, over the likeliest tokens; `logprob_moved`: of the token
    that was computed; `agreement`: the share of greedy tokens up to the first that differs."""

    prompt_tokens: int
    hit_tokens: int
    kl: float
    logprob_moved: float
    same_first: bool
    agreement: float


def quality(
    prompts: Sequence[Prompt],
    *,
    url: str = "http://127.0.0.1:8000",
    model: str | None = None,
    greedy: int = 16,
    reset: bool = False,
    api_key: str | None = None,
    timeout_s: float = 600.0,
) -> list[Compared]:
    """Ask the server at `url` for `prompts`, compute them and then serve them from its tiers, and compare.

    Each has a ``cache_salt`` of its own, so that nothing stored before serves it; what it stores leaves the tiers like
    anything else. One at a time: beside others a prompt may be computed otherwise.

    Parameters
    ----------
    prompts
        texts, lists of token ids, or lists of chat messages, as `read_prompts` gives them
    url
        of vLLM's API server, with or without ``/v1``; its connector needs the setting ``report``
    model
        as the server names it; by default the first that it lists
    greedy
        tokens to generate
    reset
        have vLLM forget its own prefix cache in between (``POST /reset_prefix_cache``, which needs
        VLLM_SERVER_DEV_MODE=1): it would serve the prompts again by itself. Not needed with
        ``--no-enable-prefix-caching``
    api_key
        what the server's ``--api-key`` says

    Raises
    ------
    ConfigError
        for prompts or a URL that cannot be sent
    StoreError
        where the server does not answer, or refuses, or kvlab loaded nothing: there is nothing to compare

    Examples
    --------
    >>> quality(["You are a helpful assistant. " * 100], url="http://127.0.0.1:8000")  # doctest: +SKIP
    [Compared(prompt_tokens=601, hit_tokens=600, kl=0.0008, ...)]
    """
    if not prompts:
        raise ConfigError("there are no prompts to send; give at least one")
    if not 1 <= greedy <= 1 << 20:
        raise ConfigError(f"greedy must be from 1 to {1 << 20} tokens, got {greedy}")
    server = ApiServer(url, api_key, timeout_s)
    body = {
        "model": model or server.first_model(), "max_tokens": greedy, "temperature": 0,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    salts = [secrets.token_hex(16) for _ in prompts]
    with Progress(2 * len(prompts), "comparing", unit="prompt") as bar:

        def asked() -> list[dict[str, Any]]:
            answers = []
            for prompt, salt in zip(prompts, salts, strict=True):
                wanted = {"logprobs": True, "top_logprobs": TOP} if is_chat(prompt) else {"logprobs": TOP}
                answers.append(server.complete(prompt, body | wanted | {"cache_salt": salt}))
                bar.step()
            return answers

        computed = asked()
        if reset:
            server.post("/reset_prefix_cache")
        loaded = asked()
    found = [_compared(*pair) for pair in zip(computed, loaded, strict=True)]
    if not any(one.hit_tokens for one in found):
        raise StoreError(
            "kvlab loaded none of the prompts the second time: the connector needs report=true, and vLLM's own prefix "
            "cache must be off (--no-enable-prefix-caching) or forgotten in between (reset)"
        )
    return found


def summary(compared: Sequence[Compared]) -> dict[str, float]:
    """Means over the prompts that were hits."""
    hits = [one for one in compared if one.hit_tokens]
    return {
        "prompts": len(compared),
        "hits": len(hits),
        "hit_tokens": sum(one.hit_tokens for one in hits),
        "kl_mean": mean(one.kl for one in hits),
        "kl_worst": max(one.kl for one in hits),
        "logprob_moved": mean(one.logprob_moved for one in hits),
        "same_first": mean(one.same_first for one in hits),
        "agreement": mean(one.agreement for one in hits),
    }


def divergence(before: Mapping[Any, float], after: Mapping[Any, float]) -> float:
    """KL of two distributions in nats, over the likeliest tokens that both name and one for all others; `before` and
    `after` are logprobs by token."""
    tokens = before.keys() & after.keys()
    p, q = ({token: math.exp(each[token]) for token in tokens} for each in (before, after))
    rest_p, rest_q = (max(1 - sum(each.values()), 1e-9) for each in (p, q))
    shared = sum(p[token] * (before[token] - after[token]) for token in tokens)
    return max(shared + rest_p * math.log(rest_p / rest_q), 0.0)


def _compared(computed: dict[str, Any], loaded: dict[str, Any]) -> Compared:
    (words, before), (again, after) = (_told(answer) for answer in (computed, loaded))
    length = max(len(words), len(again))
    pairs = zip(words, again, strict=False)
    alike = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(words), len(again)))
    moved = abs(before[words[0]] - after.get(words[0], min(after.values())))
    hit = int(row_of(loaded).get("hit_tokens") or 0)
    return Compared(
        prompt_tokens_of(loaded), hit, divergence(before, after), moved, words[0] == again[0], alike / length
    )


def _told(answer: dict[str, Any]) -> tuple[list[str], dict[str, float]]:
    """The tokens of an answer, and the logprobs of the first one's alternatives."""
    try:
        told = answer["choices"][0]["logprobs"]
        if "content" in told:
            tokens = [each["token"] for each in told["content"]]
            first = {each["token"]: float(each["logprob"]) for each in told["content"][0]["top_logprobs"]}
        else:
            tokens = list(told["tokens"])
            first = {token: float(value) for token, value in told["top_logprobs"][0].items()}
        return tokens, first if first and tokens[0] in first else {tokens[0]: first[tokens[0]]}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"the server's answer has no logprobs ({type(error).__name__}): is it vLLM's?") from error
