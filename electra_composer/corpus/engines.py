"""What runs the parts of a conversion: processes of this machine, or Apache Spark."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer
from tqdm import tqdm

from electra_composer.corpus.chunks import Examples, Task, convert_documents
from electra_composer.corpus.documents import Document
from electra_composer.corpus.part_conversion import Job, Plan, convert_part
from electra_composer.corpus.selection import PartScan, scan_part
from electra_composer.corpus.source_parts import Part
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
_REFRESH = 0.25  # seconds between looks at the progress


class Engine(Protocol):
    """Runs the two passes over parts."""

    def scan(self, sources: Sources, parts: Iterable[Part]) -> Iterator[PartScan]:
        """:func:`scan_part` of each, in their order; it stops when it is not asked for more."""

    def convert(self, plan: Plan, jobs: list[Job], bar: tqdm) -> Iterator[dict[str, Any]]:
        """The records of :func:`convert_part`, in any order; their parts are whole when they come."""


class Processes:
    """Worker processes of this machine, each with the tokenizer; text and tokens never travel between them.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        # fork starts workers in no time, but is not safe with the system libraries of macOS
        self.context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        # The processes are the parallelism; threads would not survive a fork.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def scan(self, sources: Sources, parts: Iterable[Part]) -> Iterator[PartScan]:
        with _Pool(self._workers, self.context) as pool:
            yield from pool.ordered(partial(scan_part, sources), parts)

    def convert(self, plan: Plan, jobs: list[Job], bar: tqdm) -> Iterator[dict[str, Any]]:
        done = self.context.Value("q", 0)  # bytes of text
        with _Pool(self._workers, self.context, plan, done) as pool, _following(bar, done):
            yield from pool.unordered(_convert, jobs)


def tokenize_sample(task: Task, chunks: Iterable[list[Document]], workers: int) -> Iterator[list[Examples]]:
    """What :func:`convert_documents` makes of each chunk, in their order, by worker processes."""
    engine = Processes(workers)
    with _Pool(workers, engine.context) as pool:
        yield from pool.ordered(partial(_tokenize, task), chunks)


class Spark:
    """A Spark cluster: each part is a task, its record the result.

    Workers read the sources and write the shards themselves, so both must be where all can reach them: a file system
    that is mounted everywhere, or an object store. This package must be installed there.

    Args:
        master: a Spark master URL, such as `local[2]` or `spark://host:7077`; None: what `spark-submit` says.

    Raises:
        UserError: pyspark, or the Java that it needs, is not there.
    """

    def __init__(self, master: str | None) -> None:
        try:
            from pyspark import SparkConf, SparkContext
            from pyspark.errors import PySparkException
        except ImportError as error:
            raise UserError("--engine spark needs pyspark: pip install 'electra-composer[spark]'") from error
        conf = SparkConf().setAppName("electra_composer").set("spark.ui.showConsoleProgress", "true")
        # Python workers import torch and datasets once, not once for each part.
        conf.setIfMissing("spark.python.worker.reuse", "true")
        conf.setIfMissing("spark.task.maxFailures", "2")
        if master is not None:
            conf.setMaster(master)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            self._context = SparkContext.getOrCreate(conf)
        except (PySparkException, OSError, RuntimeError) as error:
            raise UserError(f"--engine spark: Spark does not start (is Java there?): {_first_line(error)}") from error
        self._context.setLogLevel("ERROR")

    def scan(self, sources: Sources, parts: Iterable[Part]) -> Iterator[PartScan]:
        yield from self._run(list(parts), partial(scan_part, sources))

    def convert(self, plan: Plan, jobs: list[Job], bar: tqdm) -> Iterator[dict[str, Any]]:
        shared = self._context.broadcast(plan)
        yield from self._run(jobs, lambda job: _convert_with(shared.value, job))
        shared.destroy()

    def _run(self, items: list[Item], function: Callable[[Item], Result]) -> list[Result]:
        from py4j.protocol import Py4JJavaError

        if not items:
            return []
        try:
            return self._context.parallelize(items, len(items)).map(function).collect()
        except Py4JJavaError as error:
            text = str(error.java_exception)
            if "UserError: " in text:
                raise UserError(text.partition("UserError: ")[2].split("\n")[0]) from error
            raise UserError(f"Spark: a part failed: {_last_python_line(text)}; the same command goes on") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _last_python_line(text: str) -> str:
    """The exception at the end of the traceback of a Python worker, in Spark's message."""
    before = text.partition("\n\n\tat ")[0].strip().split("\n")
    return before[-1].strip()


class _Pool:
    """A process pool whose workers end with it, whose waiting work is bounded, and that names a worker's death."""

    def __init__(self, workers: int, context: Any, plan: Plan | None = None, done: Any = None) -> None:
        self._waiting = 2 * workers
        self._stop = context.Value("b", 0, lock=False)  # not an Event, whose lock a worker that is killed may have
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, (plan, done, self._stop))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.value = 1  # nobody waits for a part that is of no use any more
        self._pool.shutdown(cancel_futures=True)

    def ordered(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) >= self._waiting:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())

    def unordered(self, function: Callable[[Item], Result], items: list[Item]) -> Iterator[Result]:
        todo = iter(items)
        running: set[Future[Result]] = set()
        while True:
            for item in todo:
                running.add(self._pool.submit(function, item))
                if len(running) >= self._waiting:
                    break
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from map(_result, done)


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended abruptly (killed, or out of memory?); the same command goes on from the parts that "
            "are whole, and fewer --workers need less memory"
        ) from error


class _following:
    """Moves a progress bar by what the workers say, while the block runs."""

    def __init__(self, bar: tqdm, done: Any) -> None:
        self._bar, self._done = bar, done
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._update()

    def _run(self) -> None:
        while not self._stopped.wait(_REFRESH):
            self._update()

    def _update(self) -> None:
        # Not `.value`, which waits for a lock: a worker that is killed may have it.
        self._bar.update(self._done.get_obj().value - self._bar.n)


_worker: tuple[Plan, Tokenizer] | None = None  # of this worker process
_done: Any = None
_stop: Any = None


def _start_worker(plan: Plan | None, done: Any, stop: Any) -> None:
    global _worker, _done, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if plan is not None:
        _worker = plan, plan.task.tokenizer()
    _done, _stop = done, stop


def _end_with_parent(parent: int) -> None:
    """A parent that is killed outright cannot end its workers, which would wait for it for ever."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _tokenize(task: Task, chunk: list[Document]) -> list[Examples]:
    return convert_documents(task, _tokenizer_of(task), "sample", chunk)


@functools.lru_cache(maxsize=1)
def _tokenizer_of(task: Task) -> Tokenizer:
    return task.tokenizer()


def _convert(job: Job) -> dict[str, Any]:
    assert _worker is not None
    return {**convert_part(*_worker, job, _add), "number": job.number}


def _add(size: int) -> None:
    if _stop.value:
        raise InterruptedError("the conversion was stopped")
    with _done.get_lock():
        _done.value += size


def _convert_with(plan: Plan, job: Job) -> dict[str, Any]:
    """In a Spark worker, which gets the plan with the job and keeps the tokenizer for the next one."""
    global _worker
    if _worker is None or _worker[0] != plan:
        _worker = plan, plan.task.tokenizer()
    return {**convert_part(*_worker, job, lambda size: None), "number": job.number}
