#!/usr/bin/env bash
# Run all measurements for a GPU machine in at most ten minutes:
#
#     benchmarks/gpu.sh OUT             writes results.jsonl, report.md and a log of each part to the folder OUT
#     benchmarks/gpu.sh --smoke OUT     runs the same programs on the CPU with tiny sizes, to test the script
#
# $PYTHON names the interpreter of the environment (default: python). No network is needed. If a part fails or exceeds
# its time limit, this is recorded, the other parts still run, and the script ends with status 1.
set -uo pipefail

smoke=false
if [ "${1:-}" = --smoke ]; then smoke=true; shift; fi
if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: benchmarks/gpu.sh [--smoke] OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
results=$out/results.jsonl
: > "$results"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
deadline=$((SECONDS + 585)) # the report takes a few seconds more
failed=0

# part NAME LIMIT COMMAND…: run a command for at most LIMIT seconds; record a failure.
# JSON lines of its standard output are results; all output goes to NAME.log.
part() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    local left=$((deadline - SECONDS))
    if [ $left -lt $limit ]; then limit=$left; fi
    echo "== $name (at most ${limit} s)" >&2
    if [ $limit -lt 5 ]; then
        echo "no time was left" > "$out/$name.log"
        status=124
    else
        timeout --kill-after=10 "$limit" "$@" > "$out/$name.out" 2> "$out/$name.log"
        status=$?
        grep '^{' "$out/$name.out" >> "$results"
        cat "$out/$name.out" >> "$out/$name.log"
        rm "$out/$name.out"
    fi
    if [ $status -ne 0 ]; then
        failed=1
        printf '{"benchmark": "failure", "part": "%s", "status": %d, "seconds": %d}\n' \
            "$name" $status $((SECONDS - begin)) >> "$results"
        echo "== $name failed with status $status; the end of $name.log:" >&2
        tail -n 15 "$out/$name.log" >&2
    fi
}

step() { # step NAME LIMIT OPTIONS…: run pretrain_step.py, with a profile if PROFILE is set
    local name=$1 limit=$2 profile=()
    shift 2
    if [ -n "${PROFILE:-}" ]; then profile=(--profile "$out/$name.profile.json"); fi
    part "$name" "$limit" "$python" benchmarks/pretrain_step.py ${profile[@]+"${profile[@]}"} "$@"
    if [ -f "$out/$name.profile.json" ]; then cat "$out/$name.profile.json" >> "$results"; fi
}

if $smoke; then
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    part tests 60 "$python" -m pytest -p no:cacheprovider -q tests/model/test_masking.py
    part masked-lm 60 "$python" benchmarks/masked_lm.py --device cpu --precision fp32 --rows 24 --vocab 199 --hidden 16 \
        --repeats 2
    PROFILE=1 step step-tiny 150 --device cpu --size tiny --batch 2 --vocab 199 --repeats 1 --segment 2 --warmup 1 \
        --skip-memory data.num_workers=0
else
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "error: no CUDA device; use --smoke on a CPU")' || exit 2
    # Most important first: parts that do not fit into the ten minutes are recorded as failed.
    PROFILE=1 step step-small 150 --size small --batch 128
    part masked-lm 60 "$python" benchmarks/masked_lm.py --device cuda --precision bf16
    PROFILE=1 step step-small-compiled 110 --size small --batch 128 --compile true --skip-memory
    step step-small-cudagraphs 110 --size small --batch 128 --compile reduce-overhead --what b,c --skip-memory
    step step-base-compiled 100 --size base --batch 64 --compile true --what b --segment 10 --warmup 3 --repeats 3 --skip-memory
    step step-base 80 --size base --batch 64 --what a,b --segment 10 --warmup 3 --repeats 2 --skip-memory
    step step-large 80 --size large --batch 16 --what a,b --segment 8 --warmup 3 --repeats 2 --skip-memory
    part tests 150 "$python" -m pytest -p no:cacheprovider -q -m cuda tests
fi

"$python" benchmarks/report.py "$results" > "$out/report.md" || failed=1
echo "results: $results, $out/report.md" >&2
exit $failed
