#!/usr/bin/env bash
# The rows of data/measured/ that take a GPU, made again:
#
#   MODEL=FOLDER OUT=FOLDER bash benchmarks/gpu_rows.sh PART ...
#
#   check     bytes, order of copies, clocks and pinning of kvlab/paged
#   kernels   the kernels' tests, then again under compute-sanitizer
#   codecs    codecs and slots with them against their twins and their speed, a few again under compute-sanitizer; 8 minutes
#   transfer  copies beside vLLM's and LMCache's
#   profile   where the time of kvlab's copies goes
#   ttft      one request at a time, backends in turns
#   pressure  500 requests with evictions, CUDA graphs on (the small model, or KVLAB_MODEL)
#   tokens    the same tokens with the cache and without, CUDA graphs on (likewise)
#   faults    the same where loads fail, requests are aborted and freed pages are overwritten at once (likewise)
#   tenants   nothing that others left in a page is stored (likewise; TENANTS=gemma: several KV cache groups, from 0.32 on)
#   ranks     the same tokens with two tensor-parallel ranks, on two GPUs
#   steps     hooks in and out within one engine: what a save and a hit cost, with intervals
#   first     what first runs cost: SEEDS (7) of them, `none` twice; 1.6 minutes of requests for each
#   memory    five backends in host memory side by side, three workloads, two runs; 17 minutes
#   tiers     six backends on disk and in Redis, likewise; 20 minutes
#
# (Minutes are prompts over rate; starting servers comes on top.)
#
# The model's weights may be random (LOAD_FORMAT=dummy, the default). Servers of one part share the GPU: reckon with the
# weights, POOL and 3 GB for each; on a smaller card name fewer: BACKENDS=none,kvlab-disk,lmcache-disk. Parts may run at
# the same time on GPUs of their own (CUDA_VISIBLE_DEVICES). All of a part is one comparison; parts are none.
set -u
python=${PYTHON:-python3} load_format=${LOAD_FORMAT:-dummy}
: "${MODEL:?a folder or hub id}" "${OUT:?a folder for rows and logs}"
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
if [ -d "$MODEL" ]; then MODEL=$(cd "$MODEL" && pwd); fi
cd "$(dirname "$0")/.."

# LMCache loads nothing where a step replays one full CUDA graph (docs/guide/benchmark.md), so none does here.
graphs=${COMPILATION:-'{"cudagraph_mode": "PIECEWISE"}'}

bench() { # name of the part, then flags of `kvlab bench`. Random weights would end an answer anywhere.
  "$python" -m kvlab bench --together --model "$MODEL" --load-format "$load_format" --out "$OUT/serving_$1.jsonl" \
    --gpu-memory-utilization 0.1 --kv-cache-memory-bytes "${POOL:-4G}" --max-model-len "${MAX_MODEL_LEN:-8192}" \
    --folder "$OUT/$1" --ignore-eos "${@:2}" -- --compilation-config "$graphs"
}
workloads=(--dataset sharegpt,rounds,documents --num-prompts "${NUM_PROMPTS:-1024,256,48}" --request-rate "${RATES:-16,12,3}")

with_graphs() {
  KVLAB_TEST_GRAPHS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 "$python" -m pytest -q -p no:cacheprovider --timeout 900 "$@"
}

part() {
  case $1 in
    check) "$python" benchmarks/gpu_transfer.py --check-only ;;
    kernels)
      tests=("$python" -m pytest -q -p no:cacheprovider tests/test_kernels.py tests/test_paged.py)
      "${tests[@]}" && compute-sanitizer --target-processes all --error-exitcode 9 "${tests[@]}" ;;
    codecs)
      "$python" benchmarks/gpu_coded_slots.py --rows "$OUT/gpu_coded_slots.csv" &&
        "$python" benchmarks/gpu_codecs.py --rows "$OUT/gpu_codecs.csv" &&
        compute-sanitizer --error-exitcode 9 "$python" benchmarks/gpu_codecs.py --check-only --small ;;
    transfer)
      "$python" benchmarks/gpu_transfer.py --peers --layouts NHD --rows "$OUT/gpu_transfer.csv" --staging "${STAGING:-128MiB}" ;;
    profile) "$python" benchmarks/gpu_transfer_profile.py --rows "$OUT/gpu_transfer_profile.csv" --staging "${STAGING:-128MiB}" ;;
    ttft)
      "$python" benchmarks/gpu_ttft.py "$MODEL" --load-format "$load_format" --graphs "${GRAPHS:-none}" \
        --backends "${TTFT_BACKENDS:-none,vllm-prefix,kvlab,lmcache,vllm-offload}" --rows "$OUT/gpu_ttft.csv" ;;
    pressure) with_graphs tests/connectors/test_pressure.py ;;
    tokens) with_graphs tests/connectors/test_same_tokens.py ;;
    faults) with_graphs tests/connectors/test_{lost_loads,freed_blocks,aborts,ownership}.py ;;
    tenants) with_graphs tests/connectors/test_tenants.py -k "${TENANTS:-demo}" ;;
    ranks) with_graphs tests/connectors/test_ranks.py ;;
    steps) "$python" benchmarks/gpu_steps.py "$MODEL" --load-format "$load_format" --rows "$OUT/gpu_steps.csv" ;;
    first)
      seeds=$(seq -s, 0 $((${SEEDS:-7} - 1)))
      bench first --backends "${BACKENDS:-none,kvlab-memory,none}" --dataset "$(sed -E 's/[0-9]+/sharegpt/g' <<< "$seeds")" --seed "$seeds" \
        --num-prompts "${NUM_PROMPTS:-500}" --request-rate "${RATES:-16}" --runs 1 --cache-size "${CACHE:-26GiB}" ;;
    memory)
      names=${BACKENDS:-none,vllm-prefix,kvlab-memory,lmcache-cpu,vllm-offload} larger=()
      [[ $names != *vllm-prefix* ]] || larger=(--flags-of "vllm-prefix=--kv-cache-memory-bytes ${PREFIX_POOL:-28G}")
      bench memory --backends "$names" "${workloads[@]}" "${larger[@]}" --cache-size "${CACHE:-26GiB}" ;;
    tiers)
      bench tiers --backends "${BACKENDS:-none,kvlab-disk,lmcache-disk,kvlab-redis,lmcache-redis,kvlab-tiered}" \
        "${workloads[@]}" --cache-size "${CACHE:-18GiB}" ;;
    *) echo "unknown part: $1" >&2; return 2 ;;
  esac
}

worst=0
for name in "$@"; do
  part "$name" > "$OUT/$name.log" 2>&1
  status=$?
  echo "$name: ended with $status"
  grep -vE '^\s*$' "$OUT/$name.log" | tail -n 12
  [ $status -eq 0 ] || worst=$status
done
exit "$worst"
