"""Fixed-size states: gated DeltaNet, KDA, Mamba-1 and -2, lightning attention, short convolution.

Shapes as vLLM 0.32 `model_executor/layers/mamba/mamba_utils.py` (MambaStateShapeCalculator) and the transformers
modelling files have them. Which family a "linear" layer belongs to is read from the fields present.
"""

from kvlab.errors import ConfigError
from kvlab.sizing.facts import Facts, hidden_size, num_heads
from kvlab.sizing.parts import StateKV


def state_of(facts: Facts, kind: str) -> StateKV:
    """The state that one layer of `kind` (``linear``, ``conv``, or one of the hybrids) keeps per sequence."""
    if kind == "conv":
        width = facts.get("conv_dim") or hidden_size(facts)
        return StateKV("short convolution", conv_channels=width, kernel=facts.count("conv_L_cache"))
    if facts.model_type.startswith("bailing"):
        heads, dim = num_heads(facts), facts.get("head_dim") or hidden_size(facts) // num_heads(facts)
        if facts.get("short_conv_kernel_size") is None:  # Ling and Ring up to 2.5
            return StateKV("lightning attention", heads=heads, rows=dim, cols=dim, in_model_dtype=True)
        kernel = facts.count("short_conv_kernel_size")
        return StateKV("KDA", conv_channels=3 * heads * dim, kernel=kernel, heads=heads, rows=dim, cols=dim)
    if facts.get("lightning_nh") is not None:  # MiniCPM-SALA; its kernels keep the state in fp32
        heads, dim = facts.count("lightning_nh"), facts.count("lightning_head_dim")
        if facts.get("lightning_nkv") not in (None, heads):
            raise ConfigError(
                f"cannot size {facts.name}: field 'lightning_nkv' differs from lightning_nh, which is not modelled"
            )
        return StateKV("lightning attention", heads=heads, rows=dim, cols=dim)
    if facts.get("linear_num_value_heads") is not None:
        return _gated_delta_net(facts)
    if facts.get("linear_attn_config") or facts.get("linear_head_dim") is not None:
        return _kimi_delta_attention(facts)
    if facts.get("mamba_n_heads", "mamba_num_heads", "n_mamba_heads") is not None or facts.model_type == "mamba2":
        return _mamba2(facts)
    if facts.get("attn_type_list") or facts.model_type.startswith("minimax"):
        heads, dim = num_heads(facts), facts.get("head_dim") or hidden_size(facts) // num_heads(facts)
        return StateKV("lightning attention", heads=heads, rows=dim, cols=dim, in_model_dtype=True)
    return _mamba1(facts)


def _gated_delta_net(facts: Facts) -> StateKV:
    k_heads, v_heads = facts.count("linear_num_key_heads"), facts.count("linear_num_value_heads")
    k_dim, v_dim = facts.count("linear_key_head_dim"), facts.count("linear_value_head_dim")
    return StateKV(
        "gated DeltaNet",
        conv_channels=2 * k_heads * k_dim + v_heads * v_dim,
        kernel=facts.count("linear_conv_kernel_dim"),
        heads=v_heads,
        rows=v_dim,
        cols=k_dim,
    )


def _kimi_delta_attention(facts: Facts) -> StateKV:
    config = facts.get("linear_attn_config") or {}
    inner = Facts(
        f"{facts.name} (linear_attn_config)", {**facts.fields, **config}, unknown=facts.unknown, seen=facts.seen
    )
    heads = inner.count("num_heads" if config else "linear_num_heads")
    dim = inner.count("head_dim" if config else "linear_head_dim")
    kernel = inner.count("short_conv_kernel_size", "linear_conv_kernel_dim")
    return StateKV("KDA", conv_channels=3 * heads * dim, kernel=kernel, heads=heads, rows=dim, cols=dim)


def _mamba2(facts: Facts) -> StateKV:
    heads = facts.count("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    width = facts.get("mamba_d_head", "mamba_head_dim", "mamba_headdim")
    if not isinstance(width, int):  # absent or "auto": the expanded width, split over the heads
        expanded = facts.get("mamba_d_ssm", "mamba_intermediate_size")
        if expanded is None and facts.model_type == "mamba2":
            width = facts.count("head_dim")
        else:
            width = (expanded or facts.count("mamba_expand", "expand") * hidden_size(facts)) // heads
    return StateKV(
        "Mamba-2",
        conv_channels=heads * width,
        groups=facts.count("mamba_n_groups", "n_groups", "mamba_ngroups"),
        group_width=facts.count("mamba_d_state", "ssm_state_size", "state_size"),
        kernel=facts.count("mamba_d_conv", "conv_kernel"),
        heads=heads,
        rows=width,
        cols=facts.count("mamba_d_state", "ssm_state_size", "state_size"),
    )


def _mamba1(facts: Facts) -> StateKV:
    if facts.model_type in ("mamba", "falcon_mamba"):
        # falcon-mamba-7b says expand 16 but is 2 x wide: its intermediate_size is the truth
        inner = facts.get("intermediate_size") or facts.count("expand") * hidden_size(facts)
    else:
        inner = facts.count("mamba_expand", "expand") * hidden_size(facts)
    return StateKV(
        "Mamba-1",
        conv_channels=inner,
        kernel=facts.count("mamba_d_conv", "conv_kernel"),
        heads=inner,
        rows=1,
        cols=facts.count("mamba_d_state", "state_size"),
    )
