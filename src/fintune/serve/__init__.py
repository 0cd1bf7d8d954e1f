"""Inference with a release: terminal chat, OpenAI-compatible server, page to compare with base."""

import socket

from fintune.errors import UsageError


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be bound, before a model is loaded.

    Raises:
        UsageError: another program listens there, or there is no such address here.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        fix = "stop what listens there, or give another --port"
        raise UsageError(f"{host}:{port} cannot be used: {error.strerror}", fix=fix) from None
