"""Fixtures shared by the tests: seed, single thread, tiny models, batches of packed rows, shards and object stores.

Fixtures return factories, so that a test states only the differences from the tiny defaults.
"""

from __future__ import annotations

import atexit
import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Engine
from tiny import TINY_YAML
from torch.distributed.checkpoint import state_dict

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.corpus.sources import Sources
from electra_composer.model.electra import ElectraForPretraining, SpecialIds
from electra_composer.model.objectives import build_pretraining_model

VOCAB_SIZE = 99  # not a multiple of 64, so the embedding table has padding rows
LENGTH = 32
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4)
FIRST_WORD = 5

Batch = dict[str, torch.Tensor]
# An example is (tokens of A with [CLS] and [SEP], tokens of B with [SEP] or 0), as in the shards' segment_lengths.
Row = list[tuple[int, int]]


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collection.

    Every start of a run collects garbage (batches/shared_memory.py). Among the objects of all libraries and test
    modules that takes most of a second, several times per run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _forget_trainers() -> Iterator[None]:
    """Release the trainers of a test, and the files that their loaders hold open (a process may have 1,024)."""
    yield
    # Workaround (torch 2.7): a private cache of torch.distributed.checkpoint keeps every model alive; goes when
    # torch 2.7 is no longer supported (later versions have no such cache).
    if hasattr(state_dict._get_fqns, "cache_clear"):
        state_dict._get_fqns.cache_clear()
    # Workaround (composer 0.32): an atexit handler keeps every trainer's state alive; goes when closing a trainer
    # unregisters it.
    atexit.unregister(Engine._close)


@pytest.fixture
def special() -> SpecialIds:
    return SPECIAL


@pytest.fixture
def tiny_model_config() -> Callable[..., ModelConfig]:
    """`tiny_model_config(hidden_size=…, …)`: two layers of size 32, embeddings 16, half-width generator, no dropout."""

    def make(**changes: object) -> ModelConfig:
        sizes: dict[str, object] = {
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "embedding_size": 16,
            "generator_size": 0.5,
            "max_positions": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }
        return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def tiny_objective_config() -> Callable[..., ObjectiveConfig]:
    return ObjectiveConfig


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return _make_batch


def _make_batch(rows: list[Row], length: int = LENGTH, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Batch:
    """Make rows of random words in the format of shards.py, integers `[rows, length]`, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    names = ("input_ids", "token_type_ids", "position_ids", "sequence_ids")
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in names}
    for index, row in enumerate(rows):
        start = 0
        for number, (first, second) in enumerate(row, start=1):
            end = start + first + second
            assert end <= length
            words = torch.randint(FIRST_WORD, vocab_size, (first + second,), generator=generator)
            words[0], words[first - 1] = SPECIAL.cls, SPECIAL.sep
            if second:
                words[-1] = SPECIAL.sep
            batch["input_ids"][index, start:end] = words
            batch["token_type_ids"][index, start + first : end] = 1
            batch["position_ids"][index, start:end] = torch.arange(first + second)
            batch["sequence_ids"][index, start:end] = number
            start = end
    return batch


@pytest.fixture
def make_model(tiny_model_config: Callable[..., ModelConfig]) -> Callable[..., ElectraForPretraining]:
    """`make_model(model_config, objective, max_seq_length=…, perturbed=True)`.

    `perturbed` replaces initial values that could hide a mistake: biases are not zero, LayerNorms are not the identity,
    and matrices are large enough for an uneven softmax.
    """

    def make(
        model: ModelConfig | None = None,
        objective: ObjectiveConfig | None = None,
        vocab_size: int = VOCAB_SIZE,
        max_seq_length: int = LENGTH,
        perturbed: bool = True,
        seed: int = 0,
    ) -> ElectraForPretraining:
        torch.manual_seed(seed)
        built = build_pretraining_model(
            model or tiny_model_config(), objective or ObjectiveConfig(), vocab_size, SPECIAL, max_seq_length
        )
        if perturbed:
            _perturb(built)
        return built

    return make


def _perturb(model: ElectraForPretraining) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = parameter.dim() == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm_weight else 0.0))
        for name, parameter in model.named_parameters():
            if name.endswith(("word.weight", "word_delta", "lm_head.bias")):
                parameter[model.vocab_size :] = 0.0


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a small invented language in which each word determines the next."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]
    lines = []
    for _ in range(300):
        start = rng.randrange(len(words))
        lines.append(" ".join(words[(start + i) % len(words)] for i in range(rng.randint(5, 40))))
    (folder / "text.txt").write_text("\n\n".join(lines))
    convert(
        Conversion(
            sources=Sources.of(str(folder / "text.txt")),
            out=str(folder / "shards"),
            tokenizer="train",
            vocab_size=120,
            max_seq_length=LENGTH,
            val_fraction=0.1,
            progress=False,
        )
    )
    return folder / "shards"


@pytest.fixture(scope="session")
def write_tiny_yaml(shards: Path) -> Callable[[Path], Path]:
    """`write_tiny_yaml(folder)`: a `pretrain.py` configuration that trains for seconds in `folder / "run"`."""

    def write(folder: Path) -> Path:
        path = folder / "tiny.yaml"
        path.write_text(TINY_YAML.replace("SHARDS", str(shards)).replace("FOLDER", str(folder / "run")))
        return path

    return write


@pytest.fixture
def tiny_yaml(write_tiny_yaml: Callable[[Path], Path], tmp_path: Path) -> Path:
    """The tiny configuration in `tmp_path`."""
    return write_tiny_yaml(tmp_path)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of a local S3 server."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Workaround (botocore 1.44): every session parses the JSON description of S3 again; goes when sessions share it.
    session = pytest.importorskip("botocore.session")
    original, cache = session.create_loader, {}

    def create_loader(*arguments: Any) -> Any:
        loader = original(*arguments)
        loader._cache = cache
        return loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "create_loader", create_loader)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Client of the S3 server, with an empty bucket `corpus`; Streaming finds it by environment variables."""
    boto3 = pytest.importorskip("boto3")
    for name, value in {
        "S3_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="corpus")
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="corpus"):
        for item in page.get("Contents", []):
            client.delete_object(Bucket="corpus", Key=item["Key"])
    client.delete_bucket(Bucket="corpus")


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Bucket `corpus` on a local Google Cloud Storage emulator, as an object of Google's client."""
    server = pytest.importorskip("gcp_storage_emulator.server").create_server("localhost", 0, in_memory=True)
    server.start()
    # Workaround (gcp-storage-emulator 2026.7): the port it chose is in a private attribute; goes when it is public.
    host, port = server._api._httpd.server_address[:2]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    # The emulator needs no credentials.
    monkeypatch.setattr("google.auth.default", lambda *_, **__: (AnonymousCredentials(), "test"))
    yield storage.Client(project="test", credentials=AnonymousCredentials()).create_bucket("corpus")
    server.stop()
