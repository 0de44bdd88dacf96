# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""One commit on the Hub that leaves a complete model behind, whatever was there before or is pushed meanwhile."""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def commit_model(
    folder: Path,
    paths: Iterable[Path],
    repo_id: str,
    commit_message: str,
    commit_description: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Commit files of `folder` and delete the weights that they replace.

    Without that, weights in one file would stay there when weights in several files are pushed, and be loaded instead
    of them.

    Raises:
        HfHubHTTPError: If another commit was made in the meantime (status 412). The client does not send files that
            have not changed, so that on top of that commit they would be missing.
    """
    api = HfApi(token=token)
    parent = api.repo_info(repo_id, revision=revision).sha
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths
    ]
    added = {operation.path_in_repo for operation in operations}
    if any(map(_WEIGHTS.fullmatch, added)):
        present = api.list_repo_files(repo_id, revision=parent)
        operations += [
            CommitOperationDelete(path) for path in present if path not in added and _WEIGHTS.fullmatch(path)
        ]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=parent,
    )
