"""Run the parts of a conversion in local worker processes or on Apache Spark."""

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
from typing import Any, TypeVar

from tokenizers import Tokenizer
from tqdm import tqdm

from electra_composer.corpus.chunks import EncodingSettings, Examples, convert_documents
from electra_composer.corpus.documents import Document
from electra_composer.corpus.part_conversion import Job, PartContext, convert_part
from electra_composer.corpus.progress import follow
from electra_composer.corpus.selection import PartScan, scan_part
from electra_composer.corpus.source_parts import Part
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Processes:
    """Local worker processes, each with its own tokenizer; text and tokens are not sent between processes.

    Args:
        workers: number of processes.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        # fork starts workers fastest, but is not safe with the system libraries of macOS.
        self.context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        # The processes already use all cores, and threads of tokenizers do not survive a fork.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def scan(self, sources: Sources, parts: Iterable[Part]) -> Iterator[PartScan]:
        """Yield :func:`scan_part` of each part in order; scan little further than the iterator is consumed."""
        parts = list(parts)
        with _Pool(max(1, min(self._workers, len(parts))), self.context) as pool:
            yield from pool.ordered(partial(scan_part, sources), parts)

    def convert(self, context: PartContext, jobs: list[Job], bar: tqdm) -> Iterator[dict[str, Any]]:
        """Yield the records of :func:`convert_part` in any order, each once its part is complete."""
        done = self.context.Value("q", 0)  # bytes of text
        workers = max(1, min(self._workers, len(jobs)))
        with _Pool(workers, self.context, context, done) as pool, follow(bar, done):
            yield from pool.unordered(_convert, jobs)


def tokenize_sample(
    settings: EncodingSettings, chunks: Iterable[list[Document]], workers: int
) -> Iterator[list[Examples]]:
    """Yield :func:`convert_documents` of each chunk in order, computed by worker processes."""
    engine = Processes(workers)
    with _Pool(workers, engine.context) as pool:
        yield from pool.ordered(partial(_tokenize, settings), chunks)


class Spark:
    """A Spark cluster: each part is a task that returns its record.

    Executors read the sources and write the shards themselves, so both must be on a shared file system or in an object
    store. This package must be installed there.

    Args:
        master: a Spark master URL, such as `local[2]` or `spark://host:7077`; None: the default of `spark-submit`.

    Raises:
        UserError: pyspark or Java is not installed.
    """

    def __init__(self, master: str | None) -> None:
        try:
            from pyspark import SparkConf, SparkContext
            from pyspark.errors import PySparkException
        except ImportError as error:
            raise UserError("--engine spark requires pyspark: pip install 'electra-composer[spark]'") from error
        conf = SparkConf().setAppName("electra_composer").set("spark.ui.showConsoleProgress", "true")
        # Python workers import torch and datasets once instead of for each part.
        conf.setIfMissing("spark.python.worker.reuse", "true")
        conf.setIfMissing("spark.task.maxFailures", "2")
        if master is not None:
            conf.setMaster(master)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            self._context = SparkContext.getOrCreate(conf)
        except (PySparkException, OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise UserError(f"--engine spark: Spark does not start (is Java installed?): {reason}") from error
        self._context.setLogLevel("ERROR")

    def scan(self, sources: Sources, parts: Iterable[Part]) -> Iterator[PartScan]:
        """Same as :meth:`Processes.scan`, but all parts are scanned."""
        yield from self._run(list(parts), partial(scan_part, sources))

    def convert(self, context: PartContext, jobs: list[Job], bar: tqdm) -> Iterator[dict[str, Any]]:
        """Same as :meth:`Processes.convert`, but all records come at the end."""
        shared = self._context.broadcast(context)
        yield from self._run(jobs, lambda job: _convert_with(shared.value, job))
        shared.destroy()

    def _run(self, items: list[Item], function: Callable[[Item], Result]) -> list[Result]:
        from py4j.protocol import Py4JJavaError

        if not items:
            return []
        try:
            return self._context.parallelize(items, len(items)).map(function).collect()
        # Workaround (pyspark 4.0): the exception of a Python worker arrives only as text, its traceback within the
        # message of a Java exception; goes when Spark raises it as an exception.
        except Py4JJavaError as error:
            text = str(error.java_exception)
            if "UserError: " in text:
                raise UserError(text.partition("UserError: ")[2].split("\n")[0]) from error
            reason = text.partition("\n\n\tat ")[0].strip().split("\n")[-1].strip()
            raise UserError(f"Spark: a part failed: {reason}; rerun the same command to resume") from error


class _Pool:
    """A process pool that ends its workers on exit, bounds the waiting items, and reports a killed worker."""

    def __init__(self, workers: int, context: Any, part_context: PartContext | None = None, done: Any = None) -> None:
        self._waiting = 2 * workers
        self._stop = context.Value("b", 0, lock=False)  # not an Event: a killed worker may hold its lock
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, (part_context, done, self._stop))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.value = 1  # workers abandon their current part
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
            "a worker process ended abruptly (killed, or out of memory?); rerun the same command to resume after the "
            "complete parts, with fewer --workers if memory is short"
        ) from error


# State of this worker process.
_worker: tuple[PartContext, Tokenizer] | None = None
_done: Any = None
_stop: Any = None


def _start_worker(context: PartContext | None, done: Any, stop: Any) -> None:
    global _worker, _done, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if context is not None:
        _worker = context, context.settings.tokenizer()
    _done, _stop = done, stop


def _end_with_parent(parent: int) -> None:
    """Exit when the parent is gone: a killed parent cannot end its workers, which would wait for it forever."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _tokenize(settings: EncodingSettings, chunk: list[Document]) -> list[Examples]:
    return convert_documents(settings, _tokenizer_of(settings), "sample", chunk)


@functools.lru_cache(maxsize=1)
def _tokenizer_of(settings: EncodingSettings) -> Tokenizer:
    return settings.tokenizer()


def _convert(job: Job) -> dict[str, Any]:
    assert _worker is not None
    return {**convert_part(*_worker, job, _add), "number": job.number}


def _add(size: int) -> None:
    if _stop.value:
        raise InterruptedError("the conversion was stopped")
    with _done.get_lock():
        _done.value += size


def _convert_with(context: PartContext, job: Job) -> dict[str, Any]:
    """Convert a part in a Spark worker, which keeps the tokenizer for the next part."""
    global _worker
    if _worker is None or _worker[0] != context:
        _worker = context, context.settings.tokenizer()
    return {**convert_part(*_worker, job, lambda size: None), "number": job.number}
