"""Download files from object stores with Streaming's downloaders, and explain the errors of storage clients."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar
from urllib.parse import urlparse

from streaming.base.storage.download import CloudDownloader
from streaming.base.util import wait_for_file_to_exist

from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import META, TOKENIZER, Meta, is_inside

T = TypeVar("T")

START_SECONDS = 30.0  # longest wait for meta.json or a tokenizer file

# Exception names and response codes of boto3, google-cloud-storage, azure, oci and huggingface_hub.
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "InvalidConfig")
REFUSED = ("401", "403", "Forbidden", "Unauthorized", "ClientAuthenticationError", "AccessDenied", "RefreshError")
REFUSED_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
NOT_THERE = ("404", "NoSuchBucket", "NoSuchKey", "NotFound", "ResourceNotFoundError", "FileNotFoundError")
NO_ANSWER = ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "TimeoutError", "ConnectionError")
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GCS_KEY and GCS_SECRET",
    "azure": "AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
    "azure-dl": "AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
    "oci": "~/.oci/config",
    "hf": "HF_TOKEN",
}
ADDRESS = {"s3": "S3_ENDPOINT_URL, unless it is Amazon's"}


# Workaround (streaming 0.13): GCSDownloader writes under the final name, where readers see a partial file, and where
# one left by a kill passes for the complete file; goes when every downloader renames complete files.
def download_atomically(
    downloader: CloudDownloader,
    remote: str,
    local: str,
    seconds: float,
    check: Callable[[str], None] | None = None,
) -> None:
    """Download a file unless it exists, and give it its name once it is complete. Raises the client's errors.

    Args:
        downloader: of the remote.
        remote, local: URL and path of the file.
        seconds: to wait for it.
        check: gets the path of the complete file under its temporary name, and raises if its content is wrong.
    """
    if os.path.exists(local):
        return
    unfinished = f"{local}.{os.getpid()}.unfinished"
    with contextlib.suppress(FileNotFoundError):
        os.remove(unfinished)
    try:
        downloader.download(remote, unfinished, seconds)
        if check is not None:
            check(unfinished)
        os.replace(unfinished, local)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)
        raise


# Workaround (streaming 0.13): downloaders pass their timeout on as a read timeout or not at all, and clients wait for
# minutes for a server that does not answer; goes when the timeout limits the complete download.
def answer(remote: str, seconds: float, ask: Callable[[], T]) -> T:
    """Call a storage client in a thread and return its result; abandon the thread after `seconds`.

    Raises:
        UserError: one line: no such bucket or file, credentials missing or refused, no answer, …; the client's error
            is its cause.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(ask())
        except Exception as error:  # each storage client raises its own types
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([future], seconds).done:
        raise UserError(f"{remote}: no answer within {seconds:g} s; {_check(remote, 'the address', ADDRESS)}")
    if error := future.exception():
        raise UserError(f"{remote}: {explain(error, remote)}") from error
    return future.result()


def fetch_meta(path: str, remote: str, timeout: float) -> None:
    """Fetch `meta.json` and the tokenizer of a folder of shards; `meta.json` appears last, when all are complete.

    Raises:
        UserError: see :func:`answer`; or the file is not a valid `meta.json`.
    """
    local = os.path.join(path, META)
    timeout = min(timeout, START_SECONDS)

    def fetch(source: str, target: str) -> None:
        answer(source, timeout, lambda: download_atomically(downloader, source, target, timeout))

    try:
        try:
            downloader = CloudDownloader.get(remote)  # one client for all files: creating it takes longer than a file
        except Exception as error:  # unknown kind of store, client package not installed, or no credentials
            raise UserError(explain(error, remote)) from error
        fetch(os.path.join(remote, META), f"{local}.tmp")
        with open(f"{local}.tmp", encoding="utf-8") as file:
            meta = Meta.from_json(file.read(), path)
        for name in meta.tokenizer.files:
            if not is_inside(name) or os.path.basename(name) != name:
                raise ValueError(f"tokenizer file {name!r} is not a plain file name")
            fetch(os.path.join(remote, TOKENIZER, name), os.path.join(path, TOKENIZER, name))
        os.replace(f"{local}.tmp", local)
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"no shards could be fetched from {remote}: {error}") from error


def wait_for_leader(file_name: str, remote: str) -> None:
    """Wait until the first rank of this node has fetched a file.

    Raises:
        UserError: it has not within a minute.
    """
    try:
        wait_for_file_to_exist(file_name, 0.07, 60.0, f"{file_name} was not fetched from {remote}")
    except RuntimeError as error:
        raise UserError(f"no shards could be fetched from {remote} by this node's first rank; see its error") from error


def explain(error: BaseException, remote: str) -> str:
    """Explain an error of a storage client and say what to check."""
    words, reason = _words(error), _one_line(error)
    credentials = _check(remote, "the credentials", CREDENTIALS)
    meanings = {
        NO_CREDENTIALS: f"no credentials were found; {credentials}",
        REFUSED_KEYS: f"the server refuses the credentials ({reason}); {credentials}",
        REFUSED: "the server refuses access: the credentials are wrong or lack permission, or there is no such bucket; "
        f"{credentials} and the name of the bucket",
        NOT_THERE: "there is no such file: the bucket or the folder is wrong, or not everything was copied there",
        NO_ANSWER: f"the server does not answer ({reason}); {_check(remote, 'the address', ADDRESS)}",
    }
    for names, meaning in meanings.items():
        if words & set(names):
            return meaning
    if isinstance(error, ImportError):
        return f"{reason}; install that package to read from {urlparse(remote).scheme}://"
    return reason


def is_not_there(error: Exception) -> bool:
    """Return whether a storage client's error means that the file does not exist."""
    return bool(_words(error) & set(NOT_THERE))


def _words(error: BaseException) -> set[str]:
    """Return the class names of an error and of its causes, and the server's response codes."""
    words: set[str] = set()
    current: BaseException | None = error
    while current is not None:
        words |= {kind.__name__ for kind in type(current).__mro__}
        response = getattr(current, "response", None)
        if isinstance(response, dict):  # botocore
            words.add(str(response.get("Error", {}).get("Code")))
        words |= {str(code) for name in ("code", "status_code", "status") if (code := getattr(current, name, None))}
        # Workaround (boto3 1.44): S3UploadFailedError is raised without the client's error as its cause; goes when it
        # has one.
        current = current.__context__ if type(current).__name__ == "S3UploadFailedError" else current.__cause__
    return words


def _check(remote: str, what: str, variables: dict[str, str]) -> str:
    names = variables.get(urlparse(remote).scheme)
    return f"check {what}" + (f" ({names})" if names else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
