"""Fine-tuning through gin/runs/finetune.gin: a head on a run's trunk, on tasks of labelled
examples."""
import dataclasses
import json
import math
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import config, run
from lm.commands import convert
from lm.corpus.document import Document
from lm.data import vocabularies
from lm.data.vocabularies import VocabularyConfig
from lm.data.vocabulary_training import train as train_vocabulary
from lm.errors import UserError
from lm.interop import initial, run_weights
from lm.models.bert import BERTConfig
from lm.training import checkpoint_io

BERT = BERTConfig(vocab_size=300, max_length=64, d_model=16, num_layers=3, num_heads=4, d_ff=24,
                  dtype='float32', scan_layers=True)
TEXTS = {'weather': 'will it rain today', 'music': 'play some jazz', 'book': 'rate this novel'}
TASK = """
include 'gin/tasks/parts/files.gin'
from __gin__ import dynamic_registration
from lm.data import examples
TRAIN_FILES = {train!r}
VALIDATION_FILES = {train!r}
examples.ExampleTask.name = 'intents'
examples.ExampleTask.kind = @examples.Classification()
text_to_text/examples.Template.inputs = '{{a}}'
decoder/examples.Template.inputs = '{{a}}'
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A task of three intents, and a run of random parameters with a vocabulary of its own."""
  folder = tmp_path_factory.mktemp('finetune')
  lines = [{'a': f'{text} {i}', 'label': label} for label, text in TEXTS.items()
           for i in range(6 if label == 'book' else 12)]
  (folder / 'train.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  (folder / 'task.gin').write_text(TASK.format(train=str(folder / 'train.jsonl')))
  source = folder / 'source'
  source.mkdir()
  documents = [Document(str(i), text) for i, text in enumerate(TEXTS.values())]
  train_vocabulary(VocabularyConfig('bpe', 275, extra_ids=2), documents, 60).save(
      source / 'vocabulary')
  convert._write_config(source, BERT, source / 'vocabulary', [])
  tree = nn.meta.unbox(jax.eval_shape(lambda: BERT.build().init(
      jax.random.key(0), method='initialize')))['params']
  rng = np.random.default_rng(0)
  run_weights.write_run_params(source, tree, [
      (path, [((), rng.normal(path.endswith('scale'), 0.2, x.shape).astype(np.float32))])
      for path, x in checkpoint_io.flatten(tree).items()])
  return folder


def experiment(folder, *more, **macros):
  """What the files, the command line's macros and other bindings say."""
  tiny = {'INITIAL': repr(str(folder / 'source')), 'CACHE_DIR': repr(str(folder / 'cache')),
          'SEQUENCE_LENGTH': 48, 'BATCH_SIZE': 2, 'NUM_EPOCHS': 2.0, 'EVAL_EVERY': 40,
          'loop.TrainConfig.watch_every': 0, 'LEARNING_RATE': 0.003}
  config.parse(['gin/runs/finetune.gin', str(folder / 'task.gin')],
               [(name, str(value)) for name, value in {**tiny, **macros}.items()] + list(more))
  return config.build(run.Experiment)


@pytest.mark.supports('fine-tuning', 'one gin file, any run, any task of examples')
def test_a_run_is_fine_tuned_and_needs_its_source_no_more(folder, tmp_path):
  moved = tmp_path / 'moved'
  shutil.copytree(folder / 'source', moved)
  directory = tmp_path / 'run'
  result = run.train(experiment(folder, INITIAL=repr(str(moved)), NUM_EPOCHS=4.0), directory)
  first = json.loads((directory / initial.FILE).read_text())
  states = {(row['group'], row['state']) for row in first['parameters']}
  assert {('trunk/blocks/layers/*', 'restored'), ('head/*', 'newly initialised'),
          ('masked_lm/*', 'dropped')} <= states
  again = experiment(folder).task.prepare(progress=False)
  rows = again.loader('train', 48, 2, 0).steps_per_epoch
  assert result['steps'] == math.ceil(4 * rows) and 4 <= rows < 15  # rows of two examples at least
  shutil.rmtree(moved)
  opened = run.open_experiment([], [], str(directory))
  assert opened.model.num_classes == 3 and opened.model.trunk.num_layers == 3
  assert pathlib.Path(opened.task.vocabulary.path) == directory / 'vocabulary'
  metrics, = run.evaluate(opened, str(directory)).values()
  assert metrics['accuracy'] == metrics['classes_accuracy'] > 0.6 and metrics['loss'] < 1.05


def test_layer_decay_reaches_the_right_leaves_under_a_head(folder):
  def first_update(layer_decay):
    made = experiment(folder, LAYER_DECAY=layer_decay, WEIGHT_DECAY=0.0)
    tree = jax.eval_shape(lambda: made.model.build().init(jax.random.key(0), method='initialize'))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), nn.meta.unbox(tree)['params'])
    optimizer = dataclasses.replace(made.optimizer, clip_norm=None).build(10)
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(lambda: optimizer.update(grads, optimizer.init(params), params)[0])
    return checkpoint_io.flatten(update())

  plain, decayed = first_update(1.0), first_update(0.5)
  for path, x in decayed.items():
    share = np.asarray(x / plain[path])
    want = 1.0 if path.startswith('head/') else 0.5**4
    if 'layers/' in path:
      want = np.array([0.5**3, 0.5**2, 0.5]).reshape(-1, *[1] * (x.ndim - 1))
    np.testing.assert_allclose(share, np.broadcast_to(want, x.shape), rtol=1e-5, err_msg=path)
  assert any('layers/' in path for path in plain) and 'head/dense/kernel' in plain


def test_the_head_has_as_many_classes_as_the_task_and_each_its_cost(folder):
  made = experiment(folder, CLASS_COSTS="'balanced'")
  prepared = made.task.prepare(progress=False)
  assert prepared.label_counts == [6, 12, 12]  # book, music, weather
  bound = run._of_data(made, prepared)
  assert bound.loss.class_costs == pytest.approx((30 / 18, 30 / 36, 30 / 36))
  assert bound.train.num_steps == math.ceil(
      2 * prepared.loader('train', 48, 2, 0).steps_per_epoch)
  other = experiment(folder, ('heads.ClassifierConfig.num_classes', '4'))
  with pytest.raises(UserError, match='the head has num_classes=4 and the task 3 labels'):
    run._of_data(other, prepared)


def test_the_vocabulary_is_that_of_the_run(folder):
  own = experiment(folder).task.prepare(progress=False).vocabulary
  assert own.digest == vocabularies.load(folder / 'source' / 'vocabulary').digest


@pytest.mark.parametrize('changes, message', [
    ({'INITIAL': "'nowhere'"}, "run_dir='nowhere' holds no config.gin, so it is no run"),
    ({'FORM': "'decoder'"}, "form='decoder' is not what a BERTConfig reads"),
    ({'POOLING': "'first'"}, "pooling"),
    ({'NUM_EPOCHS': 0.0}, 'num_epochs=0.0 must be above 0'),
    ({'WARMUP_SHARE': 2.0}, r'warmup_share=2.0 must be in \[0, 1\]'),
    ({'SEQUENCE_LENGTH': 65}, 'sequence_length=65 is longer than the context max_length=64')])
def test_what_cannot_be_is_refused_before_any_work(folder, changes, message):
  with pytest.raises(UserError, match=message):
    experiment(folder, **changes)
