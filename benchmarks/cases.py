# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Model shapes, cases, and suites of cases."""

from dataclasses import asdict, dataclass

WORKLOADS = {
    "attention": "one LSH attention module, including hashing and sorting: forward",
    "attention-step": "the same, forward and backward",
    "forward": "the whole model in evaluation mode, without gradients: forward to the logits",
    "step": "the whole model in training mode: forward, loss, backward; no optimizer",
    "training": "a training step on text: forward, loss, backward, AdamW",
    "prefill": "the forward pass to the logits of the last token, filling a KV cache",
    "last": "the forward pass to the logits of the last token, without a KV cache",
    "tokens": "decoding of 128 tokens, one at a time, after a context of the case's length",
}


@dataclass(frozen=True)
class Shape:
    """
    Sizes of a model. `layers` gives the attention type of each layer.

    With `decoder_layers`, it is an encoder-decoder: the length of a case is that of the source, `target_length` that
    of the target, and `layers` are those of the encoder.
    """

    name: str
    layers: tuple[str, ...]
    width: int
    num_heads: int
    head_size: int
    feed_forward: int
    lsh_chunk: int
    local_chunk: int
    vocab_size: int = 260
    # Positions that reformer_hf processes at a time; 0 for its default.
    feed_forward_chunk: int = 0
    head_chunk: int = 0
    decoder_layers: tuple[str, ...] = ()
    target_length: int = 0

    @property
    def check_length(self) -> int:
        """A short length with several chunks of each type, a multiple of all chunk lengths."""
        return 4 * max(self.lsh_chunk, self.local_chunk)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("base", ("lsh",) * 6, 256, 4, 64, 1024, 64, 64),
        # The enwik8 model of trax, 4 of its layers.
        Shape("enwik8", ("local", "local", "lsh", "local"), 768, 8, 96, 2048, 256, 128),
        # For memory: more layers, a wider feed-forward, and a very long sequence.
        Shape("deep", ("lsh",) * 24, 256, 4, 64, 1024, 64, 64),
        Shape("wide", ("lsh",) * 6, 256, 4, 64, 16 * 1024, 64, 64, feed_forward_chunk=64),
        Shape("million", ("local", "lsh") * 6, 256, 4, 64, 512, 64, 64, head_chunk=4096),
        # For generation: the layers and sizes of the default config.
        Shape("decoder", ("local", "lsh") * 3, 256, 4, 64, 512, 64, 64),
        Shape("decoder-ff1024", ("local", "lsh") * 3, 256, 4, 64, 1024, 64, 64),
        # An encoder-decoder, with the layers and sizes of the default config in both stacks.
        Shape(
            "seq2seq",
            ("local", "lsh") * 3,
            256,
            4,
            64,
            512,
            64,
            64,
            decoder_layers=("local", "lsh") * 3,
            target_length=256,
        ),
        Shape("quick", ("lsh",) * 2, 32, 2, 16, 64, 16, 16),
        Shape("quick-seq2seq", ("lsh",) * 2, 32, 2, 16, 64, 16, 16, decoder_layers=("lsh",), target_length=32),
    )
}


@dataclass(frozen=True)
class Case:
    """One workload at one size, with batch size 1, fp32 and no dropout."""

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


# A case and the names of the implementations to compare.
Entry = tuple[Case, tuple[str, ...]]

OURS, OURS_WIDE, OURS_IN_TREE = "reformer_hf", "reformer_hf-wide", "reformer_hf-in-tree"
IN_TREE, DENSE, COMPILED, LOWER_BOUND = "transformers", "dense", "reformer_hf-compiled", "lower-bound"
T5 = "t5"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROUNDS = (1, 2, 4, 8)

# Largest length times rounds of the in-tree model, whose memory grows with both.
_IN_TREE_LIMIT = 65536


def _required() -> list[Entry]:
    """Cases of the performance targets."""
    reformers = (OURS, OURS_IN_TREE, IN_TREE)
    entries = [
        (Case("step", "base", 16384, 4), (*reformers, OURS_WIDE, "reformer-pytorch", LOWER_BOUND)),
        (Case("step", "base", 4096, 8), reformers),
        (Case("step", "base", 16384, 1), reformers),
        (Case("forward", "base", 16384, 4), reformers),
        (Case("forward", "base", 16384, 1), reformers),
        (Case("attention", "base", 16384, 4), (*reformers, "reformer-pytorch")),
    ]
    dense = [Case("step", "base", length, 2) for length in (1024, 2048, 4096, 16384, 65536)]
    return entries + [(case, (OURS, OURS_WIDE, DENSE)) for case in dense]


def _lengths() -> list[Entry]:
    """Time of a training step against length, as in figure 5 of the paper."""
    entries = []
    for length in LENGTHS:
        for num_hashes in ROUNDS:
            names: tuple[str, ...] = (OURS,)
            if length * num_hashes <= _IN_TREE_LIMIT:
                names += (IN_TREE,)
            # The dense model has no hash rounds, so it is measured once per length.
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
    """Peak memory of a step with 6 layers, with 24, and with a feed-forward 16 times as wide."""
    return [(Case("step", name, 16384, 4), (OURS,)) for name in ("base", "deep", "wide")]


def _million() -> list[Entry]:
    return [(Case("training", "million", 1 << 20, 1), (OURS_WIDE,))]


def _generation() -> list[Entry]:
    entries: list[Entry] = []
    for length in (1024, 4096, 16384, 65536):
        baselines = (IN_TREE, DENSE) if length <= 16384 else ()
        names = (OURS, *baselines, OURS_WIDE, COMPILED, LOWER_BOUND)
        entries.append((Case("tokens", "decoder", length, 4), names))
    for length in (4096, 16384):
        names = (OURS, IN_TREE, COMPILED, LOWER_BOUND)
        entries.append((Case("tokens", "decoder-ff1024", length, 4), names))
    return entries + [(Case(workload, "decoder", 65536, 4), (OURS, OURS_WIDE)) for workload in ("last", "prefill")]


def _seq2seq() -> list[Entry]:
    """Cases of the performance targets of the encoder-decoder."""
    # T5 keeps biases of all pairs of positions: longer cases may not fit into memory.
    return [(Case("step", "seq2seq", length, 1), (OURS, OURS_WIDE, T5)) for length in (1024, 2048, 4096, 8192, 16384)]


def _quick() -> list[Entry]:
    reformers = (OURS, OURS_WIDE, OURS_IN_TREE, IN_TREE, "reformer-pytorch")
    return [
        (Case("step", "quick", 256, 2), (*reformers, DENSE, LOWER_BOUND)),
        (Case("step", "quick", 512, 2), (OURS, DENSE)),
        (Case("step", "quick-seq2seq", 256, 2), (OURS, OURS_WIDE, T5)),
        (Case("forward", "quick", 256, 2), (*reformers, DENSE)),
        (Case("attention", "quick", 256, 2), reformers),
        (Case("attention-step", "quick", 256, 2), reformers),
        (Case("tokens", "quick", 256, 2), (OURS, OURS_WIDE, OURS_IN_TREE, IN_TREE, DENSE, LOWER_BOUND)),
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
    "seq2seq": _seq2seq(),
    "quick": _quick(),
}
