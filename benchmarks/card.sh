#!/usr/bin/env bash
# A card that is there for a quarter of an hour: what to run, the most important first.
#
#     bash benchmarks/card.sh one OUT    # 7 minutes: right results everywhere; decoding, compression
#     bash benchmarks/card.sh two OUT    # 7 minutes: kernels one by one, other models, sanitizer
#
# Needs what benchmarks/gpu.py needs: moepress's dependencies, nothing compiled. Before, on any
# machine: `PYTHONPATH=src python benchmarks/on_gpu/kl.py .gpu/kl` makes the models of the part `kl`.
set -uo pipefail # what fails must not keep the rest from running
cd "$(dirname "$0")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
out=$2
mkdir -p "$out"
measure() { python3 benchmarks/gpu.py --out "$out" --only "$1" --minutes "$2"; }
case $1 in
  one)
    python3 -m moepress doctor --kernels 2>&1 | tee "$out/doctor.txt"
    measure checks,attention,small,route,captured,divided 3
    measure model,kl,compress 3
    ;;
  two)
    measure ops,prefill,search,shapes,compile 4
    measure sanitize,families 3
    ;;
esac
