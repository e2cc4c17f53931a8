"""Writes reference_beams.json and reference_guidance.json: what `transformers` finds by beam
search, and by classifier-free guidance (needs the extra `parity`).

    python tests/inference/make_beam_references.py DIRECTORY_OF_STORIES260K

The models are stories260K, of a directory that `lm convert --to` made of the run that it made of
stories260K.bin, and the tiny random T5 of tests/data/make_references.py whose weights stand in
tests/data/reference_t5_gated.npz. A case is a model, settings of `generate`, a batch of padded
prompts, and for each prompt [[tokens, score], ...].
"""
import importlib.util
import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
LENGTHS = 5, 1, 12, 9  # of the prompts of each case

SETTINGS = [
    dict(num_beams=4),
    dict(num_beams=4, length_penalty=0.0, early_stopping='never'),
    dict(num_beams=4, length_penalty=2.0, early_stopping='never'),
    dict(num_beams=4, length_penalty=-1.0, early_stopping='never'),
    dict(num_beams=4, length_penalty=0.6, early_stopping=True),
    dict(num_beams=4, length_penalty=2.5, early_stopping=True, min_new_tokens=3),
    dict(num_beams=4, length_penalty=-1.5, min_new_tokens=4),
    dict(num_beams=4, length_penalty=1.5, no_repeat_ngram_size=2),
    dict(num_beams=4, length_penalty=-0.7, early_stopping='never', no_repeat_ngram_size=2),
]
MORE_SETTINGS = [  # of stories260K alone: each is a program of its own
    dict(num_beams=7, length_penalty=0.8),
    dict(num_beams=5, length_penalty=0.3, early_stopping=True, no_repeat_ngram_size=1),
]
MAX_NEW_TOKENS = 12
ENDS = 426, 432  # '.' and ','
T5_ENDS = 9, 14, 31, 20

def module_of(path):
  """A script as a module."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def prompts(seed, vocab_size):
  """Of LENGTHS."""
  rng = np.random.default_rng(seed)
  return [rng.integers(3, vocab_size, length).tolist() for length in LENGTHS]


def beams(model, prompts_, eos, settings):
  """For each prompt [[tokens, score], ...]."""
  import torch
  encodes = model.config.is_encoder_decoder
  longest = max(map(len, prompts_))
  pad = lambda row, x: row + [x] * (longest - len(row)) if encodes else (
      [x] * (longest - len(row)) + row)
  found = model.generate(
      input_ids=torch.tensor([pad(row, 0) for row in prompts_]),
      attention_mask=torch.tensor([pad([1] * len(row), 0) for row in prompts_]),
      max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos, pad_token_id=0, do_sample=False,
      decoder_start_token_id=0, use_cache=not encodes,  # which fails with more layers there
      num_return_sequences=settings['num_beams'], return_dict_in_generate=True, output_scores=True,
      **settings)
  rows = found.sequences[:, 1 if encodes else longest:].tolist()
  until = lambda row: row[:row.index(eos) + 1] if eos in row else row
  every = [[until(row), round(float(score), 6)]
           for row, score in zip(rows, found.sequences_scores)]
  size = settings['num_beams']
  return [every[i:i + size] for i in range(0, len(every), size)]


def guided(model, scale, negative, seed):
  """A case of guidance: greedy tokens behind each prompt, alone."""
  import torch
  cases = []
  for prompt in prompts(seed, model.config.vocab_size):
    found = model.generate(
        input_ids=torch.tensor([prompt]), guidance_scale=scale, max_new_tokens=MAX_NEW_TOKENS,
        negative_prompt_ids=None if negative is None else torch.tensor([negative]),
        eos_token_id=ENDS[0], pad_token_id=0, do_sample=False)
    cases.append([prompt, found[0, len(prompt):].tolist()])
  return {'scale': scale, 'negative': negative, 'eos': ENDS[0], 'completions': cases}


def main(stories260k):
  import torch
  import transformers
  t5 = module_of(HERE.parent / 'data' / 'make_references.py').tiny_model('t5_gated')
  llama = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
  cases = []
  for name, model, ends, every in (('stories260K', llama, ENDS, SETTINGS + MORE_SETTINGS),
                                   ('t5_gated', t5, T5_ENDS, SETTINGS)):
    for number, settings in enumerate(every):
      given = prompts(number, model.config.vocab_size)
      eos = ends[number % len(ends)]
      # A T5 reads the end of the text behind its input.
      read = [row + [eos] for row in given] if '5' in name else given
      cases.append({'model': name, 'settings': settings, 'eos': eos, 'prompts': given,
                    'beams': beams(model, read, eos, settings)})
  text = json.dumps(cases, separators=(',', ':')).replace('{"model"', '\n{"model"')
  (HERE / 'reference_beams.json').write_text(text + '\n')
  cases = [guided(llama, *case) for case in (
      (3.0, None, 1), (2.0, [403, 407, 261, 378, 432], 3))]
  (HERE / 'reference_guidance.json').write_text(json.dumps(cases) + '\n')


if __name__ == '__main__':
  main(sys.argv[1])
