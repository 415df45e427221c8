#!/usr/bin/env bash
# Use an installed wheel as its users do, from a folder of theirs; `make test-wheel` builds and installs it.
#   tests/wheel.sh ENVIRONMENT/bin
set -euo pipefail

BIN=$(cd "$1" && pwd)
unset PYTHONPATH
export PATH="$BIN:$PATH"
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"

say() { printf '\n$ %s\n' "$*"; "$@"; }

python - <<'EOT'
import electra_composer.shipped as shipped
import pathlib, sys
assert shipped.PACKAGE.is_relative_to(sys.prefix), shipped.PACKAGE
assert shipped.is_installed()
EOT
say electra --help
say electra --version
say electra doctor || true # what is wrong with the machine is not wrong with the wheel
say electra pretrain --help trainer.precision
electra init small > my.yaml
test "$(electra config diff small my.yaml)" = "no differences"
say electra quickstart --smoke
tiny="trainer.max_duration=4ba trainer.eval_interval=4ba trainer.eval_batches=1 trainer.precision=fp32 trainer.device=cpu"
say electra pretrain -n 2 quickstart $tiny run_name=two checkpoints.folder=runs/two
say electra preview runs/quickstart/shards --rows 1 --checkpoint runs/two
say electra export runs/two exports/two
printf 'text,label\n%s' "$(for n in $(seq 40); do echo "a fine film,$((n % 2))"; done)" > reviews.csv
say electra finetune classification data.train=reviews.csv model.source=runs/two seeds=[1] \
    trainer.max_duration=1ep trainer.precision=fp32 trainer.device=cpu
printf 'text\na dull film\n' > new.csv
say electra predict runs/classification --input new.csv
echo 'the wheel works'
