"""CacheEngine joins the rooms: tokens -> chunks -> keys -> serde -> container -> store, and back."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch

from kvlab.auth import AuthKey, auth_key
from kvlab.chunking import Chunker, Span, longest_prefix, query_prefix
from kvlab.errors import ConfigError
from kvlab.geometry import AXES, KVGeometry
from kvlab.hashing import Extra, Namespace, block_hashes, cache_namespace
from kvlab.object_cache import ObjectCache, name_of
from kvlab.objects import logger
from kvlab.stores import Store
from kvlab.stores.shown import call_of

TOKENS_AXIS = AXES.index("tokens")


@dataclass(frozen=True)
class Hit:
    """What the cache holds of a prompt: `num_tokens` from its start, in the objects `spans` under `keys`.

    `miss` says why it does not hold more (empty if it holds every full block).
    """

    num_tokens: int
    keys: list[str] = field(repr=False)
    spans: list[Span] = field(repr=False)
    miss: str = ""


class CacheEngine(ObjectCache):
    """KV of prompts in a store: `save`, `lookup` and `load`, by token ids.

    Parameters
    ----------
    store
        a Store, or a URL for `open_store`; the engine closes what it opened itself.
    namespace
        what makes this KV differ from others' besides the tokens; a str is taken as a model's label. The engine
        adds what `cache_namespace` adds.
    chunker
        chunk and block sizes.
    serde
        name of the serde for what is saved; what is loaded says itself which kind encoded it.
    geometry
        the KV's shape and dtype, where they are known: anything else is then refused before it is decoded.
        Without it the objects of one prompt must agree with each other, and may have up to 16 MiB a token.
    auth
        a key, or the path of its file. What is saved is signed with it; what is not signed with it is a miss.

    Examples
    --------
    >>> kv = torch.zeros(2, 40, 1, 2, 4, dtype=torch.bfloat16)  # layers, tokens, kv_heads, kv, head_dim
    >>> engine = CacheEngine("memory://?size=1MiB", namespace="model")
    >>> engine.save(list(range(40)), kv)
    32
    >>> num_tokens, found = engine.load(list(range(35)))
    >>> num_tokens, tuple(found.shape)
    (32, (2, 32, 1, 2, 4))

    Notes
    -----
    Nothing a tier does raises here: a failing or lying tier is a miss with a reason, in `stats`; what a tier gives as
    its own reason is counted as ``tier_<reason>``. docs/design/container.md lists the reasons.
    """

    def __init__(
        self,
        store: Store | str,
        *,
        namespace: Namespace | str,
        chunker: Chunker | None = None,
        serde: str = "naive",
        geometry: KVGeometry | None = None,
        auth: AuthKey | str | Path | None = None,
    ) -> None:
        self.chunker = chunker or Chunker()
        key = auth_key(auth)
        named = cache_namespace(
            Namespace(namespace) if isinstance(namespace, str) else namespace,
            chunk_tokens=self.chunker.chunk_tokens,
            block_tokens=self.chunker.block_tokens,
            auth=key.id if key else None,
        )
        super().__init__(store, namespace=named, serde=serde, geometry=geometry, auth=key)
        self._given = namespace

    def __repr__(self) -> str:
        options = {"chunker": self.chunker, "serde": self.serde.spec, "geometry": self.geometry, "auth": self.auth}
        if self.chunker == Chunker():
            del options["chunker"]
        return call_of(self, self.store, namespace=self._given, **options)

    def _repr_html_(self) -> str:
        return f"<code>{escape(repr(self))}</code>{self.store._repr_html_()}"

    def hashes(self, token_ids: Sequence[int], extras: Mapping[int, Sequence[Extra]] | None = None) -> list[bytes]:
        """The chain's hash at every full block of `token_ids`."""
        return block_hashes(token_ids, self.chunker.block_tokens, extras=extras)

    def lookup(self, token_ids: Sequence[int], *, extras: Mapping[int, Sequence[Extra]] | None = None) -> Hit:
        """The longest run of chunks that is here, then the longest tail present. Reads no KV."""
        hashes, step = self.hashes(token_ids, extras), self.chunker.chunk_blocks
        known = query_prefix(hashes, step, lambda asked: self._contains([self.namespace.key(key) for key in asked]))
        spans = longest_prefix(hashes, step, lambda key: known.get(key, False))
        keys = [self.namespace.key(hashes[span.end_block - 1]) for span in spans]
        end = spans[-1].end_block if spans else 0
        missing = hashes[end : end - end % step + step]  # the rest of the chunk behind the hit
        miss = self._why_missing(self.namespace.key(missing[-1])) if missing else ""
        self._touch(keys)
        return Hit(end * self.chunker.block_tokens, keys, spans, miss)

    def why_missing(self, token_ids: Sequence[int], *, extras: Mapping[int, Sequence[Extra]] | None = None) -> str:
        """Why `lookup` finds no more of a prompt; empty if it finds every full block. Where the store never had it but
        holds the same tokens under another namespace: ``other_namespace:`` and the fields that differ.

        This looks through all keys of the store and reads an object. It is for a person who asks, not for serving.
        """
        hit = self.lookup(token_ids, extras=extras)
        if hit.miss != "never_stored":
            return hit.miss
        wanted = self.hashes(token_ids, extras)[hit.num_tokens // self.chunker.block_tokens :]
        fields = self.differing_from(wanted)
        return f"other_namespace:{','.join(fields)}" if fields else hit.miss

    def save(
        self, token_ids: Sequence[int], kv: torch.Tensor, *, extras: Mapping[int, Sequence[Extra]] | None = None
    ) -> int:
        """Save the KV of a prompt: `kv` has the axes (layers, tokens, kv_heads, kv, head_dim), one entry per token.

        Returns the number of tokens that are in the store now, from the start and without holes. What is there already
        is left as it is, unless this engine has read it and found that it has another shape.
        """
        given: object = kv
        if not isinstance(given, torch.Tensor):
            kind = type(given).__name__
            raise ConfigError(f"kv must be a torch.Tensor, got {kind}; torch.from_numpy makes one of an array")
        if kv.dim() != len(AXES) or kv.shape[TOKENS_AXIS] != len(token_ids):
            raise ConfigError(f"kv must have axes {AXES} and {len(token_ids)} tokens, got shape {tuple(kv.shape)}")
        if len(token_ids) and not kv.numel():
            raise ConfigError(f"kv must have values, got shape {tuple(kv.shape)}")
        geometry = self.geometry
        if geometry and (tuple(kv.shape), name_of(kv.dtype)) != (geometry.shape(len(token_ids)), geometry.dtype):
            wanted = f"{geometry.dtype}{list(geometry.shape(len(token_ids)))}"
            raise ConfigError(f"kv must be {wanted} as the engine's geometry says, got {kv.dtype}{list(kv.shape)}")
        hashes = self.hashes(token_ids, extras)
        block = self.chunker.block_tokens
        spans = self.chunker.spans(len(token_ids))
        keys = [self.namespace.key(hashes[span.end_block - 1]) for span in spans]
        held = self._contains(keys)
        saved = 0
        for span, key, present in zip(spans, keys, held, strict=True):
            first, end = span.first_block * block, span.end_block * block
            is_due = not present or key in self._misfits
            if is_due and not self.save_object(key, kv[:, first:end], AXES, first_token=first, end_token=end):
                break
            saved = end
        self._touch(keys)
        return saved

    def load(
        self, token_ids: Sequence[int], *, extras: Mapping[int, Sequence[Extra]] | None = None
    ) -> tuple[int, torch.Tensor | None]:
        """The KV of the longest prefix that is here and sound: its length in tokens, and the tensor (None if 0)."""
        start = time.perf_counter()
        hit = self.lookup(token_ids, extras=extras)
        pieces: list[torch.Tensor] = []
        block = self.chunker.block_tokens
        for key, span in zip(hit.keys, hit.spans, strict=True):
            first, end = span.first_block * block, span.end_block * block
            like = pieces[0] if pieces else None  # pieces that differ are of different models
            piece = self._load(key, None, self._expected(AXES, first, end, like=like))
            if piece is None:
                break
            pieces.append(piece)
        if not pieces:
            return 0, None
        kv = torch.cat(pieces, dim=TOKENS_AXIS)
        num_bytes = kv.numel() * kv.element_size()
        logger.info("%s", retrieved_line(kv.shape[TOKENS_AXIS], len(token_ids), num_bytes, time.perf_counter() - start))
        return kv.shape[TOKENS_AXIS], kv


def retrieved_line(num_tokens: int, of_tokens: int, num_bytes: int, seconds: float) -> str:
    """The log line of a hit; GB are 10**9 bytes and seconds run to the end of the copy."""
    gb_per_s = num_bytes / max(seconds, 1e-9) / 1e9
    return (
        f"Retrieved {num_tokens} of {of_tokens} tokens, {num_bytes / 1e6:.1f} MB, "
        f"{seconds * 1e3:.1f} ms, {gb_per_s:.{1 if gb_per_s >= 1 else 3}f} GB/s"
    )
