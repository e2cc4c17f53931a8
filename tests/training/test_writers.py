"""Tables, W&B and MLflow get every row, and none of them can end a run."""
import csv
import inspect
import json
import math
import sys
import threading
import time
import types

import numpy as np
import pytest
from test_monitor import scalars_of

from lm.training import monitor, writers


def table(run_dir, split='train'):
  with open(run_dir / 'csv' / f'{split}.csv', newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


def write(run_dir, others, *rows, start_step=0, log=print):
  writer = monitor.MetricsWriter(run_dir, start_step, others, log)
  for step, split, row in rows:
    writer.write(step, split, row)
  writer.close()


def test_vectors_are_lists_in_a_row_and_curves_by_layer_and_matrices_stay_in_the_row(tmp_path):
  heads = np.array([[1 / 3, 2.0], [3.0, np.inf]], np.float32)
  write(tmp_path, (writers.CSV(),), (5, 'probe', {'entropy': heads[0], 'heads': heads, 'n': 3}))
  row = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert row == {'step': 5, 'split': 'probe', 'entropy': [0.33333334, 2.0], 'n': 3,
                 'heads': [[0.33333334, 2.0], [3.0, None]], 'non_finite': True}
  assert np.float32(row['entropy'][0]) == np.float32(1 / 3)
  assert set(scalars_of(tmp_path)) == {'probe/entropy/00', 'probe/entropy/01', 'probe/n'}
  assert table(tmp_path, 'probe') == [{'step': '5', 'entropy/00': '0.33333334',
                                       'entropy/01': '2.0', 'n': '3'}]


@pytest.mark.supports('watching', 'TensorBoard', 'JSONL', 'CSV')
def test_a_column_that_appears_later_is_empty_in_the_rows_before(tmp_path):
  write(tmp_path, (writers.CSV(),), (1, 'train', {'loss': 3.0}), (2, 'train', {'loss': 2.0}),
        (2, 'validation', {'loss': 9.0}), (3, 'train', {'loss': 1.0, 'mfu': 0.5}),
        (4, 'train', {'mfu': 0.25}))
  assert [list(row.values()) for row in table(tmp_path)] == [
      ['1', '3.0', ''], ['2', '2.0', ''], ['3', '1.0', '0.5'], ['4', '', '0.25']]
  assert list(table(tmp_path)[0]) == ['step', 'loss', 'mfu']
  assert table(tmp_path, 'validation') == [{'step': '2', 'loss': '9.0'}]


def test_a_table_goes_on_behind_the_step_of_a_restart_and_loses_a_torn_line(tmp_path):
  write(tmp_path, (writers.CSV(),), *((step, 'train', {'loss': 1.0 * step, 'mfu': 0.5})
                                      for step in (1, 2, 3)))
  with open(tmp_path / 'csv' / 'train.csv', 'a', encoding='utf-8') as file:
    file.write('2,4')
  write(tmp_path, (writers.CSV(),), (3, 'train', {'loss': 7.0, 'mfu': 0.5}), start_step=2)
  assert [(row['step'], row['loss']) for row in table(tmp_path)] == [
      ('1', '1.0'), ('2', '2.0'), ('3', '7.0')]
  write(tmp_path, (writers.CSV(),), (1, 'train', {'loss': 5.0}))
  assert table(tmp_path) == [{'step': '1', 'loss': '5.0'}]


class Broken:
  """Fails where it is told to."""

  def __init__(self, *where):
    self.where, self.seen = where, []

  def _do(self, what):
    self.seen.append(what)
    if what in self.where:
      raise ConnectionError('no\nroute')

  def open(self, run_dir, start_step):
    self._do('open')

  def write(self, step, split, row):
    self._do(step)

  def close(self):
    self._do('close')


@pytest.mark.supports('watching', 'a writer that fails ends no run')
@pytest.mark.parametrize('where, seen', [(('open',), ['open']),
                                         ((2, 3, 'close'), ['open', 1, 2, 3, 4, 'close'])])
def test_a_writer_that_fails_is_reported_once_and_the_run_goes_on(tmp_path, where, seen):
  said, broken = [], Broken(*where)
  write(tmp_path, (broken, writers.CSV()), *((i, 'train', {'loss': 1.0}) for i in (1, 2, 3, 4)),
        log=said.append)
  assert len(said) == 1 and 'Broken failed (ConnectionError: no route)' in said[0]
  assert broken.seen == seen
  assert len(monitor.read_rows(tmp_path / 'metrics.jsonl')) == len(table(tmp_path)) == 4


def test_a_writer_that_hangs_delays_neither_a_step_nor_the_end_for_long(tmp_path, monkeypatch):
  monkeypatch.setattr(writers, '_CLOSING', 0.1)
  monkeypatch.setattr(writers, '_WAITING', 3)
  release, said = threading.Event(), []
  hanging = types.SimpleNamespace(open=lambda *_: release.wait(), write=None, close=None)
  start = time.monotonic()
  write(tmp_path, (hanging,), *((i, 'train', {'loss': 1.0}) for i in range(9)), log=said.append)
  assert time.monotonic() - start < 5 and len(said) == 1 and 'rows behind' in said[0]
  assert len(monitor.read_rows(tmp_path / 'metrics.jsonl')) == 9
  release.set()


class Client(types.ModuleType):
  """A module that keeps what it was called with."""

  def __init__(self, name, **functions):
    super().__init__(name)
    self.calls = []
    for key, function in functions.items():
      setattr(self, key, self._kept(key, function))

  def _kept(self, key, function):
    def call(*args, **kwargs):
      bound = inspect.signature(function).bind(*args, **kwargs)  # refuses what the real one would
      self.calls.append((key, dict(bound.arguments)))
      return function(*args, **kwargs)
    return call


ROWS = (1, 'train', {'loss': 2.0}), (2, 'validation', {'loss': math.nan, 'v': np.ones(2)})


@pytest.mark.supports('watching', 'W&B', 'MLflow')
def test_weights_and_biases_gets_every_row_and_goes_on_with_its_run(tmp_path, monkeypatch):
  """The signatures are those of wandb 0.31."""
  client = Client('wandb', log=lambda data, step=None, commit=None: None,
                  finish=lambda exit_code=None: None)
  run = types.SimpleNamespace(id='abc123', log=client.log, finish=client.finish)
  client.init = client._kept('init', lambda entity=None, project=None, dir=None, id=None,
                             name=None, notes=None, tags=None, config=None, *, resume=None,
                             mode=None, reinit=None, settings=None: run)
  monkeypatch.setitem(sys.modules, 'wandb', client)
  write(tmp_path / 'one', (writers.WandB(),), *ROWS)
  assert client.calls[0] == ('init', {'project': 'lm', 'name': 'one', 'dir': str(tmp_path / 'one'),
                                      'id': None, 'resume': None})
  assert client.calls[1] == ('log', {'data': {'train/loss': 2.0}, 'step': 1})
  (_, logged), ended = client.calls[2:]
  assert logged['step'] == 2 and math.isnan(logged['data'].pop('validation/loss'))
  assert logged['data'] == {'validation/v/00': 1.0, 'validation/v/01': 1.0}
  assert ended[0] == 'finish'
  write(tmp_path / 'one', (writers.WandB(),), start_step=1)
  assert {'id': 'abc123', 'resume': 'allow'}.items() <= client.calls[4][1].items()


def test_mlflow_gets_every_row_and_goes_on_with_its_run(tmp_path, monkeypatch):
  """The signatures are those of mlflow-skinny 3.17."""
  run = types.SimpleNamespace(info=types.SimpleNamespace(run_id='r1'))
  client = Client(
      'mlflow', set_experiment=lambda experiment_name=None, experiment_id=None: None,
      start_run=lambda run_id=None, experiment_id=None, run_name=None, nested=False,
      parent_run_id=None, tags=None, description=None, log_system_metrics=None: run,
      log_metrics=lambda metrics, step=None, synchronous=None, run_id=None, timestamp=None: None,
      end_run=lambda status='FINISHED': None)
  monkeypatch.setitem(sys.modules, 'mlflow', client)
  write(tmp_path / 'one', (writers.MLflow('mine'),), *ROWS)
  names = [name for name, _ in client.calls]
  assert names == ['set_experiment', 'start_run', 'log_metrics', 'log_metrics', 'end_run']
  assert client.calls[0][1] == {'experiment_name': 'mine'}
  assert client.calls[1][1] == {'run_id': None, 'run_name': 'one'}
  assert client.calls[2][1] == {'metrics': {'train/loss': 2.0}, 'step': 1}
  write(tmp_path / 'one', (writers.MLflow('mine'),), start_step=1)
  assert client.calls[6][1]['run_id'] == 'r1'
