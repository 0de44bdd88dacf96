# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""`replace_in_tree`: in-tree folders through the Auto classes, with everything else as it was, then and afterwards."""

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerModel,
    ReformerModelWithLMHead,
    pipeline,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

import reformer_hf
from reformer_hf import ReformerHfByteTokenizer, ReformerHfConfig, replace_in_tree

from .helpers import random_model
from .in_tree import CLASSES, in_tree_head, in_tree_model

# The in-tree class and ours of each Auto class; without an in-tree class, the head is new.
AUTO = {
    AutoModel: (ReformerModel, reformer_hf.ReformerHfModel),
    AutoModelForTextEncoding: (ReformerModel, reformer_hf.ReformerHfModel),
    AutoModelForCausalLM: (ReformerModelWithLMHead, reformer_hf.ReformerHfForCausalLM),
    AutoModelForMaskedLM: (ReformerForMaskedLM, reformer_hf.ReformerHfForMaskedLM),
    AutoModelForSequenceClassification: (
        ReformerForSequenceClassification,
        reformer_hf.ReformerHfForSequenceClassification,
    ),
    AutoModelForQuestionAnswering: (ReformerForQuestionAnswering, reformer_hf.ReformerHfForQuestionAnswering),
    AutoModelForTokenClassification: (None, reformer_hf.ReformerHfForTokenClassification),
    AutoModelForMultipleChoice: (None, reformer_hf.ReformerHfForMultipleChoice),
}


@pytest.fixture(autouse=True)
def _undone():
    yield
    replace_in_tree(False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each in-tree class, one of ours, and one of another model."""
    folder = tmp_path_factory.mktemp("folders")
    for cls in CLASSES:
        in_tree_head(cls).save_pretrained(folder / cls.__name__)
    random_model().save_pretrained(folder / "ours")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(folder / "bert")
    return folder


def _folder_of(auto_class, folders):
    in_tree_cls = AUTO[auto_class][0] or ReformerForMaskedLM
    return folders / in_tree_cls.__name__


def _assert_ours(folders):
    for auto_class, (in_tree_cls, cls) in AUTO.items():
        folder = _folder_of(auto_class, folders)
        assert type(AutoConfig.from_pretrained(folder)) is ReformerHfConfig
        model, info = auto_class.from_pretrained(folder, output_loading_info=True)
        assert type(model) is cls
        assert model.config.wrap_chunks and model.config.lsh_pattern == "chunk"
        if in_tree_cls is not None:
            assert not any(info.values()), info
            weights = in_tree_cls.from_pretrained(folder).state_dict()
            for name, weight in model.state_dict().items():
                if name != "lm_head.bias":
                    assert torch.equal(weight, weights[name]), name


def _assert_in_tree(folders):
    for auto_class, (in_tree_cls, _) in AUTO.items():
        folder = _folder_of(auto_class, folders)
        assert type(AutoConfig.from_pretrained(folder)) is ReformerConfig
        if in_tree_cls is None:
            with pytest.raises(ValueError, match="Unrecognized configuration class"):
                auto_class.from_pretrained(folder)
        else:
            assert type(auto_class.from_pretrained(folder)) is in_tree_cls


def _registered():
    """The content of all Auto mappings."""
    mappings = [getattr(each, "_model_mapping", None) for each in vars(modeling_auto).values()]
    mappings = [
        CONFIG_MAPPING,
        TOKENIZER_MAPPING,
        *(mapping for mapping in mappings if hasattr(mapping, "_extra_content")),
    ]
    return [dict(mapping._extra_content) for mapping in mappings]


def test_every_head(folders):
    """As a second call undoes it, as often as one wants."""
    before = _registered()
    _assert_in_tree(folders)
    for _ in range(2):
        replace_in_tree()
        _assert_ours(folders)
        replace_in_tree()
        _assert_in_tree(folders)
        assert _registered() == before


def test_argument():
    for _ in range(2):
        replace_in_tree(True)
        assert CONFIG_MAPPING["reformer"] is not ReformerConfig
    for _ in range(2):
        replace_in_tree(False)
        assert CONFIG_MAPPING["reformer"] is ReformerConfig


def test_context_manager(folders):
    folder = folders / "ReformerModel"
    with replace_in_tree():
        assert type(AutoModel.from_pretrained(folder)) is reformer_hf.ReformerHfModel
        with replace_in_tree():
            assert type(AutoConfig.from_pretrained(folder)) is ReformerHfConfig
        assert type(AutoConfig.from_pretrained(folder)) is ReformerHfConfig
    assert type(AutoModel.from_pretrained(folder)) is ReformerModel
    with pytest.raises(RuntimeError), replace_in_tree():
        raise RuntimeError
    assert type(AutoConfig.from_pretrained(folder)) is ReformerConfig
    replace_in_tree(True)
    with replace_in_tree():
        pass
    assert type(AutoConfig.from_pretrained(folder)) is ReformerHfConfig


def test_nothing_else_changes(folders):
    existing = ReformerConfig.from_pretrained(folders / "ReformerModel")
    replace_in_tree()
    # The in-tree classes by name, and configs that exist.
    for cls in CLASSES:
        assert type(cls.from_pretrained(folders / cls.__name__)) is cls
    assert type(ReformerConfig.from_pretrained(folders / "ReformerModel")) is ReformerConfig
    assert type(AutoModel.from_config(existing)) is ReformerModel
    assert type(AutoModel.from_pretrained(folders / "ReformerModel", config=existing)) is ReformerModel
    config = AutoConfig.for_model("reformer", num_hashes=3)
    assert type(config) is ReformerConfig and config.num_hashes == 3
    # Other folders.
    assert type(AutoModel.from_pretrained(folders / "bert")) is BertModel
    assert type(AutoModelForCausalLM.from_pretrained(folders / "ours")) is reformer_hf.ReformerHfForCausalLM
    # Code that looks the class of configs up.
    assert issubclass(CONFIG_MAPPING["reformer"], ReformerConfig)


def test_config_options(folders):
    folder = folders / "ReformerModelWithLMHead"
    with replace_in_tree():
        config, unused = AutoConfig.from_pretrained(folder, num_hashes=5, other=1, return_unused_kwargs=True)
        assert config.num_hashes == 5 and unused == {"other": 1}
        model = AutoModelForCausalLM.from_pretrained(folder, num_hashes=6, dtype=torch.float64)
    assert model.config.num_hashes == 6 and model.dtype == torch.float64


def test_tokenizers(tmp_path):
    """A folder gets the tokenizer that it gets otherwise: by its own config, or that of its model type."""
    in_tree_model(True, vocab_size=260).save_pretrained(tmp_path)
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4}
    transformers.ReformerTokenizer(vocab=vocab, merges=[("▁", "a")]).save_pretrained(tmp_path)
    for remove in (False, True):
        if remove:
            (tmp_path / "tokenizer_config.json").unlink()
        expected = AutoTokenizer.from_pretrained(tmp_path)
        with replace_in_tree():
            found = AutoTokenizer.from_pretrained(tmp_path)
        assert type(found) is type(expected) is transformers.ReformerTokenizer
        assert found("ab a")["input_ids"] == expected("ab a")["input_ids"] == [4, 3, 4]
    ReformerHfByteTokenizer().save_pretrained(tmp_path)
    with replace_in_tree():
        assert type(AutoTokenizer.from_pretrained(tmp_path)) is ReformerHfByteTokenizer


def test_pipeline(tmp_path):
    in_tree_model(True, vocab_size=260).save_pretrained(tmp_path)
    ReformerHfByteTokenizer().save_pretrained(tmp_path)
    with replace_in_tree():
        generator = pipeline("text-generation", model=str(tmp_path))
    assert type(generator.model) is reformer_hf.ReformerHfForCausalLM
    (found,) = generator("abc", max_new_tokens=5, do_sample=False)
    assert found["generated_text"].startswith("abc")
