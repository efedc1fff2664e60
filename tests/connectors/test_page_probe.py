"""The probe against vLLM's own write operators: the packing one of CPU attention, and that of latents."""

from types import SimpleNamespace

import pytest
import torch

from kvlab.errors import ConfigError
from kvlab.paged import Opaque, PageMap, understand
from kvlab.paged.known import KNOWN
from kvlab.paged.vllm_operators import cpu_attention, cpu_latents, of_layer

# (instruction set, dtype, kv heads, tokens of a block, head_dim, dtype of the cache): the name of the proven layout.
# vLLM packs for AMX with plain instructions, so its layout is seen on any x86.
CASES = [
    ("vec", torch.float32, 2, 32, 64, "auto", "CPU vec"),
    ("vec", torch.bfloat16, 1, 64, 128, "auto", "CPU vec"),
    ("vec", torch.float16, 16, 32, 64, "auto", "CPU vec"),
    ("vec", torch.bfloat16, 2, 32, 256, "auto", "CPU vec"),
    ("vec16", torch.bfloat16, 3, 16, 80, "auto", "CPU vec"),
    ("amx", torch.bfloat16, 2, 32, 64, "auto", "CPU amx"),
    ("amx", torch.bfloat16, 8, 64, 128, "auto", "CPU amx"),
]
FP8 = [("fp8", (1.0, 1.0)), ("fp8_e4m3", (0.37, 2.5)), ("fp8_e5m2", (1.0, 1.0))]


@pytest.mark.parametrize(("isa", "dtype", "heads", "tokens", "dim", "kind", "name"), CASES)
def test_the_packing_operators_pages_are_proven(isa, dtype, heads, tokens, dim, kind, name):
    found = understand(
        cpu_attention(block_tokens=tokens, kv_heads=heads, head_dim=dim, dtype=dtype, isa=isa, kv_cache_dtype=kind)
    )
    assert isinstance(found, PageMap), found
    assert found.name == name
    assert found.is_full
    assert found.shape(1, 5) == (1, 5, heads, 2, dim)


@pytest.mark.parametrize(("kind", "scales"), FP8)
def test_fp8_pages_are_proven(kind, scales):
    found = understand(
        cpu_attention(
            block_tokens=32,
            kv_heads=2,
            head_dim=64,
            dtype=torch.bfloat16,
            isa="vec",
            kv_cache_dtype=kind,
            scales=scales,
        )
    )
    assert isinstance(found, PageMap), found
    assert found.element == (torch.float8_e5m2 if kind == "fp8_e5m2" else torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["CPU vec", "CPU amx"])
def test_without_known_layouts_the_same_places_are_discovered(name, monkeypatch):
    scratch = cpu_attention(
        block_tokens=32, kv_heads=3, head_dim=64, dtype=torch.bfloat16, isa=name.removeprefix("CPU ")
    )
    known = understand(scratch)
    monkeypatch.delitem(KNOWN, name)
    found = understand(scratch)
    assert found.name == "discovered"
    assert found.offsets.equal(known.offsets)


def test_this_machines_own_instruction_set_is_proven():
    assert isinstance(understand(cpu_attention(block_tokens=32, kv_heads=2, head_dim=64, dtype=torch.float32)), PageMap)


def test_an_instruction_set_that_does_not_run_here_is_opaque():
    found = understand(cpu_attention(block_tokens=32, kv_heads=2, head_dim=64, dtype=torch.float32, isa="nonsense"))
    assert isinstance(found, Opaque)
    assert "does not run on scratch pages" in found.reason


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (256, 64)])
def test_latents_are_proven(rank, rope):
    found = understand(cpu_latents(block_tokens=16, rank=rank, rope_dim=rope))
    assert isinstance(found, PageMap), found
    assert found.is_latent
    assert found.shape(1, 3) == (1, 3, 1, 1, rank + rope)


def layer(**about):
    """An attention layer with the CPU backend's own way to write, and no engine around it."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    impl = SimpleNamespace(attn_type="decoder", kv_cache_dtype=about.get("kv_cache_dtype", "auto"))
    impl.do_kv_cache_update = CPUAttentionBackendImpl.do_kv_cache_update.__get__(impl)
    given = {"num_kv_heads": 2, "head_size": 64, "isa": "vec", "kv_cache_dtype": "auto"}
    given |= {"_k_scale_float": 1.0, "_v_scale_float": 1.0}
    return SimpleNamespace(impl=impl, **given | about)


def asked(one, cache, blocks=4, tokens=32):
    size = cache.nbytes // blocks
    return of_layer(one, cache, num_blocks=blocks, block_tokens=tokens, page_bytes=size, given=torch.bfloat16)


def test_an_engines_layer_is_asked_over_scratch_pages_and_its_cache_stays():
    cache = torch.full((4, 2, 32, 128), 3.0, dtype=torch.bfloat16)
    found = understand(asked(layer(), cache))
    assert found.name == "CPU vec"
    assert bool((cache == 3.0).all())


def test_a_block_of_two_kernel_blocks_is_understood():
    found = understand(asked(layer(), torch.zeros(8, 2, 32, 128, dtype=torch.bfloat16), tokens=64))
    assert found.name == "CPU vec"
    assert found.block_tokens == 64


def test_an_fp8_cache_is_read_by_the_layers_scales():
    cache = torch.zeros(4, 2, 32, 128, dtype=torch.uint8)
    found = understand(asked(layer(kv_cache_dtype="fp8", _k_scale_float=0.6), cache))
    assert found.element == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"kv_cache_dtype": "nvfp4"}, "a KV cache of kind nvfp4 holds numbers with scales"),
        ({"kv_cache_dtype": "fp8_ds_mla"}, "a KV cache of kind fp8_ds_mla"),
        ({"head_size_v": 32}, "K and V differ in width"),
        ({"impl": SimpleNamespace()}, "has no write operator to ask"),
    ],
)
def test_layers_that_cannot_be_understood_are_opaque_with_the_reason(about, words):
    kind = torch.uint8 if "kv_cache_dtype" in about else torch.bfloat16
    one = layer(**{key: value for key, value in about.items() if key != "impl"})
    one.impl = about.get("impl", one.impl)
    found = asked(one, torch.zeros(4, 2, 32, 128, dtype=kind))
    assert isinstance(found, Opaque)
    assert words in found.reason


def test_a_cache_dtype_that_the_operator_lacks_is_refused():
    with pytest.raises(ConfigError, match="kv_cache_dtype must be auto, fp8"):
        cpu_attention(block_tokens=32, kv_heads=2, head_dim=64, dtype=torch.bfloat16, isa="vec", kv_cache_dtype="int4")
