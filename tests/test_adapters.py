# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA adapters of PEFT, and fine-tuning by TRL."""

import pytest
import torch
from transformers import AutoTokenizer
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForCausalLM

from .helpers import CHATML, DROPOUT, assert_close, random_model, tiny_config

peft = pytest.importorskip("peft")

LAYERS = ["local", "lsh", "full", "lsh"]
TARGETS = ["query_key", "query", "value", "dense.dense", "output.dense"]


def _adapted(reversible=True, dtype=torch.float64, targets=TARGETS, lora_dropout=0.0, **fields):
    model = random_model(dtype, attn_layers=LAYERS, reversible=reversible, **fields)
    torch.manual_seed(4)
    # Both matrices random: at first one of them is zero, and half of the gradients with it.
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_dropout=lora_dropout)
    return peft.get_peft_model(model, config).to(dtype).train()


def _loss(model, length=45):
    torch.manual_seed(1)
    ids = torch.randint(0, 60, (2, length))
    torch.manual_seed(2)
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_adapter_gradients(lora_dropout):
    """With every base weight frozen, embeddings too, and dropout everywhere."""
    models = [_adapted(reversible, lora_dropout=lora_dropout, **DROPOUT) for reversible in (True, False)]
    # As TRL does for gradient checkpointing.
    models[0].enable_input_require_grads()
    for model in models:
        _loss(model).backward()
    reversible, plain = (dict(model.named_parameters()) for model in models)
    adapted = {name for name in reversible if "lora_" in name}
    assert len(adapted) == 2 * sum(name.endswith("base_layer.weight") for name in reversible)
    for name, parameter in reversible.items():
        if name in adapted:
            assert_close(parameter.grad, plain[name].grad, 1e-11, name)
            assert parameter.grad.any()
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


def test_adapters_in_decoding():
    model = _adapted(eos_token_id=None).eval()
    prompt = torch.randint(1, 60, (2, 33), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(input_ids=prompt, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=prompt, **options), expected)


@torch.no_grad()
def test_adapters_of_examples():
    """Each example of a batch with an adapter of its own, or with none."""
    model = _adapted(eos_token_id=None).eval()
    torch.manual_seed(5)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.to(torch.float64)
    ids = torch.randint(1, 60, (3, 33))
    logits = model(input_ids=ids, adapter_names=["default", "other", "__base__"]).logits
    for i, name in enumerate(("default", "other")):
        model.set_adapter(name)
        assert_close(logits[i], model(input_ids=ids[i : i + 1]).logits[0], 1e-12, name)
    with model.disable_adapter():
        assert_close(logits[2], model(input_ids=ids[2:]).logits[0], 1e-12, "base")


def test_save_load_and_merge(tmp_path):
    model = _adapted().eval()
    ids = torch.randint(0, 60, (2, 33))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(random_model(torch.float64, attn_layers=LAYERS), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        merged = loaded.merge_and_unload()
        assert isinstance(merged, ReformerHfForCausalLM)
        assert_close(merged(ids).logits, expected, 1e-9)
        assert not any("lora" in name for name, _ in merged.named_parameters())


def _without_defaults():
    """Leave the tables of PEFT as they are when it is imported after the model was built."""
    tables = [table for name, table in vars(peft.utils.constants).items() if name.endswith("MODULES_MAPPING")]
    for table in tables:
        table.pop("reformer_hf", None)
    return tables


@pytest.mark.parametrize("saved", [["word_embeddings"], ["word_embeddings", "lm_head"]], ids=["one", "both"])
def test_merged_after_training_tied_weights(saved, tmp_path):
    """PEFT unties weights of which it has trained a copy. Here, a head that is not tied is twice as wide."""
    model = random_model(torch.float64, attn_layers=LAYERS, tie_word_embeddings=True)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, modules_to_save=saved)
    model = peft.get_peft_model(model, config).to(torch.float64)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert_close(merged(ids).logits, expected, 1e-10)
        merged.save_pretrained(tmp_path)
        loaded = ReformerHfForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        for model in (merged, loaded):
            assert_close(model(ids).logits, expected, 1e-10)


def test_default_targets():
    model = random_model(attn_layers=LAYERS)
    tables = _without_defaults()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2))
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"query_key", "query", "value"}
    assert all("reformer_hf" in table for table in tables)


@pytest.mark.parametrize("name", ["IA3Config", "LNTuningConfig", "VeraConfig", "LoHaConfig", "BeftConfig"])
def test_other_adapters(name):
    """With default targets: outside the layers' own parameters, as in VeRA, or in place of a norm."""
    grads = []
    for reversible in (True, False):
        model = random_model(torch.float64, attn_layers=LAYERS, reversible=reversible)
        torch.manual_seed(4)
        model = peft.get_peft_model(model, getattr(peft, name)()).double().train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        _loss(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], 1e-11, name)
        assert grad.any()


def test_tied_head_in_trl():
    trl_utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(trl_utils, "add_fused_lm_head"):
        pytest.skip("this version of TRL has no fused LM head")
    model = random_model(attn_layers=LAYERS, tie_word_embeddings=True)
    expected = _loss(model)
    trl_utils.add_fused_lm_head(model)
    assert torch.equal(_loss(model), expected)
    ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="`tie_word_embeddings` is True.*TRL.*`tie_word_embeddings=False`"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)


def test_prefix_tuning():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(random_model(attn_layers=LAYERS), config)
    with pytest.raises(ValueError, match="prefix tuning, are not supported"):
        _loss(model.train())


def test_add_adapter_of_transformers():
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))
    model = random_model(attn_layers=LAYERS)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query_key", "value"]))
    _loss(model.train()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


WORDS = ["cat", "dog", "owl", "fox"]


def _sft(rows, tokenizer, model, folder, epochs=15, peft_config=None):
    """Train with the defaults of TRL, bf16 and gradient checkpointing among them. Returns the trainer."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    args = trl.SFTConfig(
        folder,
        num_train_epochs=epochs,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    assert args.bf16 and args.gradient_checkpointing
    data = datasets.Dataset.from_list(rows * 16)
    trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    return trainer


def _completion(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    generated = model.eval().generate(**inputs, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :])


def _sft_model():
    torch.manual_seed(0)
    return ReformerHfForCausalLM(tiny_config(vocab_size=260, bos_token_id=258))


def test_sft_learns_to_stop(tmp_path):
    """With data that do not name `</s>`: TRL appends it as text."""
    tokenizer, model = ReformerHfByteTokenizer(), _sft_model()
    _sft([{"text": f"{word} {word}"} for word in WORDS], tokenizer, model, tmp_path, epochs=8)
    assert [_completion(model, tokenizer, f"{word} ") for word in WORDS] == [f"{word}</s>" for word in WORDS]


@pytest.mark.slow
def test_sft_chat(tmp_path):
    tokenizer, model = ReformerHfByteTokenizer(chat_template=CHATML), _sft_model()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    model.resize_token_embeddings(len(tokenizer))
    chats = [[{"role": "user", "content": word}, {"role": "assistant", "content": f"{word} {word}"}] for word in WORDS]
    _sft([{"messages": chat} for chat in chats], tokenizer, model, tmp_path).save_model()
    loaded, tokenizer = ReformerHfForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for chat, word in zip(chats, WORDS, strict=True):
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        assert _completion(loaded, tokenizer, prompt) == f"{word} {word}<|im_end|>"


@pytest.mark.slow
def test_sft_lora(tmp_path):
    model = _sft_model()
    model.save_pretrained(tmp_path / "base")
    model = ReformerHfForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    rows = [{"text": f"{word} {word}"} for word in WORDS]
    _sft(rows, ReformerHfByteTokenizer(), model, tmp_path / "adapter", peft_config=config).save_model()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    for each in (loaded, loaded.merge_and_unload()):
        assert [_completion(each, tokenizer, f"{word} ") for word in WORDS] == [f"{word}</s>" for word in WORDS]
