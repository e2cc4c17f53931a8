"""Every family learns by its own gin experiment, and goes on from a checkpoint bit for bit."""
import json
import math
import pathlib
import shutil
import sys

import numpy as np
import pytest

from lm import config, run
from lm.training import checkpoint, monitor

BATCH_SIZE, STEPS_AGAIN = 16, 20
MODULES = '''abc bz2 cmd code codeop colorsys copy copyreg fileinput fnmatch genericpath getopt
  getpass glob graphlib hashlib hmac io linecache lzma netrc numbers opcode operator
  py_compile pyclbr queue quopri reprlib rlcompleter runpy sched shelve shlex stat
  string symtable tabnanny timeit types'''.split()

# Experiment: the model's config, steps, nats that the held-out loss is below that of who knows
# nothing but how often each target occurs, the metric and what it exceeds, and its name in the
# report. A quarter of the bytes are blanks; a random document is right once in BATCH_SIZE.
FAMILIES = {
    'masked_lm': ('bert.BERTConfig', 150, 0.2, 'accuracy', 0.28, 'held-out accuracy'),
    'span_corruption': ('t5.T5Config', 80, 0.5, 'span_exact_match', 0.05,
                        'held-out span exact match'),
    'transformer_xl': ('transformer_xl.TransformerXLConfig', 100, 0.3, 'accuracy', 0.28,
                       'held-out bits per byte'),
    'contrastive': ('bert.BERTConfig', 80, 0.4, 'retrieval_at_1', 4 / BATCH_SIZE,
                    'held-out retrieval at 1'),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the runs lie, beside some small modules of the standard library."""
  folder = tmp_path_factory.mktemp('families')
  (folder / 'texts').mkdir()
  library = pathlib.Path(json.__file__).parents[1]
  for module in MODULES:
    shutil.copy(library / f'{module}.py', folder / 'texts')
  for name in FAMILIES:
    tiny(name, folder).task.prepare()  # most have the same cache
  return folder


@pytest.mark.supports('models', 'BERT, T5, Transformer-XL and a dual encoder learn and resume')
@pytest.mark.parametrize('name', FAMILIES)
def test_a_family_learns_and_resumes(child_with_devices, folder, name):
  _, steps, margin, metric, chance, shown = FAMILIES[name]
  result = child_with_devices(__file__, name, folder, devices=1)
  assert result['loss'] < result['entropy'] - margin, result
  assert result['rows'][-1][metric] > chance, result['rows'][-1]
  report = (folder / name / 'report.html').read_text()
  assert shown in report and ('nats per query' in report) == (name == 'contrastive')
  again = [row['step'] for row in result['rows_again'] if row['step'] > steps - STEPS_AGAIN]
  assert again == [*range(steps - STEPS_AGAIN + 1, steps + 1), steps]
  assert result['rows_again'] == result['rows']


def tiny(name, folder):
  """An experiment of gin/experiments with a model of one layer, which reads bytes."""
  model, steps = FAMILIES[name][:2]
  bindings = {'FILES': repr(f'{folder}/texts/*.py'), 'CACHE_DIR': repr(f'{folder}/cache'),
              'vocabularies.VocabularyConfig.kind': "'byte'", 'EXTRA_IDS': 100, 'VOCAB_SIZE': 359,
              'tasks.TextTask.held_out_fraction': 0.2, f'{model}.d_model': 32,
              f'{model}.num_layers': 1, f'{model}.num_heads': 2, f'{model}.d_ff': 64,
              f'{model}.dtype': "'float32'", f'{model}.scan_layers': False,
              'SEQUENCE_LENGTH': 64, 'BATCH_SIZE': BATCH_SIZE, 'NUM_STEPS': steps,
              'WARMUP_STEPS': 10, 'LEARNING_RATE': 0.02, 'CHECKPOINT_EVERY': steps - STEPS_AGAIN,
              'EVAL_EVERY': steps, 'loop.TrainConfig.eval_batches': 4}
  config.parse([f'gin/experiments/{name}.gin'], [(key, str(x)) for key, x in bindings.items()])
  return config.build(run.Experiment)


def entropy(experiment):
  """Of the held-out bytes, in nats; of which of a batch's documents it is, for a dual encoder."""
  if experiment.loss.whole_batch:
    return math.log(BATCH_SIZE)
  documents = experiment.task.prepare().cache('validation')
  counts = np.bincount(np.concatenate([document['tokens'] for document in documents]))
  share = counts[counts > 0] / counts.sum()
  return float(-(share * np.log(share)).sum())


def rows(run_dir):
  """What a run wrote of its steps, without what it measured by the clock."""
  kept = 'step', 'split', 'loss', 'grad_norm', *{family[3] for family in FAMILIES.values()}
  return [{key: row[key] for key in kept if key in row}
          for row in monitor.read_rows(run_dir / monitor.METRICS)
          if row['split'] in ('train', 'validation')]


def main():
  """Run in a child: trains, forgets the last checkpoint, and trains to the end once more."""
  name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
  experiment, run_dir = tiny(name, folder), folder / name
  run.train(experiment, run_dir)
  evaluation, first = json.loads((run_dir / 'evaluation.json').read_text()), rows(run_dir)
  _, last = checkpoint.list_steps(run_dir / 'checkpoints')
  shutil.rmtree(run_dir / 'checkpoints' / f'{last:08d}')
  run.fit(experiment, run_dir)
  print(json.dumps({
      'loss': evaluation['loss'], 'rows': first, 'rows_again': rows(run_dir),
      'entropy': evaluation.get('unigram_entropy') or entropy(experiment)}))


if __name__ == '__main__':
  main()
