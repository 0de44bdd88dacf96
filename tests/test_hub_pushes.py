# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Pushes that fail, are cut off or meet: `main` never shows half a model, and a second attempt works."""

import json
import subprocess
import sys
import threading
from collections import Counter
from http import HTTPStatus

import pytest
import torch

from reformer_hf import ReformerHfForCausalLM

from .helpers import random_model
from .hub_process import USERS, WITH_PACKAGE, hub_env, run_with_hub
from .hub_server import Handler, HubError, HubServer
from .processes import ROOT

pytestmark = pytest.mark.slow

# Weights in one file, in several files, and the models that they belong to: each says by its config which one it is.
PUSH = """
import json
from tests.helpers import random_model

models = {num_hashes: random_model(num_hashes=num_hashes) for num_hashes in (1, 2, 3)}
for num_hashes, model in models.items():
    for parameter in model.parameters():
        parameter.data.add_(num_hashes)

def push(num_hashes, repo_id, **arguments):
    try:
        models[num_hashes].push_to_hub(repo_id, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def found(repo_id):
    # Which model a user finds, who loads it with the real client.
    model = reformer_hf.ReformerHfForCausalLM.from_pretrained(repo_id)
    expected = models[model.config.num_hashes].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()), "half a model"
    return model.config.num_hashes

def write(found):
    with open(f"{sys.argv[1]}/found.json", "w") as file:
        json.dump(found, file)
"""

FAULTS = """
results = {}
for fault in ("busy", "refused", "cut", "lost"):
    repo_id = f"user/{fault}"
    push(1, repo_id)
    results[fault] = [found(repo_id)]
    for attempt in range(2):
        results[fault] += [push(2, repo_id, max_shard_size="10kB"), found(repo_id)]
    # Back to one file, so that no old shard remains either.
    results[fault] += [push(3, repo_id), found(repo_id)]
write(results)
"""

MEET = """
import threading

push(1, "user/both")
errors = {}
threads = [
    threading.Thread(target=lambda each=each: errors.update({each: push(each, "user/both")})) for each in (2, 3)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
first = found("user/both")
write([errors, first, push(5 - first, "user/both"), found("user/both")])
"""


@pytest.fixture
def hub():
    with HubServer(USERS) as server:
        yield server


class Faults:
    """Each fault hits the second push to the repository of its name, once."""

    def __init__(self, hub: HubServer):
        self.uploads = Counter()
        self.commits = Counter()
        self.hit: set[str] = set()
        hub.before.update(lfs_upload=self.upload, commit=self.commit)

    def is_due(self, fault: str, handler: Handler) -> bool:
        due = f"/user/{fault}/" in handler.path and self.commits[fault] > 0 and fault not in self.hit
        self.hit |= {fault} if due else set()
        return due

    def upload(self, handler: Handler):
        if self.is_due("busy", handler):
            raise HubError(HTTPStatus.SERVICE_UNAVAILABLE, "Try again")
        # The first upload is that of the first push.
        if self.uploads["refused"] == 3 and self.is_due("refused", handler):
            raise HubError(HTTPStatus.FORBIDDEN, "Storage is full")
        self.uploads[_name(handler)] += 1

    def commit(self, handler: Handler):
        if self.is_due("cut", handler):
            handler.rfile.read(1000)
            handler.cut()
        handler.lose_answer = self.is_due("lost", handler)
        self.commits[_name(handler)] += 1


def _name(handler: Handler) -> str:
    """The repository of a request, without its user."""
    return handler.path.partition("/user/")[2].partition("/")[0]


def _assert_intact(files: dict[str, bytes], folder):
    """That a commit has weights in one form, and loads without anything missing."""
    folder.mkdir()
    for path, content in files.items():
        (folder / path).write_bytes(content)
    shards = {path for path in files if path.startswith("model-")}
    index = files.get("model.safetensors.index.json")
    assert set(json.loads(index)["weight_map"].values() if index else ()) == shards
    assert ("model.safetensors" in files) != bool(shards)
    _, info = ReformerHfForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_faults(hub, tmp_path):
    faults = Faults(hub)
    run_with_hub(PUSH + FAULTS, hub, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    # Which model was there first, then for each attempt its error and the model that is there.
    assert found.pop("busy") == [1, None, 2, None, 2, None, 3]
    for fault, (error, after) in {
        "refused": ("Error while uploading", 1),
        "cut": ("", 1),
        "lost": ("", 2),
    }.items():
        first, message, *rest = found.pop(fault)
        assert first == 1 and "Error" in message and error in message
        assert rest == [after, None, 2, None, 3], fault
    assert not found
    assert faults.hit == {"busy", "refused", "cut", "lost"}
    for repo_id, repo in hub.repos.items():
        name = repo_id.partition("/")[2]
        assert len(repo.commits) == 4, "not the first, empty one and one for each model"
        _, *commits = repo.commits.values()
        for number, files in enumerate(commits):
            _assert_intact(files, tmp_path / f"{name}-{number}")
        shards = [path for path in commits[1] if path.startswith("model-")]
        # A second attempt uploads no shard again.
        assert len(shards) > 3 and faults.uploads[name] == 1 + len(shards) + 1


def test_two_at_once(hub, tmp_path):
    """Both have uploaded everything before one of them commits; the second to commit is refused."""
    barrier = threading.Barrier(2)

    def meet(handler: Handler):
        if len(hub.repos["user/both"].commits) == 2 and not barrier.broken:
            try:
                barrier.wait(30)
            except threading.BrokenBarrierError:
                return
            barrier.abort()

    hub.before["commit"] = meet
    run_with_hub(PUSH + MEET, hub, tmp_path)
    errors, first, retried, last = json.loads((tmp_path / "found.json").read_text())
    refused = 5 - first
    assert errors[str(first)] is None
    assert "412" in errors[str(refused)] and "A commit has happened since" in errors[str(refused)]
    assert retried is None and last == refused
    assert len(hub.repos["user/both"].commits) == 4


def test_killed(hub, tmp_path):
    """A process that is killed in the middle of an upload."""
    uploading, killed = threading.Event(), threading.Event()

    def hold(handler: Handler):
        if hub.calls.count("lfs_upload") == 4:
            handler.rfile.read(100)
            uploading.set()
            killed.wait(60)
            handler.cut()

    hub.before["lfs_upload"] = hold
    script = WITH_PACKAGE + PUSH + "push(1, 'user/killed')\npush(2, 'user/killed', max_shard_size='10kB')"
    env = {**hub_env(hub, tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=tmp_path, env=env)
    try:
        assert uploading.wait(120)
    finally:
        process.kill()
        process.wait()
        killed.set()
    repo = hub.repos["user/killed"]
    assert len(repo.commits) == 2
    _assert_intact(repo.files, tmp_path / "before")
    model = ReformerHfForCausalLM.from_pretrained(tmp_path / "before")
    expected = random_model(num_hashes=1).get_input_embeddings().weight + 1
    assert torch.equal(model.get_input_embeddings().weight, expected)
    script = PUSH + "write([push(2, 'user/killed', max_shard_size='10kB'), found('user/killed')])"
    run_with_hub(script, hub, tmp_path)
    assert json.loads((tmp_path / "found.json").read_text()) == [None, 2]
    _assert_intact(repo.files, tmp_path / "after")
