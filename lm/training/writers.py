"""Where else the numbers of a run go: tables, W&B, MLflow, or what you write.

A writer is any object with the three methods of `Writer`. It is bound in a gin file, and made of
plain settings there, since a configuration is read by every command:

    from lm.training import writers

    run.Experiment.writers = (@writers.CSV(), @writers.WandB(), @my_project.Writer())
    writers.WandB.project = 'ablations'
"""
from collections.abc import Callable, Mapping
import csv
import os
import pathlib
import queue
import threading
from typing import Protocol

_WAITING = 10_000  # rows; a writer that is further behind loses what comes
_CLOSING = 60  # seconds that the end of a run waits for a writer


class Writer(Protocol):
  """All three are called in one thread, which is the writer's own."""

  def open(self, run_dir: pathlib.Path, start_step: int):
    """A run starts, or goes on after `start_step`: what was written of later steps comes again."""

  def write(self, step: int, split: str, row: Mapping[str, float]):
    """A row of metrics.jsonl, flat: name -> number, which may be NaN."""

  def close(self):
    """The run ends, or stops."""


class Aside:
  """A writer in a thread of its own: it never delays a step, and its failures do not end a run.

  The first one is told to `log`; later rows are tried all the same.
  """

  def __init__(self, writer: Writer, run_dir: pathlib.Path, start_step: int,
               log: Callable[[str], None]):
    self._writer, self._log, self._has_failed = writer, log, False
    self._rows: queue.Queue = queue.Queue(_WAITING)
    self._thread = threading.Thread(target=self._work, args=(run_dir, start_step), daemon=True)
    self._thread.start()

  def write(self, step: int, split: str, row: Mapping[str, float]):
    """Hands over a row."""
    try:
      self._rows.put_nowait((step, split, row))
    except queue.Full:
      self._fail(f'is {_WAITING} rows behind, and loses those that come')

  def close(self):
    """Waits until all rows are written, but not for ever."""
    try:
      self._rows.put(None, timeout=_CLOSING)
      self._thread.join(_CLOSING)
    except queue.Full:
      pass
    if self._thread.is_alive():
      self._fail(f'has not ended after {_CLOSING} seconds')

  def _work(self, run_dir, start_step):
    if not self._try(self._writer.open, run_dir, start_step):
      self._writer = None
    while (row := self._rows.get()) is not None:
      if self._writer is not None:
        self._try(self._writer.write, *row)
    if self._writer is not None:
      self._try(self._writer.close)

  def _try(self, method, *args) -> bool:
    try:
      method(*args)
      return True
    except Exception as error:  # whatever another's client raises
      self._fail(' '.join(f'failed ({type(error).__name__}: {error})'.split()))
      return False

  def _fail(self, what):
    if not self._has_failed:
      self._has_failed = True
      self._log(f'the writer {type(self._writer).__name__} {what}; the run goes on, and '
                'metrics.jsonl has every row')


class CSV:
  """A table for each split: csv/train.csv, csv/validation.csv, ...

  Columns that appear later are empty in the rows before: the table is then written anew.
  """

  def open(self, run_dir: pathlib.Path, start_step: int):
    """Keeps the rows up to `start_step`."""
    self._folder, self._names = run_dir / 'csv', {}
    self._folder.mkdir(exist_ok=True)
    for path in self._folder.glob('*.csv'):
      with open(path, newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        # A last line that a kill tore has too few cells.
        rows = [row for row in reader if None not in row.values()
                and int(row['step']) <= start_step]
      if start_step and rows:
        self._names[path.stem] = list(reader.fieldnames)
        self._rewrite(path, self._names[path.stem], rows)
      else:
        path.unlink()

  def write(self, step: int, split: str, row: Mapping[str, float]):
    """Appends a line."""
    path, row = self._folder / f'{split}.csv', {'step': step, **row}
    names = self._names.setdefault(split, [])
    added = [name for name in row if name not in names]
    if added:
      rows = []
      if names:
        with open(path, newline='', encoding='utf-8') as file:
          rows = list(csv.DictReader(file))
      names += added
      self._rewrite(path, names, rows)
    with open(path, 'a', newline='', encoding='utf-8') as file:
      csv.DictWriter(file, names, restval='').writerow(row)

  def _rewrite(self, path, names, rows):
    temporary = path.with_suffix('.new')
    with open(temporary, 'w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, names, restval='')
      writer.writeheader()
      writer.writerows(rows)
    os.replace(temporary, path)

  def close(self):
    """Every line stands already."""


class WandB:
  """Weights & Biases (`pip install wandb`, seen with 0.31; offline by WANDB_MODE=offline)."""

  def __init__(self, project: str = 'lm'):
    self._project, self._run = project, None

  def open(self, run_dir: pathlib.Path, start_step: int):
    """Starts a run, or goes on with that of this directory."""
    import wandb
    path = run_dir / 'wandb_id'
    name = path.read_text() if start_step and path.exists() else None
    self._run = wandb.init(project=self._project, name=run_dir.name, dir=str(run_dir), id=name,
                           resume='allow' if name else None)
    path.write_text(self._run.id)

  def write(self, step: int, split: str, row: Mapping[str, float]):
    """Rows of one step become one."""
    self._run.log({f'{split}/{name}': value for name, value in row.items()}, step=step)

  def close(self):
    """Sends what is left."""
    self._run.finish()


class MLflow:
  """MLflow (`pip install mlflow-skinny`, seen with 3.17), where MLFLOW_TRACKING_URI says."""

  def __init__(self, experiment: str = 'lm'):
    self._experiment, self._mlflow = experiment, None

  def open(self, run_dir: pathlib.Path, start_step: int):
    """Starts a run, or goes on with that of this directory."""
    import mlflow
    self._mlflow, path = mlflow, run_dir / 'mlflow_id'
    mlflow.set_experiment(self._experiment)
    run = mlflow.start_run(path.read_text() if start_step and path.exists() else None,
                           run_name=run_dir.name)
    path.write_text(run.info.run_id)

  def write(self, step: int, split: str, row: Mapping[str, float]):
    """Logs all numbers of a row at once."""
    self._mlflow.log_metrics({f'{split}/{name}': value for name, value in row.items()}, step=step)

  def close(self):
    """Marks the run as finished."""
    self._mlflow.end_run()
