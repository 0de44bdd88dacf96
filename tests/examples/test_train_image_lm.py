# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiles of images, their baselines, and the script for images on a small image folder."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from image_baselines import format_bits, neighbor_bits, neighbor_predictions
from image_data import BEGIN_ID, ImageArguments, RandomCrops, encode_tile, load_photographs, load_tiles
from image_residuals import NoWrapping, from_residuals, to_residuals
from PIL import Image
from train_image_lm import complete, encode, main, sinusoids
from training_run import LearningCurve
from transformers import AutoModelForCausalLM, set_seed

from reformer_hf.training import MuonWithAdamW

SIZE = 8
REFORMER = (
    'attn_layers=["local","lsh"],hidden_size=16,num_attention_heads=2,attention_head_size=8,feed_forward_size=16,'
    "local_attn_chunk_length=8,local_num_chunks_before=1,lsh_attn_chunk_length=8"
)
OPTIONS = f"""
    --tile_size {SIZE} --num_crops 6 --num_completed_tiles 2 --config_overrides {REFORMER} --max_steps 4 --save_steps 2
    --eval_steps 2 --logging_steps 1 --use_cpu --disable_tqdm true
"""


def run(data, output_dir, *options):
    return main([*OPTIONS.split(), "--data", str(data), "--output_dir", str(output_dir), *options])


def numbered_image(number, height, width):
    """An image whose pixels name themselves: image, row and column."""
    rows, columns = np.indices((height, width))
    return np.stack([np.full_like(rows, number), rows, columns], axis=-1).astype(np.uint8)


def save_images(folder, number, height=20, width=30):
    folder.mkdir(parents=True)
    for i in range(number):
        Image.fromarray(numbered_image(i, height, width)).save(folder / f"{i:03}.png")
    return folder


def pixels_of(images):
    return {tuple(pixel) for image in images for pixel in image.reshape(-1, 3).tolist()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data") / "images", 3)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_lm")
    return folder, *run(images, folder)


def test_encode_tile():
    """Position `i` predicts byte `i` of the raster order and reads the one before."""
    tile = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    example = encode_tile(tile[:, ::-1])
    assert example["shift_labels"].reshape(4, 4, 3).tolist() == tile[:, ::-1].tolist()
    assert example["input_ids"][0] == BEGIN_ID
    assert torch.equal(example["input_ids"][1:], example["shift_labels"][:-1])


def test_residuals():
    """They are those of the predictor, and give the tiles back."""
    tiles = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    residuals = to_residuals(tiles)
    assert residuals.dtype == np.uint8
    assert np.array_equal(residuals, (tiles - neighbor_predictions(tiles)["median"]) % 256)
    assert np.array_equal(from_residuals(residuals), tiles)
    # Neighboring residuals are alike, -1 and 0 too.
    vectors = sinusoids(256, 64, circular=True)
    similarities = vectors @ vectors[0]
    assert similarities[255] == pytest.approx(similarities[1].item(), rel=1e-4)
    assert similarities.argsort(descending=True)[0] == 0 and similarities[1] > similarities[5:252].max()


@pytest.mark.parametrize("given", [0, 30], ids=["whole", "completed"])
def test_no_wrapping(given):
    """Random residuals that the processor allows never lead from bright to dark, whatever the pixels before."""
    generator = torch.Generator().manual_seed(given)
    tiles = torch.randint(0, 256, (3, 4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    begin = torch.full((3, 1), BEGIN_ID)
    ids = torch.cat([begin, torch.from_numpy(to_residuals(tiles).reshape(3, -1)[:, :given]).long()], dim=1)
    processor, allowed = NoWrapping(4), []
    while ids.shape[1] <= tiles[0].size:
        scores = processor(ids, torch.randn(3, 257, generator=generator))
        allowed.append(scores[:, :256].isfinite().sum(1))
        assert scores[:, BEGIN_ID].isfinite().all()
        ids = torch.cat([ids, scores[:, :256].softmax(-1).multinomial(1, generator=generator)], dim=1)
    # Half of the range lies beyond the end where a prediction is 0 or 255.
    assert torch.cat(allowed).min() >= 128 and torch.cat(allowed).max() > 250
    residuals = ids[:, 1:].reshape(tiles.shape).numpy().astype(np.uint8)
    found = from_residuals(residuals)
    signed = residuals.astype(np.int8).astype(int)
    differences = found - neighbor_predictions(found)["median"]
    assert np.array_equal(differences.reshape(3, -1)[:, given:], signed.reshape(3, -1)[:, given:])
    assert np.array_equal(found.reshape(3, -1)[:, :given], tiles.reshape(3, -1)[:, :given])


def test_random_crops():
    """Crops are windows of the images or their mirror images, and depend on seed, epoch and index only."""
    sources = [numbered_image(0, 9, 12), numbered_image(1, 8, 8)]
    crops = RandomCrops(sources, SIZE, 200, 3, encode_tile)
    found, flips = set(), 0
    for i in range(len(crops)):
        crop = crops.crop(i)
        flipped = crop[0, 0, 2] > crop[0, -1, 2]
        flips += flipped
        number, top, left = (crop[:, ::-1] if flipped else crop)[0, 0].tolist()
        expected = sources[number][top : top + SIZE, left : left + SIZE]
        assert np.array_equal(crop, expected[:, ::-1] if flipped else expected)
        found.add((number, top, left))
    assert found == {(0, top, left) for top in range(2) for left in range(5)} | {(1, 0, 0)}
    assert 70 < flips < 130
    again = RandomCrops(sources, SIZE, 200, 3, encode_tile)
    assert torch.equal(again[7]["input_ids"], crops[7]["input_ids"])
    again.set_epoch(1)
    assert any(not torch.equal(again[i]["input_ids"], crops[i]["input_ids"]) for i in range(5))


@pytest.mark.parametrize("number, num_held_out", [(3, 3 * 2), (40, 5 * 6)])
def test_held_out(tmp_path, number, num_held_out):
    """Held-out tiles share no pixel with the training images: strips of few images, or whole images of many."""
    tiles = load_tiles(ImageArguments(str(save_images(tmp_path / "images", number)), tile_size=SIZE))
    assert len(tiles.held_out) == num_held_out
    assert not pixels_of(tiles.train) & pixels_of(tiles.held_out)
    assert len(pixels_of(tiles.held_out)) == num_held_out * SIZE**2


def test_held_out_split(tmp_path):
    save_images(tmp_path / "train", 2)
    save_images(tmp_path / "test", 1, height=50)
    tiles = load_tiles(ImageArguments(str(tmp_path), tile_size=SIZE, max_held_out_tiles=5))
    assert [image.shape for image in tiles.train] == [(20, 30, 3)] * 2
    assert tiles.held_out.shape == (5, SIZE, SIZE, 3) and tiles.held_out_description == "the split `test`"


def test_photographs():
    photographs = load_photographs()
    assert {"china.jpg", "flower.jpg", "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"} <= set(photographs)
    for image in photographs.values():
        assert image.dtype == np.uint8 and image.shape[2] == 3 and min(image.shape[:2]) >= 300


def test_neighbor_predictions():
    tiles = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    predictions = neighbor_predictions(tiles)
    for n, row, column, channel in np.ndindex(tiles.shape):
        tile = tiles[n, :, :, channel].astype(int)
        if row == column == 0:
            expected = dict.fromkeys(predictions, 128)
        elif row == 0:
            expected = dict.fromkeys(predictions, tile[row, column - 1])
        elif column == 0:
            expected = dict.fromkeys(predictions, tile[row - 1, column])
        else:
            left, above, corner = tile[row, column - 1], tile[row - 1, column], tile[row - 1, column - 1]
            median = sorted([left, above, left + above - corner])[1]
            expected = {"left": left, "above": above, "mean": (left + above) // 2, "median": median}
        assert {name: values[n, row, column, channel] for name, values in predictions.items()} == expected


def test_neighbor_bits():
    """Noise takes eight bits. A slope in each row takes almost none from the left neighbor."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    for bits in neighbor_bits(noise[:50], noise[50:]).values():
        assert bits == pytest.approx(8, abs=0.05)
    # Every column is three more than the one before, modulo 256. The first is noise, one pixel of 16: with probability
    # 1/16 the residual takes log2(16) + 8 bits, otherwise log2(16/15), which is 0.84 on average.
    slopes = 3 * np.arange(16, dtype=np.uint8)[None, None, :, None] + noise[:, :, :1]
    bits = neighbor_bits(slopes[:50], slopes[50:])
    assert bits["left"] < 1 and bits["above"] > 7


def test_format_bits():
    tiles = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(tiles[0]).save(file, "PNG")
    assert np.array_equal(np.asarray(Image.open(file)), tiles[0])
    assert format_bits(tiles[:1], "PNG") == 8 * len(file.getvalue()) / tiles[0].size


def test_sinusoids():
    """One linear map moves every value by the same distance, as far as the table goes."""
    table = sinusoids(64, 20).double()
    solution = torch.linalg.lstsq(table[:-5], table[5:]).solution
    assert (table[:-5] @ solution - table[5:]).norm() < 1e-3 * table.norm()
    for size in (3, 64, 256):
        similarity = torch.nn.functional.cosine_similarity(sinusoids(size, 64)[:, None], sinusoids(size, 64), dim=-1)
        assert (similarity - torch.eye(size) < 0.999).all()


def test_folder(trained):
    folder, trainer, metrics = trained
    assert {"model.safetensors", "config.json", "README.md", "curve.jsonl"} <= {path.name for path in folder.iterdir()}
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.axial_pos_shape == (SIZE, SIZE, 3) and config.max_position_embeddings == 3 * SIZE**2
    results = json.loads((folder / "all_results.json").read_text())
    for name in ("eval_bits_per_dimension", "best_neighbor_bits_per_dimension", "png_bits_per_dimension"):
        assert results[name] == metrics[name]
    # Two tiles and four rows, each of 4 + 2 * 8 pixels.
    assert Image.open(folder / "completions.png").size == (2 * 20, 4 * 20)


def test_bits_per_dimension(trained, images):
    _, trainer, metrics = trained
    assert isinstance(trainer.optimizer.optimizer, MuonWithAdamW)
    nats = 0.0
    tiles = load_tiles(ImageArguments(str(images), tile_size=SIZE)).held_out
    for tile in tiles:
        example = encode(tile, predict_residuals=True)
        with torch.no_grad():
            log_probs = trainer.model.eval()(example["input_ids"][None]).logits[0].double().log_softmax(-1)
        nats -= log_probs.gather(1, example["shift_labels"][:, None]).sum().item()
    assert metrics["eval_bits_per_dimension"] == pytest.approx(nats / math.log(2) / tiles.size, rel=1e-4)


def test_resume(trained, images, tmp_path):
    """A resumed run ends with the weights of an uninterrupted one."""
    folder, trainer, _ = trained
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed, _ = run(images, tmp_path)
    for (name, weight), expected in zip(resumed.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_resumed_time(trained, images, tmp_path):
    """A resumed run continues with the remaining time and drops the curve after its checkpoint."""
    folder, trainer, _ = trained
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(folder / "checkpoint-2", checkpoint)
    shutil.copy(folder / "curve.jsonl", tmp_path)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["LearningCurve"]["attributes"]["spent"]
    assert 0 < saved["seconds"] < trainer.curve.spent()["seconds"]
    saved["seconds"] = 100.0
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    resumed, _ = run(images, tmp_path, "--max_steps", "3")
    assert 100 < resumed.curve.spent()["seconds"] < 130
    entries = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    losses = [(entry["step"], entry["seconds"] > 100) for entry in entries if "loss" in entry]
    assert losses == [(1, False), (2, False), (3, True)]


def test_state_of_old_checkpoints(tmp_path):
    """Checkpoints of versions that did not save the time can be resumed and save it from then on."""

    class State:
        stateful_callbacks, global_step, is_world_process_zero = {}, 5, True

    class Arguments:
        output_dir = str(tmp_path)

    LearningCurve().on_train_begin(Arguments, State, None)
    assert State.stateful_callbacks["LearningCurve"]["attributes"]["spent"]["seconds"] == 0


def test_complete(trained, images):
    """The upper half stays, and the KV cache samples what the model samples without a cache."""
    model = trained[1].model
    tiles = load_tiles(ImageArguments(str(images), tile_size=SIZE)).held_out[:2]
    completed = {}
    for use_cache in (True, False):
        model.generation_config.use_cache = use_cache
        set_seed(0)
        completed[use_cache] = complete(model, tiles, predict_residuals=True)
    model.generation_config.use_cache = True
    assert np.array_equal(completed[True][:, : SIZE // 2], tiles[:, : SIZE // 2])
    assert not np.array_equal(completed[True][0, SIZE // 2 :], completed[True][1, SIZE // 2 :])
    assert np.array_equal(completed[True], completed[False])


def test_card(trained):
    folder, _, metrics = trained
    card = ModelCard.load(folder / "README.md")
    result = card.data.eval_results[0]
    assert result.metric_value == round(metrics["eval_bits_per_dimension"], 4)
    for part in (f"{metrics['png_bits_per_dimension']:.4f}", "the image folder `images`", "completions.png"):
        assert part.lower() in card.text.lower()


def test_card_usage(trained):
    """The code of the card generates an image."""
    folder = trained[0]
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace(f'"{folder.name}"', f'"{folder}"'), names)
    assert names["image"].shape == (SIZE, SIZE, 3) and names["image"].dtype == np.uint8


BAD_OPTIONS = (
    (["--validation_fraction", "0"], "`validation_fraction` is 0.0, but must be between 0 and 1"),
    (["--tile_size", "0"], "`tile_size` is 0, but must be at least 1"),
    (["--tile_size", "21"], "give more or larger images, or lower `tile_size`"),
    (["--image_column", "picture"], r"set `image_column` to one of \['image'\]"),
    (["--config_overrides", "vocab_size=300"], "the tiles determine these fields"),
    (["--config_overrides", "width=3"], "each entry must be key=value"),
)


def test_bad_options(images, tmp_path):
    for options, message in BAD_OPTIONS:
        with pytest.raises(ValueError, match=message):
            run(images, tmp_path, *options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="are no folder with images"):
        run(tmp_path / "empty", tmp_path)
