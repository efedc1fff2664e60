"""What one layer keeps per sequence: K/V heads, an MLA latent, indexer keys, or a fixed state.

Each part answers three questions under given `Conventions`: bytes per held token, how many tokens it holds at most, and
bytes that do not depend on the length. `shard(tp)` is the part as one tensor-parallel rank keeps it.
"""

from dataclasses import dataclass, replace

from kvlab.errors import ConfigError
from kvlab.sizing.dtypes import KVDtype


@dataclass(frozen=True)
class Conventions:
    """The conventions a figure follows.

    engine: ``vllm`` or ``transformers``; they differ in window edges, conv columns and the indexer's dtype.
    model_bytes / state_bytes: bytes per element of the model's dtype and of recurrent states.
    """

    kv: KVDtype
    model_bytes: int
    state_bytes: int
    engine: str = "vllm"


@dataclass(frozen=True)
class HeadsKV:
    """K and V of `num_kv_heads` heads. `window` tokens are kept at most; `chunked` marks Llama 4's local chunks."""

    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    chunked: bool = False
    fixed_tokens: int | None = None  # cross-attention: encoder tokens, written once

    def token_bytes(self, conventions: Conventions) -> int:
        return self.num_kv_heads * conventions.kv.head_bytes(self.k_dim, self.v_dim)

    def held_tokens(self, conventions: Conventions) -> int | None:
        # transformers drops the token that the next query cannot see; vLLM's window counts the query itself.
        return None if self.window is None else self.window - (conventions.engine == "transformers")

    def fixed_bytes(self, conventions: Conventions) -> int:
        return 0

    def shard(self, tp: int) -> "HeadsKV":
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise ConfigError(
                f"tp must divide {self.num_kv_heads} KV heads or be a multiple of them, got tp={tp}; "
                f"try {_nearest_tp(self.num_kv_heads, tp)}"
            )
        return replace(self, num_kv_heads=max(1, self.num_kv_heads // tp))

    def formula(self, conventions: Conventions) -> str:
        kv = conventions.kv
        widths = f"({self.k_dim} + {self.v_dim})"
        per_head = {1: f"{widths} x {kv.num} B"}.get(kv.per, f"{widths} / {kv.per} x {kv.num} B")
        if kv.head_extra:
            per_head = f"({per_head} + {kv.head_extra} B)"
        return f"{self.num_kv_heads} KV heads x {per_head}"


@dataclass(frozen=True)
class LatentKV:
    """One MLA latent per token, shared by all heads (DeepSeek-V2, arXiv:2405.04434); replicated on every TP rank."""

    lora_rank: int
    rope_dim: int
    window = None
    chunked = False
    fixed_tokens = None

    def token_bytes(self, conventions: Conventions) -> int:
        return conventions.kv.latent_bytes(self.lora_rank, self.rope_dim)

    def held_tokens(self, conventions: Conventions) -> int | None:
        return None

    def fixed_bytes(self, conventions: Conventions) -> int:
        return 0

    def shard(self, tp: int) -> "LatentKV":
        return self

    def formula(self, conventions: Conventions) -> str:
        if conventions.kv.mla_only:
            return f"latent ({self.lora_rank} fp8 + {self.lora_rank // 128} fp32 scales + {self.rope_dim} 16-bit)"
        return f"latent ({self.lora_rank} + {self.rope_dim}) x {conventions.kv.num} B" + (
            f" / {conventions.kv.per}" if conventions.kv.per > 1 else ""
        )


@dataclass(frozen=True)
class IndexerKV:
    """Keys of a sparse-attention indexer (DeepSeek-V3.2), replicated on every TP rank.

    vLLM keeps them in fp8 with one fp32 scale per 128 elements, for any KV dtype; transformers in the model's.
    `packed` False (MiniMax-M3) is the model's dtype in both. `pool` tokens share one key in vLLM, which transformers
    keeps apart until they are scored.
    """

    dim: int
    packed: bool = True
    pool: int = 1
    window = None
    chunked = False
    fixed_tokens = None

    def token_bytes(self, conventions: Conventions) -> int:
        if conventions.engine == "vllm" and self.pool > 1:
            raise ConfigError(
                f"cannot size an indexer under vLLM that keeps one key per {self.pool} tokens (field 'index_kpool' or "
                "'indexer_compress_ratio'); use engine='transformers' for what transformers keeps"
            )
        if conventions.engine == "transformers" or not self.packed:
            return self.dim * conventions.model_bytes
        return self.dim + 4 * -(-self.dim // 128)

    def held_tokens(self, conventions: Conventions) -> int | None:
        return None

    def fixed_bytes(self, conventions: Conventions) -> int:
        return 0

    def shard(self, tp: int) -> "IndexerKV":
        return self

    def formula(self, conventions: Conventions) -> str:
        if conventions.engine == "transformers" or not self.packed:
            return f"indexer {self.dim} x {conventions.model_bytes} B"
        return f"indexer ({self.dim} fp8 + {-(-self.dim // 128)} fp32 scale)"


@dataclass(frozen=True)
class StateKV:
    """A state of fixed size per sequence: the last columns of a short convolution and a recurrent matrix per head.

    conv_channels + 2 * groups * group_width channels are convolved with `kernel` taps; the recurrent part is
    heads x rows x cols elements, in the state dtype unless `in_model_dtype`.
    """

    name: str
    conv_channels: int = 0
    groups: int = 0
    group_width: int = 0
    kernel: int = 0
    heads: int = 0
    rows: int = 0
    cols: int = 0
    in_model_dtype: bool = False
    window = None
    chunked = False
    fixed_tokens = None

    def token_bytes(self, conventions: Conventions) -> int:
        return 0

    def held_tokens(self, conventions: Conventions) -> int | None:
        return None

    def _columns(self, conventions: Conventions) -> int:
        # transformers keeps all K columns, vLLM the K - 1 that the next token needs
        return self.kernel - (conventions.engine != "transformers") if self.kernel else 0

    def _channels(self) -> int:
        return self.conv_channels + 2 * self.groups * self.group_width

    def _recurrent_bytes(self, conventions: Conventions) -> int:
        return conventions.model_bytes if self.in_model_dtype else conventions.state_bytes

    def fixed_bytes(self, conventions: Conventions) -> int:
        conv = self._columns(conventions) * self._channels() * conventions.model_bytes
        return conv + self.heads * self.rows * self.cols * self._recurrent_bytes(conventions)

    def shard(self, tp: int) -> "StateKV":
        # A group is repeated so that every rank's heads find theirs: vLLM MambaStateShapeCalculator.
        groups = self.groups if self.groups % tp == 0 else tp
        for label, count in (("conv channels", self.conv_channels), ("state heads", self.heads)):
            if count % tp:
                raise ConfigError(f"tp must divide {count} {label} of a {self.name} layer, got tp={tp}")
        return replace(self, conv_channels=self.conv_channels // tp, groups=groups // tp, heads=self.heads // tp)

    def formula(self, conventions: Conventions) -> str:
        terms = []
        if self.kernel:
            inner = (
                f"{self.conv_channels} + 2 x {self.groups} x {self.group_width}" if self.groups else self._channels()
            )
            terms.append(f"conv {self._columns(conventions)} x ({inner}) x {conventions.model_bytes} B")
        if self.heads:
            terms.append(f"state {self.heads} x {self.rows} x {self.cols} x {self._recurrent_bytes(conventions)} B")
        return " + ".join(terms)


CacheSpec = HeadsKV | LatentKV | IndexerKV | StateKV


@dataclass(frozen=True)
class Layer:
    """One layer: its index, what kind it is in words, and the cache specs it keeps (none where it keeps nothing)."""

    index: int
    kind: str
    specs: tuple[CacheSpec, ...] = ()


def spec_bytes(spec: CacheSpec, num_tokens: int, conventions: Conventions) -> int:
    """Bytes that `spec` keeps for a sequence of `num_tokens`."""
    if spec.fixed_tokens is not None:
        return spec.token_bytes(conventions) * spec.fixed_tokens
    held = spec.held_tokens(conventions)
    kept = num_tokens if held is None else min(num_tokens, held)
    return spec.token_bytes(conventions) * kept + spec.fixed_bytes(conventions)


def _nearest_tp(heads: int, tp: int) -> str:
    fits = [t for t in range(1, 2 * tp + 1) if heads % t == 0 or t % heads == 0]
    return " or ".join(map(str, sorted(sorted(fits, key=lambda t: abs(t - tp))[:2])))
