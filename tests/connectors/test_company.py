"""One of several connectors, and vLLM's roles."""

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

import kvlab
from tests.connectors.damage import flip_a_bit, objects
from tests.connectors.engine import PATIENT, connector, engine, generate, prompt

PROMPT = prompt(300)
SLOW = {**PATIENT, "report": True, "chunk_tokens": 64}


def company(*tiers, policy="recompute", others=(), **settings):
    """Settings of an engine whose MultiConnector holds kvlab's and `others`."""
    from vllm.config import KVTransferConfig

    children = [*others, kvlab.vllm_config(tiers, **SLOW, **settings)]
    return {
        "kv_transfer_config": KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_load_failure_policy=policy,
            kv_connector_extra_config={"connectors": children},
        )
    }


def ours(llm):
    """The last connector of several, or the only one."""
    return getattr(connector(llm), "_connectors", [connector(llm)])[-1]


def settle(llm) -> None:
    """Steps, until what was saved is in the secondary tiers."""
    scheduler = ours(llm).scheduler
    while scheduler.saves.in_flight:
        generate(llm, [[5] * 3], max_tokens=1)


@pytest.mark.parametrize("secondary", [False, True], ids=["memory", "with-disk"])
def test_hits_are_loaded_and_failures_recomputed(tmp_path, expected, secondary):
    tiers = ["memory://?size=256MiB"] * (not secondary) + [f"file://{tmp_path}?size=1GiB"] * secondary
    with engine(None, company(*tiers)) as llm:
        counters = ours(llm).scheduler.counters
        assert generate(llm, [PROMPT])[0].tokens == expected(PROMPT)
        settle(llm)
        answer = generate(llm, [PROMPT])[0]
        assert (answer.hit, answer.tokens) == (299, expected(PROMPT))
        assert (counters["load_rollbacks"], counters["loaded_bytes"] > 0) == (0, True)
        if secondary:
            for path in objects(tmp_path):
                flip_a_bit(path, [])
            answer = generate(llm, [PROMPT])[0]
            assert (answer.hit, answer.tokens) == (0, expected(PROMPT))
        assert not ours(llm).hook_errors


class Claims(KVConnectorBase_V1):
    """Says that it has the first four chunks of every prompt, and loads nothing."""

    claimed = 0

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return self.claimed, False

    def build_connector_meta(self, scheduler_output):
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context, **kwargs): ...
    def wait_for_layer_load(self, layer_name): ...
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): ...
    def wait_for_save(self): ...
    def update_state_after_alloc(self, request, blocks, num_external_tokens): ...


def test_what_another_connector_loaded_is_not_stored(tmp_path, expected, monkeypatch):
    """How well it did so is not known here."""
    other = {"kv_connector": "Claims", "kv_connector_module_path": __name__, "kv_role": "kv_both"}
    with engine(None, company("memory://?size=256MiB", others=[other])) as llm:
        counters = ours(llm).scheduler.counters
        monkeypatch.setattr(Claims, "claimed", 256)
        generate(llm, [PROMPT])
        assert counters["saved_tokens"] == 0
        monkeypatch.setattr(Claims, "claimed", 0)
        answer = generate(llm, [PROMPT])[0]
        assert (answer.hit, answer.tokens) == (0, expected(PROMPT))
        assert counters["saved_tokens"] == 300
        assert not ours(llm).hook_errors


def test_a_policy_that_would_end_requests_is_refused(tmp_path):
    from kvlab.errors import ConfigError

    with pytest.raises(ConfigError, match='set "kv_load_failure_policy": "recompute" beside'):  # noqa: SIM117
        with engine(None, company("memory://?size=64MiB", policy="fail")):
            pass


def test_two_of_ours_are_refused():
    from kvlab.errors import ConfigError

    other = kvlab.vllm_config(["memory://?size=64MiB"])
    with pytest.raises(ConfigError, match="stands twice in one engine"):  # noqa: SIM117
        with engine(None, company("memory://?size=64MiB", others=[other])):
            pass


@pytest.mark.parametrize("role", ["kv_consumer", "kv_producer"])
def test_a_consumer_stores_nothing_and_a_producer_loads_nothing(tmp_path, expected, role):
    from vllm.config import KVTransferConfig

    tiers = ["memory://?size=64MiB", f"file://{tmp_path}?size=1GiB"]
    chosen = {**kvlab.vllm_config(tiers, **SLOW), "kv_role": role}
    with engine(None, {"kv_transfer_config": KVTransferConfig(**chosen)}) as llm:
        answers = []
        for _ in range(2):
            answers += generate(llm, [PROMPT])
            settle(llm)
        assert [answer.tokens for answer in answers] == [expected(PROMPT)] * 2
        assert [answer.hit for answer in answers] == [0, 0]
        assert bool(objects(tmp_path)) is (role == "kv_producer")
        assert not connector(llm).hook_errors
    with engine(tiers) as llm:
        assert generate(llm, [PROMPT])[0].hit == (299 if role == "kv_producer" else 0)
        settle(llm)
    with engine(None, {"kv_transfer_config": KVTransferConfig(**chosen)}) as llm:
        answer = generate(llm, [PROMPT])[0]
        assert (answer.hit, answer.tokens) == (299 if role == "kv_consumer" else 0, expected(PROMPT))
