"""Typed pages: known layouts as data, and the probe against operators that this file writes."""

from dataclasses import replace

import pytest
import torch

from kvlab.errors import ConfigError
from kvlab.paged import PageMap, TypedPages, page_layout
from kvlab.paged.known import KNOWN, known_maps
from kvlab.paged.probe import BLOCKS, ELEMENTS, UNTOUCHED, Scratch, alphabet, discover, flaw, understand
from kvlab.paged.typed import WORDS, Opaque, Plane

TOKENS, HEADS, DIM = 32, 3, 48


def operator(page_map: PageMap, *, given=torch.float32, scales=(1.0, 1.0), slack=0, **changed) -> Scratch:
    """Scratch pages whose operator writes as `page_map` says."""
    pages = torch.zeros(BLOCKS, page_map.page_bytes, dtype=torch.uint8)

    def write(planes, slots):
        cast = [(p.float() / s).to(page_map.element) for p, s in zip(planes, scales, strict=False)]
        block = int(slots[0]) // page_map.block_tokens
        page_map.write(torch.stack(cast, dim=2)[None], pages[block][None, None])
        pages[block, :slack] = 1

    about = dict(
        pages=pages, write=write, block_tokens=page_map.block_tokens, kv_heads=page_map.kv_heads,
        head_dim=page_map.head_dim, element=page_map.element, given=given, latent=page_map.is_latent, scales=scales,
    )  # fmt: skip
    return Scratch(**about | changed)


def maps(element=torch.bfloat16, tokens=TOKENS, heads=HEADS, dim=DIM, rows=1, latent=False, slack=0):
    planes = 1 if latent else 2
    size = tokens * heads * planes * dim * element.itemsize + slack
    found = known_maps(block_tokens=tokens, kv_heads=heads, head_dim=dim, element=element, page_bytes=size,
                       latent=latent, rows=rows)  # fmt: skip
    return {one.name: one for one in found}


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_elements_of_the_probe_are_told_apart_in_every_bit(element):
    words = alphabet(element).view(WORDS[element.itemsize])
    assert len(words.unique()) == len(words) > 64
    for bit in range(8 * element.itemsize):
        assert len(((words >> bit) & 1).unique()) == 2
    if element.itemsize == 1:  # what the model computes in holds it as it is
        for wide in (torch.bfloat16, torch.float16):
            assert alphabet(element).float().to(wide).to(element).view(torch.uint8).equal(words)


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@pytest.mark.parametrize("name", list(KNOWN))
def test_a_known_layout_is_proven_and_named(name, element):
    page_map = maps(element)[name]
    assert page_map.is_full
    found = understand(operator(page_map))
    assert found == page_map


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_an_element_that_is_not_written_is_told_from_one_that_is(element):
    assert not bool((alphabet(element).view(torch.uint8) == UNTOUCHED).view(-1, element.itemsize).all(1).any())


def test_known_layouts_put_elements_where_indexing_does():
    values = torch.arange(TOKENS * HEADS * 2 * DIM, dtype=torch.int16).view(TOKENS, HEADS, 2, DIM)
    orders = {"HNC": (1, 0, 2, 3), "NHC": (0, 1, 2, 3), "NHD": (2, 0, 1, 3), "HND": (2, 1, 0, 3)}
    for name, order in orders.items():
        page = values.permute(order).contiguous().view(torch.uint8).flatten()
        typed = maps()[name].read(page[None, None], TOKENS)
        assert typed[0].view(torch.int16).equal(values), name


@pytest.mark.parametrize("rows", [2, 4])
def test_a_block_of_several_kernel_blocks_is_proven(rows):
    page_map = maps(rows=rows)["HNC"]
    assert page_map != maps()["HNC"]
    assert understand(operator(page_map, rows=rows)) == page_map


def test_an_unknown_order_is_discovered_and_proven():
    channels = torch.randperm(DIM, generator=torch.Generator().manual_seed(1)) * 2
    plane = maps()["HNC"].planes[0]
    odd = tuple(
        Plane(plane.tokens, plane.heads, tuple(int(at) + plane.channels[0] + kv * 2 * DIM for at in channels))
        for kv in (0, 1)
    )
    page_map = PageMap("mine", torch.bfloat16, maps()["HNC"].page_bytes, odd)
    found = understand(operator(page_map))
    assert isinstance(found, PageMap)
    assert found.name == "discovered"
    assert found.offsets.equal(page_map.offsets)


def test_padding_is_no_element_and_stays():
    page_map = maps(slack=64)["NHC"]
    assert not page_map.is_full
    assert understand(operator(page_map)) == page_map


def test_latents_have_one_plane():
    page_map = maps(heads=1, dim=576, latent=True)["latents"]
    assert page_map.is_latent
    assert understand(operator(page_map, scales=(1.0,))) == page_map


@pytest.mark.parametrize("element", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_fp8_pages_are_proven_through_the_operators_scales(element, given):
    page_map = maps(element)["HNC"]
    assert understand(operator(page_map, given=given, scales=(0.37, 2.9))) == page_map


# ---- what is wrong is caught


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_a_map_that_is_wrong_in_one_bit_of_one_entry_is_caught(element):
    """By the map itself, where elements lie over each other or outside, else by the probe."""
    for page_map in maps(element, tokens=8, heads=2, dim=8, slack=3 * 256 * element.itemsize).values():
        scratch = operator(page_map)
        assert flaw(page_map, scratch) is None
        probed = 0
        for mutant in mutants(page_map):
            assert flaw(mutant, scratch) is not None, mutant
            probed += 1
        assert probed > 40, page_map


def mutants(page_map: PageMap):
    """Maps with one bit turned in one entry, or in all entries, of a table; with tables at another stride; where such
    a map can be made at all."""
    for kv, plane in enumerate(page_map.planes):
        for axis in ("tokens", "heads", "channels"):
            table = getattr(plane, axis)
            changed = [tuple(2 * at for at in table), tuple(at + page_map.element.itemsize for at in table)]
            for bit in range(page_map.page_bytes.bit_length()):
                changed.append(tuple(at ^ (1 << bit) for at in table))
                changed += [(*table[:at], table[at] ^ (1 << bit), *table[at + 1 :]) for at in range(len(table))]
            for turned in changed:
                planes = list(page_map.planes)
                planes[kv] = replace(plane, **{axis: turned})
                try:
                    mutant = replace(page_map, planes=tuple(planes))
                except ConfigError:
                    continue
                if not mutant.offsets.equal(page_map.offsets):
                    yield mutant


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_a_map_with_two_entries_or_k_and_v_exchanged_is_caught(element):
    page_map = maps(element, tokens=8, heads=2, dim=8)["HNC"]
    scratch = operator(page_map)
    exchanged = [replace(page_map, planes=page_map.planes[::-1])]
    for axis in ("tokens", "heads", "channels"):
        table = getattr(page_map.planes[0], axis)
        for first in range(len(table) - 1):
            swapped = (*table[:first], table[first + 1], table[first], *table[first + 2 :])
            exchanged.append(replace(page_map, planes=(replace(page_map.planes[0], **{axis: swapped}),
                                                       page_map.planes[1])))  # fmt: skip
    assert all(flaw(mutant, scratch) is not None for mutant in exchanged)


@pytest.mark.parametrize(
    ("truth", "claim"),
    [(torch.bfloat16, torch.float16), (torch.float8_e4m3fn, torch.float8_e5m2), (torch.float32, torch.bfloat16)],
)
def test_another_element_is_caught(truth, claim):
    page_map = maps(truth)["HNC"]
    assert flaw(replace(page_map, element=claim), operator(page_map)) is not None
    wrong = operator(page_map, element=claim)
    assert isinstance(understand(wrong), Opaque)


def test_an_operator_that_turns_one_bit_is_not_proven():
    page_map = maps()["HNC"]
    honest = operator(page_map)

    def write(planes, slots):
        honest.write(planes, slots)
        honest.pages[1, 1001] ^= 4

    found = understand(replace(honest, write=write))
    assert isinstance(found, Opaque)
    assert "elements are found" in found.reason or "wrongly" in found.reason


def test_an_operator_that_writes_beside_the_elements_is_opaque():
    page_map = maps(slack=64)["NHC"]
    shifted = replace(page_map, planes=tuple(
        replace(plane, tokens=tuple(at + 64 for at in plane.tokens)) for plane in page_map.planes))  # fmt: skip
    found = understand(operator(shifted, slack=8))
    assert found == Opaque("the engine writes bytes of a page that are no element of map discovered")


def test_an_operator_that_writes_to_another_page_is_opaque():
    honest = operator(maps()["HNC"])

    def write(planes, slots):
        honest.write(planes, slots)
        honest.pages[2, 7] = 0

    assert understand(replace(honest, write=write)) == Opaque(
        "the engine's write operator wrote to a page that no slot names"
    )


def test_what_is_no_sum_of_its_axes_or_does_not_run_is_opaque():
    page_map = maps()["HNC"]
    honest = operator(page_map)

    def swizzled(planes, slots):
        turned = [plane.clone() for plane in planes]
        for plane in turned:
            plane[1::2] = plane[1::2].flip(-1)  # every second token's channels backwards
        honest.write(turned, slots)

    assert understand(replace(honest, write=swizzled)) == Opaque(
        "the place of an element is no sum of a token's, a head's and a channel's"
    )

    def broken(planes, slots):
        raise RuntimeError("no kernel for this\ncard")

    found = understand(replace(honest, write=broken))
    assert found.reason.endswith("does not run on scratch pages: RuntimeError: no kernel for this card")
    assert "no plain numbers" in understand(replace(honest, element=torch.uint8)).reason


def test_discovery_alone_gives_the_same_places():
    for page_map in maps(torch.float32).values():
        assert discover(operator(page_map)).offsets.equal(page_map.offsets)


# ---- typed KV of pages


@pytest.mark.parametrize("name", list(KNOWN))
@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 95])
def test_typed_pages_are_read_and_written_token_by_token(name, num_tokens):
    page_map = maps()[name]
    size = page_map.page_bytes
    raw = torch.randint(0, 256, (2, 7, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    caches = {f"layer.{i}": raw[i] for i in range(2)}
    layout = page_layout(caches, num_blocks=7, page_bytes=dict.fromkeys(caches, size), name="LBHNC")
    pages = TypedPages(layout, page_map, 2)
    kv = torch.randn(page_map.shape(2, num_tokens)).to(torch.bfloat16)
    before = raw.clone()
    pages.write(kv, [5, 0, 3])
    assert pages.read([5, 0, 3], num_tokens).equal(kv)
    for block in (1, 2, 4, 6):
        assert raw[:, block].equal(before[:, block])
    offsets = page_map.offsets
    for token in range(96):
        place = offsets[token % 32].flatten()
        block = (5, 0, 3)[token // 32]
        for layer in range(2):
            page = raw[layer, block].view(torch.int16)[place // 2]
            if token < num_tokens:
                assert page.equal(kv[layer, token].flatten().view(torch.int16))
            else:
                assert page.equal(before[layer, block].view(torch.int16)[place // 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_bytes": 64}, "outside of its page"),
        ({"page_bytes": 12289}, "cannot hold elements"),
        ({"planes": ()}, "K and V of one shape"),
        ({"planes": "twice"}, "two elements at one place"),
        ({"planes": "odd"}, "no multiple of their 2 bytes"),
    ],
)
def test_a_map_that_cannot_be_is_refused(change, words):
    page_map = maps(tokens=8, heads=2, dim=8)["HNC"]
    first = page_map.planes[0]
    if change.get("planes") == "twice":
        change = {"planes": (first, first)}
    elif change.get("planes") == "odd":
        change = {"planes": (replace(first, tokens=tuple(at + 1 for at in first.tokens)),)}
    with pytest.raises(ConfigError, match=words):
        replace(page_map, **change)


def test_pages_and_kv_that_do_not_fit_are_refused():
    page_map = maps()["HNC"]
    pages = torch.zeros(2, 1, page_map.page_bytes, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="hold up to 64 tokens, got 65"):
        page_map.read(pages, 65)
    with pytest.raises(ConfigError, match="typed KV must be"):
        page_map.write(torch.zeros(page_map.shape(2, 3), dtype=torch.bfloat16), pages)
    with pytest.raises(ConfigError, match="pages must be uint8"):
        page_map.read(pages[0], 1)
