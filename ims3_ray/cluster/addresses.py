"""Checks the address of a Ray cluster, and the folder of a local one, before Ray is asked: Ray itself waits for minutes."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from ims3_ray.errors import UserError

CONNECT_S = 5.0
LONGEST_SOCKET = 107
"""Largest length in bytes of the path of a Unix socket."""
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""Path of the longest-named socket that Ray makes in its folder; only its length matters."""
LARGEST_PORT = 65535
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of HTTP/2 says first, with an empty frame of settings; a server answers with its settings (frame type 4)."""


def check_address(address: str) -> None:
    """Raises :class:`UserError` for an address at which no Ray cluster can be joined; it takes a few seconds at most."""
    if address == "auto":
        return
    scheme, separator, _ = address.partition("://")
    if separator:
        what = {"http": "of a job server", "https": "of a job server", "ray": "of Ray Client, which Ray Train cannot use"}
        raise UserError(
            f"'{address}' is the address {what.get(scheme, 'of something else')}; submit the command with `ray job submit "
            "--address …`, or give the address of the cluster's head as HOST:6379 (cluster.address, RAY_ADDRESS)"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= LARGEST_PORT:  # a larger one would reach another port
        raise UserError(f"'{address}' is no address of a Ray cluster; give HOST:6379 (cluster.address, RAY_ADDRESS)")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(PREFACE)
            answer = connection.recv(9)
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at '{address}' ({error}); check cluster.address or RAY_ADDRESS, or unset it to start "
            "Ray on this machine"
        ) from error
    if len(answer) < 4 or answer[3] != 4:
        raise UserError(f"what answers at '{address}' is no Ray cluster; give HOST:6379 (cluster.address, RAY_ADDRESS)")


def check_temporary_folder() -> None:
    """Raises :class:`UserError` for a folder (``RAY_TMPDIR``) in which a local Ray cannot make its sockets."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    most = LONGEST_SOCKET - len(SOCKET)
    if len(os.fsencode(folder)) > most:
        raise UserError(
            f"Ray's temporary folder '{folder}' is longer than the {most} bytes that its sockets leave for it; set RAY_TMPDIR "
            "to a shorter path, such as /tmp"
        )
    if Path(folder).exists() and not os.access(folder, os.W_OK):
        raise UserError(f"Ray's temporary folder '{folder}' cannot be written; set RAY_TMPDIR to another")
