#!/usr/bin/env bash
# TTFT of a hit, one backend after the other on one machine:  bash benchmarks/gpu_all.sh MODEL OUT [BACKEND ...]
set -u
model=$1 out=$2; shift 2
for backend in "${@:-none vllm-prefix kvlab lmcache vllm-offload}"; do
  timeout "${LIMIT:-110}" python3 benchmarks/gpu_ttft.py "$model" --backend "$backend" --rows "$out/gpu_ttft.csv" > "$out/$backend.log" 2>&1
  echo "== $backend rc $?"; grep -E "^backend=|^\{" "$out/$backend.log" || tail -5 "$out/$backend.log"
done
