"""A run that begins with the parameters of another goes on as any does, however it is killed."""
import json

import guarded_runs as runs
import numpy as np
import pytest

from lm.interop import initial

LENGTH = {'NUM_STEPS': 6, 'CHECKPOINT_EVERY': 4, 'EVAL_EVERY': 6}


@pytest.fixture(scope='module')
def from_run(folder, tmp_path_factory):
  """The bindings of a run that goes on from one of 20 steps, its directory, and that run's."""
  source = tmp_path_factory.mktemp('source') / 'run'
  runs.train(folder, source, NUM_STEPS=20, CHECKPOINT_EVERY=20, EVAL_EVERY=20)
  bindings = LENGTH | {'run__Experiment__initial': '@initial.Weights()',
                       'initial__Weights__run_dir': repr(str(source)), 'LEARNING_RATE': 0.001}
  directory = tmp_path_factory.mktemp('continued') / 'run'
  runs.train(folder, directory, **bindings)
  return bindings, directory, source


@pytest.mark.supports('fine-tuning', 'continued pretraining')
def test_a_gpt_goes_on_where_another_run_ended(from_run):
  _, directory, source = from_run
  before, after = (runs.rows(place)[i]['loss'] for place, i in ((source, -1), (directory, 0)))
  assert after < before + 0.2 < runs.rows(source)[0]['loss'] - 1
  told = json.loads((directory / initial.FILE).read_text())
  assert told['step'] == 20 and {row['state'] for row in told['parameters']} == {'restored'}


def test_a_kill_before_the_first_checkpoint_changes_no_bit(from_run, folder, tmp_path, capfd):
  bindings, whole, _ = from_run
  with runs.killed():
    runs.train(folder, tmp_path / 'run', kill_at=(2, 1), **bindings)
  assert not (tmp_path / 'run' / 'checkpoints' / '00000004').exists()
  said = capfd.readouterr().err
  assert 'starts from step 20' in said and 'blocks/layers/*' in said
  runs.train(folder, tmp_path / 'run', **bindings)
  ours, theirs = runs.arrays_of(tmp_path / 'run', 6), runs.arrays_of(whole, 6)
  assert ours.keys() == theirs.keys()
  for name, x in ours.items():
    np.testing.assert_array_equal(x, theirs[name], err_msg=name)
  assert [row['loss'] for row in runs.rows(tmp_path / 'run')] == [
      row['loss'] for row in runs.rows(whole)]
  runs.train(folder, tmp_path / 'run', **bindings | {'initial__Weights__run_dir': "'gone'"})
  said = capfd.readouterr().err
  assert 'step 20 of gone' in said and 'no longer there; it goes on from its own' in said
