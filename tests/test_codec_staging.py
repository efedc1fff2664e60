"""What codecs on a GPU refuse before anything is launched, and where their parts lie."""

from dataclasses import replace

import pytest
import torch

from kvlab.codecs import PageCodec
from kvlab.codecs.addresses import Addresses
from kvlab.codecs.lossless import LosslessCodec
from kvlab.codecs.plan import ALIGNMENT
from kvlab.codecs.scaled import ScaledCodec
from kvlab.codecs.staging import Staging, _one_run
from kvlab.errors import ConfigError, FormatError
from kvlab.paged import TypedPages, page_layout
from kvlab.serde import get_serde
from kvlab.testing.serde import kv_like
from tests.test_page_codecs import LAYERS, page_map_of

CPU = torch.device("cpu")


def engine(page_map, num_blocks=12):
    raw = torch.zeros(LAYERS, num_blocks, page_map.page_bytes, dtype=torch.uint8)
    caches = {f"layer.{at}": raw[at] for at in range(LAYERS)}
    sizes = dict.fromkeys(caches, page_map.page_bytes)
    return TypedPages(page_layout(caches, num_blocks=num_blocks, page_bytes=sizes, name="LBHNC"), page_map, LAYERS)


def encoded(spec, page_map, num_tokens):
    pages = torch.zeros(-(-num_tokens // 16), LAYERS, page_map.page_bytes, dtype=torch.uint8)
    page_map.write(kv_like(page_map.shape(LAYERS, num_tokens)), pages)
    return PageCodec(get_serde(spec), page_map).encode(pages, num_tokens)


@pytest.mark.parametrize("spec", ["int8", "fp8", "int4", "int4:k=token,group=7", "int8:k=channel,group=24"])
@pytest.mark.parametrize("num_tokens", [1, 16, 37])
def test_a_plan_has_the_twins_parts_one_after_the_other(spec, num_tokens):
    page_map = page_map_of()
    plan = ScaledCodec(get_serde(spec), Addresses(engine(page_map))).plan(num_tokens)
    want = encoded(spec, page_map, num_tokens)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in want.parts.items()} == {
        name: (part.dtype, part.shape) for name, part in plan.parts.items()
    }
    assert (plan.shape, plan.dtype, dict(plan.params)) == (want.shape, want.dtype, dict(want.params))
    end = 0
    for part in plan.parts.values():
        assert end <= part.start < end + ALIGNMENT
        assert part.start % ALIGNMENT == 0
        end = part.start + part.num_bytes
    assert end <= plan.num_bytes < end + ALIGNMENT


def test_channels_side_by_side_are_read_16_bytes_at_a_time_and_others_by_a_table():
    planes = {name: Addresses(engine(page_map_of(name))).planes for name in ("NHC", "CPU vec", "CPU amx")}
    assert [(plane.stride, plane.align) for plane in planes["NHC"]] == [(1, 8), (1, 8)]
    assert [(plane.stride, plane.align) for plane in planes["CPU vec"]] == [(16, 1), (1, 8)]
    assert [(plane.stride, plane.align) for plane in planes["CPU amx"]] == [(0, 1), (0, 1)]
    padded = page_map_of(slack=2)  # pages that start at no multiple of 16
    assert [plane.align for plane in Addresses(engine(padded)).planes] == [1, 1]


def test_what_no_program_codes_is_refused():
    addresses = Addresses(engine(page_map_of()))
    with pytest.raises(ConfigError, match=r"pages hold float8_e4m3fn"):
        ScaledCodec(get_serde("int4"), Addresses(engine(page_map_of(element=torch.float8_e4m3fn))))
    with pytest.raises(ConfigError, match=r"take bf16 pages, got torch.float16"):
        LosslessCodec(Addresses(engine(page_map_of(element=torch.float16))))
    codec = ScaledCodec(get_serde("int4"), addresses)
    with pytest.raises(ConfigError, match="as many blocks each"):
        addresses.ids([[1, 2], [3]])
    with pytest.raises(ConfigError, match=r"block ids must be in \[0, 12\)"):
        addresses.ids([[1, 12]])
    small = Staging(codec, CPU, codec.plan(16).num_bytes)
    with pytest.raises(ConfigError, match=r"an object of 64 tokens takes .* a staging buffer has"):
        small.save([[1, 2, 3, 4]], 64, torch.empty(0, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="1 to 1 objects go together, got 2"):
        small.save([[1], [2]], 16, torch.empty(0, dtype=torch.uint8))


@pytest.mark.parametrize("spec", ["int8", "int4", "lossless"])
def test_objects_whose_parts_do_not_fit_are_refused(spec):
    page_map = page_map_of()
    addresses = Addresses(engine(page_map))
    codec = LosslessCodec(addresses) if spec == "lossless" else ScaledCodec(get_serde(spec), addresses)
    staging = Staging(codec, CPU, 2 * codec.plan(160).num_bytes)
    good = encoded(spec, page_map, 160)
    blocks = list(range(10))
    for name, part in good.parts.items():
        for bad in (part.reshape(-1)[:-1], part.view(torch.int8).to(torch.int16), None):
            parts = {key: value for key, value in good.parts.items() if key != name}
            parts |= {} if bad is None else {name: bad}
            if name == "payload.escapes" and bad is not None and bad.dtype == torch.uint8:
                continue  # only the codes tell how many there are: it is found on the device
            with pytest.raises(FormatError):
                staging.load([replace(good, parts=parts)], [blocks])
    for name, value in (("dtype", "float16"), ("axes", good.axes[::-1]), ("params", {**good.params, "k": "x"}),
                        ("serde", "other"), ("shape", (*good.shape[:3], 1, 128)), ("shape", (3, 160))):  # fmt: skip
        with pytest.raises(FormatError):
            staging.load([replace(good, **{name: value})], [blocks])
    with pytest.raises(FormatError, match="loaded together must be"):
        staging.load([good, encoded(spec, page_map, 144)], [blocks, blocks])


def test_lossless_objects_that_the_programs_do_not_read_are_refused():
    page_map = page_map_of()
    codec = LosslessCodec(Addresses(engine(page_map)))
    staging = Staging(codec, CPU, codec.plan(160).num_bytes)
    good = encoded("lossless", page_map, 160)
    with pytest.raises(FormatError, match=r"params must be"):
        staging.load([replace(good, params={**good.params, "period": 64})], [list(range(10))])
    room = codec.plan(160).parts["payload.escapes"].shape[0]
    wild = {**good.parts, "payload.escapes": torch.zeros(room + 1, dtype=torch.uint8)}
    with pytest.raises(FormatError, match="more than a staging buffer has room for"):
        staging.load([replace(good, parts=wild)], [list(range(10))])
    assert codec.takes(128)
    assert not codec.takes(127)


def test_objects_that_lie_as_planned_are_one_run_of_memory():
    page_map = page_map_of()
    codec = ScaledCodec(get_serde("int8"), Addresses(engine(page_map)))
    plan = codec.plan(16)
    host = torch.arange(2 * plan.num_bytes, dtype=torch.int64).to(torch.uint8)
    objects = [plan.encoded(host[at * plan.num_bytes :]) for at in range(2)]
    assert _one_run(plan, objects).equal(host)
    assert _one_run(plan, objects[::-1]) is None
    assert _one_run(plan, [plan.encoded(host.clone()), objects[1]]) is None
