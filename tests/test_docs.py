"""Tests of the commands in README.md, CONTRIBUTING.md and docs/.

Every command is checked as far as possible without running it: its script exists, its options parse, its configuration
loads. It must also be listed below: in RUN_BY with the test that runs it, or in NOT_RUN with the reason why none does.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from composer.cli.launcher import _get_parser
from doc_pages import DOCS, PAGES, blocks, functions_of_tests, load_script
from tiny import ROOT, schema_of

from electra_composer.command import COMMANDS, program_of
from electra_composer.config_loading import load_config

# Commands (full match) and the test that runs them as they stand, or the same program at a small size.
RUN_BY = {
    r"make quickstart": "test_smoke",
    r"make notebooks": "test_all_cells_run_one_notebook_after_another",
    r"python data_prep/convert_owt\.py --source texts/el\.txt --tokenizer .*": "test_commands_that_run_in_seconds",
    r"python -m electra_composer\.preview data/owt": "test_commands_that_run_in_seconds",
    r"python electra_composer/export\.py runs/electra-small exports/small": "test_commands_that_run_in_seconds",
    r"python -m electra_composer\.report( .*)?": "test_the_report_of_a_trained_run",
    r"python -m electra_composer\.push runs/electra-small .*": "test_a_push_is_read_back_by_from_pretrained",
    r"python docs/list_workarounds\.py( --check)?": "test_the_list_of_workarounds_is_up_to_date",
    r"python docs/make_schema\.py( --check)?": "test_what_is_generated_from_the_schema_is_current",
    r"python electra_composer/pretrain\.py --help": "test_help_of_a_program_with_keys",
    r"electra --help": "test_help_imports_no_library",
    r"electra pretrain (small|--help) .*": "test_from_another_folder_by_the_name_of_a_configuration",
    r"electra init( small > my\.yaml)?": "test_a_copy_loads_and_names_the_schema",
    r"electra config diff small runs/mine": "test_a_run_folder_and_a_shipped_name",
    r"electra doctor": "test_the_report_and_its_status",
    r"python docs/make_picture\.py": "test_the_picture_is_drawn_from_a_metrics_file",
    r"python data_prep/convert_owt\.py .* --out data/(both|el|th|docstrings)": "test_the_language_walk_through_runs",
    r"python -m electra_composer\.preview data/el": "test_the_language_walk_through_runs",
    r"composer electra_composer/pretrain\.py .* run_name=greek .*": "test_the_language_walk_through_runs",
    r"python electra_composer/export\.py runs/greek exports/greek": "test_the_language_walk_through_runs",
    r"python data_prep/convert_owt\.py --mixture mixture\.yaml": "test_a_mixture_takes_each_source_by_its_weight",
    r"python data_prep/convert_owt\.py --source owt/ --weight .*": "test_a_mixture_takes_each_source_by_its_weight",
    r"python benchmarks/pretrain_step\.py .*": "test_rehearsal_on_the_cpu",
    r"python benchmarks/masked_lm\.py .*": "test_rehearsal_on_the_cpu",
    r"benchmarks/gpu\.sh --smoke OUT": "test_rehearsal_on_the_cpu",
    r"python benchmarks/cost\.py": "test_the_table_of_the_page_is_current_and_its_numbers_are_said_to_be_computed",
    r"python benchmarks/cost\.py --add .*": "test_steps_of_a_results_file_are_added",
    r"python benchmarks/dataloader\.py .*": "test_one_line",
    r"python benchmarks/(convert\.py .*|neighbours\.py)": "test_one_line",
    r"python benchmarks/glue\.py .*": "test_one_line_for_a_classification_and_a_regression",
    r"python benchmarks/report\.py .*": "test_report_of_two_lines",
    r"python benchmarks/soak\.py .*": "test_a_short_soak",
    r"composer -n 2 electra_composer/pretrain\.py .*": "test_two_processes",
    r"composer -n 3 electra_composer/pretrain\.py .*": "test_to_three_shards",
    r"composer --world_size 16 --node_rank [01] .*": "test_two_nodes",
    r"python electra_composer/pretrain\.py my\.yaml .*": "test_from_two_shards_to_one_process",
    r"python electra_composer/pretrain\.py my\.yaml": "test_a_run_between_its_data_and_its_first_batch",
    r"python electra_composer/export\.py runs/my exported": "test_export_from_both_forms",
    r"composer electra_composer/finetune\.py yamls/.*": "test_from_files_to_a_model_of_transformers",
    r"python electra_composer/glue_report\.py .*": "test_the_command_prints_the_statistics",
    r"python benchmarks/objectives\.py .*": "test_a_tiny_run_is_measured_once",
    r"python benchmarks/finetune\.py .*": "test_one_line_for_each_kind_of_task",
    r"python electra_composer/predict\.py .*": "test_predictions_are_those_of_the_pipeline_in_the_order_of_the_file",
    r"python electra_composer/score\.py runs/electric sentences\.txt .*": "test_output_files",
    r"python -m electra_composer\.preview data/owt --checkpoint .*": "test_with_a_checkpoint",
}
# Commands (full match) that no test runs, and why.
NOT_RUN = {
    r"python data_prep/convert_owt\.py": "needs the hub, and hours",
    r"python data_prep/convert_owt\.py --source 'texts/\*\.jsonl\.gz' --out data/mine": "its tokenizer is on the hub",
    r"python data_prep/convert_owt\.py --source 'texts/\*\.jsonl\.gz' --add-vocabulary .*": "the same",
    r"python data_prep/convert_owt\.py --engine spark --master spark://.*": "needs a Spark cluster and a bucket",
    r"composer electra_composer/pretrain\.py yamls/(small|base)\.yaml.*": "needs GPUs, and days",
    r"composer electra_composer/pretrain\.py yamls/continue\.yaml.*": "needs released weights from the hub, and a GPU",
    r"composer -n 8 electra_composer/pretrain\.py .*": "needs eight GPUs, and days",
    r"composer electra_composer/glue\.py yamls/glue\.yaml.*": "needs a pretrained model, the GLUE files, and hours",
    r"benchmarks/gpu\.sh OUT": "needs a GPU",
    r"python benchmarks/convert_kills\.py": "many conversions one after another; the tests of the corpus kill a few",
    r"python benchmarks/fingerprint\.py .*": "compares two checkouts",
    r"python benchmarks/mutations\.py": "runs the tests once per mutation",
    r"python -m pytest tests/.*": "runs tests",
    r"make (PYTHON=\S+ )?(test|test-fast|test-long|test-newest|test-wheel)( FAST=1)?": "runs tests",
    r"make (lint|format)": "checks the working tree; no test of the code",
    r"pip install .*": "needs a package index",
    r"git (worktree|tag|push) .*": "changes the repository",
    r"source \.venv/bin/activate": "needs the environment of make",
}

PROGRAMS = r"(?:python|composer|electra|make|pip|git|benchmarks/gpu\.sh)"


def commands_of_block(block):
    """Yield the commands of a shell block; here-documents are left out, lines joined, comments and spaces removed."""
    without_files = re.sub(r"<<'EOT'\n.*?\nEOT", "", block, flags=re.S).replace("\\\n", " ")
    for line in without_files.splitlines():
        if line.strip() and "cat >" not in line:
            yield " ".join(re.sub(r"\s+#.*", "", line).split())


def commands():
    """Return every command of the pages, in shell blocks, indented blocks and inline code, each once."""
    found = [command for block in blocks("bash") for command in commands_of_block(block)]
    for text in PAGES.values():
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        found += [" ".join(command.split()) for command in re.findall(rf"`({PROGRAMS} [^`]+)`", prose)]
        found += re.findall(rf"^    ({PROGRAMS} .+)$", prose, re.M)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", commands())
def test_commands_name_what_is_there(command):
    words = shlex.split(command)
    if words[0] == "make":
        target = next(word for word in words[1:] if "=" not in word)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0] == "composer":
        launcher = _get_parser().parse_args(words[1:])  # options of the launcher come before the script
        check_script(launcher.training_script, launcher.training_script_args)
    elif words[0] == "electra":
        assert words[1] in ("--help", *(name for name, entry in COMMANDS.items() if program_of(entry) is not None))
    elif words[:2] == ["python", "-m"]:
        module = importlib.util.find_spec(words[2])
        assert module is not None
        if words[2] == "pytest":
            assert (ROOT / words[3]).exists()
        else:
            check_options(Path(module.origin), words[3:])
    elif words[0] == "python":
        check_script(words[1], words[2:])
    else:
        assert words[0] in ("pip", "git", "source", "benchmarks/gpu.sh")


def check_script(script, arguments):
    """Check that a script exists, that it has the options, and that a configuration loads."""
    assert (ROOT / script).is_file()
    if script == "data_prep/convert_owt.py":
        # the files that the page asks for are not here
        load_script(script).parse_arguments([w for w in arguments if w != "--mixture" and not w.endswith(".yaml")])
    elif script in ("electra_composer/pretrain.py", "electra_composer/glue.py", "electra_composer/finetune.py"):
        if arguments[0] == "--help":
            return
        path, *overrides = arguments
        if path == "my.yaml":  # the reader's own
            path = "yamls/base.yaml"
        if path == "yamls/continue.yaml":  # without sizes: those of a model on the hub
            path, overrides = "yamls/small.yaml", [*overrides, "model.init_from=google/electra-small-discriminator"]
        schema = schema_of(ROOT / path)
        assert schema.__doc__
        assert f"`{script}`" in schema.__doc__
        load_config(str(ROOT / path), overrides, schema)
    else:
        check_options(ROOT / script, arguments)


def check_options(script, arguments):
    """Check that the script declares each option."""
    source = script.read_text(encoding="utf-8")
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source, option


@pytest.mark.parametrize("command", commands())
def test_each_command_runs_in_a_test_or_has_a_reason_why_not(command):
    run_by = [test for pattern, test in RUN_BY.items() if re.fullmatch(pattern, command)]
    reasons = [reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, command)]
    assert run_by or reasons, "list the command in RUN_BY or NOT_RUN"
    assert not (run_by and reasons)
    assert functions_of_tests().issuperset(run_by)


def test_the_tables_list_no_command_that_is_gone():
    for pattern in (*RUN_BY, *NOT_RUN):
        assert any(re.fullmatch(pattern, command) for command in commands()), pattern


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the programs in it, as the current folder."""
    for name in ("electra_composer", "data_prep", "yamls"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment():
    """Return the environment of a program: this package, one thread, and `python` and `composer` of this Python."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}


def shell(text):
    """Run a shell block as it stands; it must succeed."""
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def python(command):
    """Run a command that starts with `python`; it must succeed."""
    words = [sys.executable, *shlex.split(command)[1:]]
    done = programs.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_commands_that_run_in_seconds(workplace, shards, write_tiny_yaml):
    """Commands of the README as they stand, on a tiny run and its shards."""
    (workplace / "texts").mkdir()
    greek = next(block for block in blocks("bash", [DOCS / "languages.md"]) if "texts/el.txt <<" in block)
    (workplace / "data").mkdir()
    (workplace / "data" / "owt").symlink_to(shards)
    (workplace / "runs").mkdir()
    tiny = write_tiny_yaml(workplace)
    shell(greek)
    python(f"python electra_composer/pretrain.py {tiny} checkpoints.folder=runs/electra-small")
    done = [pattern for pattern, test in RUN_BY.items() if test == "test_commands_that_run_in_seconds"]
    mine = [command for command in commands() if any(re.fullmatch(pattern, command) for pattern in done)]
    assert len(mine) == len(done)
    for command in mine:
        python(command)
    assert (workplace / "data/el/meta.json").is_file()
    assert (workplace / "exports/small/discriminator/model.safetensors").is_file()


@pytest.mark.long
def test_the_language_walk_through_runs(workplace):
    """All of docs/languages.md, from top to bottom; a program that reads from the hub is left out."""
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", PAGES[DOCS / "languages.md"], re.S):
        if language == "bash":
            shell(block)
        elif "your/tokenizer" not in block:
            exec(compile(block, "languages.md", "exec"), {})
    assert (workplace / "exports/greek/generator/model.safetensors").is_file()
    assert (workplace / "data/th/meta.json").is_file()
