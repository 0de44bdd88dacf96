# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Loading runs no code of a folder unless it is trusted, and no code in weights ever."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForCausalLM

from .helpers import random_model
from .hub_process import USERS, run_with_hub
from .hub_server import HubServer

# Tries to load with each Auto class, and says what happened.
ATTEMPTS = """
import json
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

found = {}
for source in (f"{sys.argv[1]}/model", "user/model"):
    for auto_class in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        for name, arguments in {"missing": {}, "refused": {"trust_remote_code": False}}.items():
            try:
                auto_class.from_pretrained(source, **arguments)
                found[f"{source} {auto_class.__name__} {name}"] = "loaded"
            except Exception as error:
                found[f"{source} {auto_class.__name__} {name}"] = f"{type(error).__name__}: {error}"
with open(f"{sys.argv[1]}/found.json", "w") as file:
    json.dump(found, file)
"""

TRUST = """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/model", **options)
"""


class MakesFile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _with_alarm(folder: Path, alarm: Path) -> None:
    """Save a model and a tokenizer whose code makes a file when it runs."""
    random_model(vocab_size=260).save_pretrained(folder)
    ReformerHfByteTokenizer().save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.write_text(f"{path.read_text()}\nopen({str(alarm)!r}, 'w').close()\n")


def test_package_is_preferred(tmp_path):
    """With `trust_remote_code=True`, Transformers prefers the package for models, but not for tokenizers."""
    alarm = tmp_path / "alarm"
    _with_alarm(tmp_path / "model", alarm)
    models = (AutoConfig, AutoModelForCausalLM)
    for arguments, auto_classes in (
        ({}, (*models, AutoTokenizer)),
        ({"trust_remote_code": False}, (*models, AutoTokenizer)),
        ({"trust_remote_code": True}, models),
    ):
        for auto_class in auto_classes:
            loaded = auto_class.from_pretrained(tmp_path / "model", **arguments)
            assert type(loaded).__module__.startswith("reformer_hf.")
    assert not alarm.exists()


def test_names_of_code_that_look_like_paths(tmp_path):
    random_model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for auto_map in ("../../evil.Class", "/tmp/evil.Class", "user/evil--evil.Class"):
        fields["auto_map"] = dict.fromkeys(fields["auto_map"], auto_map)
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ReformerHfForCausalLM, auto_map


@pytest.mark.slow
def test_code_is_not_trusted(tmp_path):
    """Without the package, from a folder and from the Hub. With `trust_remote_code=True` the code does run."""
    alarm = tmp_path / "alarm"
    _with_alarm(tmp_path / "model", alarm)
    with HubServer(USERS) as hub:
        script = "from huggingface_hub import HfApi\nHfApi().create_repo('user/model')\n"
        script += "HfApi().upload_folder(repo_id='user/model', folder_path=f'{sys.argv[1]}/model')\n"
        run_with_hub(script, hub, tmp_path)
        run_with_hub(ATTEMPTS, hub, tmp_path, package=False)
        found = json.loads((tmp_path / "found.json").read_text())
        assert len(found) == 12
        for attempt, error in found.items():
            assert error.startswith("ValueError: ") and "trust_remote_code=True" in error, (attempt, error)
        assert not alarm.exists()
        run_with_hub(TRUST, hub, tmp_path, package=False)
        assert alarm.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_code_in_weights(name, tmp_path):
    """A pickle is not run, whatever its name."""
    alarm = tmp_path / "alarm"
    model = random_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    weights = {**model.state_dict(), "more": MakesFile(alarm)}
    torch.save(weights, tmp_path / "model" / name)
    with pytest.raises(Exception, match="(?i)weights.only|safetensors|header"):
        ReformerHfForCausalLM.from_pretrained(tmp_path / "model")
    assert not alarm.exists()
    # It would run if it were not refused.
    with open(tmp_path / "model" / name, "rb") as file:
        torch.load(file, weights_only=False)
    assert alarm.exists()


def test_pickled_tensors(tmp_path):
    """Weights of old folders are read with `weights_only=True`."""
    model = random_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded, info = ReformerHfForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
