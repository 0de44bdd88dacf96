# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Load tables from CSV and JSON files and from the Hub."""

from collections.abc import Mapping
from pathlib import Path

import datasets

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_columns(
    data: str, columns: Mapping[str, str], dataset_config: str | None = None, validation_fraction: float = 0.1
) -> datasets.DatasetDict:
    """
    Load columns of a CSV or JSON file or of a dataset on the Hub, with held-out rows.

    Args:
        data: The file, or the name of the dataset.
        columns: The name of each column in the data, by its name in the result.
        dataset_config: Configuration of the dataset on the Hub.
        validation_fraction: Fraction to hold out of data without a split `validation` or `test`.

    Returns:
        The splits `train` and `validation`.

    Raises:
        ValueError: If the data do not exist or have no such columns.
    """
    path = Path(data)
    kind = _FORMATS.get(path.suffix)
    if kind and not path.exists():
        raise ValueError(f"The file {data!r} does not exist: give a CSV or JSON file, or a dataset on the Hub.")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction` is {validation_fraction}, but must be between 0 and 1.")
    try:
        if kind:
            splits = datasets.load_dataset(kind, data_files=str(path))
        else:
            splits = datasets.load_dataset(data, dataset_config)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"The data {data!r} are no CSV or JSON file, and could not be loaded as a dataset from the Hub: {error}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"The data {data!r} have no split `train`, only {sorted(splits)}: choose other data.")
    found = splits["train"].column_names
    missing = set(columns.values()) - set(found)
    if missing:
        options = " and ".join(f"`{name}_column`" for name in columns)
        raise ValueError(f"The data {data!r} have no column {min(missing)!r}: set {options} to columns of {found}.")
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out is None:
        splits = splits["train"].train_test_split(validation_fraction, seed=0)
        held_out = "test"
    chosen = datasets.DatasetDict(train=splits["train"], validation=splits[held_out])
    chosen = chosen.select_columns(list(columns.values()))
    return chosen.rename_columns({column: name for name, column in columns.items() if column != name})
