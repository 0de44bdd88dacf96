# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what was trained, on what, how, and what came out, in the form that the Hub reads."""

import platform
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from transformers import PreTrainedModel, Trainer

TEMPLATE = Path(__file__).with_name("model_card.md")
# Where the Hub looks for results on benchmarks that it hosts.
EVAL_RESULTS = Path(".eval_results", "results.yaml")

MODEL_SETTINGS = (
    "attn_layers",
    "decoder_attn_layers",
    "hidden_size",
    "num_attention_heads",
    "attention_head_size",
    "feed_forward_size",
    "max_position_embeddings",
    "axial_pos_shape",
    "axial_norm_std",
    "initializer_range",
    "local_attn_chunk_length",
    "local_num_chunks_before",
    "local_rope_theta",
    "lsh_pattern",
    "lsh_attn_chunk_length",
    "lsh_num_chunks_before",
    "num_hashes",
    "num_buckets",
    "hash_seed",
    "hidden_dropout_prob",
    "reversible",
)
TRAINING_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "seed",
    "bf16",
    "fp16",
)
LIMITS = {
    "text-generation": (
        "The model continues text in the style of its training data. Its output may be wrong, offensive, or a copy of "
        "the training data, and it is not filtered."
    ),
    "fill-mask": (
        "The model fills masked tokens as its training data would. Its output may be wrong or offensive, and it is "
        "not filtered."
    ),
    "text2text-generation": (
        "The model answers inputs that resemble its training data. On other inputs its output is arbitrary, and it is "
        "not filtered."
    ),
    "unconditional-image-generation": (
        "The model draws images that resemble its training data, which may be copies of parts of it, and they are not "
        "filtered."
    ),
}
_OTHER_LIMITS = "The results hold for data that resemble the training data; on other data they may be far worse."


@dataclass(frozen=True)
class Metric:
    """
    A held-out result.

    Args:
        type: Identifier, such as `"accuracy"`.
        name: Name to show.
        value: The result, in the unit of its name.
        split: Split of the dataset.
    """

    type: str
    name: str
    value: float
    split: str = "validation"


@dataclass(frozen=True)
class RunReport:
    """
    What a model card says and a `Trainer` does not know.

    Args:
        summary: What the model is, in one or two sentences.
        pipeline_tag: Task of the Hub, such as `"text-generation"`.
        data: What the model was trained and evaluated on, in Markdown.
        metric: The most important held-out result.
        results: Further results, by name.
        results_note: How they were computed, in Markdown.
        intended_use: What the model is for; by default, research on models for long sequences.
        limits: What it cannot do; by default, a text for the task.
        command: The command that trained it.
        usage: Python code that uses the model; `{model_id}` stands for its name.
        figures: Files in the output folder, by caption.
        sample: An output, in Markdown.
        dataset_id: Name of the dataset on the Hub; `None` for other data.
        dataset_name: Name of the data in the metadata.
        base_model: What was fine-tuned, a folder or a name on the Hub; `None` for a new model.
        seconds: Seconds of training; `None` for those that the trainer logged, since it was last resumed.
    """

    summary: str
    pipeline_tag: str
    data: str
    metric: Metric
    results: dict[str, str] = field(default_factory=dict)
    results_note: str = ""
    intended_use: str = "Research on models for long sequences."
    limits: str | None = None
    command: str = ""
    usage: str = ""
    figures: dict[str, str] = field(default_factory=dict)
    sample: str = ""
    dataset_id: str | None = None
    dataset_name: str = "generated"
    base_model: str | None = None
    seconds: float | None = None


def write_model_card(trainer: Trainer, report: RunReport) -> Path:
    """
    Write the model card of a run, `README.md` in its output folder.

    The metadata contain the metric in the form `model-index`. If the data are a dataset on the Hub, it also stands in
    `.eval_results/results.yaml`, from which the Hub fills the page of the model and leaderboards.

    Args:
        trainer: The trainer after training.
        report: What it does not know.

    Returns:
        The card.

    Raises:
        ValueError: If a figure does not exist in the output folder.
    """
    args, model = trainer.args, cast(PreTrainedModel, trainer.model)
    folder = Path(args.output_dir)
    missing = [file for file in report.figures.values() if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"`figures` names {missing}, which {folder} does not hold: write figures before the card.")
    name = args.hub_model_id.split("/")[-1] if args.hub_model_id else folder.resolve().name
    metric = report.metric
    card = ModelCard.from_template(
        _metadata(report, name),
        template_path=str(TEMPLATE),
        model_name=name,
        report=report,
        origin=f"Fine-tuned from `{report.base_model}`." if report.base_model else "Trained from random weights.",
        num_parameters=f"{model.num_parameters():,}",
        max_length=f"{model.config.max_position_embeddings:,}",
        results={f"{metric.name}, held out": f"{metric.value:.4f}", **report.results, **_costs(trainer, report)},
        limits=report.limits or LIMITS.get(report.pipeline_tag, _OTHER_LIMITS),
        model_settings=_settings(model.config, MODEL_SETTINGS),
        training_settings=_optimizer_settings(trainer) | _settings(args, TRAINING_SETTINGS),
        software=f"torch {torch.__version__}, transformers {transformers.__version__}",
        hardware=hardware(args.device),
        usage=report.usage.replace("{model_id}", args.hub_model_id or name),
    )
    card.save(folder / "README.md")
    if report.dataset_id:
        entry = EvalResultEntry(report.dataset_id, "default", metric.value, notes=f"{metric.name}, {metric.split}")
        path = folder / EVAL_RESULTS
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml_dump(eval_result_entries_to_yaml([entry])), encoding="utf-8")
    return folder / "README.md"


def _metadata(report: RunReport, name: str) -> ModelCardData:
    metric = report.metric
    is_on_hub = report.base_model is not None and not Path(report.base_model).exists()
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=report.pipeline_tag,
        tags=["reformer", "lsh-attention", "long-context"],
        datasets=[report.dataset_id] if report.dataset_id else None,
        base_model=report.base_model if is_on_hub else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=report.pipeline_tag,
                dataset_type=report.dataset_id or "other",
                dataset_name=report.dataset_id or report.dataset_name,
                dataset_split=metric.split,
                metric_type=metric.type,
                metric_name=metric.name,
                metric_value=metric.value,
            )
        ],
    )


def _costs(trainer: Trainer, report: RunReport) -> dict[str, str]:
    logged = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    seconds = report.seconds if report.seconds is not None else sum(logged)
    costs = {"Training steps": f"{trainer.state.global_step:,}", "Minutes of training": f"{seconds / 60:.1f}"}
    peak = peak_memory(trainer.args.device)
    return costs if peak is None else {**costs, "Peak memory": f"{peak / 2**30:.2f} GiB"}


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory so far in bytes: that of a GPU, or of the process; `None` where neither is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def hardware(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def _optimizer_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the optimizer that trained, which a script may have chosen, and its learning rates if it has several."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is None:
        return _settings(trainer.args, ("optim",))
    rates = dict.fromkeys(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    settings = {"optimizer": type(optimizer).__name__}
    return settings if len(rates) < 2 else settings | {"learning_rates": tuple(rates)}


def _settings(source: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(source, name) for name in names if hasattr(source, name)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
