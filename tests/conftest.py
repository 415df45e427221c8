"""Settings and hooks of the test suite; the shared fixtures are in shared_fixtures.py."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel and start processes

import programs
import psutil
import pytest

TESTS = Path(__file__).parent

# The usual limit of open files, so that a leak is detected on every machine.
_SOFT, _HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (1024 if _SOFT == resource.RLIM_INFINITY else min(_SOFT, 1024), _HARD))

# Fixtures whose tests convert text, train a model, start a program or a server.
HEAVY_FIXTURES = {"shards", "write_tiny_yaml", "tiny_yaml", "s3", "s3_endpoint", "gcs"}


# Modules that --fast leaves out as a whole: most of their tests compile, convert, train or start programs.
SLOW_MODULES = {
    "benchmarks",
    "batches/test_remote_errors.py",
    "batches/test_remote_shards.py",
    "batches/test_workers.py",
    "checkpoints/test_exact_resume.py",
    "checkpoints/test_remote.py",
    "corpus/test_conversion.py",
    "corpus/test_conversion_failures.py",
    "corpus/test_conversion_kills.py",
    "corpus/test_conversion_options.py",
    "corpus/test_estimate.py",
    "corpus/test_remote_writing.py",
    "corpus/test_resuming_conversion.py",
    "finetuning/test_one_run.py",
    "finetuning/test_processes.py",
    "finetuning/test_results.py",
    "model/test_compile.py",
    "model/test_large_vocabulary.py",
    "model/kernels/test_masked_lm_compiled.py",
    "model/kernels/test_attention_triton.py",
    "model/kernels/test_masked_lm_triton.py",
    "training/test_devices.py",
    "training/test_distributed.py",
    "training/test_equality.py",
    "training/test_interrupts.py",
    "training/test_monitors.py",
    "test_artefacts.py",
    "test_exit.py",
    "test_faults.py",
    "test_glue.py",
    "test_pretrain.py",
    "test_quickstart.py",
    "test_signals_at_work.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out what takes long, for a run between two edits")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --fast, do not even import the modules that are left out."""
    name = collection_path.relative_to(TESTS).as_posix() if collection_path.is_relative_to(TESTS) else ""
    return True if config.getoption("--fast") and name in SLOW_MODULES else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start modules with long tests first, so that all workers end together; with --fast, deselect what takes long."""

    def takes_long(item: pytest.Item) -> bool:
        return any(map(item.get_closest_marker, ("slow", "distributed")))

    long_modules = {item.path for item in items if takes_long(item)}
    items.sort(key=lambda item: item.path not in long_modules)
    if config.getoption("--fast"):
        heavy = {item for item in items if takes_long(item) or HEAVY_FIXTURES & {*getattr(item, "fixturenames", ())}}
        config.hook.pytest_deselected(items=list(heavy))
        items[:] = [item for item in items if item not in heavy]


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures where tests run; start the server of programs.py once for all workers of pytest-xdist.

    The process that only distributes tests imports neither torch nor Composer, so its workers start seconds earlier and
    Composer's signal handlers do not interfere with Ctrl-C.
    """
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        if not (config.option.collectonly or config.getoption("--fast")):
            programs.start_server()
    else:
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Kill the processes that a test has started when it exceeds its time limit, so that nothing waits for them."""
    report = yield
    if report.failed and "Timeout" in str(call.excinfo):
        programs.kill_running()
        _kill(psutil.Process().children(recursive=True))
    return report


@pytest.hookimpl(optionalhook=True)  # unknown with `-p no:xdist`
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Kill what a worker that crashed, or was ended by the last time limit, has left behind."""
    if error:
        marks = {"PYTEST_XDIST_TESTRUNUID": node.workerinput["testrunuid"], "PYTEST_XDIST_WORKER": node.gateway.id}
        _kill(process for process in psutil.process_iter() if marks.items() <= _environment(process).items())


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if "program_server.py" not in " ".join(process.cmdline()):  # their server
                process.kill()
