# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""`Trainer(push_to_hub=True)`: what is on the Hub while a model trains, and a run that continues from there."""

import json
from pathlib import Path

import pytest
import torch

from reformer_hf import ReformerHfForCausalLM

from .hub_process import USERS, run_with_hub
from .hub_server import HubServer
from .test_flat_files import FLAT_FILES

pytestmark = pytest.mark.slow

OF_ENCODER_DECODER = {"configuration_encoder_decoder.py", "encoder_decoder.py"}
CODE = {path.name for path in FLAT_FILES} - OF_ENCODER_DECODER

TRAIN = """
from pathlib import Path
from huggingface_hub import snapshot_download
from reformer_hf.training import PushModelCode
from tests.helpers import tiny_config
from transformers import Trainer, TrainerCallback, TrainingArguments

class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps

def trainer_of(folder, strategy, steps=4, seed=0, callbacks=(PushModelCode(),)):
    torch.manual_seed(seed)
    rows = torch.randint(3, 259, (8, 40), generator=torch.Generator().manual_seed(2))
    model = reformer_hf.ReformerHfForCausalLM(tiny_config(vocab_size=260, hidden_dropout_prob=0.1))
    return Trainer(
        model=model,
        args=TrainingArguments(
            f"{sys.argv[1]}/{folder}",
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            push_to_hub=True,
            hub_model_id=f"user/{folder}",
            hub_strategy=strategy,
            # Otherwise a push that is not finished at the next checkpoint would let it pass.
            hub_always_push=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        processing_class=reformer_hf.ReformerHfByteTokenizer(),
        callbacks=[*callbacks, StopAfter(steps)],
    )

def train(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    trainer.push_to_hub()
    torch.save(trainer.model.state_dict(), f"{trainer.args.output_dir}/weights")

for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    train(trainer_of(strategy, strategy))
train(trainer_of("no-code", "every_save", callbacks=()))
# Breaks off, and continues in another folder from what is on the Hub.
broken = trainer_of("broken", "checkpoint", steps=2)
broken.train()
broken._finish_current_push()
checkpoint = Path(snapshot_download("user/broken"), "last-checkpoint")
train(trainer_of("resumed", "end", seed=1), str(checkpoint))
"""

LOAD = """
import json
from pathlib import Path
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

commits = json.loads(Path(sys.argv[1], "commits.json").read_text())
for repo_id, oid in commits:
    model = AutoModelForCausalLM.from_pretrained(repo_id, revision=oid, **options)
    assert AutoTokenizer.from_pretrained(repo_id, revision=oid, **options)("ab")["input_ids"]
    assert type(model).__module__.startswith("transformers_modules.")
# A checkpoint is a model of its own.
folder = Path(snapshot_download("user/checkpoint"), "last-checkpoint")
model = AutoModelForCausalLM.from_pretrained(folder, **options)
torch.save(model.state_dict(), f"{sys.argv[1]}/last-checkpoint")
"""


def _commits(hub: HubServer, repo_id: str) -> dict[str, dict[str, bytes]]:
    """All but the first, which is empty."""
    return dict(list(hub.repos[repo_id].commits.items())[1:])


def _weights(files: dict[str, bytes], folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights of a model that is loaded from the files of a commit."""
    folder.mkdir(parents=True)
    for path, content in files.items():
        if path.startswith(prefix) and "/" not in path.removeprefix(prefix):
            (folder / path.removeprefix(prefix)).write_bytes(content)
    model, info = ReformerHfForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


def _equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_strategies(tmp_path):
    with HubServer(USERS) as hub:
        trained = tmp_path / "trained"
        trained.mkdir()
        run_with_hub(TRAIN, hub, trained)
        final = {path.parent.name: torch.load(path) for path in trained.glob("*/weights")}
        assert len(final) == 6
        strategies = ("end", "every_save", "checkpoint", "all_checkpoints")
        for strategy in (*strategies, "no-code", "resumed"):
            # The same training, broken off or not.
            assert _equal(final[strategy], final["end"]), strategy
            commits = _commits(hub, f"user/{strategy}")
            for number, files in enumerate(commits.values()):
                weights = _weights(files, tmp_path / f"{strategy}-{number}")
            assert _equal(weights, final[strategy]), strategy
            if strategy != "no-code":
                for files in commits.values():
                    assert CODE <= files.keys(), strategy
        assert len(_commits(hub, "user/end")) == 1
        during, *_ = _commits(hub, "user/every_save").values()
        assert json.loads(during["config.json"])["auto_map"]
        assert not _equal(_weights(during, tmp_path / "during"), final["every_save"])
        # This is what the callback is for.
        assert "modeling_reformer_hf.py" not in next(iter(_commits(hub, "user/no-code").values()))
        every = hub.repos["user/all_checkpoints"].files
        for number in (2, 4):
            assert {f"checkpoint-{number}/{name}" for name in CODE | {"optimizer.pt", "trainer_state.json"}} <= {
                *every
            }
        files = hub.repos["user/checkpoint"].files
        last = _weights(files, tmp_path / "last", "last-checkpoint/")
        assert _equal(last, final["checkpoint"])
        assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 4

        loaded = tmp_path / "loaded"
        loaded.mkdir()
        commits = [(f"user/{name}", oid) for name in strategies for oid in _commits(hub, f"user/{name}")]
        (loaded / "commits.json").write_text(json.dumps(commits))
        run_with_hub(LOAD, hub, loaded, package=False)
        assert _equal(torch.load(loaded / "last-checkpoint"), last)
