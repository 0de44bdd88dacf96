# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Saving: the same model again, in this process and in others, with the package and without, and while it trains."""

import copy
import json
import math
import os
import pickle
import re
from pathlib import Path

import accelerate
import pytest
import torch
from packaging import version
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ReformerConfig,
    ReformerModelWithLMHead,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto

import reformer_hf
from reformer_hf import (
    ReformerHfByteTokenizer,
    ReformerHfConfig,
    ReformerHfForCausalLM,
    ReformerHfForSequenceClassification,
    ReformerHfModel,
)

from .helpers import random_model, tiny_config
from .processes import ROOT, WITHOUT_PACKAGE, run_python
from .test_flat_files import FLAT_FILES

TEXT = "Пульхерия Александровна, née R.\n"
AXIAL_AND_TIED = {
    "axial": {},
    "axial-tied": {"tie_word_embeddings": True},
    "learned": {"axial_pos_embds": False},
    "learned-tied": {"axial_pos_embds": False, "tie_word_embeddings": True},
}

each_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])

# What each process runs: `load` gives what the models and the tokenizer of a folder compute.
LOAD = """
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
)

saved, again, results, text, tokenizer_alone = sys.argv[1:]

def load(folder):
    classes = (AutoConfig, AutoTokenizer, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
    loaded = [each.from_pretrained(folder, **options) for each in classes]
    config, tokenizer, base, causal_lm, classifier = loaded
    for linear in (classifier.classifier.dense, classifier.classifier.out_proj):
        torch.nn.init.constant_(linear.weight, 0.1)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        outputs = {
            "fields": config.to_diff_dict(),
            "input_ids": inputs["input_ids"],
            "text": tokenizer.decode(inputs["input_ids"][0]),
            "bytes": tokenizer.decode_bytes(inputs["input_ids"][0]),
            "last_hidden_state": base(**inputs).last_hidden_state,
            "logits": causal_lm(**inputs).logits,
            "classes": classifier(**inputs).logits,
            "generated": causal_lm.generate(**inputs, max_new_tokens=3, do_sample=False),
            "modules": [type(each).__module__ for each in loaded],
        }
    return outputs, causal_lm, tokenizer

outputs, causal_lm, tokenizer = load(saved)
"""

SAVE_AGAIN = """
causal_lm.save_pretrained(again)
tokenizer.save_pretrained(again)
alone = AutoTokenizer.from_pretrained(tokenizer_alone, **options)
outputs["alone"] = [type(alone).__module__, alone(text)["input_ids"]]
torch.save([outputs, load(again)[0]], results)
"""


@torch.no_grad()
def _outputs(model, length=77):
    input_ids = torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids)[0]


def _assert_loads(cls, folder, expected, **kwargs):
    """A model whose outputs are `expected` to the last bit, and whose folder has neither too much nor too little."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[what], (what, info[what])
    assert not model.training
    assert torch.equal(_outputs(model), expected)
    return model


def _tensors(folder):
    """Names and numbers of elements of the tensors in a folder's files."""
    sizes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}
        assert not names.keys() & sizes.keys()
        sizes.update(names)
    return sizes


def _json(path):
    return json.loads(path.read_text())


def _assert_ties(model):
    head, embedding = model.lm_head.decoder, model.get_input_embeddings()
    assert head.bias is model.lm_head.bias
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings


def test_round_trip(tmp_path):
    for kind, fields in AXIAL_AND_TIED.items():
        model = random_model(**fields)
        expected = _outputs(model)
        model.save_pretrained(tmp_path / kind)
        for cls in (ReformerHfForCausalLM, AutoModelForCausalLM):
            loaded = _assert_loads(cls, tmp_path / kind, expected)
            assert type(loaded) is ReformerHfForCausalLM
            _assert_ties(loaded)
            for name, weight in model.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], weight), (kind, name)


def test_base_model_round_trip(tmp_path):
    for kind, fields in AXIAL_AND_TIED.items():
        model = random_model(cls=ReformerHfModel, **fields)
        expected = _outputs(model)
        model.save_pretrained(tmp_path / kind)
        for cls in (ReformerHfModel, AutoModel):
            assert type(_assert_loads(cls, tmp_path / kind, expected)) is ReformerHfModel


def test_dtype_round_trip(tmp_path):
    model = random_model(tie_word_embeddings=True).to(torch.bfloat16)
    expected = _outputs(model)
    model.save_pretrained(tmp_path)
    loaded = _assert_loads(AutoModelForCausalLM, tmp_path, expected)
    assert loaded.config.dtype == torch.bfloat16
    assert {weight.dtype for weight in loaded.state_dict().values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _assert_ties(loaded)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].float()), name


@each_tie
def test_tensors_written_once(tied, tmp_path):
    model = random_model(tie_word_embeddings=tied)
    for max_shard_size in ("1GB", "10kB"):
        folder = tmp_path / max_shard_size
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        sizes = _tensors(folder)
        assert "lm_head.bias" in sizes and "lm_head.decoder.bias" not in sizes
        assert ("lm_head.decoder.weight" in sizes) != tied
        assert sum(sizes.values()) == model.num_parameters() == sum(weight.numel() for weight in model.parameters())


def test_round_trip_in_shards(tmp_path):
    model = random_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="10kB")
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 3
    weight_map = _json(tmp_path / "model.safetensors.index.json")["weight_map"]
    assert set(weight_map.values()) == shards
    assert weight_map.keys() == _tensors(tmp_path).keys()
    _assert_ties(_assert_loads(ReformerHfForCausalLM, tmp_path, _outputs(model)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model and a tokenizer."""
    folder = tmp_path_factory.mktemp("folder") / "saved"
    random_model(vocab_size=260).save_pretrained(folder)
    ReformerHfByteTokenizer(padding_side="left").save_pretrained(folder)
    return folder


def _heads():
    """The classes of the package by the Auto classes that they are registered with."""
    heads = {}
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and ReformerHfConfig in mapping:
            heads[name] = mapping[ReformerHfConfig].__name__
    return heads


def _file_of(head):
    return getattr(reformer_hf, head).__module__.rpartition(".")[2]


def test_folder_has_every_file(saved):
    of_others = {"configuration_encoder_decoder.py", "encoder_decoder.py"}
    code = {path.name: path.read_bytes() for path in FLAT_FILES if path.name not in of_others}
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in saved.iterdir()} == weights | {"tokenizer.json", "tokenizer_config.json"} | set(code)
    for name, content in code.items():
        assert (saved / name).read_bytes() == content, name


def test_folder_names_every_head(saved):
    heads = _heads()
    assert {"AutoModel": "ReformerHfModel", "AutoModelForCausalLM": "ReformerHfForCausalLM"}.items() <= heads.items()
    auto_map = {name: f"{_file_of(head)}.{head}" for name, head in heads.items()}
    auto_map["AutoConfig"] = "configuration_reformer_hf.ReformerHfConfig"
    assert len(heads) == 8
    config = _json(saved / "config.json")
    assert config["auto_map"] == auto_map
    assert config["architectures"] == ["ReformerHfForCausalLM"]
    assert config["model_type"] == "reformer_hf"
    tokenizer = _json(saved / "tokenizer_config.json")
    assert "tokenization_reformer_hf.ReformerHfByteTokenizer" in tokenizer["auto_map"]["AutoTokenizer"]


def test_base_model_names_heads(saved, tmp_path):
    random_model(cls=ReformerHfModel).save_pretrained(tmp_path)
    assert _json(tmp_path / "config.json")["auto_map"] == _json(saved / "config.json")["auto_map"]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_buckets": [4, 8], "hash_seed": 3, "lsh_deduplicate_keys": True},
        {"axial_pos_shape": (4, 8, 8), "lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
        {"axial_pos_embds": False, "num_buckets": None, "reversible": False, "chunk_size_lm_head": 7},
    ],
    ids=["factors", "in-tree", "others"],
)
def test_config_round_trip(fields, tmp_path):
    expected = tiny_config(**fields)
    model = ReformerHfForCausalLM(copy.deepcopy(expected))
    model.save_pretrained(tmp_path)
    loaded = ReformerHfForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.config) is ReformerHfConfig
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert _json(tmp_path / "again" / name) == _json(tmp_path / name), name
    # What saving adds apart, it is what was given.
    added = {"architectures", "auto_map", "dtype"}
    assert {name: x for name, x in loaded.config.to_diff_dict().items() if name not in added} == {
        name: x for name, x in expected.to_diff_dict().items() if name not in added
    }


def test_auto_classes(saved):
    assert type(AutoConfig.from_pretrained(saved)) is ReformerHfConfig
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert type(tokenizer) is ReformerHfByteTokenizer
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    model = random_model(vocab_size=260)
    # The package is preferred to the code in the folder.
    for options in ({}, {"trust_remote_code": True}):
        loaded = _assert_loads(AutoModelForCausalLM, saved, _outputs(model), **options)
        assert type(loaded) is ReformerHfForCausalLM
        # It leaves the head behind.
        base = AutoModel.from_pretrained(saved, **options)
        assert type(base) is ReformerHfModel
        assert torch.equal(_outputs(base), _outputs(model.reformer))


def test_from_config():
    for auto_class in (AutoModel, AutoModelForCausalLM):
        config = tiny_config()
        torch.manual_seed(3)
        model = auto_class.from_config(config)
        assert type(model).__name__ == _heads()[auto_class.__name__]
        torch.manual_seed(3)
        assert torch.equal(_outputs(model), _outputs(type(model)(config))), auto_class
        assert auto_class.from_config(config, dtype=torch.bfloat16).dtype == torch.bfloat16, auto_class


def test_field_given_while_loading(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    for cls in (ReformerHfForCausalLM, AutoModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path, num_hashes=4)
        assert loaded.config.num_hashes == 4
        assert torch.equal(_outputs(loaded), _outputs(random_model(num_hashes=4)))
        assert not torch.equal(_outputs(loaded), _outputs(model))
    with pytest.raises(ValueError, match="`num_hashes` is 0"):
        ReformerHfForCausalLM.from_pretrained(tmp_path, num_hashes=0)
    assert _json(tmp_path / "config.json")["num_hashes"] == 2


def test_other_vocab_size(tmp_path):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ReformerHfForCausalLM.from_pretrained(tmp_path, vocab_size=70)
    model = ReformerHfForCausalLM.from_pretrained(tmp_path, vocab_size=70, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().weight.shape == (70, 32)
    _assert_ties(model)
    assert _outputs(model).isfinite().all()


@each_tie
def test_copies(tied):
    model = random_model(tie_word_embeddings=tied)
    expected = _outputs(model)
    for name, copied in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        _assert_ties(copied)
        assert torch.equal(_outputs(copied), expected), name
        with torch.no_grad():
            copied.lm_head.bias += 1
        assert torch.equal(_outputs(model), expected), name
        assert not torch.equal(_outputs(copied), expected), name


def test_pickled_config():
    for fields in ({}, {"num_buckets": [4, 8]}, {"dtype": "bfloat16"}):
        config = tiny_config(**fields)
        copied = pickle.loads(pickle.dumps(config))
        assert type(copied) is ReformerHfConfig
        assert copied.to_dict() == config.to_dict(), fields
        assert copied.num_hidden_layers == 3, fields


def test_torch_save(tmp_path):
    model = random_model(tie_word_embeddings=True)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = ReformerHfForCausalLM(tiny_config(tie_word_embeddings=True))
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt"))
    _assert_ties(loaded)
    assert torch.equal(_outputs(loaded), _outputs(model))


@pytest.mark.skipif(
    version.parse(accelerate.__version__) < version.parse("1.15"), reason="older ones refuse to offload a whole model"
)
@pytest.mark.parametrize("axial", [True, False], ids=["axial", "learned"])
def test_disk_offload(axial, tmp_path):
    """Each module takes its weights from there when it is called."""
    model = random_model(axial_pos_embds=axial)
    model.save_pretrained(tmp_path / "model")
    expected = _outputs(model)
    waiting = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "disk"
    )
    assert {parameter.device.type for parameter in waiting.parameters()} == {"meta"}
    assert torch.equal(_outputs(waiting), expected)


def test_in_tree_folder(tmp_path):
    fields = {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (8, 32),
        "axial_pos_embds_dim": (8, 24),
        "max_position_embeddings": 256,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 48,
        "vocab_size": 60,
        "num_buckets": 8,
    }
    in_tree = ReformerModelWithLMHead(ReformerConfig(is_decoder=True, lsh_num_chunks_after=0, **fields))
    in_tree.save_pretrained(tmp_path)
    model, info = ReformerHfForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, weight in in_tree.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    behaviour = {
        "model_type": "reformer_hf",
        "lsh_pattern": "chunk",
        "lsh_across_buckets": True,
        "lsh_deduplicate_keys": False,
        "wrap_chunks": True,
    }
    model.save_pretrained(tmp_path / "ours")
    loaded = _assert_loads(AutoModelForCausalLM, tmp_path / "ours", _outputs(model))
    for config in (model.config, loaded.config):
        for name, value in {**fields, **behaviour}.items():
            assert getattr(config, name) == value or getattr(config, name) == tuple(value), name


def _run(saved: Path, folder: Path):
    """What a new process without the package computes from `saved`, in `folder` with nothing cached."""
    dropped = ("HF_", "TRANSFORMERS_", "PYTHON")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env.update(HF_HOME=str(folder / "hf_home"), HF_MODULES_CACHE=str(folder / "modules"), HF_HUB_OFFLINE="1")
    ReformerHfByteTokenizer.from_pretrained(saved).save_pretrained(folder / "tokenizer")
    arguments = [saved, folder / "again", folder / "results", TEXT, folder / "tokenizer"]
    run_python(["-I", "-c", WITHOUT_PACKAGE + LOAD + SAVE_AGAIN, *arguments], folder, env)
    return torch.load(folder / "results", weights_only=False)


def _assert_same(found, saved):
    """That a process found the outputs that the folder's model and tokenizer have here."""
    tokenizer = ReformerHfByteTokenizer.from_pretrained(saved)
    model = ReformerHfForCausalLM.from_pretrained(saved)
    inputs = tokenizer(TEXT, return_tensors="pt")
    assert torch.equal(found["input_ids"], inputs["input_ids"])
    assert found["text"] == TEXT and found["bytes"] == TEXT.encode()
    assert found["fields"] == model.config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(found["last_hidden_state"], model.reformer(**inputs).last_hidden_state)
        assert torch.equal(found["logits"], model(**inputs).logits)
        classifier = ReformerHfForSequenceClassification.from_pretrained(saved)
        for linear in (classifier.classifier.dense, classifier.classifier.out_proj):
            torch.nn.init.constant_(linear.weight, 0.1)
        assert torch.equal(found["classes"], classifier(**inputs).logits)
    assert torch.equal(found["generated"], model.generate(**inputs, max_new_tokens=3, do_sample=False))


def test_process_without_package(saved, tmp_path):
    """The code in the folder is enough to load it, and to save a folder that loads again (with it: `test_hub`)."""
    found, found_again = _run(saved, tmp_path)
    for outputs, folder in ((found, "saved"), (found_again, "again")):
        for module in outputs["modules"]:
            assert module.startswith(f"transformers_modules.{folder}."), module
        _assert_same(outputs, saved)
    module, input_ids = found["alone"]
    assert module.startswith("transformers_modules.tokenizer.")
    assert input_ids == found["input_ids"][0].tolist()
    again = tmp_path / "again"
    assert {path.name for path in again.iterdir()} == {path.name for path in saved.iterdir()}
    for path in saved.iterdir():
        if path.name == "tokenizer_config.json":
            # Transformers adds how a tokenizer was loaded.
            assert _json(path).items() <= _json(again / path.name).items()
        else:
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_readme(tmp_path):
    """Each block on saving and loading runs in a process of its own."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        run_python(["-c", block], tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})


def _trained(folder, seed, steps, resume=None, **fields):
    """A model after so many steps of a schedule of four, from the weights of `seed`, or from a checkpoint."""
    torch.manual_seed(seed)
    model = ReformerHfForCausalLM(tiny_config(**fields))
    args = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
    )
    # Three steps an epoch: it breaks off within the first.
    rows = torch.randint(0, 60, (6, 40), generator=torch.Generator().manual_seed(2))
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.add_callback(_StopAfter(steps))
    trainer.train(resume_from_checkpoint=resume)
    return model


class _StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def test_resume(tmp_path):
    """With dropout and fresh hashes in each step, to the last bit."""
    fields = {
        "tie_word_embeddings": True,
        "hidden_dropout_prob": 0.1,
        "local_attention_probs_dropout_prob": 0.1,
        "lsh_attention_probs_dropout_prob": 0.1,
    }
    unbroken = _trained(tmp_path / "unbroken", 0, 4, **fields)
    broken_off = _trained(tmp_path / "broken", 0, 2, **fields)
    checkpoint = tmp_path / "broken" / "checkpoint-2"
    resumed = _trained(tmp_path / "broken", 1, 4, resume=checkpoint, **fields)
    _assert_ties(resumed)
    halfway = broken_off.state_dict()
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
        assert not torch.equal(halfway[name], weight), name
    _assert_loads(AutoModelForCausalLM, tmp_path / "broken" / "checkpoint-4", _outputs(unbroken))
    _assert_loads(AutoModelForCausalLM, checkpoint, _outputs(broken_off))


@pytest.mark.parametrize("change", ["assign", "empty"])
def test_both_names_of_the_bias(change, tmp_path):
    """The bias in use is saved, also where `load_state_dict(assign=True)` or `to_empty` could part its two names."""
    weights = random_model().state_dict()
    with torch.device("meta"):
        model = ReformerHfForCausalLM(tiny_config(is_decoder=True))
    if change == "empty":
        model.to_empty(device="cpu")
    model.load_state_dict(weights, assign=change == "assign")
    with torch.no_grad():
        model.lm_head.decoder.bias.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = ReformerHfForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.decoder.bias == 0.5).all() and loaded.lm_head.bias is loaded.lm_head.decoder.bias


def test_tying_a_built_model_is_refused():
    model = random_model()
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="set after the model was built.*`tie_word_embeddings=True`"):
        model.tie_weights()
