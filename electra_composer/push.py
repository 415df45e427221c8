"""Upload a run to the Hugging Face Hub: `python -m electra_composer.push RUN USER/NAME`.

The repository is private unless --public is given. Its branch main has the newest checkpoint: the discriminator at the
top, where from_pretrained finds it, the generator in a folder, and a model card. Each milestone of the run (6.25 … 100%
of training) is a branch named after its step, such as step62500. The same command again uploads what is missing.

The token is that of `hf auth login`, or HF_TOKEN in the environment; it must have write access.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse

from electra_composer.arguments import RESULTS_HELP, ArgumentParser, parse_early


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="python -m electra_composer.push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="run folder of pretrain.py, or one of its checkpoints")
    parser.add_argument("repository", help="user/name on the hub; created if it is not there")
    parser.add_argument("--public", action="store_true", help="everyone may see the repository (default: private)")
    parser.add_argument("--results", action="append", default=[], metavar="FILE", help=RESULTS_HELP)
    parser.add_argument("--no-milestones", action="store_true", help="upload the newest checkpoint only")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds
    parse_early(parse)

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from electra_composer.checkpoints.saving import checkpoints_in
from electra_composer.checkpoints.weights import Checkpoint, read_checkpoint
from electra_composer.errors import UserError, one_line, report_user_errors
from electra_composer.export import export
from electra_composer.model_card import TAG, networks_in, read_own_results
from electra_composer.signals import unwind

MAIN = "main"
NAME = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
AGAIN = "rerun the same command to upload the rest"
LOGIN = "run hf auth login, or set HF_TOKEN, with a token of https://huggingface.co/settings/tokens that may write"


def push(
    run: str,
    repository: str,
    public: bool = False,
    results: Sequence[str] = (),
    milestones: bool = True,
    api: HfApi | None = None,
) -> list[str]:
    """Upload a checkpoint, and the milestones of its run.

    Args:
        run: run folder of `pretrain.py`, or a checkpoint of it (without milestones).
        repository: `user/name`.
        public: whether everyone may see the repository.
        results: see :func:`read_own_results`.
        milestones: whether to upload them.
        api: client of the hub; None: with the endpoint and token of the environment.

    Returns:
        The branches to which something was uploaded.

    Raises:
        UserError: the checkpoint cannot be read; the repository is another's, or public against `public`; no token, no
            access, no network. What was uploaded until then stays, and is complete on each branch.
    """
    if not re.fullmatch(NAME, repository):
        raise UserError(f"{repository!r} is not the name of a repository; expected user/name, such as me/electra-small")
    api = api or HfApi()
    checkpoint = read_checkpoint(run)
    found = read_own_results(results, checkpoint)
    with explain_hub_errors(repository, api.endpoint):
        api.whoami()  # before anything is exported
        changed = [MAIN] if _upload(api, repository, MAIN, checkpoint, found, public) else []
        for saved in checkpoints_in(run, "milestone-ba") if milestones else ():
            branch = f"step{saved.batch}"
            if _upload(api, repository, branch, read_checkpoint(saved.path), found if _same(saved.path, run) else ()):
                changed.append(branch)
    return changed


def _same(milestone: str, run: str) -> bool:
    """Return whether a milestone is the newest checkpoint of a run, to which results belong."""
    return os.path.realpath(milestone) == os.path.realpath(os.path.join(run, "latest-rank0.pt"))


def _upload(
    api: HfApi,
    repository: str,
    branch: str,
    checkpoint: Checkpoint,
    results: Sequence[Mapping[str, Any]],
    public: bool | None = None,
) -> bool:
    """Upload one checkpoint in one commit, if the branch does not have it already; return whether it was uploaded.

    Args:
        public: visibility of the repository, which is created if it is not there; None: it is there.
    """
    with tempfile.TemporaryDirectory() as folder:
        exported = os.path.join(folder, "export")
        export(checkpoint, exported, results=results, repository=repository)
        main = next(iter(networks_in(exported)))
        shutil.copytree(os.path.join(exported, main), exported, dirs_exist_ok=True)  # to the top
        shutil.rmtree(os.path.join(exported, main))
        if public is not None:
            _open_repository(api, repository, public)
        if branch != MAIN:
            # From the first commit, which is empty: never has a branch the weights of another step.
            first = api.list_repo_commits(repository)[-1].commit_id
            api.create_branch(repository, branch=branch, revision=first, exist_ok=True)
        before = api.repo_info(repository, revision=branch).sha
        message = f"{os.path.basename(os.path.realpath(checkpoint.path))} of electra_composer"
        commit = api.upload_folder(repo_id=repository, folder_path=exported, revision=branch, commit_message=message)
    uploaded = commit.oid != before
    print(f"{repository}, {branch}: {'uploaded' if uploaded else 'is there already'}", flush=True)
    return uploaded


def _open_repository(api: HfApi, repository: str, public: bool) -> None:
    """Create the repository, or check that one of this name is a former upload with the wanted visibility."""
    try:
        info = api.repo_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=not public)
        return
    if info.private == public:
        is_now, hint = ("public", "give --public") if not public else ("private", "leave out --public")
        raise UserError(
            f"{repository} is there already and {is_now}; {hint}, change it in its settings on the hub, or choose "
            "another name"
        )
    names = [file.rfilename for file in info.siblings or []]
    if set(names) <= {".gitattributes"}:
        return
    if TAG not in (info.tags or []):  # those of the model card
        raise UserError(
            f"{repository} is there already, with files of something else ({', '.join(sorted(names)[:3])}, …); choose "
            "another name"
        )


@contextlib.contextmanager
def explain_hub_errors(repository: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the hub and of the way to it into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError(f"no token of the hub; {LOGIN}") from error
    except Exception as error:
        message = _explain(error, repository, endpoint)
        if message is None:
            raise
        raise UserError(message) from error


def _explain(error: BaseException, repository: str, endpoint: str) -> str | None:
    """Describe an error of the hub, or of the way to it; None for any other."""
    chain = [error]  # the client wraps errors, such as those of a thread that uploads
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for each in chain:
        if isinstance(each, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it"
        if isinstance(each, HfHubHTTPError) and each.response is not None:
            status, said = each.response.status_code, one_line(each.server_message or each, 200)
            return {
                401: f"the hub does not accept the token ({said}); {LOGIN}",
                403: f"the token may not write to {repository} ({said}); use one that may, or another name",
                409: f"{repository} conflicts with what is on the hub ({said}); choose another name",
            }.get(status, f"{endpoint} answers {status} ({said}); {AGAIN}")
    for each in chain:
        if isinstance(each, OSError) and type(each).__module__.startswith(("requests.", "urllib3.")):
            return f"{endpoint} cannot be reached ({type(each).__name__}); check the network: {AGAIN}"
    return None


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse(argv)
    unwind()
    push(options.run, options.repository, options.public, options.results, not options.no_milestones)
    print(f'transformers.AutoModel.from_pretrained("{options.repository}")')


if __name__ == "__main__":
    main()
