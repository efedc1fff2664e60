"""Does an engine that slept serve right KV? Sleep mode on a GPU, where pages and weights really go away.

    python benchmarks/gpu_sleep.py MODEL [--serde int8] [--folder FOLDER] [--rounds 3]

One engine with `enable_sleep_mode`, a memory tier and a folder. Each round: prompts are computed, which stores them,
and while saves may be under way the engine falls asleep (level 1, in the last round level 2 with `reload_weights`), and
the GPU memory that it has given back is filled by this process with bytes of no meaning, then freed. Awake again, the
first answers must be computed, the second ones hits, and all of them those of the first round; memory that kvlab's
kernels read, such as addresses of pages, must have survived. Ends with status 1 and what differed; a row a round.
"""

import argparse
import json
import random
import sys
import tempfile

import torch

LENGTHS = (300, 777, 1500)


def prompts():
    rng = random.Random(0)
    return [[rng.randrange(1000, 40000) for _ in range(length)] for length in LENGTHS]


def ask(llm, sampling):
    """Tokens and hits of each prompt, one after the other."""
    done = [llm.generate([{"prompt_token_ids": p}], sampling, use_tqdm=False)[0] for p in prompts()]
    rows = [(each.kv_transfer_params or {}).get("kvlab", {}) for each in done]
    return [list(each.outputs[0].token_ids) for each in done], [int(row.get("hit_tokens", 0)) for row in rows]


def spoil() -> int:
    """Fill the GPU memory that is free, and let go of it; its GiB."""
    free = torch.cuda.mem_get_info()[0] * 9 // 10
    taken = torch.full((free // 8,), 0x7FF8DEADBEEFDEAD, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    del taken
    torch.cuda.empty_cache()
    return free >> 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--serde", default="naive")
    parser.add_argument("--folder", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load-format", default="auto")
    given = parser.parse_args()

    import os

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    import kvlab

    folder = given.folder or tempfile.mkdtemp(prefix="kvlab-sleep-")
    serde = "" if given.serde == "naive" else f"&serde={given.serde}"
    tiers = [f"memory://?size=2GiB{serde}", f"file://{folder}?size=8GiB{serde}"]
    llm = LLM(
        given.model, enable_sleep_mode=True, enforce_eager=True, enable_prefix_caching=False, max_model_len=2048,
        gpu_memory_utilization=0.3, dtype="float32" if given.serde == "naive" else "auto", skip_tokenizer_init=True,
        load_format=given.load_format,
        kv_transfer_config=KVTransferConfig(**kvlab.vllm_config(tiers, report=True, admission=False)),
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    right, hits = ask(llm, sampling)
    wrong = ["hits before anything was stored"] if any(hits) else []
    for number in range(1, given.rounds + 1):
        level = 2 if number == given.rounds and given.load_format == "auto" else 1
        before = torch.cuda.mem_get_info()[0]
        llm.sleep(level)
        freed = torch.cuda.mem_get_info()[0] - before
        spoilt = spoil()
        llm.wake_up()
        if level == 2:
            llm.collective_rpc("reload_weights")
        first, none = ask(llm, sampling)
        second, hits = ask(llm, sampling)
        row = {"round": number, "level": level, "freed_gib": round(freed / 2**30, 1), "spoilt_gib": spoilt}
        print(json.dumps({**row, "hits_first": none, "hits_second": hits}), flush=True)
        if first != right:
            wrong.append(f"round {number}: what was computed after a sleep differs")
        if any(none):
            wrong.append(f"round {number}: hits of what was stored before the sleep")
        if second != right and given.serde == "naive":
            wrong.append(f"round {number}: hits answer otherwise")
        if min(hits) == 0:
            wrong.append(f"round {number}: nothing of what was computed after the sleep was found")
    print("; ".join(wrong) or "every answer is the first one's")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
