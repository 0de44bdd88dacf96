# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""To the Hub and back, with the real client in processes of its own, against a server on loopback."""

import json

import pytest
import torch

from .hub_process import USERS, run_with_hub
from .hub_server import HubServer
from .processes import ROOT

SAVE_OUTPUTS = """
import torch

def save_outputs(name, causal_lm, model, tokenizer):
    input_ids = torch.arange(150).view(2, 75)
    with torch.no_grad():
        logits = causal_lm.eval()(input_ids).logits
        last_hidden_state = model.eval()(input_ids).last_hidden_state
        generated = causal_lm.generate(input_ids, max_new_tokens=3, do_sample=False)
    modules = [type(x).__module__ for x in (causal_lm.config, causal_lm, model, tokenizer)]
    tokens = tokenizer("Пульхерия Александровна, née R.\\n")["input_ids"]
    found = {"logits": logits, "last_hidden_state": last_hidden_state, "modules": modules}
    found |= {"tokens": torch.tensor(tokens), "text": tokenizer.decode(tokens)}
    found |= {"generated": generated, "fields": causal_lm.config.to_diff_dict()}
    torch.save(found, f"{sys.argv[1]}/{name}")
"""

PUSH = """
from tests.helpers import tiny_config

torch.manual_seed(0)
model = reformer_hf.ReformerHfForCausalLM(tiny_config(vocab_size=260))
for parameter in model.parameters():
    # As after training: no bias is zero, so that one that gets lost is missed.
    torch.nn.init.normal_(parameter, std=0.2)
tokenizer = reformer_hf.ReformerHfByteTokenizer()
for each in (model, tokenizer):
    each.push_to_hub("user/tiny-reformer")
save_outputs("pushed", model, model.reformer, tokenizer)
"""

LOAD = """
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

classes = (AutoModelForCausalLM, AutoModel, AutoTokenizer)
save_outputs("loaded", *(each.from_pretrained("user/tiny-reformer", **options) for each in classes))
"""

# Each head, by the name of its Auto class.
HEADS = """
import transformers

HEADS = {
    "MaskedLM": "ReformerHfForMaskedLM",
    "SequenceClassification": "ReformerHfForSequenceClassification",
    "TokenClassification": "ReformerHfForTokenClassification",
    "QuestionAnswering": "ReformerHfForQuestionAnswering",
    "MultipleChoice": "ReformerHfForMultipleChoice",
    "Seq2SeqLM": "encoder_decoder.ReformerHfForConditionalGeneration",
}

def save_head(name, model, prefix=""):
    input_ids = torch.arange(40).view((2, 2, 10) if name == "MultipleChoice" else (2, 20))
    inputs = {"decoder_input_ids": input_ids[:, :7]} if name == "Seq2SeqLM" else {}
    with torch.no_grad():
        outputs = model.eval()(input_ids, **inputs)
    found = {field: value for field, value in outputs.items() if isinstance(value, torch.Tensor)}
    found["module"] = type(model).__module__
    if name == "Seq2SeqLM":
        found["generated"] = model.generate(input_ids, max_new_tokens=3, num_beams=2)
        found["max_length"] = model.generation_config.max_length
    torch.save(found, f"{sys.argv[1]}/{prefix}{name}")
"""

PUSH_HEADS = """
from operator import attrgetter
from reformer_hf import encoder_decoder
from tests.helpers import tiny_config

for name, head in HEADS.items():
    torch.manual_seed(0)
    head = attrgetter(head)(reformer_hf)
    model = head(tiny_config(head.config_class, is_decoder=False, num_labels=2))
    if name == "Seq2SeqLM":
        model.generation_config.max_length = 77
    model.push_to_hub(f"user/{name}")
    save_head(name, model)
"""

LOAD_HEADS = """
for name in HEADS:
    auto_class = getattr(transformers, f"AutoModelFor{name}")
    model = auto_class.from_pretrained(f"user/{name}", **options)
    save_head(name, model)
    # And saved again.
    model.save_pretrained(f"{sys.argv[1]}/saved/{name}")
    save_head(name, auto_class.from_pretrained(f"{sys.argv[1]}/saved/{name}", **options), "again-")
"""

FAIL = """
import json
from huggingface_hub import hf_hub_download

load = reformer_hf.ReformerHfForCausalLM.from_pretrained
model = reformer_hf.ReformerHfForCausalLM(tiny_config())
attempts = {
    "repository": lambda: load("user/missing"),
    "revision": lambda: load("user/tiny-reformer", revision="missing"),
    "file": lambda: hf_hub_download("user/tiny-reformer", "missing.txt"),
    "token": lambda: model.push_to_hub("user/another", token="wrong"),
}
errors = {}
for name, attempt in attempts.items():
    try:
        attempt()
    except Exception as error:
        errors[name] = [type(error).__name__, type(error.__cause__).__name__, str(error)]
with open(f"{sys.argv[1]}/errors.json", "w") as file:
    json.dump(errors, file)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer(USERS) as server:
        yield server


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    """Results of a process that pushes `user/tiny-reformer`, loads it again, and tries what must fail."""
    folder = tmp_path_factory.mktemp("with-package")
    run_with_hub(SAVE_OUTPUTS + PUSH + LOAD + FAIL, hub, folder)
    return folder


@pytest.fixture(scope="module")
def pushed(folder):
    """Outputs of the model and the tokenizer that were pushed."""
    return torch.load(folder / "pushed")


def _is_home(module: str, package: bool) -> bool:
    """Whether a class of this module is from the package, or else from the code that was pushed."""
    return module.startswith("reformer_hf." if package else "transformers_modules.user.tiny_hyphen_reformer.")


def test_push(hub, pushed):
    files = hub.repos["user/tiny-reformer"].files
    assert {"README.md", "config.json", "model.safetensors", "modeling_reformer_hf.py"} <= files.keys()
    assert "lfs_upload" in hub.calls, "the weights did not go the way that they go on the Hub"
    for path in (path for path in files if path.endswith(".py")):
        assert files[path] == (ROOT / "reformer_hf" / path).read_bytes(), path
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_reformer_hf.ReformerHfForCausalLM"
    assert {f"{name.partition('.')[0]}.py" for name in auto_map.values()} <= files.keys()


def _assert_equals(loaded, pushed, package):
    assert all(_is_home(module, package) for module in loaded["modules"]), loaded["modules"]
    for name in ("logits", "last_hidden_state", "generated", "tokens"):
        assert torch.equal(loaded[name], pushed[name]), name
    assert loaded["fields"] == pushed["fields"]
    assert loaded["text"] == pushed["text"] == "Пульхерия Александровна, née R.\n"


def test_load_with_package(folder, pushed):
    _assert_equals(torch.load(folder / "loaded"), pushed, package=True)


def test_load_without_package(hub, pushed, tmp_path):
    run_with_hub(SAVE_OUTPUTS + LOAD, hub, tmp_path, package=False)
    _assert_equals(torch.load(tmp_path / "loaded"), pushed, package=False)


@pytest.mark.slow
def test_each_head(hub, tmp_path):
    """Each head is loaded with and without the package by its Auto class, and computes what the pushed model does."""
    folders = {name: tmp_path / name for name in ("pushed", "with", "without")}
    for name, folder in folders.items():
        folder.mkdir()
        script = HEADS + (PUSH_HEADS if name == "pushed" else LOAD_HEADS)
        run_with_hub(script, hub, folder, package=name != "without")
    names = [path.name for path in folders["pushed"].iterdir() if path.is_file()]
    assert len(names) == 6
    for name in names:
        pushed = torch.load(folders["pushed"] / name)
        code = {path: content for path, content in hub.repos[f"user/{name}"].files.items() if path.endswith(".py")}
        for kind, home in (("with", "reformer_hf."), ("without", "transformers_modules.")):
            loaded, again = (torch.load(folders[kind] / f"{prefix}{name}") for prefix in ("", "again-"))
            for found in (loaded, again):
                assert found.pop("module").startswith(home), name
                for field, value in found.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(pushed[field])), (name, field)
            saved = folders[kind] / "saved" / name
            assert {path.name: path.read_bytes() for path in saved.glob("*.py")} == code, name


def test_client_errors(hub, folder):
    errors = json.loads((folder / "errors.json").read_text())
    expected = {
        "repository": ("OSError", "RepositoryNotFoundError", "user/missing is not a local folder and is not a valid"),
        "revision": ("OSError", "RevisionNotFoundError", "missing is not a valid git identifier"),
        "file": ("RemoteEntryNotFoundError", "HTTPStatusError", "missing.txt does not exist on main"),
        "token": ("HfHubHTTPError", "HTTPStatusError", "401 Unauthorized"),
    }
    assert errors.keys() == expected.keys()
    for name, (error, cause, message) in expected.items():
        assert errors[name][:2] == [error, cause], errors[name]
        assert message in errors[name][2]
    assert "user/another" not in hub.repos
