# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What is measured: shapes of models, cases, and suites of cases."""

from dataclasses import asdict, dataclass

WORKLOADS = {
    "attention": "one LSH attention module on hidden states, hashing and sorting included: forward",
    "attention-step": "the same, forward and backward",
    "forward": "the whole model in evaluation, without gradient, to the logits",
    "step": "the whole model in training: forward, loss, backward; no optimizer",
    "training": "a step of training on text: forward, loss, backward, AdamW",
    "prefill": "the forward pass, and the decoding state that it leaves; the logits of the last token",
    "last": "the forward pass to the logits of the last token, which leaves no state",
    "tokens": "128 tokens of decoding, one by one, after a context of the case's length",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `layers` names the attention of each layer."""

    name: str
    layers: tuple[str, ...]
    width: int
    num_heads: int
    head_size: int
    feed_forward: int
    lsh_chunk: int
    local_chunk: int
    vocab_size: int = 260
    # Positions at a time, of ours: 0 for all, or what suits the device.
    feed_forward_chunk: int = 0
    head_chunk: int = 0

    @property
    def check_length(self) -> int:
        """A short length that has several chunks of each kind: a multiple of all chunk lengths."""
        return 4 * max(self.lsh_chunk, self.local_chunk)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("base", ("lsh",) * 6, 256, 4, 64, 1024, 64, 64),
        # The enwik8 model of trax, 4 of its layers.
        Shape("enwik8", ("local", "local", "lsh", "local"), 768, 8, 96, 2048, 256, 128),
        # For memory: deeper, a wider feed-forward, and the length that the Reformer is for.
        Shape("deep", ("lsh",) * 24, 256, 4, 64, 1024, 64, 64),
        Shape("wide", ("lsh",) * 6, 256, 4, 64, 16 * 1024, 64, 64, feed_forward_chunk=64),
        Shape("million", ("local", "lsh") * 6, 256, 4, 64, 512, 64, 64, head_chunk=4096),
        # For generation: the layers and sizes of new configs.
        Shape("decoder", ("local", "lsh") * 3, 256, 4, 64, 512, 64, 64),
        Shape("quick", ("lsh",) * 2, 32, 2, 16, 64, 16, 16),
    )
}


@dataclass(frozen=True)
class Case:
    """One workload at one size. Batch 1, fp32, no dropout."""

    workload: str
    shape_name: str
    length: int
    num_hashes: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def name(self) -> str:
        prefix = "" if self.shape_name == "base" else f"{self.shape_name}-"
        return f"{prefix}{self.workload}-L{self.length}-R{self.num_hashes}"

    def to_dict(self) -> dict:
        return asdict(self)


# A case and the names of the implementations that it compares.
Entry = tuple[Case, tuple[str, ...]]

OURS, OURS_WIDE, OURS_IN_TREE = "reformer_hf", "reformer_hf-wide", "reformer_hf-in-tree"
IN_TREE, DENSE, COMPILED = "transformers", "dense", "reformer_hf-compiled"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROUNDS = (1, 2, 4, 8)

# In-tree, time and memory grow with length times rounds: beyond this, a step does not fit the machines at hand.
_IN_TREE_LIMIT = 65536


def _required() -> list[Entry]:
    """What the table of required figures needs."""
    twins = (OURS, OURS_IN_TREE, IN_TREE)
    entries = [
        (Case("step", "base", 16384, 4), (*twins, OURS_WIDE, "reformer-pytorch", "floor")),
        (Case("step", "base", 4096, 8), twins),
        (Case("step", "base", 16384, 1), twins),
        (Case("forward", "base", 16384, 4), twins),
        (Case("forward", "base", 16384, 1), twins),
        (Case("attention", "base", 16384, 4), (*twins, "reformer-pytorch")),
    ]
    dense = [Case("step", "base", length, 2) for length in (1024, 2048, 4096, 16384, 65536)]
    return entries + [(case, (OURS, OURS_WIDE, DENSE)) for case in dense]


def _lengths() -> list[Entry]:
    """Time of a step against length, as in figure 5 of the paper."""
    entries = []
    for length in LENGTHS:
        for num_hashes in ROUNDS:
            names: tuple[str, ...] = (OURS,)
            if length * num_hashes <= _IN_TREE_LIMIT:
                names += (IN_TREE,)
            # The dense model has no rounds: once is enough.
            if num_hashes == 2:
                names += (DENSE,)
            entries.append((Case("step", "base", length, num_hashes), names))
    return entries


def _enwik8() -> list[Entry]:
    return [
        (Case(workload, "enwik8", length, 2), (OURS, OURS_IN_TREE, IN_TREE))
        for length in (4096, 16384)
        for workload in ("forward", "step")
    ]


def _attention() -> list[Entry]:
    names = (OURS, OURS_IN_TREE, IN_TREE, "reformer-pytorch")
    return [
        (Case(workload, "base", length, num_hashes), names)
        for length in (4096, 16384)
        for num_hashes in ROUNDS
        for workload in ("attention", "attention-step")
    ]


def _memory() -> list[Entry]:
    """Peaks of one step: six layers, four times as many, a feed-forward sixteen times as wide."""
    return [(Case("step", name, 16384, 4), (OURS,)) for name in ("base", "deep", "wide")]


def _million() -> list[Entry]:
    return [(Case("training", "million", 1 << 20, 1), (OURS_WIDE,))]


def _generation() -> list[Entry]:
    entries: list[Entry] = []
    for length in (1024, 4096, 16384, 65536):
        rivals = (IN_TREE, DENSE) if length <= 16384 else ()
        entries.append((Case("tokens", "decoder", length, 4), (OURS, *rivals, OURS_WIDE, COMPILED)))
    return entries + [(Case(workload, "decoder", 65536, 4), (OURS, OURS_WIDE)) for workload in ("last", "prefill")]


def _quick() -> list[Entry]:
    reformers = (OURS, OURS_WIDE, OURS_IN_TREE, IN_TREE, "reformer-pytorch")
    return [
        (Case("step", "quick", 256, 2), (*reformers, DENSE, "floor")),
        (Case("step", "quick", 512, 2), (OURS, DENSE)),
        (Case("forward", "quick", 256, 2), (*reformers, DENSE)),
        (Case("attention", "quick", 256, 2), reformers),
        (Case("attention-step", "quick", 256, 2), reformers),
        (Case("tokens", "quick", 256, 2), (OURS, OURS_WIDE, OURS_IN_TREE, IN_TREE, DENSE)),
        (Case("prefill", "quick", 256, 2), (OURS, OURS_WIDE, OURS_IN_TREE)),
        (Case("last", "quick", 256, 2), (OURS, OURS_WIDE, OURS_IN_TREE)),
    ]


SUITES = {
    "required": _required(),
    "lengths": _lengths(),
    "attention": _attention(),
    "enwik8": _enwik8(),
    "memory": _memory(),
    "million": _million(),
    "generation": _generation(),
    "quick": _quick(),
}
