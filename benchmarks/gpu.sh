#!/usr/bin/env bash
# Run the measurements for a GPU machine in at most ten minutes, without a network:
#
#     benchmarks/gpu.sh OUT               all parts, the most important first
#     benchmarks/gpu.sh OUT small base    only these parts
#     benchmarks/gpu.sh --smoke OUT       the same programs on the CPU with tiny sizes, to test this script
#
# Parts: tests, small, captured, base, convert, same-seed, pretrain, glue; only if named: masked-lm, large.
#
# Writes to the folder OUT: results.jsonl (one line per result, as soon as it is there), report.md (after every part),
# gpu.log (all output), metrics.jsonl and glue.md (of the pretraining and finetuning runs). Each part has a time limit.
# If one fails or exceeds its limit, this is recorded, the other parts still run, and the script ends with status 1.
#
# $PYTHON: interpreter of the environment (default: python). $DATA: folder with corpus/, glue_data/ and
# bert-base-uncased-vocab.txt (default: ../shared/data or shared/data if there; else synthetic data).
set -uo pipefail

# Options for a step with a CUDA graph around all of it, and without: further settings of the fastest step go here.
captured=(--compile true trainer.cuda_graph=true)
uncaptured=(--compile reduce-overhead trainer.cuda_graph=false)

all=(tests small captured base convert same-seed pretrain glue)
smoke=false
if [ "${1:-}" = --smoke ]; then
    smoke=true
    all=(tests small convert same-seed pretrain glue) # captured and base are the program of small
    shift
fi
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: benchmarks/gpu.sh [--smoke] OUT [PART …]" >&2
    exit 2
fi
out=$1
shift
wanted=("$@")
if [ $# -eq 0 ]; then wanted=("${all[@]}"); fi
for name in "${wanted[@]}"; do
    case $name in
        tests|small|captured|base|convert|same-seed|pretrain|glue|masked-lm|large) ;;
        *) echo "error: no part $name; see the top of this file" >&2; exit 2 ;;
    esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
data=${DATA:-}
for folder in ../shared/data shared/data; do
    if [ -z "$data" ] && [ -d "$folder/corpus" ]; then data=$folder; fi
done
work=$(mktemp -d) || exit 2
results=$out/results.jsonl log=$out/gpu.log running=$out/running.out
: > "$results"
: > "$log"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=$work/inductor # parts share what was compiled
deadline=$((SECONDS + 580)) # of 600: to end the last part, and the report
failed=0 child=

collect() { # move what the running part has printed to results and log
    if [ -f "$running" ]; then
        grep '^{.*}$' "$running" >> "$results"
        cat "$running" >> "$log"
        rm "$running"
    fi
    "$python" benchmarks/report.py "$results" > "$out/report.md" 2>> "$log" || failed=1
}
trap 'if [ -n "$child" ]; then kill "$child"; wait "$child"; fi; collect; rm -rf "$work"; exit 143' TERM INT
trap 'rm -rf "$work"' EXIT

is_wanted() { case " ${wanted[*]} " in *" $1 "*) ;; *) return 1 ;; esac; }

left() { echo $((deadline - SECONDS)); }

# part NAME LIMIT COMMAND…: run a command for at most LIMIT seconds; record a failure. JSON lines that it prints are
# results. It is no pipeline, which would wait for children that the command has left behind.
part() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    if [ "$(left)" -lt "$limit" ]; then limit=$(left); fi
    echo "== $name (at most ${limit} s)" | tee -a "$log" >&2
    if [ "$limit" -lt 5 ]; then
        echo "no time was left" >> "$log"
        status=124
    else
        timeout -k 5 "$limit" "$@" > "$running" 2>> "$log" &
        child=$!
        wait "$child"
        status=$?
        child=
    fi
    if [ $status -ne 0 ]; then
        failed=1
        printf '{"benchmark": "failure", "part": "%s", "status": %d, "seconds": %d}\n' \
            "$name" $status $((SECONDS - begin)) >> "$results"
    fi
    if [ "$name" = tests ] && [ -s "$running" ]; then
        printf '{"benchmark": "tests", "summary": "%s"}\n' "$(tail -n 1 "$running" | tr -d '"\\')" >> "$results"
    fi
    collect
    echo "== $name: status $status after $((SECONDS - begin)) s" | tee -a "$log" >&2
    if [ $status -ne 0 ]; then tail -n 20 "$log" >&2; fi
}

step() { # step NAME LIMIT OPTIONS…: time training steps; no round of blocks starts in the last part of the limit
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" benchmarks/pretrain_step.py --skip-memory --seconds $((limit / 2)) "$@"
}

user() { # user NAME LIMIT OPTIONS…: run commands as a user types them
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" benchmarks/user_runs.py "$name" "$work" ${data:+--data "$data"} \
        --limit $((limit > 30 ? limit - 10 : limit)) "$@"
}

if $smoke; then
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    data=
    sizes=(--device cpu --vocab 199 --size tiny --batch 2 --repeats 1 --segment 2 --warmup 1)
    small=("${sizes[@]}") base=("${sizes[@]}") large=("${sizes[@]}") captured=() uncaptured=() tiny=(--smoke)
    head=(--device cpu --precision fp32 --rows 24 --vocab 199 --hidden 16 --repeats 2)
    tests=(tests/model/test_masking.py)
    seconds=1
else
    has_cuda='import sys, torch; sys.exit(not torch.cuda.is_available() and "error: no CUDA device; use --smoke on a CPU")'
    "$python" -c "$has_cuda" || exit 2
    small=(--size small --batch 128 --repeats 3)
    base=(--size base --batch 64 --segment 10 --warmup 5 --repeats 2)
    large=(--size large --batch 16 --segment 8 --warmup 4 --repeats 2)
    head=(--device cuda --precision bf16)
    tiny=()
    mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.cuda' tests)
    tests+=(-m cuda)
    seconds=
fi

# Limits, not expectations: a part that compiles may need most of its time. What the others leave is that of pretrain, at
# most 180 s of steps.
for name in "${wanted[@]}"; do
    case $name in
        tests) part tests 120 "$python" -m pytest -p no:cacheprovider -rfE --tb=short "${tests[@]}" ;;
        small) step small 110 "${small[@]}" --what a,b,c --profile "${uncaptured[@]}" ;;
        captured) step captured 80 "${small[@]}" --what b,c --profile "${captured[@]}" ;;
        base) step base 90 "${base[@]}" --what b,c --profile "${captured[@]}" ;;
        large) step large 85 "${large[@]}" --what b,c "${captured[@]}" ;;
        masked-lm) part masked-lm 60 "$python" benchmarks/masked_lm.py "${head[@]}" ;;
        convert) user convert 30 "${tiny[@]}" ;;
        same-seed) user same-seed 80 "${tiny[@]}" ${seconds:+--batches 4} ;;
        pretrain)
            if is_wanted glue; then reserved=70; else reserved=0; fi
            steps=${seconds:-$(($(left) - reserved - 35))} # 35 s: start, evaluation, checkpoint
            steps=$((steps > 180 ? 180 : steps < 1 ? 1 : steps))
            user pretrain $((steps + 35)) --seconds "$steps" "${tiny[@]}"
            cp "$work/pretrain/metrics.jsonl" "$out/" 2>> "$log"
            ;;
        glue)
            user glue 70 "${tiny[@]}"
            cp "$work/glue/results.md" "$out/glue.md" 2>> "$log"
            ;;
    esac
done

echo "results: $results, $out/report.md" >&2
exit $failed
