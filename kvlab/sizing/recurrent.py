"""Fixed-size states: gated DeltaNet, KDA, Mamba-1 and -2, lightning attention, short convolution.

Shapes as vLLM 0.32 `model_executor/layers/mamba/mamba_utils.py` (MambaStateShapeCalculator) and the transformers
modelling files have them. Which family a "linear" layer belongs to is read from the fields present.
"""

from kvlab.errors import ConfigError
from kvlab.sizing.cache_specs import StateKV
from kvlab.sizing.model_config import ModelConfig, hidden_size, num_heads


def state_of(config: ModelConfig, kind: str) -> StateKV:
    """The state that one layer of `kind` (``linear``, ``conv``, or one of the hybrids) keeps per sequence."""
    if kind == "conv":
        width = config.get("conv_dim") or hidden_size(config)
        return StateKV("short convolution", conv_channels=width, kernel=config.count("conv_L_cache"))
    if config.model_type.startswith("bailing"):
        heads, dim = num_heads(config), config.get("head_dim") or hidden_size(config) // num_heads(config)
        if config.get("short_conv_kernel_size") is None:  # Ling and Ring up to 2.5
            return StateKV("lightning attention", heads=heads, rows=dim, cols=dim, in_model_dtype=True)
        kernel = config.count("short_conv_kernel_size")
        return StateKV("KDA", conv_channels=3 * heads * dim, kernel=kernel, heads=heads, rows=dim, cols=dim)
    if config.get("lightning_nh") is not None:  # MiniCPM-SALA; its kernels keep the state in fp32
        heads, dim = config.count("lightning_nh"), config.count("lightning_head_dim")
        if config.get("lightning_nkv") not in (None, heads):
            raise ConfigError(
                f"cannot size {config.name}: field 'lightning_nkv' differs from lightning_nh, which is not modelled"
            )
        return StateKV("lightning attention", heads=heads, rows=dim, cols=dim)
    if config.get("linear_num_value_heads") is not None:
        return _gated_delta_net(config)
    if config.get("linear_attn_config") or config.get("linear_head_dim") is not None:
        return _kimi_delta_attention(config)
    if config.get("mamba_n_heads", "mamba_num_heads", "n_mamba_heads") is not None or config.model_type == "mamba2":
        return _mamba2(config)
    if config.get("attn_type_list") or config.model_type.startswith("minimax"):
        heads, dim = num_heads(config), config.get("head_dim") or hidden_size(config) // num_heads(config)
        return StateKV("lightning attention", heads=heads, rows=dim, cols=dim, in_model_dtype=True)
    return _mamba1(config)


def _gated_delta_net(config: ModelConfig) -> StateKV:
    k_heads, v_heads = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    k_dim, v_dim = config.count("linear_key_head_dim"), config.count("linear_value_head_dim")
    return StateKV(
        "gated DeltaNet",
        conv_channels=2 * k_heads * k_dim + v_heads * v_dim,
        kernel=config.count("linear_conv_kernel_dim"),
        heads=v_heads,
        rows=v_dim,
        cols=k_dim,
    )


def _kimi_delta_attention(config: ModelConfig) -> StateKV:
    raw_config = config.get("linear_attn_config") or {}
    inner = ModelConfig(
        f"{config.name} (linear_attn_config)", {**config.fields, **raw_config}, unknown=config.unknown, seen=config.seen
    )
    heads = inner.count("num_heads" if raw_config else "linear_num_heads")
    dim = inner.count("head_dim" if raw_config else "linear_head_dim")
    kernel = inner.count("short_conv_kernel_size", "linear_conv_kernel_dim")
    return StateKV("KDA", conv_channels=3 * heads * dim, kernel=kernel, heads=heads, rows=dim, cols=dim)


def _mamba2(config: ModelConfig) -> StateKV:
    heads = config.count("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    width = config.get("mamba_d_head", "mamba_head_dim", "mamba_headdim")
    if not isinstance(width, int):  # absent or "auto": the expanded width, split over the heads
        expanded = config.get("mamba_d_ssm", "mamba_intermediate_size")
        if expanded is None and config.model_type == "mamba2":
            width = config.count("head_dim")
        else:
            width = (expanded or config.count("mamba_expand", "expand") * hidden_size(config)) // heads
    return StateKV(
        "Mamba-2",
        conv_channels=heads * width,
        groups=config.count("mamba_n_groups", "n_groups", "mamba_ngroups"),
        group_width=config.count("mamba_d_state", "ssm_state_size", "state_size"),
        kernel=config.count("mamba_d_conv", "conv_kernel"),
        heads=heads,
        rows=width,
        cols=config.count("mamba_d_state", "ssm_state_size", "state_size"),
    )


def _mamba1(config: ModelConfig) -> StateKV:
    if config.model_type in ("mamba", "falcon_mamba"):
        # falcon-mamba-7b says expand 16 but is 2 x wide: its intermediate_size is the truth
        inner = config.get("intermediate_size") or config.count("expand") * hidden_size(config)
    else:
        inner = config.count("mamba_expand", "expand") * hidden_size(config)
    return StateKV(
        "Mamba-1",
        conv_channels=inner,
        kernel=config.count("mamba_d_conv", "conv_kernel"),
        heads=inner,
        rows=1,
        cols=config.count("mamba_d_state", "state_size"),
    )
