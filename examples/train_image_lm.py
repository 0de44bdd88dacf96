# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train a causal Reformer on the bytes of images, measure bits per dimension, and complete held-out images.

A tile of 64 × 64 pixels with three color channels is a sequence of 12,288 bytes in raster order. Train for two hours
on tiles of the photographs that scikit-learn and scikit-image ship:

    python examples/train_image_lm.py --output_dir outputs/image_lm --max_minutes 120

Train on your own images, or on a dataset on the Hub:

    python examples/train_image_lm.py --data photos/ --output_dir outputs/photos --max_minutes 120

The bytes are residuals of a predictor from neighboring pixels, so that the model need not learn that neighbors are
alike (`--predict_residuals False`: the bytes themselves). Nothing is lost, so bits per dimension mean the same.

Training tiles are random crops, half of them flipped. The script measures bits per dimension (bits for one color
channel of one pixel) on held-out tiles, and compares them with residuals of neighboring pixels and with PNG files of
the same tiles. It then samples the lower half of held-out tiles with a KV cache and writes `completions.png`.

Running the same command again resumes from the last intact checkpoint in `output_dir`, also in the middle of
`--max_minutes`; `--overwrite_output_dir` starts over. `--help` lists all options.
"""

import logging
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bits_per_byte import BitsPerByte, sum_nll
from image_baselines import format_bits, neighbor_bits
from image_data import BEGIN_ID, ImageArguments, RandomCrops, Tiles, encode_tile, grid_tiles, load_tiles
from image_residuals import NoWrapping, from_residuals, to_residuals
from model_report import plot_learning_curve, read_curve
from PIL import Image
from torch import Tensor
from training_run import ScriptTrainer, ScriptTrainingArguments, find_checkpoint, parse_overrides, write_card_of_run
from transformers import (
    EvalPrediction,
    GenerationConfig,
    HfArgumentParser,
    LogitsProcessorList,
    Trainer,
    default_data_collator,
    set_seed,
)

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.hub import Metric, RunReport

logger = logging.getLogger(__name__)

# A query of a local layer sees at least the 256 bytes before it, and so more than a row of 64 pixels.
DEFAULTS = {
    "attn_layers": ["local", "local", "lsh", "local"],
    "hidden_size": 192,
    "num_attention_heads": 3,
    "attention_head_size": 64,
    "feed_forward_size": 384,
    "local_attn_chunk_length": 64,
    "local_num_chunks_before": 4,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.05,
    "axial_norm_std": 0.3,
}
SHORTEST_WAVELENGTH = 2.5
# Of the grid of completions, in pixels.
GAP, SCALE = 4, 2

USAGE = """\
import numpy as np
import reformer_hf  # registers the model with the Auto classes
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{model_id}")
begin = torch.tensor([[model.config.bos_token_id]])
ids = model.generate(begin)[0, 1:]  # the bytes of one image
image = ids.reshape(model.config.axial_pos_shape).numpy().astype(np.uint8)"""
# Residuals stand in place of the bytes.
USAGE_OF_RESIDUALS = """
residuals, image = image.astype(int), np.zeros(image.shape, dtype=int)
for y, x in np.ndindex(image.shape[:2]):
    left, above = image[y, x - 1], image[y - 1, x]
    predicted = np.median([left, above, left + above - image[y - 1, x - 1]], axis=0).astype(int)
    if not x or not y:
        predicted = left if x else above if y else 128
    image[y, x] = (predicted + residuals[y, x]) % 256
image = image.astype(np.uint8)"""


@dataclass
class ModelArguments:
    """The model."""

    predict_residuals: bool = field(
        default=True,
        metadata={"help": "Predict residuals of the predictor of JPEG-LS instead of the bytes themselves."},
    )
    sinusoidal_init: bool = field(
        default=True,
        metadata={
            "help": "Start the embeddings of bytes and positions and the output layer with sinusoids, so that similar "
            "values have similar vectors. They are trained like all weights."
        },
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the config: key=value,key=[1,2],… with JSON values."}
    )


@dataclass
class CompletionArguments:
    """The completions of held-out tiles."""

    num_completed_tiles: int = field(default=8, metadata={"help": "Held-out tiles to complete; 0 for none."})
    completions_per_tile: int = field(default=2, metadata={"help": "Completions of each tile."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})


def build_model(args: ModelArguments, tile_size: int) -> ReformerHfForCausalLM:
    """Build a new model for tiles of this size. Raises `ValueError` for options that do not fit."""
    given = parse_overrides(args.config_overrides, ReformerHfConfig)
    fixed = {
        "vocab_size": BEGIN_ID + 1,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": None,
        "pad_token_id": None,
        "is_decoder": True,
        "axial_pos_embds": True,
        "axial_pos_shape": (tile_size, tile_size, 3),
        "max_position_embeddings": 3 * tile_size**2,
    }
    wrong = sorted(given.keys() & fixed)
    if wrong:
        raise ValueError(
            f"`config_overrides` contains {wrong}, but the tiles determine these fields: leave them out, or change "
            "`tile_size`."
        )
    model = ReformerHfForCausalLM(ReformerHfConfig(**{**DEFAULTS, **given, **fixed}))
    if args.sinusoidal_init:
        start_with_sinusoids(model, circular=args.predict_residuals)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_length=model.config.max_position_embeddings + 1,
        bos_token_id=BEGIN_ID,
        suppress_tokens=[BEGIN_ID],
    )
    return model


def sinusoids(size: int, dim: int, circular: bool = False) -> Tensor:
    """
    Return sines and cosines of `size` values, `[size, dim]`.

    The wavelengths go from 2.5 to four times `size`, or, if the values are numbers modulo `size`, to `size`.
    """
    longest = size if circular else 4 * size
    wavelengths = torch.logspace(math.log10(SHORTEST_WAVELENGTH), math.log10(longest), math.ceil(dim / 2))
    if circular:
        wavelengths = size / (size / wavelengths).round()
    angles = 2 * math.pi * torch.arange(size)[:, None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


@torch.no_grad()
def start_with_sinusoids(model: ReformerHfForCausalLM, circular: bool) -> None:
    """
    Set the vectors of bytes and positions to sinusoids (Vaswani et al. 2017, section 3.5).

    A linear map then finds the pixel above or values that are close, instead of learning each of them. The standard
    deviation of both embeddings is about `axial_norm_std`. `circular`: whether bytes are numbers modulo 256.
    """
    embeddings = model.reformer.embeddings
    scale = math.sqrt(2) * model.config.axial_norm_std
    embeddings.word_embeddings.weight[:BEGIN_ID] = scale * sinusoids(BEGIN_ID, model.config.hidden_size, circular)
    for weight in embeddings.position_embeddings.weights:
        table = weight.view(-1, weight.shape[-1])
        table.copy_(scale * sinusoids(*table.shape))
    output = model.get_output_embeddings().weight
    output[:BEGIN_ID] = output.std() * math.sqrt(2) * sinusoids(BEGIN_ID, output.shape[1], circular)


def encode(tile: np.ndarray, predict_residuals: bool) -> dict[str, Tensor]:
    """Encode a tile `[size, size, 3]` (`uint8`), or its residuals, as `encode_tile` does."""
    return encode_tile(to_residuals(tile[None])[0] if predict_residuals else tile)


def train(
    model_args: ModelArguments,
    data_args: ImageArguments,
    completion_args: CompletionArguments,
    training_args: ScriptTrainingArguments,
) -> tuple[Trainer, dict[str, Any]]:
    """
    Train and evaluate a model, and write everything to `training_args.output_dir`.

    Returns:
        The trainer with the trained model, and a dictionary of the metrics of `Trainer`, `eval_bits_per_dimension`
        and the bits per dimension of the baselines.
    """
    set_seed(training_args.seed)
    tiles = load_tiles(data_args)
    model = build_model(model_args, tiles.size)
    encode_one = partial(encode, predict_residuals=model_args.predict_residuals)
    checkpoint = find_checkpoint(training_args)
    training_args.label_names = ["shift_labels"]
    metric = BitsPerByte(keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        found = metric.compute(
            predictions=prediction.predictions, references=[labels.size for labels in prediction.label_ids]
        )
        return {"bits_per_dimension": found["bits_per_byte"]}

    trainer = ScriptTrainer(
        model=model,
        args=training_args,
        train_dataset=RandomCrops(tiles.train, tiles.size, data_args.num_crops, training_args.seed, encode_one),
        eval_dataset=[encode_one(tile) for tile in tiles.held_out],
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=partial(sum_nll, shift=False),
        muon_by_default=True,
    )
    metrics = trainer.train_or_exit(checkpoint)
    metrics |= trainer.evaluate()
    metrics |= {f"{name}_bits_per_dimension": bits for name, bits in baselines(tiles).items()}
    trainer.save_run(metrics)
    completed = complete_tiles(trainer, tiles, completion_args, model_args.predict_residuals)
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        if len(completed):
            write_grid([*completed], folder / "completions.png")
        plot_learning_curve(
            {"held out": read_curve(folder)},
            "eval_bits_per_dimension",
            "bits per dimension",
            folder / "learning_curve.png",
            {"best_neighbor": metrics["best_neighbor_bits_per_dimension"], "PNG": metrics["png_bits_per_dimension"]},
        )
        write_card(trainer, tiles, metrics, completion_args, model_args)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer, metrics


def baselines(tiles: Tiles) -> dict[str, float]:
    """Return the bits per dimension of the held-out tiles with neighbor residuals, as PNG and as lossless WebP."""
    train = np.stack([tile for image in tiles.train for tile in grid_tiles(image, tiles.size)])
    of_neighbors = neighbor_bits(train, tiles.held_out)
    return {
        **{f"{name}_neighbor": bits for name, bits in of_neighbors.items()},
        "best_neighbor": min(of_neighbors.values()),
        "png": format_bits(tiles.held_out, "PNG", optimize=True),
        "webp": format_bits(tiles.held_out, "WEBP", lossless=True, quality=100, method=6),
    }


def complete_tiles(
    trainer: Trainer, tiles: Tiles, args: CompletionArguments, predict_residuals: bool
) -> list[np.ndarray]:
    """
    Sample the lower half of held-out tiles.

    Returns:
        Rows of a grid, each `[num_completed_tiles, size, size, 3]` (`uint8`): the tiles, the tiles without their lower
        halves, and `completions_per_tile` completions. An empty list if no tile is to be completed.
    """
    number = min(args.num_completed_tiles, len(tiles.held_out))
    if number < 1:
        return []
    chosen = np.linspace(0, len(tiles.held_out) - 1, number).round().astype(int)
    originals = tiles.held_out[chosen]
    cut = originals.copy()
    cut[:, tiles.size // 2 :] = 128
    repeated = np.tile(originals, (args.completions_per_tile, 1, 1, 1))
    # With sharded weights, all processes must sample the same tokens.
    set_seed(trainer.args.seed)
    completed = complete(trainer.model, repeated, predict_residuals, args.temperature)
    return [originals, cut, *np.split(completed, args.completions_per_tile)]


def complete(
    model: ReformerHfForCausalLM, tiles: np.ndarray, predict_residuals: bool, temperature: float = 1.0
) -> np.ndarray:
    """Return tiles `[num_tiles, size, size, 3]` with the upper halves of `tiles` and lower halves from the model."""
    num_given = math.prod(tiles[0, : tiles.shape[1] // 2].shape)
    # The token of begin stands before the first byte.
    encoded = [encode(tile, predict_residuals)["input_ids"][: num_given + 1] for tile in tiles]
    given = torch.stack(encoded).to(model.device)
    processors = LogitsProcessorList([NoWrapping(tiles.shape[1])] if predict_residuals else [])
    output = model.eval().generate(
        given, attention_mask=torch.ones_like(given), temperature=temperature, logits_processor=processors
    )
    completed = output[:, 1:].reshape(tiles.shape).cpu().numpy().astype(np.uint8)
    return from_residuals(completed) if predict_residuals else completed


def write_grid(rows: list[np.ndarray], path: Path) -> None:
    """Write a PNG file with rows of tiles, each row `[num_tiles, size, size, 3]`, at twice their size."""
    rows = [np.kron(row, np.ones((1, SCALE, SCALE, 1), dtype=np.uint8)) for row in rows]
    framed = [np.pad(row, ((0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=255) for row in rows]
    Image.fromarray(np.concatenate([np.concatenate([*row], axis=1) for row in framed])).save(path)


def write_card(
    trainer: Trainer,
    tiles: Tiles,
    metrics: dict[str, float],
    args: CompletionArguments,
    model_args: ModelArguments,
) -> None:
    """Write the model card."""
    results = {
        "Bits per dimension of the best neighbor predictor": metrics["best_neighbor_bits_per_dimension"],
        "Bits per dimension as PNG": metrics["png_bits_per_dimension"],
        "Bits per dimension as lossless WebP": metrics["webp_bits_per_dimension"],
    }
    size, figures, sample = tiles.size, {"Learning curve": "learning_curve.png"}, ""
    if args.num_completed_tiles > 0:
        figures["Completions of held-out tiles"] = "completions.png"
        within = ", without residuals that lead below 0 or above 255" * model_args.predict_residuals
        sample = (
            "`completions.png` shows, from top to bottom, held-out tiles, their upper halves, which the model reads, "
            f"and {args.completions_per_tile} samples of the lower halves, drawn with a KV cache at temperature "
            f"{args.temperature:g}{within}."
        )
    bits = metrics["eval_bits_per_dimension"]
    report = RunReport(
        summary=(
            f"A causal Reformer over the {3 * size**2:,} bytes of images of {size} × {size} pixels."
            + " The bytes are residuals of the predictor of JPEG-LS." * model_args.predict_residuals
            + " Embeddings and output layer started as sinusoids." * model_args.sinusoidal_init
        ),
        pipeline_tag="unconditional-image-generation",
        results={name: f"{value:.4f}" for name, value in results.items()},
        results_note=(
            "A dimension is one color channel of one pixel. The neighbor predictors predict a byte from the left "
            "neighbor, the one above, their mean, or the median of left, above and left + above − upper left, in the "
            "same color channel, and encode residuals modulo 256 with a histogram for each channel, fitted to the "
            "adjacent tiles of the training images with a pseudocount of 0.1; the best on the held-out tiles counts. "
            "PNG (`optimize=True`) and WebP (`lossless=True`, `quality=100`, `method=6`) are files of Pillow, one for "
            "each tile, with all headers."
        ),
        figures=figures,
        data=(
            f"{tiles.description[0].upper()}{tiles.description[1:]}: {tiles.num_train_pixels:,} pixels to train on. "
            f"Training examples are random crops of {size} × {size} pixels, half of them flipped horizontally. "
            f"{len(tiles.held_out)} adjacent tiles, which do not overlap them, are held out: "
            f"{tiles.held_out_description}."
        ),
        dataset_id=tiles.dataset_id,
        metric=Metric("bits_per_dimension", "Bits per dimension", round(bits, 4)),
        usage=USAGE + USAGE_OF_RESIDUALS * model_args.predict_residuals,
        sample=sample,
    )
    write_card_of_run(trainer, report)


def main(argv: list[str] | None = None) -> tuple[Trainer, dict[str, Any]]:
    """Run the script with the options `argv`, or those of the command line. Returns the result of `train`."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    parser = HfArgumentParser(
        (ModelArguments, ImageArguments, CompletionArguments, ScriptTrainingArguments), description=__doc__
    )
    parser.set_defaults(
        output_dir="outputs/image_lm",
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        adam_beta2=0.95,
        save_steps=100,
    )
    return train(*parser.parse_args_into_dataclasses(argv))


if __name__ == "__main__":
    final_trainer, final_metrics = main()
    if final_trainer.is_world_process_zero():
        print(f"\nHeld-out bits per dimension: {final_metrics['eval_bits_per_dimension']:.3f}")
        print(f"Best neighbor predictor:     {final_metrics['best_neighbor_bits_per_dimension']:.3f}")
        print(f"PNG:                         {final_metrics['png_bits_per_dimension']:.3f}")
        print(f"Lossless WebP:               {final_metrics['webp_bits_per_dimension']:.3f}")
        print(f"Model, model card and figures: {final_trainer.args.output_dir}")
