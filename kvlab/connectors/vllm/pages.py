"""What is known of the inside of an engine's pages, and so what the slots of host memory hold.

Which byte of a page is which is proven by the engine's own write operator when it registers its pages. How many slots
there are is told earlier, and to a process that has no pages: by the specs, with which the proven map must then agree.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvlab.connectors.config import ConnectorConfig
from kvlab.connectors.vllm import compat
from kvlab.errors import ConfigError
from kvlab.paged import Opaque, PageLayout, PageMap, Transfer, open_transfer, understand
from kvlab.paged.pools import outside_pools
from kvlab.paged.vllm_operators import of_layer
from kvlab.sharedmemory import SharedSlots
from kvlab.stated import is_coded
from kvlab.stores.url import shown_url
from kvlab.units import format_bytes

if TYPE_CHECKING:
    from kvlab.codecs.blocks import BlockCodec

logger = logging.getLogger("vllm.kvlab")


def slot_bytes_of(vllm_config: Any, kv_cache_config: Any, serde: str) -> int:
    """Bytes of a slot: a block of any group, as it is or as `serde` codes it. ConfigError where it cannot."""
    as_it_is = compat.slot_bytes(vllm_config, kv_cache_config)
    if serde == "naive":
        return as_it_is
    from kvlab.codecs.blocks import slot_bytes
    from kvlab.serde import get_serde
    from kvlab.serde.groups import FLOATS

    made, blocks = get_serde(serde), compat.typed_blocks(vllm_config, kv_cache_config)
    dtypes = {dtype for _, dtype in blocks}
    if not dtypes <= FLOATS:
        raise ConfigError(
            f"serde {serde!r} takes {', '.join(sorted(FLOATS))}, and this engine's pages hold "
            f"{', '.join(sorted(dtypes))} already; use naive or lossless"
        )
    return max(slot_bytes(made, shape, dtype) for shape, dtype in blocks)


def proven_map(
    vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor], page_bytes: Mapping[str, int]
) -> PageMap | Opaque:
    """The map of every group's pages; or why there is none."""
    maps = layer_maps(vllm_config, kv_cache_config, kv_caches, page_bytes).values()
    refused = [each for each in maps if isinstance(each, Opaque)]
    if refused:
        return refused[0]
    if len({(each.element, each.planes) for each in maps if isinstance(each, PageMap)}) > 1:
        return Opaque("layers differ in what lies where in a page")
    return list(maps)[-1] if maps else Opaque("no layer has pages")


def layer_maps(
    vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor], page_bytes: Mapping[str, int]
) -> dict[str, PageMap | Opaque]:
    """The map of each layer's pages, or why there is none; layers that are made alike are asked once."""
    layers = vllm_config.compilation_config.static_forward_context
    found: dict[str, PageMap | Opaque] = {}
    seen: dict[tuple[Any, ...], PageMap | Opaque] = {}
    for group in kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            layer, cache = layers.get(name), kv_caches.get(name)
            if layer is None or cache is None:  # it reads the KV of another layer
                continue
            kind = (
                type(getattr(layer, "impl", None)), getattr(layer, "num_kv_heads", 0), getattr(layer, "head_size", 0),
                str(getattr(layer, "kv_cache_dtype", "")), cache.dtype, cache.shape[1:], cache.stride(),
                page_bytes[name], group.kv_cache_spec.block_size,
            )  # fmt: skip
            if kind not in seen:
                seen[kind] = _asked(
                    layer,
                    cache,
                    num_blocks=kv_cache_config.num_blocks,
                    block_tokens=group.kv_cache_spec.block_size,
                    page_bytes=page_bytes[name],
                    given=vllm_config.model_config.dtype,
                )
            found[name] = seen[kind]
    return found


def _asked(layer: Any, cache: torch.Tensor, **about: Any) -> PageMap | Opaque:
    try:
        scratch = of_layer(layer, cache, **about)
    except Exception as error:  # a layer of a kind that is not known says nothing
        return Opaque(f"the engine's layer could not be asked: {type(error).__name__}: {' '.join(str(error).split())}")
    return scratch if isinstance(scratch, Opaque) else understand(scratch)


def codec_of(serde: str, page_map: PageMap | Opaque, layout: PageLayout, transform: str = "") -> "BlockCodec | None":
    """What codes blocks on their way between pages and slots; None where slots hold them as they are."""
    if transform:
        from kvlab.connectors.vllm.transformed import TransformedBlocks

        return TransformedBlocks(transform, page_map, layout.num_layers, layout.pages[0].device.type)
    if serde == "naive":
        return None
    from kvlab.codecs.blocks import BlockCodec
    from kvlab.serde import get_serde

    return BlockCodec(get_serde(serde), page_map, layout.num_layers)


def warn_of_rope(spec: str, vllm_config: Any, page_map: PageMap | Opaque) -> None:
    """`centered` turns keys back by a rope that its options name; by another one it loses what it is there for."""
    from kvlab.serde import get_serde
    from kvlab.serde.centered import CenteredSerde, rope_of

    serde = get_serde(spec) if spec.startswith("centered") else None
    if not isinstance(serde, CenteredSerde) or isinstance(page_map, Opaque):
        return
    theta, rotary = rope_of(vllm_config.model_config.hf_text_config, page_map.head_dim)
    if (serde.theta, serde.rotary or page_map.head_dim) != (theta, rotary):
        wanted = f"centered:theta={theta:.12g}" + ("" if rotary == page_map.head_dim else f",rotary={rotary}")
        logger.warning("kvlab: %s is not this model's rope, which costs quality; give ?serde=%s", spec, wanted)


def map_below(spec: str, page_map: PageMap | Opaque, layout: PageLayout) -> dict[str, Any]:
    """What the process of the tiers must know of pages to code them. ConfigError where the serde cannot."""
    from kvlab.codecs import PageCodec
    from kvlab.codecs.blocks import BlockCodec
    from kvlab.serde import get_serde

    serde = get_serde(spec)
    made = BlockCodec(serde, page_map, layout.num_layers) if is_coded(spec) else PageCodec(serde, page_map)
    assert isinstance(made.map, PageMap)  # or the line before has refused it
    return made.map.as_json()


def open_engine_transfer(
    layout: PageLayout,
    codec: "BlockCodec | None",
    num_slots: int,
    *,
    staging_bytes: int,
    shared: SharedSlots | None,
) -> Transfer:
    """A transfer whose own GPU memory stays while the engine sleeps."""

    def opened() -> Transfer:
        if codec is None:
            return open_transfer(layout, num_slots, staging_bytes=staging_bytes, shared=shared)
        from kvlab.codecs.transfer import open_coded_transfer

        return open_coded_transfer(layout, codec, num_slots, staging_bytes=staging_bytes, shared=shared)

    return outside_pools(layout.pages[0].device, opened)


def what_is_used(config: ConnectorConfig, num_slots: int, slot_bytes: int, page_map: PageMap | Opaque) -> str:
    """Of the start-up line; the tier worker adds what the secondary tiers hold."""
    memory = "memory tier" if config.keeps_memory else "staging"
    pages = f"opaque ({page_map.reason})" if isinstance(page_map, Opaque) else f"typed ({page_map.name})"
    tiers = ", ".join(shown_url(url) for url in config.secondary_tiers) or "none"
    return (
        f"{memory} of {format_bytes(config.arena_bytes)} ({num_slots} blocks of {format_bytes(slot_bytes)} as "
        f"{config.slot_serde} a rank), pages {pages}, secondary tiers {tiers}"
    )
