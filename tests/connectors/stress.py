"""Random traffic through a real vLLM (a tiny random model, float32) with kvlab over tiers that fail, corrupt, lose and
stall; every token against an engine without a connector.

    python -m tests.connectors.stress SEED ROUNDS [llama|gemma|lora]

Each round is an engine of its own, with other settings and faults. Requests arrive, are aborted, share prefixes, carry
salts; caches are reset; where vLLM keeps no freed pages of its own, these are overwritten at once. After a round
nothing may be leased or left over, and an engine over the same folder without faults answers every prompt again, so
that wrong KV that was persisted is found.
"""

import argparse
import random
import shutil
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch

from kvlab.datasets.tiny_model import SIZES, VOCABULARY, tiny_adapter, tiny_llama
from kvlab.stores.wrappers import FaultStore
from tests.connectors.damage import overwritten
from tests.connectors.engine import connector, drain, engine, objects_of, worker

BLOCK = 32
POLICIES = ["lru", "s3fifo", "arc", "fifo", "lfu", "mru"]
PLENTY = {"kv_cache_memory_bytes": 48 << 20}


def tiny_model(folder: Path, kind: str) -> str:
    if kind != "gemma":
        return tiny_llama(folder)
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, sliding_window=80,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, initializer_range=0.2,
        query_pre_attn_scalar=64, **SIZES,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


class UnevenFaults(FaultStore):
    """Some calls are slow, most are not."""

    def __init__(self, inner, rng, **faults):
        super().__init__(inner, **faults)
        self._rng, self._slowest = rng, faults["slow_s"]

    def _around(self, method, num_bytes):
        self.slow_s = self._rng.random() ** 3 * self._slowest
        super()._around(method, num_bytes)


class Stress:
    """Rounds of random traffic; `wrong` lists what must not be."""

    def __init__(self, folder: Path, seed: int, kind: str = "llama") -> None:
        self.folder, self.kind, self.rng = folder, kind, random.Random(seed)
        self.settings = {
            "model": tiny_model(folder / "model", kind), "skip_tokenizer_init": True, "max_model_len": 448,
            "block_size": BLOCK,
        }  # fmt: skip
        self.adapters = {}
        if kind == "lora":
            from vllm.lora.request import LoRARequest

            self.settings |= {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
            paths = {at: tiny_adapter(folder / f"adapter-{at}", at) for at in (1, 2)}
            self.adapters = {at: LoRARequest(f"adapter-{at}", at, path) for at, path in paths.items()}
        self.prompts = self._prompts()
        # Not the base model beside adapters: vLLM's CPU build answers it otherwise where a step holds both, without a
        # connector too.
        step = len(self.adapters) or 1  # as many keys with adapters as without
        self.keys = [(at, adapter) for at in range(0, len(self.prompts), step) for adapter in self.adapters or (0,)]
        self.wrong: list[object] = []
        self.totals: Counter[str] = Counter()
        with engine(None, self.settings | PLENTY) as llm:
            self.want = self._ask_all(llm)
        assert len({tuple(tokens) for tokens in self.want.values()}) > len(self.want) // 2

    def _prompts(self) -> list[list[int]]:
        """Documents cut anywhere, some with endings of their own, and lengths around the edges of blocks."""
        rng = self.rng
        documents = [[rng.randrange(3, VOCABULARY) for _ in range(400)] for _ in range(6)]
        found = [document[:n] for document in documents for n in rng.sample(range(20, 380), 9)]
        for document in documents:
            for n in rng.sample(range(20, 300), 4):
                found.append(document[:n] + [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 60))])
        return found + [documents[0][:n] for n in (31, 32, 33, 63, 64, 65, 127, 128, 129, 1, 2, 3)]

    def _sampling(self, **more):
        from vllm import SamplingParams

        return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False, **more})

    def _ask_all(self, llm, salt=None):
        answers = {}
        for adapter in self.adapters or (0,):
            keys = [key for key in self.keys if key[1] == adapter]
            inputs = [
                {"prompt_token_ids": self.prompts[at], **({"cache_salt": salt} if salt else {})} for at, _ in keys
            ]
            outputs = llm.generate(inputs, self._sampling(), use_tqdm=False, lora_request=self.adapters.get(adapter))
            answers |= {key: list(out.outputs[0].token_ids) for key, out in zip(keys, outputs, strict=True)}
        return answers

    def round(self, number: int) -> None:
        """One engine, some hundred requests, then every prompt again over what was persisted."""
        rng = random.Random(self.rng.randrange(1 << 60))
        folder = self.folder / f"kv-{number}"
        page = 2 * 2 * 64 * 4 * BLOCK * (2 if self.kind == "gemma" else 4)
        chunk = rng.choice([32, 64, 128])
        num_slots = max(rng.choice([8, 12, 16, 30, 60, 200]), 2 * chunk // BLOCK + 1)
        connector_settings = {
            "chunk_tokens": chunk, "save_partial_block": rng.random() < 0.7, "save_generated": rng.random() < 0.3,
            "store_threshold": rng.choice([1, 1, 2]), "admission": rng.random() < 0.2,
            "lookup_timeout_ms": rng.choice([0, 20, 1000, 60_000]), "min_hit_tokens": rng.choice([1, 1, 40]),
        }  # fmt: skip
        tiers = []
        has_secondary = rng.random() < 0.85
        if rng.random() < 0.8 or not has_secondary:
            tiers.append(f"memory://?size={num_slots * page}&policy={rng.choice(POLICIES)}")
        else:
            connector_settings["staging"] = num_slots * page
        if has_secondary:
            serde = rng.choice(["naive", "lossless"])
            tiers.append(f"file://{folder}?size={rng.choice([page * 60, page * 2000])}&serde={serde}")
        settings = self.settings | {
            "kv_cache_memory_bytes": rng.choice([60, 80, 300] if self.kind == "gemma" else [26, 40, 80, 300]) * page,
            "enable_prefix_caching": rng.random() < 0.6, "max_num_seqs": rng.choice([2, 4, 8]),
            "max_num_batched_tokens": rng.choice([64, 100, 512, 2048]), "enable_chunked_prefill": True,
            "async_scheduling": rng.random() < 0.5,
        }  # fmt: skip
        faults = {
            "fail": rng.choice([0, 0.03, 0.2]), "corrupt": rng.choice([0, 0.05, 0.3]),
            "truncate": rng.choice([0, 0.05]), "lose": rng.choice([0, 0.1]), "slow_s": rng.choice([0, 0.02, 0.3]),
        }  # fmt: skip
        about = {"round": number, "tiers": tiers, "faults": faults, **connector_settings, **settings}
        in_thread = has_secondary and rng.random() < 0.6  # else a process that is killed now and then
        about["tier worker"] = "thread" if in_thread else "process"
        with engine(tiers, settings, in_thread=in_thread, **connector_settings) as llm:
            if in_thread:
                tier = objects_of(llm)
                tier.store = UnevenFaults(tier.store, rng, seed=rng.randrange(1 << 30), **faults)
            self.kills = 0.01 if has_secondary and not in_thread else 0.0
            pages = nullcontext() if rng.random() < 0.4 else overwritten(llm)
            with pages:
                self._traffic(llm, rng, about)
            drain(llm)
            self._check_nothing_is_left(llm, about)
        if has_secondary:
            self._check_what_was_persisted(tiers[-1], chunk, about)
        shutil.rmtree(folder, ignore_errors=True)

    def _traffic(self, llm, rng, about) -> None:
        vllm, live, left, number = llm.llm_engine, {}, rng.choice([150, 300]), 0
        patience = {}  # steps until a request is aborted: drawn as it arrives, so a slow machine aborts no more of them
        while left > 0 or live:
            if left > 0 and len(live) < 12 and rng.random() < 0.5:
                for _ in range(rng.choice([1, 1, 2, 6])):
                    key = (
                        rng.choice(self.keys)
                        if rng.random() < 0.5
                        else self.keys[int(rng.random() ** 4 * len(self.keys))]
                    )
                    request_id, number, left = f"{about['round']}-{number}", number + 1, left - 1
                    more = {"n": rng.choice([2, 3]), "temperature": 0.7, "top_k": 1} if rng.random() < 0.15 else {}
                    if rng.random() < 0.04 and not self.adapters:
                        more["prompt_logprobs"] = 1
                    sampling = self._sampling(max_tokens=rng.choice([1, 4, 8]), **more)
                    inputs = {"prompt_token_ids": self.prompts[key[0]]}
                    if rng.random() < 0.4:
                        inputs["cache_salt"] = rng.choice(["a", "b", "c"])
                    vllm.add_request(request_id, inputs, sampling, lora_request=self.adapters.get(key[1]))
                    live[request_id] = (key, sampling.max_tokens)
                    if rng.random() < 0.12:
                        patience[request_id] = int(rng.random() ** 2 * 30)
            for request_id in [request_id for request_id, steps in patience.items() if steps == 0]:
                if live.pop(request_id, None):
                    vllm.abort_request([request_id])
                    self.totals["aborted"] += 1
            patience = {request_id: steps - 1 for request_id, steps in patience.items() if steps}
            if rng.random() < self.kills:
                worker(llm).tiers._worker.kill()
                self.totals["kills"] += 1
            if rng.random() < 0.004:
                llm.reset_prefix_cache(reset_connector=rng.random() < 0.5)
            for output in vllm.step():
                if output.finished and output.request_id in live:
                    key, max_tokens = live.pop(output.request_id)
                    self.totals["finished"] += 1
                    row = (output.kv_transfer_params or {}).get("kvlab", {})
                    self.totals["hits"] += bool(row.get("hit_tokens"))
                    for choice in output.outputs:
                        if list(choice.token_ids) != self.want[key][:max_tokens]:
                            self.wrong.append(("tokens", about, key, row, self.want[key], list(choice.token_ids)))

    def _check_nothing_is_left(self, llm, about) -> None:
        ours = connector(llm)
        scheduler, index = ours.scheduler, ours.scheduler.index
        for at in range(4000):  # reports come with steps
            if not (scheduler.loads.in_flight or scheduler.saves.in_flight):
                break
            llm.generate([{"prompt_token_ids": [5 + at % 64]}], self._sampling(max_tokens=1), use_tqdm=False)
        held = [slot for entry in index._entries.values() for slot in entry.slots]
        faults = {
            "loads in flight": scheduler.loads.in_flight, "saves in flight": scheduler.saves.in_flight,
            "leased slots": index.num_leased_slots, "states": scheduler._states, "save states": scheduler.saves._states,
            "arrived": scheduler.loads._arrived, "hook errors": ours.hook_errors,
            "slot mismatches": worker(llm).counters["slot_mismatch"],
            "slots with two owners": len(held) - len(set(held)),
            "lost slots": len(held) + index.num_free != index.num_slots,
            "engine errors": scheduler.counters["errors"],
        }  # fmt: skip
        if found := {name: fault for name, fault in faults.items() if fault}:
            self.wrong.append(("left over", about, found))
        self.totals["bad objects"] += scheduler.counters["bad_objects"]
        self.totals["evictions"] += index.num_evictions

    def _check_what_was_persisted(self, tier: str, chunk: int, about) -> None:
        options = {"chunk_tokens": chunk, "save_partial_block": about["save_partial_block"]}
        with engine(["memory://?size=64MiB", tier], self.settings | PLENTY, **options) as llm:
            for salt in (None, "a"):
                for key, tokens in self._ask_all(llm, salt).items():
                    if tokens != self.want[key]:
                        self.wrong.append(("persisted", about, key, salt, self.want[key], tokens))
            self.totals["persisted hits"] += connector(llm).scheduler.counters["hit_requests"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("rounds", type=int)
    parser.add_argument("kind", nargs="?", default="llama", choices=["llama", "gemma", "lora"])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        stress = Stress(folder, options.seed, options.kind)
        for number in range(options.rounds):
            stress.round(number)
            print(number, dict(stress.totals), f"wrong: {len(stress.wrong)}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for wrong in stress.wrong:
        print(wrong)
    raise SystemExit(bool(stress.wrong))


if __name__ == "__main__":
    main()
