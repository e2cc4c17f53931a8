"""Prompts in, text out; a model and its parameters are received, never made.

In: a module with `apply`, `config.init_cache` and `config.unstack`, its parameters, prompts, a
`SamplingConfig`, a seed. Out: a `Completion` for each prompt; `complete` does the same from text to
text.

Change `sampling.py` for what a request may ask and how the next token is chosen, `penalties.py` for
what the text so far does to the scores of its next token (repetition, bad words), `filters.py` for
which tokens may be drawn (top-k, top-p, typical, mirostat), `stops.py` for stop strings and for
text that is streamed, `constrain.py` for rules that a completion follows (regular expression,
choice, JSON schema, grammar), `scores.py` for log-probabilities of a text's tokens, `best_of.py`
for the best of several samples, `decoder.py` for what all of these need of a
model and how its weights lie, `prompts.py` for how prompts are batched, `generate.py` for how the
cache is filled and decoding stops; `speculative.py` for who drafts tokens that one pass checks
(prompt lookup, early exit, another model), `infill.py` for what stands in a gap. `methods.py` says
which of all these `lm generate --decoding` takes, `runs.py` those that need models of other runs.

Other searches than the next token's choice: `beam.py` is beam search, its loop over a model and its
results, `beam_step.py` one step of it over scores alone, `forced_words.py` which beams stay where
words must be written, `contrastive.py` contrastive search.
`guidance.py` makes one decoder of several models or prompts (contrastive decoding, classifier-free
guidance, DExperts).

Requests that come and go: `requests.py` is one of them, `engine.py` the loop that decodes all that
are there, `scheduler.py` says which are worked on and which wait, `pages.py` who holds which page
of the cache, which beginnings of texts stand in them and which the host keeps, `paged.py` has the
programs of the device, `texts.py` makes requests of texts and texts of answers. Of models without
pages `rows.py` decodes many texts at once: `model_rows.py` those of T5 and Transformer-XL,
`lm.export` those of its artefacts.
"""
from lm.inference.generate import Completion, generate
from lm.inference.sampling import SamplingConfig
from lm.inference.texts import complete

__all__ = ['complete', 'Completion', 'generate', 'SamplingConfig']
