"""A run through the door that users use: `lm train` in child processes that are killed, starved
and resumed."""
import contextlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm import main
from lm.commands import convert
from lm.data.vocabularies import ByteVocabulary
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.training import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = ('--gin_file=gin/models/gpt_small_cpu.gin', '--gin_file=gin/optim/adamw.gin',
        '--gin_file=gin/objectives/causal_lm.gin', '--gin_file=gin/runs/pretrain.gin',
        "--gin.vocabularies.VocabularyConfig.kind='byte'", '--gin.VOCAB_SIZE=259',
        '--gin.gpt.GPTConfig.d_model=32', '--gin.gpt.GPTConfig.num_layers=2',
        '--gin.gpt.GPTConfig.d_ff=48', '--gin.gpt.GPTConfig.dropout_rate=0.1',
        '--gin.SEQUENCE_LENGTH=64', '--gin.BATCH_SIZE=4', '--gin.NUM_STEPS=14',
        '--gin.CHECKPOINT_EVERY=4', '--gin.EVAL_EVERY=6', '--gin.loop.TrainConfig.eval_batches=1')
WORDS = 'the of and to in a is that for it as was with be by on not he his but at are'.split()


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> pathlib.Path:
  """A folder of small texts, one far longer than the context."""
  folder = tmp_path_factory.mktemp('text')
  rng = random.Random(0)
  for i in range(12):
    words = rng.choices(WORDS, k=3000 if i == 5 else 120)
    (folder / f'{i:02}.txt').write_text(' '.join(words) + '\n')
  return folder


@pytest.fixture(scope='session')
def flags(text, tmp_path_factory) -> list[str]:
  """What every command here is called with."""
  cache = tmp_path_factory.mktemp('cache')
  return [*TINY, f"--gin.FILES='{text}/*.txt'", f"--gin.CACHE_DIR='{cache}'"]


def start(*argv, devices=1, **options) -> subprocess.Popen:
  """Starts `lm` in a child process."""
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen([sys.executable, '-m', 'lm.main', *map(str, argv)], cwd=ROOT, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def lm(*argv, devices=1, status=0) -> tuple[str, str]:
  """Runs `lm` in a child process to its end."""
  child = start(*argv, devices=devices)
  out, err = child.communicate(timeout=300)
  assert child.returncode == status, err
  return out, err


def refused(*argv) -> str:
  """Runs `lm` in this process; it must refuse in one sentence, with status 2."""
  with contextlib.redirect_stderr(io.StringIO()) as err:
    assert main.main([str(arg) for arg in argv]) == 2
  lines = err.getvalue().strip().splitlines()
  assert lines[-1].startswith('error: ') and 'Traceback' not in err.getvalue(), err.getvalue()
  return lines[-1]


def losses(run: pathlib.Path, split='train') -> dict[int, float]:
  """Loss by step; a step that stands twice fails."""
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  rows = [row for row in rows if row['split'] == split]
  assert len({row['step'] for row in rows}) == len(rows)
  return {row['step']: row['loss'] for row in rows}


def leaves(run: pathlib.Path) -> list[np.ndarray]:
  """The parameters of a run's last checkpoint."""
  import jax
  return jax.tree.leaves(checkpoint.restore_params(run / 'checkpoints')[1])


def wait_for_step(run: pathlib.Path, step: int, child: subprocess.Popen):
  """Waits until a step stands in metrics.jsonl."""
  path, end = run / 'metrics.jsonl', time.monotonic() + 240
  while not (path.exists() and f'"step": {step},' in path.read_text()):
    assert child.poll() is None, child.stderr.read()
    assert time.monotonic() < end
    time.sleep(0.005)


@pytest.fixture(scope='session')
def whole(flags, tmp_path_factory) -> pathlib.Path:
  """A run that nothing disturbed."""
  run = tmp_path_factory.mktemp('whole') / 'run'
  result = run.parent / 'result.json'
  out, _ = lm('train', *flags, f'--run_dir={run}', f'--json={result}')
  assert f'report: {run}/report.html' in out
  return run


def same_run(run: pathlib.Path, whole: pathlib.Path):
  """Every loss and every parameter equals, bit for bit."""
  assert losses(run) == losses(whole)
  assert losses(run, 'validation') == losses(whole, 'validation')
  for ours, theirs in zip(leaves(run), leaves(whole), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_train_leaves_all_that_it_promises(whole):
  result = json.loads((whole.parent / 'result.json').read_text())
  assert result['steps'] == 14 and len(result['losses']) == 14
  assert result['losses'] == list(losses(whole).values())
  assert result['final_loss'] == result['losses'][-1]
  assert result['final_loss'] < result['losses'][0]
  assert 0 <= result['data_wait_share'] < 1 and result['tokens_per_second'] > 0
  assert result['mfu'] > 0 and result['first_step_seconds'] > 0 and result['peak_rss_bytes'] > 1e8
  rows = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
  rates = [row['learning_rate'] for row in rows if row['split'] == 'train']
  assert len(rates) == 14 and 0 < rates[0] < rates[-1]  # all of it is warm-up
  evaluation = json.loads((whole / 'evaluation.json').read_text())
  assert evaluation['step'] == 14 and 0 < evaluation['bits_per_byte'] < 16
  assert 'held-out' in (whole / 'report.html').read_text().lower()


@pytest.mark.supports('faults survived', 'kill -9 bit for bit')
def test_a_killed_run_repeats_itself_bit_for_bit(flags, whole, tmp_path):
  run = tmp_path / 'run'
  for step in sorted(random.Random().sample(range(2, 13), 2)):
    child = start('train', *flags, f'--run_dir={run}')
    wait_for_step(run, step, child)
    child.kill()
    child.communicate()
  lm('train', *flags, f'--run_dir={run}')
  same_run(run, whole)


@pytest.mark.supports('faults survived', 'SIGTERM within a step')
def test_sigterm_saves_within_one_step_and_the_same_command_continues(flags, whole, tmp_path):
  for attempt in range(3):  # these steps are so short that a run may end before the signal arrives
    run = tmp_path / f'run{attempt}'
    child = start('train', *flags, f'--run_dir={run}')
    wait_for_step(run, 2, child)
    child.send_signal(signal.SIGSTOP)  # so that no step passes between the look and the signal
    at = max(losses(run))
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGCONT)
    out, err = child.communicate(timeout=120)
    if child.returncode:
      break
  assert child.returncode == 128 + signal.SIGTERM, err
  saved = checkpoint.list_steps(run / 'checkpoints')[-1]
  assert at <= saved <= at + 1 and saved == max(losses(run)) and f'after step {saved}' in out
  lm('train', *flags, f'--run_dir={run}')
  same_run(run, whole)


@pytest.mark.supports('faults survived', 'another number of devices')
def test_another_number_of_devices_goes_on_with_the_same_batches(flags, whole, tmp_path):
  run = tmp_path / 'run'
  child = start('train', *flags, f'--run_dir={run}')
  wait_for_step(run, 4, child)
  child.send_signal(signal.SIGTERM)
  child.communicate(timeout=120)
  _, err = lm('train', *flags, f'--run_dir={run}', devices=4)
  assert 'continues from the checkpoint of step' in err
  ours, theirs = losses(run), losses(whole)
  assert list(ours) == list(theirs)
  # A batch is a function of the step alone, so only rounding differs; another batch moves 1e-2.
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=2e-3)


@pytest.mark.supports('faults survived', 'damaged checkpoints')
@pytest.mark.parametrize('damage', ['truncated', 'flipped'])
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_used(damage, flags, whole, tmp_path):
  run = tmp_path / 'run'
  child = start('train', *flags, f'--run_dir={run}')
  wait_for_step(run, 9, child)
  child.send_signal(signal.SIGTERM)
  child.communicate(timeout=120)
  step = checkpoint.list_steps(run / 'checkpoints')[-1]
  victim = max((run / 'checkpoints' / f'{step:08d}').rglob('*'), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data if damage == 'flipped' else data[:-1])
  _, err = lm('train', *flags, f'--run_dir={run}')
  assert f'the checkpoint of step {step} is damaged' in err and victim.name in err
  assert (run / 'checkpoints' / f'corrupt-{step:08d}').exists()
  same_run(run, whole)


def test_tensorflow_is_not_imported_once_the_cache_stands(flags, whole, tmp_path):
  code = ('import sys; from lm import main; status = main.main(sys.argv[1:]);'
          'print([m for m in sys.modules if m.split(".")[0] in ("tensorflow", "seqio")]);'
          'sys.exit(status)')
  out = subprocess.run([sys.executable, '-c', code, 'train', *flags, '--gin.NUM_STEPS=2',
                        f'--run_dir={tmp_path / "run"}'], cwd=ROOT, text=True, capture_output=True,
                       timeout=300)
  assert out.returncode == 0, out.stderr
  assert out.stdout.splitlines()[-1] == '[]'


def test_evaluate_and_generate_need_the_run_directory_alone(whole, tmp_path):
  result = tmp_path / 'result.json'
  out, _ = lm('generate', f'--run_dir={whole}', '--prompt=the of', '--prompt=', '--temperature=0',
              '--max_new_tokens=8', f'--json={result}')
  completions = json.loads(result.read_text())['completions']
  assert [c['prompt'] for c in completions] == ['the of', '']
  assert all(0 < len(c['tokens']) <= 8 and isinstance(c['text'], str) for c in completions)
  assert completions[0]['prompt'] + completions[0]['text'] in out
  before = json.loads((whole / 'evaluation.json').read_text())
  lm('evaluate', f'--run_dir={whole}', f'--json={result}')
  metrics = json.loads(result.read_text())['text']
  assert metrics['bits_per_byte'] == pytest.approx(before['bits_per_byte'], rel=1e-6)


@pytest.mark.supports('faults survived', 'NaN loss')
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(flags, tmp_path):
  run = tmp_path / 'run'
  lm('train', *flags, '--gin.NUM_STEPS=4', f'--run_dir={run}')
  message = refused('train', *flags, '--gin.NUM_STEPS=40', '--gin.LEARNING_RATE=1e30',
                    f'--run_dir={run}')
  assert 'loss of step' in message and ('nan' in message or 'inf' in message)
  assert 'checkpoint of step 4 stands' in message
  assert checkpoint.list_steps(run / 'checkpoints') == [4]


def test_mistakes_are_refused_in_one_sentence(flags, whole, text, tmp_path):
  run = f'--run_dir={tmp_path / "run"}'
  assert 'NUM_STEPS' in refused('train', *flags, '--gin.NUM_STEP=5', run)
  assert 'did you mean' in refused('train', *flags, '--gin.gpt.GPTConfig.d_modl=5', run)
  assert 'int' in refused('train', *flags, "--gin.BATCH_SIZE='8'", run)
  assert f'{tmp_path}/*.txt' in refused('train', *flags, f"--gin.FILES='{tmp_path}/*.txt'", run)
  assert 'max_length' in refused('train', *flags, '--gin.gpt.GPTConfig.max_length=8', run)
  assert 'config.gin' in refused('generate', '--prompt=a', f'--run_dir={tmp_path / "none"}')
  assert 'prompt' in refused('generate', f'--run_dir={whole}', f'--prompt={"the " * 40}')
  (text.parent / 'latin').mkdir(exist_ok=True)
  (text.parent / 'latin' / 'a.txt').write_bytes('caf\xe9 '.encode('latin-1') * 9)
  message = refused('train', *flags, f"--gin.FILES='{text.parent}/latin/*.txt'", run)
  assert 'a.txt' in message and 'UTF-8' in message
  (tmp_path / 'file').write_text('')
  assert 'cannot be written' in refused('train', *flags, f'--run_dir={tmp_path}/file/run')
  message = refused('train', *flags, '--gin_file=gin/mesh/fsdp.gin',
                    '--gin.mesh.MeshConfig.data=3', run)
  assert '3' in message and 'device' in message


@pytest.fixture(scope='session')
def initial(tmp_path_factory):
  """initial(path): a run, without parameters, that an experiment begins with; None of others."""
  folder = tmp_path_factory.mktemp('initial')
  sizes = dict(vocab_size=300, max_length=512, d_model=16, num_heads=4)
  for model in (BERTConfig(**sizes), GPTConfig(**sizes)):
    directory = folder / type(model).__name__
    directory.mkdir()
    ByteVocabulary(44).save(directory / 'vocabulary')
    convert._write_config(directory, model, directory / 'vocabulary', [])

  def of(path):
    text = path.read_text()
    if 'gin/tasks/' in text and not (ROOT.parent / 'shared' / 'data').exists():
      pytest.skip('../shared/data is not beside the repository')
    if 'INITIAL' not in text:
      return None
    return folder / ('BERTConfig' if 'MiniLM' in text else 'GPTConfig')
  return of


@pytest.mark.parametrize('path', sorted((ROOT / 'gin' / 'experiments').glob('*.gin')),
                         ids=lambda p: p.stem)
def test_every_experiment_builds_and_states_its_command(path, initial, tmp_path, capsys):
  flags = ['--json', os.devnull]
  if initial(path):
    flags += [f"--gin.INITIAL='{initial(path)}'", f"--gin.CACHE_DIR='{tmp_path}'"]
  assert main.main(['explain', f'--gin_file={path}', *flags]) == 0
  assert 'Experiment.task' in capsys.readouterr().out
  header = path.read_text().split('\ninclude')[0]
  assert ('lm train' in header or 'lm sweep' in header) and 'Expected' in header


def test_a_mixture_trains_and_is_evaluated_by_its_metrics(text, tmp_path):
  config = tmp_path / 'mixture.gin'
  config.write_text(f"""
from __gin__ import dynamic_registration
from lm import run
from lm.data import mixtures
from lm.data import tasks
run.Experiment.task = @mixtures.Mixture()
mixtures.Mixture.components = (@a/mixtures.Component(), @b/mixtures.Component())
a/mixtures.Component.task = @tasks.TextTask()
b/mixtures.Component.task = @tasks.TextTask()
a/mixtures.Component.rate = 1.0
b/mixtures.Component.rate = 3.0
FILES = '{text}/*.txt'
CACHE_DIR = '{tmp_path}/cache'
""")
  lm('train', *TINY, f'--gin_file={config}', f'--run_dir={tmp_path}/run', '--gin.NUM_STEPS=2')
  evaluation = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
  assert set(evaluation) == {'step', 'loss', 'accuracy', 'unigram_entropy'}
  assert evaluation['step'] == 2 and evaluation['loss'] > evaluation['unigram_entropy'] > 1
