"""Contents of the store to which the tests copy a run."""

from __future__ import annotations

from electra_composer.checkpoints.remote_run import RemoteIndex

REMOTE = "s3://corpus/my/run"


def objects(s3) -> dict[str, int]:
    found = s3.list_objects_v2(Bucket="corpus", Prefix="my/run/").get("Contents", [])
    return {item["Key"].removeprefix("my/run/"): item["Size"] for item in found}


def contents(s3) -> RemoteIndex:
    return RemoteIndex.from_json(s3.get_object(Bucket="corpus", Key="my/run/latest.json")["Body"].read().decode())
