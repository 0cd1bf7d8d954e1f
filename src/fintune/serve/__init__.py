"""Inference with a release: terminal chat, OpenAI-compatible server, page to compare with base."""

import socket

from fintune.errors import UsageError


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be bound, before a model is loaded.

    Raises:
        UsageError: another program listens there, or there is no such address here.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        fix = "stop what listens there, or give another --port"
        raise UsageError(f"{host}:{port} cannot be used: {error.strerror}", fix=fix) from None
