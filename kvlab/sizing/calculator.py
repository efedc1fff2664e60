"""`size_calculator`: from a model's name, config or object to its `KVSize`."""

from fractions import Fraction
from typing import Any

from kvlab.errors import ConfigError
from kvlab.sizing.cache_specs import Conventions, IndexerKV, StateKV
from kvlab.sizing.catalog import load_config
from kvlab.sizing.dtypes import KVDtype, element_bytes, get_kv_dtype
from kvlab.sizing.kv_size import KVSize
from kvlab.sizing.layers import build_layers
from kvlab.sizing.model_config import ModelConfig

ENGINES = ("vllm", "transformers")


def size_calculator(
    model: Any,
    dtype: str = "auto",
    tp: int = 1,
    pp: int = 1,
    *,
    engine: str = "vllm",
    state_dtype: str = "auto",
    factor: float = 1.0,
    mtp: bool = False,
    encoder_tokens: int | None = None,
    hub: bool = False,
) -> KVSize:
    """How big the KV cache of `model` is, per sequence, as a curve that explains itself.

    Parameters
    ----------
    model
        a name (``"Qwen2.5-7B"``; organisation optional, case-blind), a dict, a path to a config.json or its folder,
        or a transformers config object.
    dtype
        KV dtype: ``auto`` (what the config says, else the model's own), ``bf16``, ``fp8``, ``int4_per_token_head``,
        ``fp8_ds_mla``, ``nvfp4``, ``q8_0``...; see `kvlab.sizing.dtypes.KV_DTYPES`.
    tp, pp
        tensor- and pipeline-parallel ranks.
    engine
        whose conventions logical bytes follow: ``vllm`` (a window of W tokens, K - 1 conv columns, fp8 indexer)
        or ``transformers`` (W - 1, K, model dtype).
    state_dtype
        dtype of recurrent states: ``auto`` is the config's, else fp32.
    factor
        stored bytes per raw byte of a serde, for what is kept in a tier.
    mtp
        count the multi-token-prediction layers, which hold KV only under speculative decoding.
    encoder_tokens
        encoder (or vision) tokens that cross-attention layers hold.
    hub
        whether an unknown name may be looked up on the Hugging Face hub.

    Raises
    ------
    UnknownModelError
        with the nearest names of the catalog
    ConfigError
        naming the field, value or argument

    Notes
    -----
    A model is decided layer by layer from the fields of its config, each field by a rule with a source; a field that
    changes what a cache holds and that no rule reads is refused by name.

    Examples
    --------
    >>> size = size_calculator("Qwen2.5-7B")
    >>> size
    KVSize(Qwen/Qwen2.5-7B, bf16, tp=1, pp=1: 57,344 B/token)
    >>> size.at("2k"), size_calculator("Qwen2.5-7B", "fp8", tp=2).rank_bytes("2k")
    (117440512, 29360128)
    """
    for label, ranks in (("tp", tp), ("pp", pp)):
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise ConfigError(f"{label} must be a positive integer, got {ranks!r}")
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1e-6 <= factor <= 1e6:
        raise ConfigError(f"factor must be a number from 1e-6 to 1e6 (stored bytes per raw byte), got {factor!r}")
    if encoder_tokens is not None and (not isinstance(encoder_tokens, int) or encoder_tokens < 0):
        raise ConfigError(f"encoder_tokens must be 0 or more, got {encoder_tokens!r}")
    config = load_config(model, hub=hub)
    try:
        return _answer(config, dtype, tp, pp, engine, state_dtype, Fraction(factor), mtp, encoder_tokens)
    except ConfigError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # a config is data from elsewhere: any field may hold anything
        why = f"a field of its config has an unexpected form ({error!r})"
        raise ConfigError(f"cannot size {config.name}: {why}"[:300]) from error


def _answer(
    config: ModelConfig,
    dtype: str,
    tp: int,
    pp: int,
    engine: str,
    state_dtype: str,
    factor: Fraction,
    mtp: bool,
    encoder_tokens: int | None,
) -> KVSize:
    layers = tuple(build_layers(config, mtp=mtp, encoder_tokens=encoder_tokens))
    before = list(config.notes)
    conventions = Conventions(
        kv=_kv_dtype(config, dtype, engine),
        model_bytes=element_bytes(_model_dtype(config, engine), "the model's dtype"),
        state_bytes=element_bytes(_state_dtype(config, state_dtype), "state_dtype"),
        engine=engine,
    )
    if dtype != "auto" and not any(isinstance(p, StateKV | IndexerKV) for layer in layers for p in layer.specs):
        config.notes[:] = before  # nothing here depends on the model's own dtype
    size = KVSize(config, layers, conventions, tp, pp, factor.limit_denominator(10**6))
    size.rank_bytes(1)  # a tp, pp or dtype that does not fit is refused here, not at the first use
    return size


def _model_dtype(config: ModelConfig, engine: str) -> str:
    name = config.get("dtype", "torch_dtype")
    if name is None:
        config.note("the config gives no dtype: bf16 assumed")
        return "bf16"
    if engine == "vllm" and get_kv_dtype(name).name == "fp32":
        config.note("the checkpoint is fp32, which vLLM serves as bf16: bf16 counted; pass dtype='fp32' for the other")
        return "bf16"
    return str(name)


def _kv_dtype(config: ModelConfig, dtype: str, engine: str) -> KVDtype:
    if dtype != "auto":
        return get_kv_dtype(dtype)
    algo, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    nested = config.get("quantization_config")
    scheme = scheme or (nested.get("kv_cache_scheme") if isinstance(nested, dict) else None)
    if algo is None and isinstance(scheme, str):
        algo = scheme
    if isinstance(algo, str) and algo.lower() in ("fp8", "nvfp4"):
        config.note(f"the checkpoint asks for a {algo} KV cache: dtype auto means {algo.lower()}")
        return get_kv_dtype(algo)
    if isinstance(scheme, dict) and scheme.get("num_bits") == 8:
        config.note("the checkpoint asks for an 8-bit KV cache (kv_cache_scheme): dtype auto means fp8")
        return get_kv_dtype("fp8")
    return get_kv_dtype(_model_dtype(config, engine))


def _state_dtype(config: ModelConfig, state_dtype: str) -> str:
    if state_dtype != "auto":
        return state_dtype
    return str(config.get("mamba_ssm_cache_dtype", "mamba_ssm_dtype") or "fp32")
