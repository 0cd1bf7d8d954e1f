"""A hub on loopback for commands that run in this process or in a fork of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from hub.server import Hub
from huggingface_hub import constants


@contextmanager
def client(hub: Hub, home: Path, token: str = "", *, xet: bool = False) -> Iterator[None]:
    """Clients of this process know this hub alone, by what they would read from the environment."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    known = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not xet,
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    environment = {"HF_TOKEN": token, "HF_HOME": str(home)}  # the latter for hf_xet
    with mock.patch.multiple(constants, **known), mock.patch.dict(os.environ, environment):
        yield
