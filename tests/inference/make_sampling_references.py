"""Writes reference_sampling.json: scores after the filters of transformers.

    python tests/inference/make_sampling_references.py      # needs the extra `parity`
"""
import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name('reference_sampling.json')
V, EOS = 32, 1

# What `SamplingConfig` is asked, each: temperature 1 where nothing is said.
CASES = [
    {'temperature': 0.7}, {'top_k': 5}, {'top_k': 500}, {'top_p': 0.6}, {'top_p': 0.99},
    {'min_p': 0.1}, {'typical_p': 0.3}, {'typical_p': 0.9}, {'eta_cutoff': 0.05},
    {'eta_cutoff': 0.6}, {'repetition_penalty': 1.7}, {'repetition_penalty': 0.6},
    {'no_repeat_ngram_size': 1}, {'no_repeat_ngram_size': 2}, {'no_repeat_ngram_size': 3},
    {'no_repeat_ngram_size': 30}, {'logit_bias': [[3, 2.5], [8, -4.0]]},
    {'bad_words': [[3], [8, 4], [2, 8, 4, 9], [2, 8, 2]]}, {'min_new_tokens': 3},
    {'repetition_penalty': 1.3, 'no_repeat_ngram_size': 2, 'min_new_tokens': 3, 'bad_words': [[7]],
     'logit_bias': [[5, 3.0]], 'temperature': 1.6, 'top_k': 14, 'top_p': 0.9, 'min_p': 0.05,
     'typical_p': 0.8, 'eta_cutoff': 0.1}]


def inputs():
  """Logits [3, V] that no filter cuts between, and a text for each: the first 10 are the prompt."""
  rng = np.random.default_rng(0)
  logits = np.stack([rng.permutation(V) / V * spread for spread in (1.0, 6.0, 12.0)]) - 3
  texts = [[4, 6, 4, 6, 4, 6, 4, 9, 4, 6, 4, 6], [5] * 12, [2, 8, 4, 2, 8, 2, 9, 9, 1, 7, 2, 8]]
  return logits.astype(np.float32), np.array(texts)


def transformed(case):
  """Scores [3, V] after transformers' processors, in the order in which its `generate` has them."""
  import torch
  from transformers.generation import logits_process as hf
  case = {'temperature': 1.0, **case}
  logits, texts = inputs()
  bias = [[[token], bias] for token, bias in case.get('logit_bias', [])]
  makers = {
      'logit_bias': lambda _: hf.SequenceBiasLogitsProcessor(bias),
      'repetition_penalty': hf.RepetitionPenaltyLogitsProcessor,
      'no_repeat_ngram_size': hf.NoRepeatNGramLogitsProcessor,
      'bad_words': hf.NoBadWordsLogitsProcessor,
      'min_new_tokens': lambda n: hf.MinNewTokensLengthLogitsProcessor(10, n, EOS),
      'temperature': hf.TemperatureLogitsWarper, 'top_k': hf.TopKLogitsWarper,
      'top_p': hf.TopPLogitsWarper, 'min_p': hf.MinPLogitsWarper,
      'typical_p': hf.TypicalLogitsWarper,
      'eta_cutoff': lambda epsilon: hf.EtaLogitsWarper(epsilon, device='cpu')}
  scores = torch.tensor(logits)
  for name, make in makers.items():
    if name in case:
      scores = make(case[name])(torch.tensor(texts), scores)
  return scores.numpy()


if __name__ == '__main__':
  rows = [[[None if np.isinf(x) else round(float(x), 5) for x in row] for row in transformed(case)]
          for case in CASES]
  FILE.write_text(json.dumps(rows, separators=(',', ':')) + '\n')
