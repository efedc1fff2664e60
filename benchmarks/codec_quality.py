"""What does a codec cost in quality, through a real vLLM? Each prompt twice: computed, then a hit that was decoded.

    python benchmarks/codec_quality.py [--model FOLDER] [--prompts 8] [--out data/measured/codec_quality.csv]

The engine runs on a CPU in float32, so that a hit of raw pages gives the same words (row `naive`) and nothing but the
codec differs. Prompts are Python's own source. Of each hit: the share of greedy tokens that are those of the computed
prompt, up to the first that is not; and how the first token's distribution moved, over the 20 likeliest tokens.
"""

import argparse
import csv
import os
import subprocess
import sys
from json import dumps, loads
from pathlib import Path
from statistics import mean

from serde_rows import ROOT, about, write
from serde_texts import code, token_rows

KINDS = (
    "naive@32",
    "fp8@32",
    "int8@32",
    "int4@32",
    "int4@128",
    "rotated4@32",
    "centered:theta=100000@32",
)  # and the tokens of a block
TOP = 20


def measured(model: str, kind: str, block_tokens: int, rows: list[list[int]], num_greedy: int) -> dict[str, object]:
    """One engine with a memory tier of this kind."""
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    import kvlab
    from kvlab.serving.quality import divergence

    settings = kvlab.vllm_config([f"memory://?size=1GiB&serde={kind}"], report=True, admission=False)
    llm = LLM(
        model,
        dtype="float32",
        block_size=block_tokens,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=2048,
        max_num_seqs=2,
        kv_cache_memory_bytes=1 << 29,
        gpu_memory_utilization=0.3,
        kv_transfer_config=KVTransferConfig(**settings),
    )
    sampling = SamplingParams(temperature=0, max_tokens=num_greedy, ignore_eos=True, logprobs=TOP)

    def asked(row: list[int]) -> tuple[list[int], dict[int, float], int]:
        (output,) = llm.generate([{"prompt_token_ids": row}], sampling, use_tqdm=False)
        first = {token: each.logprob for token, each in output.outputs[0].logprobs[0].items()}
        return list(output.outputs[0].token_ids), first, output.kv_transfer_params["kvlab"].get("hit_tokens", 0)

    agreements, differences, divergences, same_first, hits = [], [], [], [], 0
    for row in rows:
        words, before, hit = asked(row)
        again, after, hit = asked(row)
        hits += hit
        alike = next((at for at, (a, b) in enumerate(zip(words, again, strict=True)) if a != b), len(words))
        agreements.append(alike / len(words))
        same_first.append(words[0] == again[0])
        differences.append(abs(before[words[0]] - after.get(words[0], min(after.values()))))
        divergences.append(divergence(before, after))
    if hits != sum(len(row) - 1 for row in rows):
        raise SystemExit(f"only {hits} tokens were hits")
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    config = llm.llm_engine.model_config.hf_config
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * block_tokens
    slot_bytes = connector.config.arena_bytes / connector.num_slots
    return {
        "kind": kind,
        "block_tokens": block_tokens,
        "bits_per_element": round(8 * slot_bytes / elements, 3),
        "greedy_agreement": round(mean(agreements), 4),
        "first_token_equal": round(mean(same_first), 4),
        "first_logprob_difference": round(mean(differences), 5),
        "first_kl": round(mean(divergences), 6),
        "prompts": len(rows),
        "prompt_tokens": len(rows[0]),
        "greedy_tokens": num_greedy,
        "model": Path(model).name,
        "vllm": vllm.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder (default: the demo model)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=500, help="of a prompt (default: %(default)s)")
    parser.add_argument("--greedy", type=int, default=32)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="of which rows are made; others stay")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # a kind and its block size, in this process
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "measured" / "codec_quality.csv")
    args = parser.parse_args()
    if not args.model:
        from kvlab.datasets.demo_model import demo_model

        args.model = str(demo_model())
    if args.one:
        kind, _, block = args.one.rpartition("@")
        rows = token_rows(args.model, code(args.prompts), args.tokens)
        print(dumps(measured(args.model, kind, int(block), rows, args.greedy)))
        return
    machine = about()
    found = {f"{row['kind']}@{row['block_tokens']}": row for row in (read(args.out) if args.out.exists() else [])}
    for name in args.kinds:
        sizes = ["--prompts", args.prompts, "--tokens", args.tokens, "--greedy", args.greedy]
        command = [sys.executable, __file__, "--model", args.model, *map(str, sizes), "--one", name]
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = {**loads(done.stdout.splitlines()[-1]), **machine}
        print(found[name])
        write(args.out, list(found.values()))


def read(path: Path) -> list[dict[str, object]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
