"""Uploads to a stand-in of the hub (hub.py), read back by from_pretrained; and what cannot be uploaded."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from hub import READER, TOKEN, Repository, serve_hub
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import reset_sessions
from tiny import ROOT

from electra_composer.checkpoints.weights import load_source, read_checkpoint
from electra_composer.errors import UserError
from electra_composer.finetuning.results import describe_source
from electra_composer.model.weight_maps import discriminator_to_transformers, generator_to_transformers
from electra_composer.push import main, push

RUN = ROOT / "tests/data/v0.1/run"
RESULTS = ROOT / "tests/data/v0.1/finetune/results.json"
NAME = "me/electra-tiny"


@pytest.fixture
def hub():
    with serve_hub() as server:
        yield server


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    """The client of the hub's stand-in in this process, where the hub itself is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    resolve = socket.getaddrinfo

    def local_only(host, *rest, **options):
        assert host == "127.0.0.1", host
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local_only)
    reset_sessions()
    yield HfApi(hub.url, token=TOKEN)
    monkeypatch.undo()
    reset_sessions()


@pytest.fixture
def run(tmp_path):
    """A run with the milestones of the steps 1 and 2, whose weights are 1 and 2 times those of its newest, step 4."""
    folder = tmp_path / "run"
    shutil.copytree(RUN, folder, symlinks=True)
    for step in (1, 2):
        content = torch.load(folder / "batch-4-rank0.pt", weights_only=False)
        content["state"]["model"] = {name: step * value for name, value in content["state"]["model"].items()}
        torch.save(content, folder / f"milestone-ba{step}-rank0.pt")
    return folder


PROGRAM = """
import socket, sys
resolve = socket.getaddrinfo
def local_only(host, *rest, **options):
    assert host == "127.0.0.1", host
    return resolve(host, *rest, **options)
socket.getaddrinfo = local_only
from electra_composer.push import main
main(sys.argv[1:])
import torch, transformers
from transformers import AutoModel, AutoTokenizer, ElectraForMaskedLM, ElectraForPreTraining
name = sys.argv[2]
parts = {
    "discriminator": ElectraForPreTraining.from_pretrained(name),
    "generator": ElectraForMaskedLM.from_pretrained(name, subfolder="generator"),
    "step2": ElectraForPreTraining.from_pretrained(name, revision="step2"),
    "generator of step2": ElectraForMaskedLM.from_pretrained(name, revision="step2", subfolder="generator"),
}
torch.save({part: model.state_dict() for part, model in parts.items()}, "back.pt")
print(AutoTokenizer.from_pretrained(name)("a b")["input_ids"])
"""


def test_a_push_is_read_back_by_from_pretrained(hub, run, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "no_proxy": "*"}
    command = [sys.executable, "-c", PROGRAM, str(run), NAME]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for branch in ("main", "step1", "step2"):
        assert f"{NAME}, {branch}: uploaded" in done.stdout
    repository = hub.repositories[NAME]
    assert repository.private
    assert {name: len(commits) for name, commits in repository.branches.items()} == {"main": 2, "step1": 2, "step2": 2}
    newest = repository.at("main").files
    assert {"README.md", "config.json", "model.safetensors", "generator/model.safetensors"} <= newest.keys()
    assert not any(name.startswith("discriminator/") for name in newest)

    # from_pretrained gives the weights of the checkpoints
    back = torch.load(tmp_path / "back.pt")
    for step, path in (("", "batch-4-rank0.pt"), ("step2", "milestone-ba2-rank0.pt")):
        checkpoint = read_checkpoint(str(run / path))
        discriminator = discriminator_to_transformers(checkpoint.state, checkpoint.discriminator)
        generator = generator_to_transformers(checkpoint.state, checkpoint.generator)
        for part, expected in (
            (step or "discriminator", discriminator),
            (f"generator{step and ' of step2'}", generator),
        ):
            for name, tensor in expected.items():
                torch.testing.assert_close(back[part][name], tensor, rtol=0, atol=0)
    assert json.loads(done.stdout.splitlines()[-1])


def test_an_interrupted_push_goes_on(hub, api, run, capsys):
    hub.refuse = {r"POST .*/commit/step2": (503, "out of order")}
    with pytest.raises(UserError, match=rf"{hub.url} answers 503 \(out of order.*rerun the same command"):
        push(str(run), NAME, api=api)
    repository = hub.repositories[NAME]
    assert list(repository.at("step2").files) == [".gitattributes"]  # not the weights of another step
    uploads = hub.uploads()
    assert uploads == 4  # two networks; the weights of step 1 are those of step 4
    hub.refuse = {}
    assert push(str(run), NAME, api=api) == ["step2"]
    assert hub.uploads() == uploads
    assert "main: is there already" in capsys.readouterr().out
    assert push(str(run), NAME, api=api) == []
    (run / "milestone-ba2-rank0.pt").unlink()
    shutil.copy(run / "milestone-ba1-rank0.pt", run / "milestone-ba3-rank0.pt")
    assert push(str(run), NAME, milestones=False, api=api) == []
    assert push(str(run), NAME, api=api) == ["step3"]
    assert hub.uploads() == uploads  # the hub has these weights of step 1
    with pytest.raises(RepositoryNotFoundError):
        HfApi(hub.url, token=False).repo_info(NAME)  # private


def test_the_card_has_results(hub, api, run):
    results = json.loads(RESULTS.read_text())
    source = describe_source(load_source(str(run)), random_init=False)
    results["settings"]["weights_sha256 of model.source"] = source["weights_sha256"]
    (run / "results.json").write_text(json.dumps(results))
    push(str(run), NAME, results=[str(run)], milestones=False, api=api)
    card = ModelCard(hub.repositories[NAME].at("main").files["README.md"].decode())
    [row] = results["tasks"].values()
    assert [each.metric_value for each in card.data.eval_results] == [round(row["mean"], 2)]
    assert f"{row['runs'][0]['seed']}: {row['runs'][0]['score']:.1f}" in card.text
    assert f'from_pretrained("{NAME}", subfolder="generator")' in card.text
    assert "step 4, after 32 rows of at most 32 tokens: 822 tokens, without padding" in card.text
    assert str(run) not in card.content
    assert str(ROOT) not in card.content
    with pytest.raises(UserError, match=r"results of other weights than .*; expected those of finetuning this"):
        push(str(run), NAME, results=[str(RESULTS)], api=api)


REPOSITORY_ERRORS = [
    ({}, {"public": True}, None),
    ({NAME: Repository(private=False)}, {}, r"is there already and public; give --public"),
    ({NAME: Repository(private=True)}, {"public": True}, r"is there already and private; leave out --public"),
    ({}, {"repository": "electra"}, r"'electra' is not the name of a repository; expected user/name"),
]


@pytest.mark.parametrize(("repositories", "options", "message"), REPOSITORY_ERRORS)
def test_visibility_and_names(hub, api, run, repositories, options, message):
    for name, repository in repositories.items():
        repository.branches = {}
        repository.commit("main", "initial commit", {})
        hub.repositories[name] = repository
    options = {"repository": NAME, "milestones": False, **options}
    if message is None:
        assert push(str(run), api=api, **options) == ["main"]
        assert HfApi(hub.url, token=False).repo_info(NAME).private is False
        return
    with pytest.raises(UserError, match=message):
        push(str(run), api=api, **options)
    assert not hub.uploads()


@pytest.mark.parametrize(
    "files", [{"config.json": b"{}"}, {"README.md": b"---\ntags: [llama]\n---\n"}, {"README.md": b""}]
)
def test_what_is_not_ours_is_not_overwritten(hub, api, run, files):
    hub.repositories[NAME] = Repository(private=True)
    hub.repositories[NAME].commit("main", "theirs", files)
    with pytest.raises(UserError, match="is there already, with files of something else"):
        push(str(run), NAME, api=api)
    assert hub.repositories[NAME].at("main").files == files


@pytest.mark.parametrize(
    ("token", "refuse", "message"),
    [
        ("hf_wrong", {}, r"the hub does not accept the token \(.*\); run hf auth login"),
        (READER, {}, r"the token may not write to me/electra-tiny \(no write access"),
        (
            TOKEN,
            {"POST /api/repos/create": (409, "a dataset has this name")},
            r"conflicts with what .*a dataset has this name",
        ),
        (TOKEN, {"POST .*preupload": (409, "in use")}, r"me/electra-tiny conflicts with what is on the hub \(in use"),
        (TOKEN, {"PUT /lfs": (400, "too large")}, r"answers 400 \(.*rerun the same command"),
    ],
)
def test_errors_of_the_hub_are_one_line(hub, api, run, token, refuse, message):
    hub.refuse = refuse
    with pytest.raises(UserError, match=message) as caught:
        push(str(run), NAME, api=HfApi(hub.url, token=token))
    assert "\n" not in str(caught.value)


def test_no_token_no_network_no_run(api, run, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no token of the hub; run hf auth login, or set HF_TOKEN"):
        push(str(run), NAME, api=HfApi(api.endpoint))
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached \(\w+\); check the network"):
        push(str(run), NAME, api=HfApi("http://127.0.0.1:9", token=TOKEN))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(str(run), NAME, api=HfApi("http://127.0.0.1:9", token=TOKEN))
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "none"), NAME])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
