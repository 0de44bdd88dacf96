# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Processes that push to the Hub on loopback and load from it with the real client."""

import os
import subprocess
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from .hub_server import HubServer
from .processes import ROOT, link_packages, run_python

TOKEN, OTHER_TOKEN = "token-of-user", "token-of-other"
USERS = {TOKEN: "user", OTHER_TOKEN: "other"}

# What each process runs first. It may save results in the folder `sys.argv[1]`.
WITH_PACKAGE = """
import sys
import torch
import reformer_hf

options = {}
"""

WITHOUT_PACKAGE = """
import importlib.util
import sys
import torch

assert not any(map(importlib.util.find_spec, ("reformer_hf", "tests", "peft", "accelerate")))
options = {"trust_remote_code": True}
"""


def hub_env(hub: HubServer, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The environment of a process with the cache `folder`, and the token of its user."""
    dropped = ("HF_", "TRANSFORMERS_", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return env | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf_home"),
        **({"HF_TOKEN": token} if token else {}),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Else, where weights are missing, a service on the internet would be asked to convert others.
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@lru_cache
def _only_torch_and_transformers() -> TemporaryDirectory:
    """Packages of a process, deleted when this one ends."""
    folder = TemporaryDirectory()
    link_packages(["torch", "transformers"], Path(folder.name))
    return folder


def run_with_hub(
    script: str, hub: HubServer, folder: Path, package: bool = True, token: str | None = TOKEN, check: bool = True
) -> subprocess.CompletedProcess:
    """
    Run `script` in a new process whose cache is `folder`; without `package`, it has only torch and transformers.

    `options` of the script are arguments of `from_pretrained` that load without the package.
    """
    env = hub_env(hub, folder, token)
    env["PYTHONPATH"] = str(ROOT) if package else _only_torch_and_transformers().name
    arguments = ["-c", (WITH_PACKAGE if package else WITHOUT_PACKAGE) + script, folder]
    return run_python(arguments if package else ["-S", *arguments], folder, env, check)
