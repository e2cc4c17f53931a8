"""Prompts in, text out; a model and its parameters are received, never made.

In: a module with `apply`, `config.init_cache` and `config.unstack`, its parameters, prompts, a
`SamplingConfig`, a seed. Out: a `Completion` for each prompt; `complete` does the same from text to
text.

Change `sampling.py` for how the next token is chosen (greedy, temperature, top-k, top-p),
`generate.py` for how prompts are batched, the cache is filled, and decoding stops.
"""
from lm.inference.generate import complete, Completion, generate
from lm.inference.sampling import sample, SamplingConfig

__all__ = ['complete', 'Completion', 'generate', 'sample', 'SamplingConfig']
