"""Addresses of clusters and folders of Ray that cannot work are refused within seconds, by one line."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ims3_ray.cluster.addresses import PREFACE, check_address, check_temporary_folder
from ims3_ray.cluster.joining import joins
from ims3_ray.config import ClusterConfig
from ims3_ray.errors import UserError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def answering(server: socket.socket, answer: bytes) -> str:
    """Address of a server that gives this answer to whoever connects."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(len(PREFACE))
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "wrong"),
    [
        ("http://127.0.0.1:8265", "address of a job server"), ("https://x", "address of a job server"),
        ("ray://127.0.0.1:10001", "Ray Client"), ("s3://bucket", "address of something else"), ("nonsense", "is no address"),
        ("host:x", "is no address"), (":6379", "is no address"), ("127.0.0.1:1", "no Ray cluster answers"),
        ("127.0.0.1:99999", "is no address"), ("127.0.0.1:0", "is no address"),
        ("no-such-host.invalid:6379", "no Ray cluster answers"),
    ],
)  # fmt: skip
def test_an_address_without_a_cluster_is_one_line(address: str, wrong: str):
    began = time.monotonic()
    with pytest.raises(UserError, match=wrong) as refused:
        check_address(address)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - began < 30


def test_something_else_that_answers_is_no_cluster(listener: socket.socket):
    with pytest.raises(UserError, match="is no Ray cluster"):
        check_address(answering(listener, b"HTTP/1.1 400 Bad Request\r\n"))


def test_a_server_of_http_2_may_be_a_cluster(listener: socket.socket):
    check_address(answering(listener, bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))))
    check_address("auto")


def test_the_address_local_starts_ray_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert joins(ClusterConfig()) is None
    assert joins(ClusterConfig(address="head:6379")) == "head:6379"


def test_a_folder_that_is_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    with pytest.raises(UserError, match=r"is longer than the [0-9]+ bytes"):
        check_temporary_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_temporary_folder()


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what other users than root see of such a folder
    with pytest.raises(UserError, match="cannot be written"):
        check_temporary_folder()
