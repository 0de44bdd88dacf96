# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What users do with the Hub: revisions, private repositories, shards, snapshots and the command line."""

import json
import subprocess
import sys

import pytest
import torch

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForCausalLM, ReformerHfForConditionalGeneration

from .helpers import random_model
from .hub_process import OTHER_TOKEN, TOKEN, USERS, hub_env, run_with_hub
from .hub_server import HubServer

pytestmark = pytest.mark.slow

# `outputs` are what tests compare, of the model with the tokenizer beside it.
OUTPUTS = """
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

def outputs(model, tokenizer):
    inputs = tokenizer("Пульхерия R.", return_tensors="pt")
    generated = model.generate(inputs["input_ids"], do_sample=False)
    return {
        "input_ids": inputs["input_ids"],
        "generated": generated,
        "max_new_tokens": model.generation_config.max_new_tokens,
        "modules": [type(each).__module__.partition(".")[0] for each in (model, model.config, tokenizer)],
    }

def load(repo_id, auto_class=AutoModelForCausalLM, **arguments):
    model = auto_class.from_pretrained(repo_id, **arguments, **options)
    return outputs(model, AutoTokenizer.from_pretrained(repo_id, **arguments, **options))
"""

PUSH = """
from tests.helpers import random_model

tokenizer = reformer_hf.ReformerHfByteTokenizer(padding_side="left")

def model_of(number, cls=reformer_hf.ReformerHfForCausalLM):
    model = random_model(cls=cls, vocab_size=260)
    torch.manual_seed(number)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.max_new_tokens = number
    return model

def push(number, repo_id, cls=reformer_hf.ReformerHfForCausalLM, **arguments):
    model = model_of(number, cls)
    model.push_to_hub(repo_id, **arguments)
    tokenizer.push_to_hub(repo_id, **{name: arguments[name] for name in ("revision",) if name in arguments})
    return outputs(model, tokenizer)

api = HfApi()
pushed = {"v1": push(3, "user/revisions")}
pushed["commit"] = pushed["v1"]
api.create_tag("user/revisions", tag="v1")
pushed["dev"] = push(4, "user/revisions", revision="dev")
pushed["main"] = push(5, "user/revisions")
pushed["shards"] = push(6, "user/shards", max_shard_size="20kB")
pushed["private"] = push(7, "user/private", private=True)
pushed["seq2seq"] = push(8, "user/seq2seq", reformer_hf.ReformerHfForConditionalGeneration)
torch.save(pushed, f"{sys.argv[1]}/pushed")
"""

LOAD = """
api = HfApi()
commit = api.repo_info("user/revisions", revision="v1").sha
loaded = {name: load("user/revisions", revision=name) for name in ("v1", "dev")}
loaded["main"] = load("user/revisions")
loaded["commit"] = load("user/revisions", revision=commit)
loaded["shards"] = load(snapshot_download("user/shards"))
loaded["private"] = load("user/private")
loaded["seq2seq"] = load("user/seq2seq", AutoModelForSeq2SeqLM)
torch.save(loaded, f"{sys.argv[1]}/loaded")
"""

# What was loaded is saved, pushed by both ways, and loaded again.
PASS_ON = """
for repo_id, auto_class in (("user/shards", AutoModelForCausalLM), ("user/seq2seq", AutoModelForSeq2SeqLM)):
    model = auto_class.from_pretrained(repo_id, **options)
    tokenizer = AutoTokenizer.from_pretrained(repo_id, **options)
    name = repo_id.partition("/")[2]
    for each in (model, tokenizer):
        each.push_to_hub(f"user/{name}-again")
        each.save_pretrained(f"{sys.argv[1]}/{name}-saved")
    HfApi().create_repo(f"user/{name}-uploaded")
    HfApi().upload_folder(repo_id=f"user/{name}-uploaded", folder_path=f"{sys.argv[1]}/{name}-saved")
    for source in (f"user/{name}-again", f"user/{name}-uploaded", f"{sys.argv[1]}/{name}-saved"):
        loaded[source] = load(source, auto_class)
torch.save(loaded, f"{sys.argv[1]}/loaded")
"""

ACCESS = """
import json

found = {}
attempts = {
    "load": lambda: load("user/private"),
    "snapshot": lambda: snapshot_download("user/private"),
    "push": lambda: AutoModelForCausalLM.from_pretrained("user/shards", **options).push_to_hub("user/private"),
}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "done"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
with open(f"{sys.argv[1]}/found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer(USERS) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    run_with_hub(OUTPUTS + PUSH, hub, folder)
    return torch.load(folder / "pushed")


def _assert_equal(loaded, pushed, package):
    assert loaded["modules"] == ["reformer_hf" if package else "transformers_modules"] * 3
    assert loaded["max_new_tokens"] == pushed["max_new_tokens"]
    for name in ("input_ids", "generated"):
        assert torch.equal(loaded[name], pushed[name]), name


def test_load_with_package(hub, pushed, tmp_path):
    run_with_hub(OUTPUTS + LOAD, hub, tmp_path)
    loaded = torch.load(tmp_path / "loaded")
    assert loaded.keys() == pushed.keys()
    for name, found in loaded.items():
        _assert_equal(found, pushed[name], package=True)
    assert len({found["max_new_tokens"] for found in pushed.values()}) == 6


def test_load_and_pass_on_without_package(hub, pushed, tmp_path):
    run_with_hub(OUTPUTS + LOAD + PASS_ON, hub, tmp_path, package=False)
    loaded = torch.load(tmp_path / "loaded")
    for name in pushed:
        _assert_equal(loaded.pop(name), pushed[name], package=False)
    assert len(loaded) == 6
    for source, found in loaded.items():
        _assert_equal(found, pushed["shards" if "shards" in source else "seq2seq"], package=False)
    for name in ("shards", "seq2seq"):
        code = {path: content for path, content in hub.repos[f"user/{name}"].files.items() if path.endswith(".py")}
        assert len(code) > 30
        saved = tmp_path / f"{name}-saved"
        for files in (
            hub.repos[f"user/{name}-again"].files,
            hub.repos[f"user/{name}-uploaded"].files,
            {path.name: path.read_bytes() for path in saved.iterdir()},
        ):
            assert code.items() <= files.items()
            assert "model.safetensors" in files and not any(path.startswith("model-") for path in files)
            original = json.loads(hub.repos[f"user/{name}"].files["config.json"])
            assert json.loads(files["config.json"])["auto_map"] == original["auto_map"]
        # What was loaded from the Hub without the package also loads with it.
        cls = ReformerHfForCausalLM if name == "shards" else ReformerHfForConditionalGeneration
        model = cls.from_pretrained(saved)
        tokenizer = ReformerHfByteTokenizer.from_pretrained(saved)
        generated = model.generate(tokenizer("Пульхерия R.", return_tensors="pt")["input_ids"], do_sample=False)
        assert torch.equal(generated, pushed[name]["generated"])


@pytest.mark.parametrize("token", [TOKEN, OTHER_TOKEN, None], ids=["owner", "other", "none"])
def test_private(token, hub, pushed, tmp_path):
    assert hub.repos["user/private"].private and not hub.repos["user/shards"].private
    head = hub.repos["user/private"].branches["main"]
    run_with_hub(OUTPUTS + ACCESS, hub, tmp_path, token=token)
    found = json.loads((tmp_path / "found.json").read_text())
    if token == TOKEN:
        assert found == {"load": "done", "snapshot": "done", "push": "done"}
        return
    assert "OSError: user/private is not a local folder and is not a valid" in found["load"]
    assert "RepositoryNotFoundError" in found["snapshot"]
    assert f"{403 if token else 401}" in found["push"]
    assert hub.repos["user/private"].branches["main"] == head


def _hf(hub, folder, *arguments):
    """The command `hf`."""
    env = hub_env(hub, folder)
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_command_line(hub, tmp_path):
    """`hf upload` of a saved folder, also to a branch of a private repository, and `hf download`."""
    model = random_model(vocab_size=260)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20kB")
    ReformerHfByteTokenizer().save_pretrained(tmp_path / "saved")
    _hf(hub, tmp_path, "upload", "user/uploaded", "saved", "--private")
    _hf(hub, tmp_path, "upload", "user/uploaded", "saved", "--revision", "dev")
    repo = hub.repos["user/uploaded"]
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert repo.private and repo.files == saved == repo.commits[repo.branches["dev"]]
    assert len(repo.commits) == 2, "one commit for all files, and none where nothing has changed"
    # As the documentation says: one file in place of the shards.
    model.save_pretrained(tmp_path / "one")
    _hf(hub, tmp_path, "upload", "user/uploaded", "one", "--delete", "model*.safetensors*")
    assert [path for path in repo.files if "safetensors" in path] == ["model.safetensors"]
    _hf(hub, tmp_path, "download", "user/uploaded", "--local-dir", "down")
    down = {path.name: path.read_bytes() for path in (tmp_path / "down").iterdir() if path.is_file()}
    assert down == repo.files
    loaded = ReformerHfForCausalLM.from_pretrained(tmp_path / "down")
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    script = "AutoModelForCausalLM.from_pretrained('user/uploaded', revision='dev', **options)"
    run_with_hub(OUTPUTS + script, hub, tmp_path, package=False)
