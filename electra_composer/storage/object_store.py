"""Files out of an object store by Streaming's downloaders, and what their errors mean to the person at the keyboard."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlparse

from streaming.base.storage.download import CloudDownloader
from streaming.base.util import wait_for_file_to_exist

from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import META, TOKENIZER, Meta, is_inside

T = TypeVar("T")

START_SECONDS = 30.0  # at most, for meta.json or a file of the tokenizer to come

# Names of the errors of boto3, google-cloud-storage, azure, oci and huggingface_hub, and codes of their answers.
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
ADDRESS = {"s3": "S3_ENDPOINT_URL, if it is not Amazon's"}


def fetch(downloader: CloudDownloader, remote: str, local: str, seconds: float) -> None:
    """Download one file, or give up.

    Raises:
        UserError: see :func:`answer`.
    """
    answer(remote, seconds, lambda: download_whole(downloader, remote, local, seconds))


def download_whole(downloader: CloudDownloader, remote: str, local: str, seconds: float) -> None:
    """Download a file, unless it is there; it gets its name when it is whole.

    Streaming's downloader for Google's store writes under the final name, where a reader sees half a file, and what a
    kill has left passes for the file from then on. Raises what the client raises.
    """
    if os.path.exists(local):
        return
    unfinished = f"{local}.{os.getpid()}.unfinished"
    with contextlib.suppress(FileNotFoundError):
        os.remove(unfinished)
    try:
        downloader.download(remote, unfinished, seconds)
        os.replace(unfinished, local)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)
        raise


def answer(remote: str, seconds: float, ask: Callable[[], T]) -> T:
    """What a storage client answers, or give up.

    The clients' own patience is minutes where a server does not answer at all, whatever timeout Streaming gives them:
    so a thread asks, which is left behind then.

    Raises:
        UserError: in a line: no such bucket or file, credentials missing or refused, no answer, …; with the client's
            own error as its cause.
    """
    answers: list[T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # every storage client has errors of its own
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UserError(f"{remote}: no answer within {seconds:g} s; {_check(remote, 'the address', ADDRESS)}")
    if failure:
        raise UserError(f"{remote}: {explain(failure[0], remote)}") from failure[0]
    return answers[0]


def fetch_meta(path: str, remote: str, timeout: float) -> None:
    """Fetch `meta.json` and the tokenizer of a folder of shards; `meta.json` gets its name last: who sees it sees all.

    Raises:
        UserError: see :func:`fetch`; or what is there is no `meta.json`.
    """
    local = os.path.join(path, META)
    timeout = min(timeout, START_SECONDS)
    try:
        downloader = _downloader(remote)  # one client for all files: making one takes longer than a small file
        fetch(downloader, os.path.join(remote, META), f"{local}.tmp", timeout)
        with open(f"{local}.tmp", encoding="utf-8") as file:
            meta = Meta.from_json(file.read(), path)
        for name in meta.tokenizer.files:
            if not is_inside(name) or os.path.basename(name) != name:
                raise ValueError(f"tokenizer file {name!r} is not a plain name")
            fetch(downloader, os.path.join(remote, TOKENIZER, name), os.path.join(path, TOKENIZER, name), timeout)
        os.replace(f"{local}.tmp", local)
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"no shards could be fetched from {remote}: {error}") from error


def _downloader(remote: str) -> CloudDownloader:
    try:
        return CloudDownloader.get(remote)
    except Exception as error:  # an unknown kind of store, or its client's package or credentials are not there
        raise UserError(explain(error, remote)) from error


def wait_for_leader(file_name: str, remote: str) -> None:
    """Wait until another process of this machine has fetched a file.

    Raises:
        UserError: it has not within a minute.
    """
    try:
        wait_for_file_to_exist(file_name, 0.07, 60.0, f"{file_name} was not fetched from {remote}")
    except RuntimeError as error:
        raise UserError(f"no shards could be fetched from {remote} by the first process of this machine") from error


def explain(error: Exception, remote: str) -> str:
    """What an error of a storage client means, and what to look at."""
    words = _words(error)
    if words & set(NO_CREDENTIALS):
        return f"no credentials were found; {_check(remote, 'the credentials', CREDENTIALS)}"
    if words & set(REFUSED_KEYS):
        return (
            f"the server refuses the credentials ({_one_line(error)}); {_check(remote, 'the credentials', CREDENTIALS)}"
        )
    if words & set(REFUSED):
        return (
            "the server refuses access: credentials that are wrong or may not read it, or no such place; "
            f"{_check(remote, 'the credentials', CREDENTIALS)} and the name of the bucket"
        )
    if words & set(NOT_THERE):
        return "there is no such file: the bucket or the folder is another, or not all was copied there"
    if words & set(NO_ANSWER):
        return f"the server does not answer ({_one_line(error)}); {_check(remote, 'the address', ADDRESS)}"
    if isinstance(error, ImportError):
        return f"{_one_line(error)}; install that package to read from {urlparse(remote).scheme}://"
    return _one_line(error)


def is_not_there(error: Exception) -> bool:
    """Whether a storage client's error says that there is no such file."""
    return bool(_words(error) & set(NOT_THERE))


def _words(error: BaseException) -> set[str]:
    """The names of an error's classes and of those that caused it, and the codes that the server gave."""
    words: set[str] = set()
    current: BaseException | None = error
    while current is not None:
        words |= {kind.__name__ for kind in type(current).__mro__}
        response = getattr(current, "response", None)
        if isinstance(response, dict):  # botocore
            words.add(str(response.get("Error", {}).get("Code")))
        words |= {str(code) for name in ("code", "status_code", "status") if (code := getattr(current, name, None))}
        # Of an upload, boto3 does not say that one error is due to the other.
        current = current.__context__ if type(current).__name__ == "S3UploadFailedError" else current.__cause__
    return words


def _check(remote: str, what: str, variables: dict[str, str]) -> str:
    names = variables.get(urlparse(remote).scheme)
    return f"check {what}" + (f" ({names})" if names else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
