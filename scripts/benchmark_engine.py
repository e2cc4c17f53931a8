"""How much faster requests of mixed lengths are answered when they come and go at every step.

    python scripts/benchmark_engine.py --requests=128 --rounds=3

Two traces, on a GPT of 6 layers and 512 dimensions (vocabulary 32,000, bfloat16), greedy:
- continuous batching: prompts of 16 to 64 tokens, answers of lognormal lengths. Static batches take
  as many requests in their order of arrival, and end with their longest answer, as `generate` does;
  the engine puts the next request into the place of one that ended.
- the prefix cache: prompts that share their first tokens, and prompts that share nothing.

The two of a pair take turns; figures are medians of their rounds.
"""
import argparse
import json
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.inference import generate, SamplingConfig
from lm.inference.engine import Engine, EngineConfig, Request
from lm.models.gpt import GPTConfig

MODEL = GPTConfig(vocab_size=32000, max_length=512, d_model=512, num_layers=6, num_heads=8,
                  d_ff=2048)


def params_of(model):
  """Random parameters, from numpy: faster than compiling the initialiser."""
  init = lambda: model.build().init(jax.random.key(0), method='initialize')['params']
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.02, x.dtype)
  return jax.tree.map(fill, nn.meta.unbox(jax.eval_shape(init)))


def trace(count, mean_log, sigma, most, rng):
  """(prompt, tokens of its answer) of each request."""
  lengths = np.exp(rng.normal(mean_log, sigma, count)).round().clip(1, most).astype(int)
  return [(rng.integers(3, MODEL.vocab_size, rng.integers(16, 65)), int(n)) for n in lengths]


def greedy(num_tokens):
  """Takes so many tokens."""
  return SamplingConfig(temperature=0, max_new_tokens=num_tokens)


def static(params, requests, rows):
  """Answers in batches of `rows`; each ends with its longest answer. Returns the answers."""
  answers = []
  for first in range(0, len(requests), rows):
    batch = requests[first:first + rows]
    longest = max(count for _, count in batch)
    done = generate(MODEL.build(), params, [prompt for prompt, _ in batch], greedy(longest), 0,
                    MODEL.max_length, -1)
    answers += [one.tokens[:count] for one, (_, count) in zip(done, batch)]
  return answers


def continuous(engine, requests):
  """Answers by the engine."""
  tickets = [engine.submit(Request(prompt, greedy(count))) for prompt, count in requests]
  engine.run()
  return [ticket.result(0).tokens for ticket in tickets]


def timed(function, *args):
  """What it returns, and seconds of the wall and of all processors."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = function(*args)
  return result, time.perf_counter() - wall, time.process_time() - cpu


def batching(params, count, rows, rounds, sigma):
  """Compares both ways on one trace; returns figures."""
  requests = trace(count, np.log(24), sigma, 448, np.random.default_rng(0))
  engine = Engine(MODEL.build(), params, EngineConfig(num_rows=rows, steps=32), MODEL.max_length)
  continuous(engine, requests)  # compiles
  engine.pool.forget()
  wanted = static(params, requests, rows)
  compiles = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda name, *_, **__: compiles.append(name) if 'backend_compile' in name else None)
  times = {'static': [], 'continuous': []}
  for _ in range(rounds):
    answers, *spent = timed(continuous, engine, requests)
    engine.pool.forget()
    times['continuous'].append(spent)
    times['static'].append(timed(static, params, requests, rows)[1:])
  same = sum(np.array_equal(*pair) for pair in zip(answers, wanted))
  tokens = sum(length for _, length in requests)
  median = lambda name, i: statistics.median(spent[i] for spent in times[name])
  return {'requests': count, 'rows': rows, 'tokens': tokens,
          'longest': max(length for _, length in requests),
          'compiled_after_warm_up': len(compiles), 'same_answers': same,
          **{f'{name}_tokens_per_second': tokens / median(name, 0) for name in times},
          'ratio_wall': median('static', 0) / median('continuous', 0),
          'ratio_cpu': median('static', 1) / median('continuous', 1),
          'counts': vars(engine.counts)}


def prefixes(params, count, length, rounds):
  """Compares prompts that share `length` tokens with prompts that share none."""
  rng = np.random.default_rng(1)
  draw = lambda size: rng.integers(3, MODEL.vocab_size, size)
  config = EngineConfig(cache_tokens=32768, steps=16)
  engine = Engine(MODEL.build(), params, config, MODEL.max_length)
  times = {'shared': [], 'own': []}
  for _ in range(rounds + 1):  # the first compiles
    shared = draw(length)
    for name in times:
      requests = [(np.concatenate([shared if name == 'shared' else draw(length), draw(16)]), 16)
                  for _ in range(count)]
      engine.pool.forget()
      times[name].append(timed(continuous, engine, requests)[1])
  median = lambda name: statistics.median(times[name][1:])
  return {'requests': count, 'shared_tokens': length, 'seconds_shared': median('shared'),
          'seconds_own': median('own'), 'ratio': median('own') / median('shared')}


def main():
  """Measures, and prints a line of JSON for each trace."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--requests', type=int, default=128)
  parser.add_argument('--rows', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--sigma', type=float, default=1.25, help='of the logarithm of lengths')
  args = parser.parse_args()
  params = params_of(MODEL)
  print(json.dumps(prefixes(params, 32, 256, args.rounds)), flush=True)
  print(json.dumps(batching(params, args.requests, args.rows, args.rounds, args.sigma)))


if __name__ == '__main__':
  main()
