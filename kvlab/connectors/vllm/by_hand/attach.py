"""`kvlab.attach`: read the KV of a prompt out of a running vLLM, change it, put it back, generate."""

import os
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from kvlab.connectors.captured import KV
from kvlab.connectors.proven_file import FEWEST_TOKENS, Proof, read_proven, write_proven
from kvlab.connectors.vllm.by_hand.answers import Asking, Change, Logprobs
from kvlab.connectors.vllm.by_hand.left_out import rules_of
from kvlab.connectors.vllm.by_hand.pages import EnginePages
from kvlab.connectors.vllm.by_hand.prompts import Prompt, named
from kvlab.connectors.vllm.by_hand.written import ByHand
from kvlab.connectors.vllm.connector import KVLabConnector
from kvlab.connectors.vllm.weights import weights_name
from kvlab.errors import ConfigError, FormatError
from kvlab.fingerprint import files_fingerprint, weight_files
from kvlab.geometry import AXES
from kvlab.serde import get_serde
from kvlab.simulation.replay_connector import ConnectorRules
from kvlab.simulation.traffic import Traffic
from kvlab.simulation.why import MissPage

ROUNDING = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.1}  # nats, between two ways to the same logprob


def attach(llm: Any) -> "AttachedCache":
    """The KV cache of a running vLLM, to read and to write.

    Parameters
    ----------
    llm
        a ``vllm.LLM`` with kvlab's connector (`vllm_config`) whose engine runs in this process:
        ``VLLM_ENABLE_V1_MULTIPROCESSING=0``, set before vLLM is imported

    Raises
    ------
    ConfigError
        where the engine runs in another process, has another connector, or several ranks, or where its pages are not
        proven to hold plain K and V

    Examples
    --------
    >>> cache = kvlab.attach(llm)  # doctest: +SKIP
    >>> kv = cache.read("some text")  # doctest: +SKIP
    >>> kv.values[3].zero_()  # doctest: +SKIP
    >>> llm.generate(cache.write("some text", kv))  # doctest: +SKIP
    """
    from vllm import LLM  # loads all of the engine

    if not isinstance(llm, LLM):
        got = f"the class {llm.__name__}" if isinstance(llm, type) else type(llm).__name__
        raise ConfigError(f"kvlab.attach takes a vllm.LLM, not its engine or its class; got {got}")
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise ConfigError(
            "the engine runs in a process of its own, where its pages cannot be reached; set "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported, and start it again"
        )
    decides = core.scheduler.connector
    copies = get_kv_transfer_group() if has_kv_transfer_group() else None
    if not isinstance(decides, KVLabConnector) or not isinstance(copies, KVLabConnector) or copies.worker is None:
        raise ConfigError(
            f"kvlab.attach needs an engine whose connector is kvlab's, got {type(decides).__name__}; start it with "
            "kv_transfer_config=KVTransferConfig(**kvlab.vllm_config())"
        )
    config = llm.llm_engine.vllm_config
    if config.parallel_config.world_size > 1:
        raise ConfigError(f"kvlab.attach needs an engine of one rank, got {config.parallel_config.world_size}")
    if decides.by_hand is None:
        pages = EnginePages(
            config, copies._kv_cache_config, copies.kv_caches, copies.worker.transfer.layout, copies.groups
        )
        decides.by_hand = copies.by_hand = ByHand(pages)
        decides.by_hand.history.began_empty = decides.scheduler is None or not len(decides.scheduler.index)
        core.preprocess_add_request = _salting(core.preprocess_add_request)
    return AttachedCache(llm, decides)


def _salting(original: Any) -> Any:
    """`original`, the engine's way from a request's message to its blocks' hashes, with a salt for each request."""

    def preprocess_add_request(request: Any) -> Any:
        ByHand.salt_alone(request)
        return original(request)

    return preprocess_add_request


class AttachedCache:
    """The KV of prompts in a running engine. Made by `attach`.

    A prompt is text, token ids, or what `write` returned. What is written by hand lies in this process's memory beside
    the tiers, under a salt of its own: requests that do not carry it never find it, in no tier and in no prefix cache,
    nor what the engine computes behind it.
    """

    def __init__(self, llm: Any, connector: KVLabConnector) -> None:
        assert connector.by_hand is not None  # of `attach`
        self._llm = llm
        self._connector = connector
        self._by_hand = connector.by_hand
        self._asking = Asking(llm)
        self._config = llm.llm_engine.vllm_config

    def __repr__(self) -> str:
        return f"AttachedCache({Path(self.model).name}, {self._by_hand.pages})"

    @property
    def model(self) -> str:
        return str(self._config.model_config.model)

    def read(self, prompt: Prompt) -> KV:
        """The KV that the engine has for `prompt`, to its last token; it computes what no tier holds.

        Keys are as the engine keeps them, after rotary embedding. Of layers with a sliding window, the tokens that the
        last one sees. Of recurrent layers, the states behind all tokens and behind all but the last, from which an
        engine goes on. The tensors are copies: change them as you like.
        """
        asked, pages = self._named(prompt), self._by_hand.pages
        kv = self._caught(asked)
        if not (pages.have_windows or pages.states) or len(kv.token_ids) < 2:
            return kv
        # The engine gives a window's oldest block back when the prompt's last token is done, and has changed a state
        # then. Both are there one token earlier; of what was written, they are what was written.
        written = self._by_hand.kv_of(asked.get("cache_salt", ""))
        if written is not None and written.token_ids == kv.token_ids:
            earlier = _without_last(written)
        else:
            earlier = self._caught({**asked, "prompt_token_ids": asked["prompt_token_ids"][:-1]})

        def joined(old: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            whole = zip(old, now, kv.windows or [None] * len(now), strict=True)
            return tuple(b if window is None else torch.cat([a, b[-1:]])[-window:] for a, b, window in whole)

        keys, values = joined(earlier.keys, kv.keys), joined(earlier.values, kv.values)
        return replace(kv, keys=keys, values=values, states={**earlier.states, **kv.states})

    def write(self, prompt: Prompt, kv: KV, *, any_model: bool = False) -> dict[str, Any]:
        """Have the engine use `kv` for `prompt`; returns the prompt that does, for ``llm.generate``.

        The engine computes the last token of a prompt itself, and all that follows: of `kv` it reads the tokens before.
        The returned prompt may be made longer; then all of `kv` is read.

        Raises
        ------
        ConfigError
            for KV of another shape, dtype or number of tokens, with NaN or infinity, or, unless `any_model`, of another
            model
        """
        _check_kv(kv, "write")
        asked = self._named(prompt)
        token_ids = tuple(asked["prompt_token_ids"])
        kv = self._by_hand.pages.shown(kv)
        self._by_hand.pages.check(kv, len(token_ids))
        if not any_model and kv.model and not _same_model(kv.model, self.model):
            raise ConfigError(
                f"this KV is of model {Path(kv.model).name!r}, the engine's is {Path(self.model).name!r}; "
                "any_model=True writes it all the same"
            )
        keys, values = (tuple(half.detach().cpu().clone() for half in halves) for halves in (kv.keys, kv.values))
        states = {
            end: tuple(tuple(part.detach().cpu().clone() for part in parts) for parts in layers)
            for end, layers in kv.states.items()
        }
        held = replace(kv, keys=keys, values=values, token_ids=token_ids, states=states)
        salt = self._by_hand.add(held)
        return {"prompt_token_ids": list(token_ids), "cache_salt": salt}

    def compare(self, before: Prompt, after: Prompt, *, max_tokens: int = 16, top: int = 20) -> Change:
        """What changes in the answer: tokens, and logprobs along the answer to `before`."""
        return self._asking.change(self._named(before), self._named(after), max_tokens=max_tokens, top=top)

    def save(self, path: str | Path, kv: KV, *, codec: str = "naive", num_tokens: int = 4, top: int = 20) -> None:
        """Write a file that proves itself: `kv`, coded by the serde `codec`, the model's identity and rope, and what
        this engine answers behind it, `num_tokens` tokens (fewer where the model's length ends before them) with the
        logprobs of the `top` likeliest. ConfigError where the file cannot be written."""
        _check_kv(kv, "save")
        if type(num_tokens) is not int or num_tokens < FEWEST_TOKENS:
            raise ConfigError(f"a proof needs at least {FEWEST_TOKENS} tokens, got num_tokens={num_tokens!r}")
        longest = int(self._config.model_config.max_model_len)
        if len(kv.token_ids) + FEWEST_TOKENS > longest:
            raise ConfigError(
                f"a prompt of {len(kv.token_ids):,} tokens leaves no room for a proof of {FEWEST_TOKENS}: the engine "
                f"takes {longest:,}; start it with a larger max_model_len, or save without a proof: kv.save(path)"
            )
        num_tokens = min(num_tokens, longest - len(kv.token_ids))
        held = kv
        if codec != "naive":  # the proof is of what the file holds
            serde = get_serde(codec)
            held = kv.replaced(serde.decode(serde.encode(kv.tensor(), AXES)))
        prompt = self.write(list(kv.token_ids), held)
        try:
            tokens = self._asking.answers([prompt], max_tokens=num_tokens, top=1)[0].tokens
            logprobs = self._asking.follow(prompt, tokens, top=top)
        finally:
            self._by_hand.drop(prompt["cache_salt"])
        write_proven(path, kv, Proof(self._identity(), self._rope(), codec, tokens, logprobs))

    def load(self, path: str | Path, *, check: bool = True, tolerance: float | None = None) -> KV:
        """The KV of a file, proven: this engine has the same model, and says the same behind it.

        Parameters
        ----------
        path
            what `save` wrote
        check
            False takes the file's word, and any content
        tolerance
            nats by which a logprob may differ; by the engine's dtype where it is not given

        Raises
        ------
        FormatError
            where the file is broken, of another model, or the engine answers otherwise, with what differs
        """
        if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance < inf):
            raise ConfigError(f"tolerance must be a number of nats from 0 on, got {tolerance!r}"[:200])
        kv, proof = read_proven(path, check=check)
        if not check:
            return kv
        ours = {**self._identity(), "rope": str(self._rope())}
        theirs = {**proof.model, "rope": str(dict(proof.rope))}
        if differing := [name for name in ours if ours[name] != theirs.get(name)]:
            raise FormatError(
                f"{path} is KV of another model: {', '.join(differing)} differ; check=False loads it all the same",
                reason="wrong_model",
            )
        tokens, model_config = [*kv.token_ids, *proof.tokens], self._config.model_config
        if not max(tokens) < (vocabulary := int(model_config.get_vocab_size())):
            raise FormatError(f"{path} names tokens beyond the model's {vocabulary}", reason="unproven")
        if not kv.token_ids or len(tokens) > model_config.max_model_len:
            raise FormatError(
                f"{path} has {len(tokens)} tokens with those of its proof, this engine takes 1 to "
                f"{model_config.max_model_len}",
                reason="unproven",
            )
        try:
            prompt = self.write(list(kv.token_ids), kv, any_model=True)
        except ConfigError as error:
            raise FormatError(f"{path} does not fit this engine: {error}", reason="wrong_shape") from error
        try:
            used = self._asking.answers([prompt], max_tokens=1, top=1)[0].cached_tokens
            found = self._asking.follow(prompt, proof.tokens, top=max(map(len, proof.logprobs)))
        except ConfigError as error:
            raise FormatError(f"{path} cannot be proven here: {error}", reason="unproven") from error
        finally:
            self._by_hand.drop(prompt["cache_salt"])
        if used != len(kv.token_ids) - 1:
            raise FormatError(
                f"{path}: the engine used {used} of {len(kv.token_ids) - 1} tokens, and its answer proves nothing; see "
                "its log",
                reason="unproven",
            )
        allowed = ROUNDING[self._by_hand.pages.dtype] if tolerance is None else tolerance
        off = _distance(proof.logprobs, found)
        if not off <= allowed:
            raise FormatError(
                f"{path} says what this engine does not: a logprob differs by {off:.3g} nats, {allowed:g} are allowed; "
                "check=False loads it all the same",
                reason="unproven",
            )
        return kv

    @property
    def history(self) -> list[list[int]]:
        """Prompts of the requests that ended since the cache was first attached, the latest of them last; those of
        hand-written KV are left out."""
        return [list(ended.token_ids) for ended in self._by_hand.history.ended]

    def traffic(self) -> Traffic:
        """The same as traffic for `kvlab.simulate`, with times of arrival; `save_traffic` writes a file. Blocks are
        numbers there, so a trace tells what is shared and no token. What an engine keeps apart shares nothing: salts,
        adapters, media, and prompts before and behind a reset. Prompts that hints kept from being loaded or saved are
        marked, and need ``connector=``: replay the trace with `rules`.

        Raises
        ------
        ConfigError
            where no prompt had a full block
        """
        return self._by_hand.history.traffic(self._connector.chunker.block_tokens)

    @property
    def rules(self) -> ConnectorRules:
        """What of a prompt this engine serves: ``kvlab.simulate(cache.traffic(), ..., connector=cache.rules)``."""
        return rules_of(self._connector)

    def why(self, request: int = -1) -> MissPage:
        """The miss page of a request of `history`, by replay of it through a memory tier like this engine's: see
        `kvlab.why`. Reasons beside its own: ``not_loaded`` and ``not_saved`` (hints, prompt logprobs), ``reset``,
        ``other_salt``, ``other_adapter``, ``other_media``, and the engine's own where it did not load what it could
        have. What is in use and not in the replay is named (`kvlab.connectors.vllm.by_hand.left_out`).
        """
        prefix_cache = bool(self._config.cache_config.enable_prefix_caching)
        return self._by_hand.history.why(request, self._connector, prefix_cache)

    def clear(self) -> int:
        """Forget all that was written by hand; the number of writings. Prompts of theirs are computed from then on.
        ConfigError while the engine has requests: vLLM's prefix cache would keep what they hold."""
        self._asking.check_alone()
        count = self._by_hand.clear()
        self._llm.reset_prefix_cache()
        return count

    def _named(self, prompt: Prompt) -> dict[str, Any]:
        """`prompt` as token ids, with its salt if it has one; ConfigError where the engine has ended."""
        if self._by_hand.has_ended:
            raise ConfigError("the engine of this cache has ended; start one and attach to it")
        return named(prompt, self._llm.get_tokenizer, int(self._config.model_config.get_vocab_size()))

    def _caught(self, asked: dict[str, Any]) -> KV:
        self._by_hand.want(asked["prompt_token_ids"])
        try:
            self._asking.answers([asked], max_tokens=1, top=1)
        finally:
            kv = self._by_hand.take()
        if kv is None:
            raise ConfigError("the engine ended this prompt without computing it; see its log")
        return replace(kv, model=self.model)

    def _identity(self) -> dict[str, str]:
        """What the KV depends on besides tokens, but for the machine and the engine's sizes."""
        fields = self._connector.namespace.fields
        weights = weights_name(self._config, outlives=True, named=True, loaded_here=False)
        return {"weights": weights, **{name: str(fields[name]) for name in ("config", "quantization", "dtype")}}

    def _rope(self) -> dict[str, Any]:
        config = self._config.model_config.hf_text_config.to_dict()
        return {name: value for name, value in sorted(config.items()) if "rope" in name or "rotary" in name}


def _check_kv(kv: object, what: str) -> None:
    if not isinstance(kv, KV):
        raise ConfigError(f"{what} takes a KV, as `read` and `capture` give it, got {type(kv).__name__}")


def _without_last(kv: KV) -> KV:
    """`kv` of all tokens but the last."""
    keys, values = (tuple(layer[:-1] for layer in halves) for halves in (kv.keys, kv.values))
    count = kv.num_positions - 1
    states = {end: kv.states[end] for end in kv.states if end == count}
    return replace(kv, keys=keys, values=values, token_ids=kv.token_ids[:-1], num_positions=count, states=states)


def _same_model(one: str, other: str) -> bool:
    """Whether two folders hold the same weights; without folders, whether they have the same name."""
    if one == other:
        return True
    if not (os.path.isdir(one) and os.path.isdir(other)):
        return False
    first, second = (
        files_fingerprint(weight_files(Path(path)), root=Path(path), fast=True).digest for path in (one, other)
    )
    return first == second


def _distance(proof: Sequence[Logprobs], found: Sequence[Logprobs]) -> float:
    """The largest difference of a logprob over the tokens that both name; infinite where they share too few."""
    worst = 0.0
    for told, ours in zip(proof, found, strict=True):
        shared = told.keys() & ours.keys()
        if 2 * len(shared) < len(told):
            return float("inf")
        worst = max(worst, *(abs(told[token] - ours[token]) for token in shared))
    return worst
