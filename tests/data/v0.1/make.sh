#!/usr/bin/env bash
# Write this folder's artefacts with a checkout of version 0.1 (commit 61ce48b):
#
#   git worktree add ../v0.1 61ce48b
#   tests/data/v0.1/make.sh ../v0.1
#
# tests/test_artefacts.py loads them with the code of today. All paths inside are relative to this folder.
set -euo pipefail
checkout=$(realpath "$1")
cd "$(dirname "$0")"
export PYTHONPATH=$checkout OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
find . -mindepth 1 ! -name make.sh -delete

python - <<'PY'
import random
from pathlib import Path

rng = random.Random(0)
words = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
def sentence():
    start = rng.randrange(len(words))
    return " ".join(words[(start + step) % len(words)] for step in range(rng.randint(4, 12)))
for number in range(3):
    Path(f"text{number}.txt").write_text("\n\n".join("\n".join(sentence() for _ in range(3)) for _ in range(25)))
folder = Path("glue/SST-2")
folder.mkdir(parents=True)
for part, size in (("train", 32), ("dev", 12)):
    rows = [f"{'ba ' * (index % 2)}{sentence()}\t{index % 2}" for index in range(size)]
    (folder / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
PY

cat > pretrain.yaml <<'YAML'
run_name: tiny
seed: 1
data: {path: shards, max_seq_length: 32, num_workers: 0}
model:
  {num_layers: 1, hidden_size: 16, num_heads: 2, embedding_size: 8, generator_size: 0.5, max_positions: 32,
   dropout: 0.1, attention_dropout: 0.1}
optimizer: {lr: 5.0e-3}
schedule: {warmup: 2ba}
trainer: {max_duration: 8ba, global_train_batch_size: 8, device_eval_batch_size: 8, eval_interval: 8ba, device: cpu,
          precision: fp32, log_interval: 1ba, progress_bar: false}
checkpoints: {folder: run, interval: 4ba, keep: -1, milestones: []}
callbacks: {}
loggers: {metrics_file: {}}
YAML

options=(--source text0.txt --source text1.txt --source text2.txt --tokenizer train --vocab-size 100)
options+=(--max-seq-length 32 --val-fraction 0.2 --workers 1 --no-progress)
python "$checkout/data_prep/convert_owt.py" "${options[@]}" --out shards
# The same conversion, killed after its first part.
setsid --wait python - "${options[@]}" --out unfinished <<PY || true
import os, runpy, sys
from electra_composer.part_writer import PartWriter
finish = PartWriter.finish
def stop(self, record):
    finish(self, record)
    os.killpg(0, 9)
PartWriter.finish = stop
sys.argv[0] = "$checkout/data_prep/convert_owt.py"
runpy.run_path(sys.argv[0], run_name="__main__")
PY
test -f unfinished.partial/plan.json
rm -f unfinished.partial.lock

# A run of 8 batches, as it was after batch 4; its metrics and its export after batch 8 are what a resumed run must give.
python "$checkout/electra_composer/pretrain.py" pretrain.yaml
python "$checkout/electra_composer/export.py" run export
mv run/metrics.jsonl expected_metrics.jsonl
rm -r run/batch-8-rank0.pt run/latest-rank0.pt run/.lock
ln -s batch-4-rank0.pt run/latest-rank0.pt
# A sharded checkpoint of two processes, of the same model.
composer -n 2 "$checkout/electra_composer/pretrain.py" pretrain.yaml 'trainer.fsdp={state_dict_type: sharded}' \
    checkpoints.folder=sharded trainer.max_duration=4ba
rm -rf sharded/metrics.jsonl sharded/.lock

# Finetuning of the exported discriminator: two seeds done.
python "$checkout/electra_composer/glue.py" "$checkout/yamls/glue.yaml" model.source=export/discriminator tasks=[sst2] \
    seeds=[1,2] data.path=glue data.cache=null data.max_seq_length=24 data.num_workers=0 trainer.device=cpu \
    trainer.precision=fp32 trainer.progress_bar=false trainer.max_duration=1ep checkpoints.folder=finetune optimizer.lr=2e-3
rm -rf finetune/results.png finetune/results.csv finetune/results.md finetune/.lock finetune/*/claims
find . -type f | xargs du -b | sort -n | tail -5
