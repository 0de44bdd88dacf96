# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The model behind the page: it is found, loaded, and continues a text token by token."""

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, StoppingCriteria, set_seed
from transformers.generation.streamers import BaseStreamer

import reformer_hf  # noqa: F401  registers the model with the Auto classes

MODEL_VARIABLE = "REFORMER_MODEL"
# In a Space, the folder of a model can lie next to the page.
FOLDERS = [Path(__file__).parent / "model", Path("outputs/demo")]
# Bounds of what one visitor can ask for.
MAX_CHARACTERS = 100_000
MAX_CONTEXT = 16_384
MAX_NEW_TOKENS = 1_000
MAX_TEMPERATURE = 2.0
# The page is updated at most that often.
_SECONDS_BETWEEN_UPDATES = 0.1


class InputError(ValueError):
    """An input that the page answers with a message."""


@dataclass(frozen=True)
class TextModel:
    """
    A causal language model with its tokenizer.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        name: How the page calls the model.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a text with its continuation."""
        return min(self.model.config.max_position_embeddings, MAX_CONTEXT)

    @property
    def lsh_layers(self) -> list[int]:
        """Indices of the LSH layers."""
        return [i for i, layer_type in enumerate(self.model.config.attn_layers) if layer_type == "lsh"]

    def encode(self, text: Any) -> list[int]:
        """
        Tokenize the text of a visitor.

        Raises:
            InputError: If it is empty or much too long.
        """
        if not isinstance(text, str) or not text.strip():
            raise InputError("The text is empty. Write something, or take the example.")
        if len(text) > MAX_CHARACTERS:
            raise InputError(f"The text has {len(text):,} characters. Shorten it to {MAX_CHARACTERS:,} or fewer.")
        # Special tokens in the text of a visitor are text.
        return self.tokenizer(text, split_special_tokens=True)["input_ids"]


@dataclass(frozen=True)
class Progress:
    """
    A continuation so far.

    Args:
        text: The new text.
        num_new_tokens: Number of new tokens.
        tokens_per_second: Throughput after the first new token; `None` before the second one.
        context_length: Number of tokens of the text with its continuation.
    """

    text: str
    num_new_tokens: int
    tokens_per_second: float | None
    context_length: int


def find_model(given: str | None = None) -> str:
    """
    Return the folder or Hub id of the model to show.

    Args:
        given: A folder or Hub id. `None` takes that of the environment variable `REFORMER_MODEL`, the folder `model`
            next to this file, or the folder that `make demo` writes, in this order.

    Raises:
        FileNotFoundError: If there is none; the message says what to run.
    """
    source = given or os.environ.get(MODEL_VARIABLE)
    if source is None:
        source = next((str(folder) for folder in FOLDERS if (folder / "config.json").is_file()), None)
    if source is None:
        raise FileNotFoundError(
            f"There is no model in {FOLDERS[1]}. Run `make demo`, which trains one in a few minutes, or give a folder "
            f"or a Hub id: `python examples/space/app.py --model me/my-model`, or {MODEL_VARIABLE}=me/my-model."
        )
    return source


def load_model(source: str) -> TextModel:
    """
    Load a causal model and its tokenizer.

    Args:
        source: A folder or a Hub id.

    Raises:
        ValueError: If it is not a causal model of this package.
        OSError: If there is no model there.
    """
    config = AutoConfig.from_pretrained(source)
    if config.model_type != "reformer_hf" or not config.is_decoder:
        raise ValueError(
            f"{source} holds a model of type {config.model_type!r}, but the page needs a causal model of type "
            "'reformer_hf' (`is_decoder=True`), such as `make demo` trains."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source).eval().to(device)
    return TextModel(model, AutoTokenizer.from_pretrained(source), Path(source).name)


def whole_number(value: Any, name: str, minimum: int, maximum: int) -> int:
    """Return a number that a visitor gave, or raise `InputError` with its name."""
    number = _number(value, name, minimum, maximum)
    if number != int(number):
        raise InputError(f"{name} is {value}. Give a whole number from {minimum:,} to {maximum:,}.")
    return int(number)


def _number(value: Any, name: str, minimum: float, maximum: float) -> float:
    allowed = f"Give a number from {minimum:,} to {maximum:,}."
    try:
        number = float(value)
    except (TypeError, ValueError):
        given = "empty" if value in (None, "") else f"{value!r}, which is not a number"
        raise InputError(f"{name} is {given}. {allowed}") from None
    if not math.isfinite(number) or not minimum <= number <= maximum:
        raise InputError(f"{name} is {value}. {allowed}")
    return number


def continue_text(
    text_model: TextModel, text: Any, num_new_tokens: Any, temperature: Any, seed: int | None = None
) -> Iterator[Progress]:
    """
    Continue a text, and return an iterator over the progress.

    Closing the iterator stops generation after the current token.

    Args:
        text_model: The model.
        text: The text.
        num_new_tokens: Number of tokens to generate. Generation ends earlier at the end of a document.
        temperature: Temperature of sampling. 0 always takes the most probable token.
        seed: Seed of sampling; `None` for another continuation each time.

    Raises:
        InputError: If an input cannot be used; the message says what to change.
    """
    number = whole_number(num_new_tokens, "Number of new tokens", 1, MAX_NEW_TOKENS)
    heat = _number(temperature, "Temperature", 0, MAX_TEMPERATURE)
    input_ids = text_model.encode(text)
    length, limit = len(input_ids), text_model.context_length
    if length + number > limit:
        raise InputError(
            f"The text has {length:,} tokens and you ask for {number:,} more, but the model reads {limit:,} together. "
            f"Shorten the text by {length + number - limit:,} tokens or ask for fewer."
        )
    if seed is not None:
        set_seed(seed)
    options = {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
    return _stream(text_model, input_ids, {"max_new_tokens": number, **options})


def _stream(text_model: TextModel, input_ids: list[int], options: dict[str, Any]) -> Iterator[Progress]:
    """Generate in a thread and yield what there is, a few times per second."""
    queue: Queue = Queue()
    closed = threading.Event()

    def generate() -> None:
        ids = torch.tensor([input_ids], device=text_model.model.device)
        try:
            text_model.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=_QueueStreamer(queue),
                stopping_criteria=[_Closed(closed)],
                **options,
            )
        except Exception as error:
            queue.put(error)
        else:
            queue.put(None)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    new_ids: list[int] = []
    times: list[float] = []
    updated = 0.0
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            moment, ids = item
            new_ids += ids
            times.append(moment)
            if time.perf_counter() - updated > _SECONDS_BETWEEN_UPDATES:
                updated = time.perf_counter()
                yield _progress(text_model, len(input_ids), new_ids, times)
        yield _progress(text_model, len(input_ids), new_ids, times)
    finally:
        closed.set()
        thread.join()


def _progress(text_model: TextModel, prompt_length: int, new_ids: Sequence[int], times: Sequence[float]) -> Progress:
    text = text_model.tokenizer.decode(list(new_ids), skip_special_tokens=True)
    # A character of several bytes may not be complete yet.
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return Progress(text, len(new_ids), speed, prompt_length + len(new_ids))


class _QueueStreamer(BaseStreamer):
    """Puts the time and the ids of new tokens into a queue."""

    def __init__(self, queue: Queue):
        self.queue = queue
        self.has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.has_prompt:
            self.queue.put((time.perf_counter(), value.flatten().tolist()))
        self.has_prompt = True

    def end(self) -> None:
        pass


class _Closed(StoppingCriteria):
    """Stops when nobody reads the continuation any more."""

    def __init__(self, closed: threading.Event):
        self.closed = closed

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.closed.is_set(), device=input_ids.device)
