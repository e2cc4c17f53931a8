"""Toy tasks of every kind with models of random weights; also a child of test_predictions.py, which
predicts on meshes, in several processes, and until it is killed."""
import itertools
import json
import os
import pathlib
import random
import signal
import sys

import flax.linen as nn
import jax

from lm.data import examples
from lm.data.vocabularies import VocabularyConfig
from lm.evaluation import predictions, task_report
from lm.evaluation.predictions import store
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import ClassifierConfig, DualEncoderConfig, EmbedderConfig, SpanConfig
from lm.models.heads import TaggerConfig
from lm.models.t5 import T5Config
from lm.parallel import distributed
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.state import abstract_params

LENGTH, ROWS = 64, 4
SMALL = dict(vocab_size=264, max_length=LENGTH, d_model=16, num_layers=2, num_heads=2, d_ff=24,
             dtype='float32')
BERT = BERTConfig(**SMALL, masked_lm=False, sentence_classes=0, init_std=0.3)
GPT = GPTConfig(**SMALL, init_std=0.3)
T5 = T5Config(**SMALL)
LABELS, TAGS = ('music', 'sun', 'time'), ('B-x', 'I-x', 'O')
NAMED = examples.Template('{a} is', ' {label}')
WRITES = examples.Template('{source}', '{targets}')
# name: kind, form, what else a task has, and the model.
TASKS = {
    'intents': (examples.Classification(LABELS), 'encoder', {}, ClassifierConfig(BERT, 3)),
    'whole': (examples.Classification(LABELS), 'encoder', {'packed': False},
              ClassifierConfig(BERT, 3)),
    'scores': (examples.Similarity(1.0, 3.0), 'encoder', {}, ClassifierConfig(BERT, 1)),
    'tags': (examples.Tagging(TAGS), 'encoder', {}, TaggerConfig(BERT, 3)),
    'picked': (examples.MultipleChoice(), 'encoder', {}, ClassifierConfig(BERT, 2)),
    'answered': (examples.SpanExtraction(stride=8), 'encoder', {}, SpanConfig(BERT)),
    'alike': (examples.Similarity(), 'embedder', {}, EmbedderConfig(BERT)),
    'found': (examples.Retrieval(), 'embedder', {},
              DualEncoderConfig(EmbedderConfig(BERT), EmbedderConfig(BERT, 'cls'))),
    'named': (examples.Classification(LABELS), 'decoder', {'template': NAMED}, GPT),
    'named_by_t5': (examples.Classification(LABELS), 'text_to_text', {'template': NAMED}, T5),
    'spelt': (examples.Classification(LABELS), 'decoder',
              {'template': NAMED, 'scored': False, 'target_length': 8}, GPT),
    'written': (examples.Generation(), 'decoder', {'template': WRITES, 'target_length': 8}, GPT),
    'written_by_t5': (examples.Generation(), 'text_to_text',
                      {'template': WRITES, 'target_length': 8}, T5),
    'chosen': (examples.MultipleChoice(), 'decoder',
               {'template': examples.Template('{context}', '{continuation}')}, GPT),
    'read': (examples.LanguageModelling(), 'decoder',
             {'template': examples.Template('', '{text}')}, GPT)}


UNTUNED = 'chosen', 'read'  # asked as lm-evaluation-harness asks


def records(kind: str, count: int) -> list[dict]:
  """Examples of words of letters, the same each time; some are longer than a row."""
  rng = random.Random(kind)
  word = lambda: ''.join(rng.choices('abcdefg', k=rng.randint(1, 7)))
  text = lambda most=9: ' '.join(word() for _ in range(rng.randint(1, most)))
  made = []
  for i in range(count):
    words = text(40 if i % 5 == 0 else 9).split()
    made.append({
        'id': f'n{i}', 'a': text(), 'b': text(), 'label': rng.choice(LABELS),
        'score': rng.randint(1, 3), 'words': words, 'tags': [rng.choice(TAGS) for _ in words],
        'query': text(), 'documents': [text() for _ in range(1 + i % 2)], 'source': text(),
        'targets': [text()], 'contexts': [text(), text()], 'continuations': [f' {text(3)}' for _ in
                                                                             range(2)],
        'text': text(60), 'question': text(3), 'context': ' '.join(words),
        'answers': words[:1], 'starts': [0]})
    made[-1]['label'] = i % 2 if kind == 'multiple_choice' else made[-1]['label']
  return made


def prepared(name: str, folder: pathlib.Path, count: int = 24) -> examples.PreparedExamples:
  """A toy task of a validation split alone."""
  kind, form, more, _ = TASKS[name]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f'{name}.jsonl').write_text(
      ''.join(json.dumps(record) + '\n' for record in records(kind.name, count)))
  return examples.ExampleTask(
      source=examples.Files(validation=str(folder / f'{name}.jsonl')), kind=kind, form=form,
      vocabulary=VocabularyConfig(kind='byte'), cache_dir=str(folder / 'cache'), name=name,
      **more).prepare(progress=False)


def no_page(header, rows, path, scorer):
  """Takes the place of `task_report.write`, whose intervals are of 1,000 resamples."""
  del header, rows, scorer
  path.write_text('a page\n')


def model(name: str, run: pathlib.Path, mesh: MeshConfig | None = None,
          hosts: distributed.Hosts = distributed.Hosts()) -> predictions.Model:
  """Random weights, the same on every mesh."""
  config, rules = TASKS[name][-1], Rules() if mesh is None else Rules().on(mesh.build())
  init = lambda: nn.meta.unbox(
      config.build().init(jax.random.key(1), method='initialize')['params'])
  module, alone = config.build(rules), jax.jit(init)()
  params = alone
  if mesh is not None:
    where = jax.tree.map(lambda x: x.sharding, abstract_params(module, rules))
    params = jax.tree.map(lambda x, to: jax.make_array_from_callback(
        x.shape, to, lambda index: jax.device_get(x)[index]), alone, where)
  return predictions.Model(
      module, params, lambda: (config.build(), alone), 7, 'digest', LENGTH, ROWS, run,
      name not in UNTUNED, None, hosts)


def main(folder: str, run: str, names: str, mesh: str, kill_after: str, *address: str):
  """Predicts in a child: with `mesh` 'N' devices of all processes, killed after so many batches."""
  hosts = distributed.Hosts()
  if address:
    hosts = distributed.initialize(address[0], int(address[1]), int(address[2]))
  add, left = store.Part.add, itertools.count(int(kill_after) - 1, -1)

  def counted(self, answers):
    add(self, answers)
    if next(left) == 0:
      os.kill(os.getpid(), signal.SIGKILL)

  store.Part.add, task_report.write = counted, no_page
  over = MeshConfig(data=int(mesh) // 2, fsdp=2) if int(mesh) > 1 else None
  found = {}
  for name in names.split(','):
    task = hosts.main_first('data', lambda name=name: prepared(name, pathlib.Path(folder)))
    found[name] = predictions.evaluate(model(name, pathlib.Path(run), over, hosts=hosts), task,
                                       'validation', progress=False)
  hosts.shut_down()
  print(json.dumps(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
