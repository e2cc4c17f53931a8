"""`lm train --seeds`: ordinary runs that differ in the seed, and a table over them."""
import contextlib
import io
import json
import pathlib
import statistics

import pytest

from lm import config, main, run

TINY = ('--gin_file=gin/models/gpt_small_cpu.gin', '--gin_file=gin/optim/adamw.gin',
        '--gin_file=gin/objectives/causal_lm.gin', '--gin_file=gin/runs/pretrain.gin',
        "--gin.vocabularies.VocabularyConfig.kind='byte'", '--gin.VOCAB_SIZE=259',
        '--gin.gpt.GPTConfig.d_model=16', '--gin.gpt.GPTConfig.num_layers=1',
        '--gin.gpt.GPTConfig.d_ff=16', '--gin.SEQUENCE_LENGTH=32', '--gin.BATCH_SIZE=4',
        '--gin.NUM_STEPS=4', '--gin.EVAL_EVERY=4', '--gin.loop.TrainConfig.eval_batches=1',
        '--gin.loop.TrainConfig.watch_every=0')


def train(*argv, status=0):
  """Runs `lm train` in this process; returns what it prints, of an error its sentence."""
  with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(
      io.StringIO()) as out:
    assert main.main(['train', *map(str, argv)]) == status, err.getvalue()
  return err.getvalue().strip().splitlines()[-1] if status == 2 else out.getvalue()


def rows(directory, split):
  found = map(json.loads, (directory / 'metrics.jsonl').read_text().splitlines())
  return [row['loss'] for row in found if row['split'] == split]


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  for name in 'ab':
    (folder / f'{name}.txt').write_text('to be or not to be ' * 100)
  return [*TINY, f"--gin.FILES='{folder}/*.txt'", f"--gin.CACHE_DIR='{folder}/cache'"]


@pytest.mark.supports('fine-tuning', 'k seeds: mean, deviation, interval')
def test_seeds_are_ordinary_runs_and_more_of_them_are_added(flags, tmp_path):
  train(*flags, '--seeds=1', f'--run_dir={tmp_path / "seeds"}')
  before = rows(tmp_path / 'seeds' / 'seed-0', 'train')
  shown = train('--seeds=2', f'--run_dir={tmp_path / "seeds"}')  # by the config that stands
  assert before == rows(tmp_path / 'seeds' / 'seed-0', 'train') and len(before) == 4
  losses = [rows(tmp_path / 'seeds' / f'seed-{seed}', 'validation')[-1] for seed in (0, 1)]
  assert losses[0] != losses[1]
  mean, spread = statistics.fmean(losses), statistics.stdev(losses)
  assert f'validation loss: {mean:.4f} ± {spread:.4f}, 95 % of the mean ' in shown
  configs = [(tmp_path / 'seeds' / f'seed-{seed}' / 'config.gin').read_text().splitlines()
             for seed in (0, 1)]
  assert [pair for pair in zip(*configs, strict=True) if pair[0] != pair[1]] == [
      ('SEED = 0', 'SEED = 1')]
  found, = json.loads((tmp_path / 'seeds' / 'seeds.json').read_text())['groups']
  loss = found['metrics']['validation loss']
  assert loss['values'] == losses
  assert loss['half_width'] == pytest.approx(12.7062 * spread / 2**0.5, rel=1e-5)


def test_a_signal_stops_all_of_them(flags, tmp_path, monkeypatch):
  seen = []

  def stopped(experiment, run_dir, hosts):
    seen.append((experiment.train.seed, pathlib.Path(run_dir).name))
    return {'stopped_by': 'SIGTERM' if len(seen) == 2 else None, 'steps': 7}

  monkeypatch.setattr(run, 'train', stopped)
  shown = train(*flags, '--seeds=4', f'--run_dir={tmp_path}', status=128 + 15)
  assert seen == [(0, 'seed-0'), (1, 'seed-1')]
  assert 'stopped by SIGTERM' in shown and 'the same command continues' in shown


def test_what_is_no_directory_of_seeds_is_refused(flags, tmp_path):
  assert '--seeds=0 must be at least 1' in train(
      *flags, '--seeds=0', f'--run_dir={tmp_path}', status=2)
  assert '--gin.SEED binds it again' in train(
      *flags, '--seeds=2', '--gin.SEED=3', f'--run_dir={tmp_path}', status=2)
  assert 'needs --run_dir' in train(*flags, '--seeds=2', status=2)
  (tmp_path / 'checkpoints').mkdir()
  assert 'is the directory of a run' in train(
      *flags, '--seeds=2', f'--run_dir={tmp_path}', status=2)
  config.reset()
