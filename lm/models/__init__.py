"""Batches in, logits out: one file a family, built from `lm/layers/`.

A family is a frozen config dataclass (bound by `gin/models/`) and a Flax module whose `init` gives
a plain tree of parameters and whose `apply` is pure. Copy a file to fork a model; share only
layers.
"""
