"""KV read out of a real engine, changed, and written back: against transformers, and beside other requests."""

from dataclasses import replace

import pytest
import torch

import kvlab
from kvlab.connectors.captured import KV
from kvlab.connectors.transformers import load_model, to_cache
from kvlab.connectors.vllm import pages as pages_module
from kvlab.errors import ConfigError
from kvlab.paged import Opaque
from kvlab.reuse import PRESSES, answered, kept, pasted, pruned, turned
from kvlab.reuse.methods import Case, cacheblend
from kvlab.reuse.rope import rope_of
from kvlab.simulation.trace_files import load_traffic, save_traffic
from tests.connectors.engine import BLOCK, connector, engine, generate, prompt, shared, text_ids
from tests.connectors.models import WINDOW, gemma, short_demo
from tests.support.asked import agree, random_requests

TIERS = "memory://?size=64MiB"


@pytest.fixture
def llm():
    return shared(TIERS)


@pytest.fixture(scope="module")
def model():
    return load_model(short_demo()).float()


def said(model, kv, count=8):
    """What transformers answers with all of `kv` but the last token, which it computes, as an engine does."""
    before = KV(
        tuple(key[:-1] for key in kv.keys), tuple(value[:-1] for value in kv.values),
        kv.token_ids[:-1], kv.num_positions - 1,
    )  # fmt: skip
    cache, tokens = to_cache(before), [kv.token_ids[-1]]
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


def answer(llm, asked, count=8):
    """Tokens, and how many of the prompt were not computed."""
    from vllm import SamplingParams

    done = llm.generate([asked], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)[0]
    return list(done.outputs[0].token_ids), done.num_cached_tokens


def worst(kv, other):
    return max(float(error.max()) for error in kv.diff(other).values())


def zeroed(kv, layer):
    values = tuple(torch.zeros_like(value) if at == layer else value for at, value in enumerate(kv.values))
    return KV(kv.keys, values, kv.token_ids, kv.num_positions, kv.model, kv.windows)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 300])
def test_what_is_read_is_transformers_kv_of_the_same_model(llm, model, length):
    cache = kvlab.attach(llm)
    kv = cache.read(prompt(length))
    assert kv.keys[0].shape == (length, 3, 64)
    assert worst(kvlab.capture(model, prompt(length)), kv) < (5e-3 if torch.cuda.is_available() else 1e-4)  # or TF32
    assert worst(kv, cache.read(prompt(length))) < 1e-4  # a second time the tiers hold it


def test_what_is_written_back_answers_the_same_with_a_full_hit(llm):
    cache = kvlab.attach(llm)
    for length in (33, 300, 320):
        asked = prompt(length)
        plain = generate(llm, [asked])[0].tokens
        tokens, cached = answer(llm, cache.write(asked, cache.read(asked)))
        assert tokens == plain
        assert cached == length - 1


def test_an_edit_changes_the_answer_as_it_does_in_transformers(llm, model):
    cache = kvlab.attach(llm)
    kv = cache.read(prompt(300))
    edited = zeroed(kv, 2)
    tokens, cached = answer(llm, cache.write(prompt(300), edited))
    assert cached == 299
    assert tokens == said(model, edited)
    assert tokens != said(model, kv)
    assert generate(llm, [prompt(300)])[0].tokens == said(model, kv)


def test_other_requests_never_find_what_was_written(llm):
    cache = kvlab.attach(llm)
    plain = generate(llm, [prompt(200), prompt(480)])
    index = connector(llm).scheduler.index
    held = {key for key in index._entries}
    longer = cache.write(prompt(200), zeroed(cache.read(prompt(200)), 1))
    longer["prompt_token_ids"] = prompt(480)
    tokens, cached = answer(llm, longer)
    assert cached == 200  # a longer prompt reads all of it
    assert tokens != plain[1].tokens
    assert set(index._entries) == held  # nothing of it is stored, and nothing that was computed behind it
    assert [one.tokens for one in generate(llm, [prompt(200), prompt(480)])] == [one.tokens for one in plain]


def test_a_prompt_that_begins_otherwise_is_computed(llm):
    cache = kvlab.attach(llm)
    asked = cache.write(prompt(200), zeroed(cache.read(prompt(200)), 1))
    asked["prompt_token_ids"] = prompt(300, ending=0)[100:]
    assert answer(llm, asked)[1] == 0


def test_after_clear_the_prompt_is_computed(llm):
    cache = kvlab.attach(llm)
    kv = cache.read(prompt(100))
    asked = cache.write(prompt(100), zeroed(kv, 1))
    assert cache.clear() >= 1
    assert answer(llm, asked) == (generate(llm, [prompt(100)])[0].tokens, 0)


def test_a_reset_of_the_connector_ends_what_was_written():
    with engine([TIERS]) as llm:
        cache = kvlab.attach(llm)
        asked = cache.write(prompt(100), zeroed(cache.read(prompt(100)), 1))
        assert answer(llm, asked)[1] == 99
        assert llm.reset_prefix_cache(reset_connector=True)
        assert answer(llm, asked)[1] == 0


def test_what_does_not_fit_is_refused(llm):
    cache = kvlab.attach(llm)
    kv = cache.read(prompt(64))
    with pytest.raises(ConfigError, match="KV of 64 tokens does not fit a prompt of 63"):
        cache.write(prompt(63), kv)
    with pytest.raises(ConfigError, match=r"KV of 1 layers does not fit this engine's 6"):
        cache.write(prompt(64), KV(kv.keys[:1], kv.values[:1], kv.token_ids, 64))
    halves = tuple(key[..., :32] for key in kv.keys), tuple(value[..., :32] for value in kv.values)
    with pytest.raises(ConfigError, match=r"K of layer 0 must be torch.float32\[64, 3, 64\], got"):
        cache.write(prompt(64), KV(*halves, kv.token_ids, 64))
    with pytest.raises(ConfigError, match=r"got torch.bfloat16"):
        cache.write(prompt(64), KV(tuple(k.bfloat16() for k in kv.keys), kv.values, kv.token_ids, 64))
    kv.values[3][5, 1, 7] = float("nan")
    with pytest.raises(ConfigError, match="V of layer 3 holds NaN or infinity"):
        cache.write(prompt(64), kv)
    with pytest.raises(ConfigError, match="at least one token"):
        cache.read([])


def test_kv_of_another_model_is_refused_unless_told_otherwise(llm):
    cache = kvlab.attach(llm)
    kv = cache.read(prompt(64))
    other = KV(kv.keys, kv.values, kv.token_ids, 64, "some/other-model")
    with pytest.raises(ConfigError, match="this KV is of model 'other-model'"):
        cache.write(prompt(64), other)
    assert answer(llm, cache.write(prompt(64), other, any_model=True))[1] == 63


def test_a_context_made_of_pieces_is_served(llm, model):
    """Read from the engine, moved to their places, written: it says what transformers says behind the same KV."""
    cache, question = kvlab.attach(llm), list(text_ids()[600:610])
    pieces = [cache.read(prompt(70)), cache.read(list(text_ids()[300:390]))]
    context = pasted([pieces[0], turned(pieces[1], 70, rope_of(model))])
    shorter = kept(context, [*range(8), *range(40, 160)], rope_of(model))
    blended = cacheblend(0.3)(Case(model, pieces, cache.read(list(context.token_ids)))).kv
    for made in (context, shorter, blended):
        asked = cache.write(list(made.token_ids), made)
        asked["prompt_token_ids"] = [*made.token_ids, *question]
        tokens, cached = answer(llm, asked)
        assert cached == made.num_positions
        assert tokens == answered(model, made, question, 8)
    assert worst(context, blended) > 0.01


@pytest.mark.parametrize("press", ["StreamingLLM", "KNorm", "SnapKV"])
def test_a_pruned_prompt_is_served(llm, model, press):
    """Each head keeps tokens of its own; the engine says behind them what transformers says behind the same KV."""
    cache, question = kvlab.attach(llm), list(text_ids()[600:610])
    kv = cache.read(prompt(320))
    part = pruned(model, kv, PRESSES[press], 0.5)
    asked = cache.write(list(part.token_ids), part)
    asked["prompt_token_ids"] += question
    tokens, cached = answer(llm, asked)
    assert (part.num_positions, cached) == (160, 160)
    assert tokens == answered(model, part, question, 8)
    assert tokens != answered(model, kv, question, 8)


def test_a_comparison_follows_one_answer_under_both(llm):
    cache = kvlab.attach(llm)
    kv = cache.read(prompt(300))
    same = cache.compare(prompt(300), cache.write(prompt(300), kv), max_tokens=6)
    assert (same.same_tokens, same.agreement) == (6, 1.0)
    assert same.kl < 1e-4
    other = cache.compare(prompt(300), cache.write(prompt(300), zeroed(kv, 2)), max_tokens=6)
    assert other.kl > 0.01
    assert "<table>" in other._repr_html_()
    with pytest.raises(ConfigError, match="top=-1 needs an LLM with max_logprobs=-1"):
        cache.compare(prompt(300), prompt(300), top=-1)


def test_kv_goes_through_a_store_to_the_token(llm):
    cache = kvlab.attach(llm)
    kv = cache.read(prompt(333))
    store = kvlab.CacheEngine("memory://?size=64MiB", namespace="by hand", chunker=kvlab.Chunker(256, 1))
    assert store.save(kv.token_ids, kv.tensor()) == 333
    found = kv.replaced(store.load(kv.token_ids)[1])
    assert worst(kv, found) == 0


def without_last(kv, other):
    """`kv` with the last token of `other`, which the engine computed itself."""
    keys, values = (
        tuple(torch.cat([a[:-1], b[-1:]]) for a, b in zip(*halves, strict=True))
        for halves in ((kv.keys, other.keys), (kv.values, other.values))
    )
    return replace(kv, keys=keys, values=values)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (5, "text, token ids or what `write` returned, got int"),
        (b"abc", "got bytes"),
        ([1.5], r"whole numbers, got 1\.5"),
        ({"prompt_token_ids": [1], "cache_salt": 5}, "cache_salt must be text, got int"),
    ],
)
def test_what_is_no_prompt_is_refused(llm, prompt, words):
    with pytest.raises(ConfigError, match=words):
        kvlab.attach(llm).read(prompt)
    with pytest.raises(ConfigError, match=r"write takes a KV, .* got Tensor"):
        kvlab.attach(llm).write([1, 2], torch.zeros(1))
    with pytest.raises(ConfigError, match=r"save takes a KV, .* got NoneType"):
        kvlab.attach(llm).save("nowhere", None)
    for other in (None, "x", type(llm), llm.llm_engine):
        with pytest.raises(ConfigError, match=r"takes a vllm\.LLM, not its engine or its class; got"):
            kvlab.attach(other)


def test_the_engines_own_prefix_cache_keeps_them_apart_too():
    from vllm import SamplingParams

    with engine([TIERS], {"enable_prefix_caching": True}) as llm:
        cache = kvlab.attach(llm)
        plain = generate(llm, [prompt(200)])[0].tokens
        kv = cache.read(prompt(200))
        edited = cache.write(prompt(200), zeroed(kv, 2))
        first = answer(llm, edited)
        assert answer(llm, edited) == first
        assert first[0] != plain
        assert first[1] == 199
        assert generate(llm, [prompt(200)])[0].tokens == plain
        assert answer(llm, cache.write(prompt(200), kv))[0] == plain
        for at in range(3):  # computed under the name of a writing: its later requests find none of it
            again = cache.write(prompt(200), zeroed(kv, 2))
            if at == 0:
                llm.generate([again], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
            else:
                ids = [prompt(150), [*prompt(100), *text_ids()[300:380]]][at - 1]
                answer(llm, {**again, "prompt_token_ids": list(ids)})
            assert answer(llm, again) == first
            assert worst(zeroed(kv, 2), without_last(cache.read(again), zeroed(kv, 2))) == 0
        cache.clear()
        assert answer(llm, edited)[0] == plain
        for beyond in (-1, 1 << 40, llm.llm_engine.model_config.get_vocab_size()):
            with pytest.raises(ConfigError, match=rf"token ids must be those of the model, 0 to \d+; got {beyond}"):
                cache.read([5, beyond, 7])
    for call in (lambda: cache.read(prompt(200)), lambda: cache.write(prompt(200), kv)):
        with pytest.raises(ConfigError, match="the engine of this cache has ended; start one and attach to it"):
            call()


def test_the_miss_page_of_an_engines_request_is_what_the_engine_did(tmp_path):
    """Prompts of whole chunks, as a replay knows no partial block."""
    asked = [prompt(256), prompt(512), prompt(256, ending=0)[44:] + prompt(44), prompt(320, ending=1), prompt(512)]
    with engine(["memory://?size=6MiB"]) as llm:
        slots = connector(llm).num_slots
        cache = kvlab.attach(llm)
        hits = [generate(llm, [tokens])[0].hit for tokens in asked]
        assert cache.history == [list(tokens) for tokens in asked]
        pages = [cache.why(at) for at in range(len(asked))]
        save_traffic(cache.traffic(), tmp_path / "trace.jsonl")
        generate(llm, [prompt(320)], salt="bob's")
        pages.append(cache.why())
        assert llm.reset_prefix_cache(reset_connector=True)
        for save in (False, True):
            hints = {"kv_transfer_params": {"kvlab": {"save": save}}}
            hits.append(generate(llm, [prompt(320)], extra_args=hints)[0].hit)
            pages.append(cache.why())
    assert [page.reason for page in pages[-3:]] == ["other_salt", "reset", "not_saved"]
    assert hits[-2:] == [0, 0]
    pages, hits = pages[:5], hits[:5]
    assert slots < 24
    assert [min(page.hit_tokens, page.tokens - 1) for page in pages] == hits
    assert "evicted" in [page.reason for page in pages]
    differs = pages[3].difference
    assert (differs.nearest, differs.token) == (1, 300)
    trace = load_traffic(tmp_path / "trace.jsonl", block_tokens=BLOCK)
    assert [request.num_tokens for request in trace.requests] == [len(tokens) for tokens in asked]
    run = kvlab.simulate(trace, f"{slots} blocks", chunk_tokens=64, connector=True)
    assert run.hit_tokens.tolist() == [page.hit_tokens for page in pages]


def test_the_reason_of_a_page_is_that_of_the_engines_row():
    """Without partial blocks, of which a replay knows nothing: then every hit is the replay's too."""
    rows, pages, traces = [], [], []
    with engine(["memory://?size=6MiB"], save_partial_block=False) as llm:
        cache, slots = kvlab.attach(llm), connector(llm).num_slots
        for asked in random_requests(1, 90, 288):
            if asked is None:
                traces.append(cache.traffic())
                assert llm.reset_prefix_cache(reset_connector=True)
                continue
            tokens, salted, hints = asked
            more = {"extra_args": {"kv_transfer_params": {"kvlab": hints}}} if hints else {}
            rows += [generate(llm, [tokens], salt="bob's" if salted else None, max_tokens=1, **more)[0].row]
            pages.append(cache.why())
        rules = cache.rules
    hits = [row["hit_tokens"] for row in rows]
    assert [page.hit_tokens for page in pages] == hits
    assert not [each for each in zip(pages, rows, strict=True) if not agree(each[0], each[1].get("miss", ""), BLOCK)]
    assert {"hit", "evicted", "differs", "other_salt", "not_saved", "not_loaded", "reset"} <= {p.reason for p in pages}
    assert not any("The engine itself" in line or "Not in the replay" in line for p in pages for line in p.lines())
    run = kvlab.simulate(traces[0], f"{slots} blocks", chunk_tokens=64, connector=rules)
    assert run.hit_tokens.tolist() == hits[: len(traces[0].requests)]


def test_nothing_is_asked_of_an_engine_that_has_requests_of_others(llm):
    from vllm import SamplingParams

    cache, asked = kvlab.attach(llm), prompt(70)
    llm.llm_engine.add_request("other's", {"prompt_token_ids": asked}, SamplingParams(max_tokens=3))
    calls = [lambda: cache.read(asked), lambda: cache.compare(asked, asked), cache.clear]
    for call in calls:
        with pytest.raises(ConfigError, match="the engine has requests that have not ended"):
            call()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert cache.read(asked).num_positions == 70


def test_pages_that_are_not_proven_are_refused(monkeypatch):
    with engine([TIERS]) as llm:
        monkeypatch.setattr(pages_module, "understand", lambda scratch: Opaque("nothing proves it"))
        with pytest.raises(ConfigError, match=r"the pages of layer .* cannot be read as K and V: nothing proves it"):
            kvlab.attach(llm)


def test_an_engine_with_another_connector_is_refused():
    with engine(None) as llm, pytest.raises(ConfigError, match="needs an engine whose connector is kvlab's"):
        kvlab.attach(llm)


def test_layers_with_windows_are_read_and_written(tmp_path):
    made = gemma(tmp_path / "gemma", ["sliding_attention", "full_attention", "sliding_attention", "full_attention"])
    asked = prompt(300)
    with engine([TIERS], made) as llm:
        cache = kvlab.attach(llm)
        for length in (300, 60, 289, 80, 81):
            kv = cache.read(asked[:length])
            assert [len(key) for key in kv.keys] == [min(length, WINDOW), length] * 2
            plain = generate(llm, [asked[:length]], detokenize=False)[0].tokens
            tokens, cached = answer_ids(llm, cache.write(asked[:length], kv))
            assert tokens == plain, length
            assert cached == length - 1
            other = zeroed(kv, 1)
            other = replace(other, keys=tuple(key * 1.5 for key in other.keys))
            found = cache.read(cache.write(asked[:length], other))  # windows too
            assert worst(other, without_last(found, other)) == 0
        whole = kvlab.capture(load_model(made["model"]), asked[:81])
        tokens, cached = answer_ids(llm, cache.write(asked[:81], whole))  # which holds all tokens in each layer
        assert (tokens, cached) == (generate(llm, [asked[:81]], detokenize=False)[0].tokens, 80)
    for at, key in enumerate(kv.keys):
        assert torch.allclose(key, whole.keys[at][-len(key) :], atol=1e-3), at


def answer_ids(llm, asked):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    done = llm.generate([asked], sampling, use_tqdm=False)[0]
    return list(done.outputs[0].token_ids), done.num_cached_tokens
