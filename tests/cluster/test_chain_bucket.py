"""The chain on a bucket, over HTTP: the same run, with nothing but its storage and tracking changed."""

from __future__ import annotations

import os
from collections.abc import Callable

import boto3
from harness import Run


def test_the_chain_on_a_bucket_is_found_finished_there_and_holds_no_secret(
    s3: str, make_run: Callable[..., Run]
) -> None:
    run = make_run(
        "bucket",
        models={
            "context_encoder": {"size": 32, "width": 0.1, "overlap": 0, "train": {"steps": {"train": 40}}}
        },
    )
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    run.recipe |= {"storage": f"{s3}/runs", "tracking": f"sqlite:///{run.folder}/mlflow.db"}
    assert run.finish(run.start(storage=False)) == 0, run.output
    assert "registered models:/context_encoder/1" in run.output
    assert f"{s3}/runs/reports/small-" in run.output
    assert secret not in run.output
    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket=s3.removeprefix("s3://"))["Contents"]
    before = {item["Key"]: item["LastModified"] for item in listed}
    assert any(key.endswith("model.safetensors") for key in before)
    for key in before:
        if not key.endswith((".tar", ".pt", ".png")):
            assert (
                secret.encode()
                not in client.get_object(Bucket=s3.removeprefix("s3://"), Key=key)["Body"].read()
            ), key

    assert run.finish(run.start(storage=False)) == 0, run.output
    assert "found finished" in run.output
    after = {
        item["Key"]: item["LastModified"]
        for item in client.list_objects_v2(Bucket=s3.removeprefix("s3://"))["Contents"]
    }
    assert after == before
