"""What objects hold of recurrent states, and what is refused: without an engine."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import MambaSpec

from kvlab.chunking import Chunker, Span
from kvlab.connectors.vllm import states
from kvlab.connectors.vllm.kv_groups import STATE_WINDOW, KVGroups
from kvlab.connectors.vllm.scheduler.requests import RequestState
from kvlab.errors import ConfigError
from kvlab.paged import page_layout


def group(mode: str = "align", **more) -> SimpleNamespace:
    spec = MambaSpec(
        block_size=32, shapes=((3, 4), (2, 8)), dtypes=(torch.float32, torch.float32), page_size_padded=256,
        mamba_cache_mode=mode, **more,
    )  # fmt: skip
    return SimpleNamespace(kv_cache_spec=spec, layer_names=["state.0"])


def test_an_object_holds_the_page_of_the_state_behind_it():
    groups = KVGroups((None, STATE_WINDOW), 16, recurrent=frozenset({1}))
    parts = [(p.group, p.first_block, p.end_block, p.offset) for p in groups.parts(Span(4, 8), 128)]
    assert parts == [(0, 4, 8, 0), (1, 7, 8, 4)]
    tables = [[10 + at for at in range(8)], [0] * 8]
    assert groups.pages(Span(4, 8), 128, tables, 64, {1: 99}) == (14, 15, 16, 17, 99)
    assert groups.pages(Span(4, 8), 128, tables, 64, {}) == ()  # no step left a state there
    assert groups.pages(Span(4, 8), 128, tables, 64) == ()
    held = [[*range(10, 18)], [0, 0, 0, 0, 0, 0, 0, 77]]
    assert groups.pick(Span(0, 4), 64, range(5), held, range(8), 128) == ((0, 1, 2, 3), (10, 11, 12, 13))
    assert groups.pick(Span(4, 8), 128, range(5), held, range(8), 128) == ((0, 1, 2, 3, 4), (14, 15, 16, 17, 77))
    assert groups.needed(held, range(8), 128) == [*range(10, 18), 77]


def test_no_object_ends_with_the_token_that_is_computed():
    groups, plain = KVGroups((STATE_WINDOW,), 16, recurrent=frozenset({0})), KVGroups((None,), 16)
    assert [groups.num_blocks(n) for n in (16, 17, 32, 33)] == [0, 1, 1, 2]
    assert [plain.num_blocks(n) for n in (16, 17, 32, 33)] == [1, 1, 2, 2]
    request = SimpleNamespace(num_tokens=64, num_prompt_tokens=64)
    of_prompt = RequestState(request, {}, hashes=[bytes([at]) for at in range(4)], has_states=True)
    assert len(of_prompt.hit_hashes(Chunker(32, 16))) == 3


def test_chunks_are_whole_blocks():
    assert KVGroups((STATE_WINDOW,), 544, recurrent=frozenset({0})).chunker(256).chunk_tokens == 544
    with pytest.raises(ConfigError, match="must be a multiple"):
        KVGroups((None,), 544).chunker(256)


def test_the_pages_that_a_step_leaves():
    offers = SimpleNamespace(boundary_state_offloads={"a": [(1, 7, 64), (2, 8, 64), (1, 9, 96)]})
    output = SimpleNamespace(kv_connector_block_state=offers)
    assert states.left_by(output) == {"a": {64: {1: 7, 2: 8}, 96: {1: 9}}}
    assert states.left_by(SimpleNamespace()) == {}


@pytest.mark.parametrize(("shared", "wanted"), [(0, 64), (16, 64), (48, 48), (64, 64), (96, 64)])
def test_a_step_ends_at_the_nearer_of_two_stops(shared, wanted):
    request = SimpleNamespace(shared_prefix_boundary=shared)
    assert states.shared_tokens(request) == shared
    states.stop_at(request, 32, 64, shared)
    assert request.shared_prefix_boundary == wanted


def test_only_the_padding_of_a_states_page_is_cleared():
    storage = torch.full((2 * 4 * 256,), 7, dtype=torch.int8)  # two layers of four pages
    views = [
        storage[at * 1024 :].as_strided((4, 1, 1, size), (256, size, size, 1)) for at, size in ((0, 112), (1, 256))
    ]
    caches = dict(zip(("state.0", "attention.0"), views, strict=True))
    engine = [group(), SimpleNamespace(kv_cache_spec=object(), layer_names=["attention.0"])]
    about = {"num_blocks": 4, "page_bytes": dict.fromkeys(caches, 256), "name": "LBHNC"}
    layout = page_layout(caches, content_bytes=states.content_bytes(engine), **about)
    assert layout.page_bytes == 256
    states.Padding(layout, caches, engine).clear({0: [1, 3]})
    first, second = storage.view(2, 4, 256)
    for page in range(4):
        kept = 7 if page in (0, 2) else 0
        assert (first[page, :112] == 7).all()
        assert (first[page, 112:] == kept).all()
        assert (second[page] == kept).all()
    with pytest.raises(ConfigError, match="a page must be one run of 256 bytes, found 112"):
        page_layout(caches, **about)


CONFIG = SimpleNamespace(speculative_config=None)


def test_a_state_at_boundaries_is_served():
    states.refuse_unserved(CONFIG, [group()], lossy=False)
    states.refuse_unserved(SimpleNamespace(speculative_config=object()), [], lossy=True)


@pytest.mark.parametrize(
    ("config", "mode", "lossy", "why"),
    [
        (CONFIG, "none", False, "add --enable-prefix-caching"),
        (SimpleNamespace(speculative_config=object()), "align", False, "not kept with speculative decoding"),
        (CONFIG, "align", True, "no serde with a loss takes them.* use naive or lossless"),
    ],
)
def test_what_is_refused_says_what_to_do(config, mode, lossy, why):
    with pytest.raises(ConfigError, match=why):
        states.refuse_unserved(config, [group(mode)], lossy=lossy)


def test_a_vllm_that_offers_no_pages_is_refused(monkeypatch):
    monkeypatch.delattr(states.scheduler_output, "KVConnectorBlockState")
    with pytest.raises(ConfigError, match="take a newer one"):
        states.refuse_unserved(CONFIG, [group()], lossy=False)


def test_what_the_bytes_mean_is_named():
    names = {str(states.described(each)) for each in (group(), group("none"))}
    assert len(names) == 2
