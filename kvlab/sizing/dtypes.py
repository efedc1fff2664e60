"""How many bytes a KV dtype needs: per token and head for K and V, per token for an MLA latent.

Packed formats are named as the engines name them. Sources: vLLM 0.32 `v1/kv_cache_interface.py` and
`v1/attention/backends/triton_attn.py` (per-token-head, nvfp4, fp8_ds_mla); ggml `ggml-common.h` (q8_0, q4_0).
"""

from dataclasses import dataclass

from kvlab.errors import ConfigError


@dataclass(frozen=True)
class KVDtype:
    """One storage format: `num` bytes hold `per` elements, plus `head_extra` bytes per token and head (K and V).

    `per` is also the packing unit: a head's width must be a multiple of it.
    """

    name: str
    num: int
    per: int = 1
    head_extra: int = 0
    mla_only: bool = False
    heads_only: bool = False

    def vector_bytes(self, width: int) -> int:
        """Bytes of one vector of `width` elements."""
        if width % self.per:
            raise ConfigError(
                f"dtype {self.name!r} packs {self.per} elements together, which does not divide a width of {width}; "
                "choose another dtype"
            )
        return width // self.per * self.num

    def head_bytes(self, k_dim: int, v_dim: int) -> int:
        """Bytes of one token's K (`k_dim` wide) and V (`v_dim` wide) in one head."""
        if self.mla_only:
            raise ConfigError(f"dtype {self.name!r} stores an MLA latent only, not K and V heads; use fp8 instead")
        return self.vector_bytes(k_dim) + self.vector_bytes(v_dim) + self.head_extra

    def latent_bytes(self, lora_rank: int, rope_dim: int) -> int:
        """Bytes of one token's MLA latent of `lora_rank` + `rope_dim` elements."""
        if self.heads_only:
            raise ConfigError(f"dtype {self.name!r} scales whole heads, and an MLA latent has none; use fp8 or bf16")
        if not self.mla_only:
            return self.vector_bytes(lora_rank + rope_dim)
        if lora_rank % 128:
            raise ConfigError(
                f"fp8_ds_mla has one scale per 128 elements; kv_lora_rank {lora_rank} is no multiple of it"
            )
        return lora_rank + 4 * (lora_rank // 128) + 2 * rope_dim  # fp8 latent, fp32 scales, 16-bit rope part


_FORMATS = (
    KVDtype("fp32", 4),
    KVDtype("bf16", 2),
    KVDtype("fp16", 2),
    KVDtype("fp8", 1),
    KVDtype("fp8_per_token_head", 1, head_extra=8, heads_only=True),  # one fp32 scale each for K and V
    KVDtype("int8_per_token_head", 1, head_extra=8, heads_only=True),
    KVDtype("int4_per_token_head", 1, per=2, head_extra=8, heads_only=True),
    KVDtype("fp8_ds_mla", 1, mla_only=True),
    KVDtype("nvfp4", 9, per=16, heads_only=True),  # 16 elements in 8 bytes and one fp8 scale
    KVDtype("q8_0", 34, per=32),  # 32 int8 and one fp16 scale
    KVDtype("q4_0", 18, per=32),
)
KV_DTYPES = {fmt.name: fmt for fmt in _FORMATS}
_ALIASES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "f16": "fp16",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "float8_e4m3fn": "fp8",
    "fp8_inc": "fp8",
}


def get_kv_dtype(name: str) -> KVDtype:
    """The format called `name`; common aliases (``bfloat16``, ``torch.float16``, ``fp8_e4m3``) are understood.

    Raises ConfigError listing the known names.
    """
    key = str(name).lower().removeprefix("torch.")
    fmt = KV_DTYPES.get(_ALIASES.get(key, key))
    if fmt is None:
        raise ConfigError(f"unknown KV dtype {name!r}; known: auto, {', '.join(KV_DTYPES)}")
    return fmt


def element_bytes(name: str, what: str) -> int:
    """Bytes per element of a plain dtype (the model's, or a state's); `what` names it in the error."""
    fmt = get_kv_dtype(name)
    if fmt.per != 1 or fmt.head_extra or fmt.mla_only:
        raise ConfigError(f"{what} must be fp32, bf16, fp16 or fp8, got {name!r}")
    return fmt.num
