# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Write the loss curve and the model card of a training run."""

import json
import math
import platform
from enum import Enum
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from byte_data import Corpus
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

_CARDS = Path(__file__).resolve().parent.parent / "model_cards"
TEMPLATE, TASK_TEMPLATE = _CARDS / "causal_lm.md", _CARDS / "task.md"
MODEL_SETTINGS = (
    "attn_layers",
    "hidden_size",
    "num_attention_heads",
    "attention_head_size",
    "feed_forward_size",
    "axial_pos_shape",
    "axial_norm_std",
    "initializer_range",
    "local_attn_chunk_length",
    "local_num_chunks_before",
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
    "optim",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "bf16",
    "fp16",
)


def plot_loss_curve(log_history: list[dict[str, Any]], bigram: float, folder: Path) -> None:
    """Write `loss_curve.png`: the losses in bits by step, and the bits per byte of the `bigram` model as a line."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    curves = (("loss", 1 / math.log(2), "training, per token"), ("eval_bits_per_byte", 1.0, "held out, per byte"))
    for key, factor, label in curves:
        points = [(entry["step"], entry[key] * factor) for entry in log_history if key in entry]
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker=".", label=label)
    axes.axhline(bigram, color="gray", linestyle="--", label="byte bigram model, held out")
    axes.set(xlabel="step", ylabel="bits")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss_curve.png", dpi=120)
    plt.close(figure)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a learning curve, of a `.jsonl` file or of the output folder of a run."""
    path = path / "curve.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_learning_curve(
    curves: dict[str, list[dict[str, Any]]],
    key: str,
    label: str,
    path: Path,
    baselines: dict[str, float] | None = None,
    time: str = "seconds",
) -> None:
    """
    Plot a metric against the time of training.

    Args:
        curves: The learning curves of runs, by name. Names that are equal up to a comma share a color.
        key, label: Name of the metric in the curves and on the axis.
        path: PNG file to write.
        baselines: Values to draw as horizontal lines.
        time: `"seconds"` or `"cpu_seconds"`.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors: dict[str, str] = {}
    for name, curve in curves.items():
        color = colors.setdefault(name.partition(",")[0], f"C{len(colors)}")
        points = [(entry[time] / 60, entry[key]) for entry in curve if key in entry]
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker=".", color=color, label=name)
    for style, (name, value) in zip(("--", ":", "-."), (baselines or {}).items(), strict=False):
        axes.axhline(value, color="gray", linestyle=style, label=name.replace("_", " "))
    axes.set(xlabel=f"minutes of training{' (CPU time)' if time == 'cpu_seconds' else ''}", ylabel=label)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_confusion_matrix(found: np.ndarray, right: np.ndarray, names: list[str], folder: Path) -> None:
    """Write `confusion_matrix.png`: for each true class, the share of each predicted class."""
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (right, found), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 10 else 0)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="share of the true class")
    figure.savefig(folder / "confusion_matrix.png", dpi=120)
    plt.close(figure)


def write_task_card(
    trainer: Trainer,
    summary: str,
    pipeline_tag: str,
    results: dict[str, str],
    results_note: str,
    figures: dict[str, str],
    data_description: str,
    dataset_id: str | None,
    base_model: str | None,
    metric: tuple[str, str, float],
    usage: str,
    sample: str = "",
) -> None:
    """Write the model card `README.md` of a task from `model_cards/task.md`, with settings and results of the run."""
    args, model = trainer.args, trainer.model
    name = args.hub_model_id.split("/")[-1] if args.hub_model_id else Path(args.output_dir).resolve().name
    metric_type, metric_name, value = metric
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["reformer", "lsh-attention"],
        datasets=[dataset_id] if dataset_id else None,
        base_model=base_model if base_model and not Path(base_model).exists() else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=pipeline_tag,
                dataset_type=dataset_id or "generated",
                dataset_name=data_description.split(":")[0].replace("`", ""),
                dataset_split="validation",
                metric_type=metric_type,
                metric_name=metric_name,
                metric_value=value,
            )
        ],
    )
    run = {
        "Training steps": f"{trainer.state.global_step:,}",
        "Minutes of training": f"{trainer.curve.spent()['seconds'] / 60:.1f}",
    }
    card = ModelCard.from_template(
        card_data,
        template_path=str(TASK_TEMPLATE),
        model_name=name,
        summary=summary,
        origin=f"Fine-tuned from `{base_model}`." if base_model else "Trained from random weights.",
        num_parameters=f"{model.num_parameters():,}",
        max_position_embeddings=f"{model.config.max_position_embeddings:,}",
        results=results | run,
        results_note=results_note,
        figures=figures,
        data_description=data_description,
        model_settings=_settings(model.config, MODEL_SETTINGS),
        training_settings=_settings(args, TRAINING_SETTINGS) | {"processes": args.world_size},
        software=f"torch {torch.__version__}, transformers {transformers.__version__}",
        hardware=_hardware(args.device),
        usage=usage.replace("{model_id}", args.hub_model_id or name),
        sample=sample,
    )
    card.save(Path(args.output_dir) / "README.md")


def write_model_card(
    trainer: Trainer,
    corpus: Corpus,
    metrics: dict[str, float],
    sequence_length: int,
    base_model: str | None,
    prompt: str,
    sample: str,
) -> None:
    """Write the model card `README.md` from the template in `model_cards/`, with settings and results of the run."""
    args, config = trainer.args, trainer.model.config
    model_name = args.hub_model_id.split("/")[-1] if args.hub_model_id else Path(args.output_dir).resolve().name
    bits = metrics["eval_bits_per_byte"]
    num_sequences = trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps
    results = {
        "Bits per byte, held out": f"{bits:.4f}",
        "Bits per byte of a byte bigram model, held out": f"{metrics['bigram_bits_per_byte']:.4f}",
        "Training steps": f"{trainer.state.global_step:,}",
        "Training tokens, including repetitions": f"{num_sequences * args.world_size * sequence_length:,}",
        "Epochs": f"{trainer.state.epoch:.2f}",
        "Training time since the last resume": f"{metrics['train_runtime']:.0f} s",
    }
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reformer", "lsh-attention", "byte-level"],
        datasets=[corpus.dataset_id] if corpus.dataset_id else None,
        base_model=base_model if base_model and not Path(base_model).exists() else None,
        model_name=model_name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=corpus.dataset_id or "text",
                dataset_name=corpus.description.replace("`", ""),
                dataset_split="validation",
                metric_type="bits_per_byte",
                metric_name="Bits per byte",
                metric_value=round(bits, 4),
            )
        ],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        model_id=args.hub_model_id or model_name,
        origin=f"Fine-tuned from `{base_model}`." if base_model else "Trained from random weights.",
        num_parameters=f"{trainer.model.num_parameters():,}",
        max_position_embeddings=f"{config.max_position_embeddings:,}",
        sequence_length=f"{sequence_length:,}",
        results=results,
        data_description=corpus.description,
        num_train_bytes=f"{corpus.num_train_bytes:,}",
        num_held_out_bytes=f"{corpus.num_held_out_bytes:,}",
        held_out_description=corpus.held_out_description,
        model_settings=_settings(config, MODEL_SETTINGS),
        training_settings=_settings(args, TRAINING_SETTINGS) | {"processes": args.world_size},
        software=f"torch {torch.__version__}, transformers {transformers.__version__}",
        hardware=_hardware(args.device),
        prompt=prompt,
        sample=sample,
    )
    card.save(Path(args.output_dir) / "README.md")


def _settings(source: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(source, name) for name in names if hasattr(source, name)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
