# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The commit of `push_to_hub`, with the real client in this process: what it deletes, and when it is refused."""

from functools import partial

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from reformer_hf import hub_commit

from .hub_process import OTHER_TOKEN, TOKEN, USERS
from .hub_server import HubServer

REPO = "user/model"
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(USERS) as server:
        monkeypatch.setattr(hub_commit, "HfApi", partial(HfApi, endpoint=server.url))
        HfApi(server.url, token=TOKEN).create_repo(REPO)
        yield server


def _commit(folder, *names, content="1", token=TOKEN, **arguments):
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content)
    return hub_commit.commit_model(folder, paths, REPO, "message", token=token, **arguments)


def test_replaced_weights(hub, tmp_path):
    repo = hub.repos[REPO]
    _commit(tmp_path, "config.json", "model.safetensors", "model.fp16.safetensors", "checkpoint/model.safetensors")
    # Neither a tokenizer nor an adapter, another precision or code replaces weights.
    kept = {*repo.files}
    for name in ("tokenizer.json", "adapter_model.safetensors", "model.bf16.safetensors", "modeling_reformer_hf.py"):
        kept.add(name)
        _commit(tmp_path, name)
        assert repo.files.keys() == kept
    kept.remove("model.safetensors")
    for weights in (SHARDS, {"model.safetensors"}, SHARDS, {"model-00001-of-00001.safetensors"}):
        _commit(tmp_path, "config.json", *weights, content=str(weights))
        assert repo.files.keys() == kept | weights


def test_revision(hub, tmp_path):
    repo = hub.repos[REPO]
    _commit(tmp_path, *SHARDS)
    repo.branches["dev"] = repo.branches["main"]
    _commit(tmp_path, "model.safetensors", revision="dev")
    assert repo.files.keys() == SHARDS
    assert repo.commits[repo.branches["dev"]].keys() == {"model.safetensors"}


def test_other_commit_in_between(hub, tmp_path):
    """Whenever it comes: between the first request and the last."""
    repo = hub.repos[REPO]
    _commit(tmp_path, "config.json", "model.safetensors")
    for endpoint in ("list_tree", "preupload", "lfs_batch", "commit"):
        hub.before[endpoint] = lambda handler: repo.add_commit(
            "main", {**repo.files, "other": b"%d" % len(repo.commits)}
        )
        with pytest.raises(HfHubHTTPError, match="(?s)412.*A commit has happened since") as refused:
            _commit(tmp_path, "config.json", "model.safetensors", content=endpoint)
        assert refused.value.response.status_code == 412
        assert repo.files["model.safetensors"] == b"1"
        hub.before.clear()
        _commit(tmp_path, "config.json", "model.safetensors", content=endpoint)
        assert repo.files["model.safetensors"] == repo.files["config.json"] == endpoint.encode()
        _commit(tmp_path, "config.json", "model.safetensors")


def test_nothing_changed(hub, tmp_path):
    _commit(tmp_path, "config.json", "model.safetensors")
    _commit(tmp_path, "config.json", "model.safetensors")
    assert len(hub.repos[REPO].commits) == 2


def test_other_user(hub, tmp_path):
    with pytest.raises(HfHubHTTPError, match="403"):
        _commit(tmp_path, "config.json", token=OTHER_TOKEN)
    assert not hub.repos[REPO].files
