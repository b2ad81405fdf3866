"""Fixtures of all tests: an S3 API over HTTP, and small models."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import boto3
import pytest
from gateway import running_gateway
from moto.server import ThreadedMotoServer
from small import build_small

if TYPE_CHECKING:
    from models.base import Model

USER = "testing"
SECRET = "very-secret-7f3a"


@pytest.fixture(scope="session")
def server():
    """A real HTTP server that speaks S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory):
    """Another: JuiceFS, as `inpaint services s3` starts it. It checks signatures, and ignores conditional writes."""
    with running_gateway(tmp_path_factory.mktemp("gateway"), USER, SECRET) as uri:
        yield uri


@pytest.fixture
def s3(server, monkeypatch):
    """A fresh bucket; returns its uri."""
    return fresh_bucket(server, monkeypatch)


@pytest.fixture
def gateway_s3(gateway, monkeypatch):
    """A fresh bucket of the gateway; returns its uri."""
    return fresh_bucket(gateway, monkeypatch)


def fresh_bucket(server, monkeypatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{os.urandom(4).hex()}"
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def small() -> Callable[..., Model]:
    return build_small
