"""`lm compile` of a small model for 16 TPUs that are not there, what it says of too large ones, and
`lm train` from what it saves."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('libtpu')

from lm import main, run
from lm.data.tasks import TextTask
from lm.models.gpt import GPTConfig
from lm.parallel import compile_report, remedies
from lm.parallel.rules import Rules
from lm.parallel.topology import Topology
from lm.training.loop import TrainConfig
from lm.training.optimizers import AdamW

FLAGS = {'gpt.GPTConfig.d_model': 256, 'gpt.GPTConfig.num_layers': 2, 'gpt.GPTConfig.num_heads': 2,
         'gpt.GPTConfig.d_ff': 512, 'gpt.GPTConfig.scan_layers': True, 'VOCAB_SIZE': 512,
         'mesh.MeshConfig.data': 4, 'SEQUENCE_LENGTH': 256, 'BATCH_SIZE': 16,
         'loop.TrainConfig.tpu_options': (), 'gpt.GPTConfig.remat': "'full'"}


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  """What --json holds, and the directory of the run."""
  directory = tmp_path_factory.mktemp('compiled')
  flags = [f'--gin.{name}={value}' for name, value in FLAGS.items()]
  status = main.main(['compile', '--gin_file=gin/experiments/gpt_7b.gin', '--topology=v5e:4x4',
                      f'--run_dir={directory}', f'--json={directory / "out.json"}', *flags])
  assert status == 0
  return json.loads((directory / 'out.json').read_text()), directory


@pytest.mark.supports('precision and parallelism', 'compiling for TPUs that are not there')
def test_memory_of_the_state_is_exact_and_the_kinds_add_up_to_the_peak(report):
  result, _ = report
  kinds = result['hbm_bytes']
  sharded = result['parameters'] / 16 * 4  # float32 over 16 chips; norms are whole on each
  assert sharded <= kinds['parameters'] <= sharded * 1.02
  assert 2 * kinds['parameters'] <= kinds['optimizer'] <= 2 * kinds['parameters'] + 64
  assert sum(kinds.values()) >= result['hbm_peak_bytes'] > 3 * kinds['parameters']
  assert result['hbm_limit_bytes'] == int(15.75 * 2**30)


def test_no_gradient_of_a_whole_parameter_is_summed_on_every_chip(report):
  result, _ = report
  matrix = 4 * 256 * 256  # bytes, of the smallest in a layer
  rows = result['collectives']
  assert all(x['bytes'] < matrix for x in rows if x['op'] == 'all-reduce'
             and 'fsdp' in x['axes'] and 'data' in x['axes'])
  assert any(x['op'] == 'reduce-scatter' and x['times'] == 2 for x in rows)
  gathers = [x for x in rows if x['op'] == 'all-gather' and x['times'] == 2]
  assert len(gathers) == 14  # seven matrices of a layer, once forward and once backward


def test_of_two_slices_only_the_sums_of_gradients_cross_and_once(tmp_path):
  flags = [f'--gin.{name}={value}' for name, value in {
      **FLAGS, 'gpt.GPTConfig.attention_implementation': "'reference'",
      'mesh.MeshConfig.slice': 2, 'mesh.MeshConfig.data': 1}.items()]
  assert main.main(['compile', '--gin_file=gin/experiments/gpt_7b.gin', '--topology=v5e:2x2',
                    '--num_slices=2', f'--json={tmp_path / "out.json"}', *flags]) == 0
  result = json.loads((tmp_path / 'out.json').read_text())
  crossing = [x for x in result['collectives'] if 'slice' in x['axes']]
  assert all(x['axes'] == ['slice'] and x['op'] == 'all-reduce' for x in crossing)
  of_a_chip = result['parameters'] / 4 * 4  # float32 gradients over four chips of a slice
  assert of_a_chip <= sum(x['bytes'] * x['times'] for x in crossing) < 1.1 * of_a_chip


def test_a_differentiated_kernel_is_the_one_of_its_name():
  kernels = {'grouped_matmul': 1, 'grouped_matmul_weights': 2}
  assert compile_report.kernel_of('jvp_grouped_matmul_', kernels) == 'grouped_matmul'
  assert compile_report.kernel_of('grouped_matmul_weights', kernels) == 'grouped_matmul_weights'
  assert compile_report.kernel_of('flash_attention_forward', kernels) is None


def test_kernels_loops_and_floating_point_operations_are_counted(report):
  result, directory = report
  assert all(x['cycles'] > 1000 and x['times'] == 2 for x in result['kernels'])
  assert {x['name'] for x in result['kernels']} == {'flash_attention_forward',
                                                    'flash_attention_backward'}
  assert result['kernel_cycles'] == sum(x['cycles'] * x['times'] for x in result['kernels'])
  # 6 a matrix parameter, and 2 of the blocks' again; the kernels' own are not among them.
  blocks, head, tokens = 2 * (4 * 256**2 + 3 * 256 * 512), 256 * 512, 16 * 256
  most = tokens * (8 * blocks + 6 * head)
  assert 0.85 * most < result['compiled_flops'] < 1.1 * most
  low, high = result['step_seconds']
  assert 0 < low <= high and 0 < result['mfu'][0] <= result['mfu'][1] < 1
  assert any('lm/' in x['source'] for x in result['largest_buffers'])
  assert '<table>' in (directory / 'compile.html').read_text()


def test_an_offloaded_optimizer_is_not_in_the_memory_of_the_device(report, tmp_path):
  flags = [f'--gin.{name}={value}' for name, value in FLAGS.items()]
  path = tmp_path / 'out.json'
  assert main.main(['compile', '--gin_file=gin/experiments/gpt_7b.gin', '--topology=v5e:4x4',
                    '--gin.loop.TrainConfig.offload_optimizer=True', f'--json={path}', *flags]) == 0
  plain, offloaded = report[0], json.loads(path.read_text())
  assert offloaded['hbm_bytes']['optimizer'] < 1000 < plain['hbm_bytes']['optimizer']
  saved = plain['hbm_peak_bytes'] - offloaded['hbm_peak_bytes']
  assert 0.9 * plain['hbm_bytes']['optimizer'] < saved


TRAINED = [
    '--gin_file=gin/models/gpt_small_cpu.gin', '--gin_file=gin/optim/adamw.gin',
    '--gin_file=gin/objectives/causal_lm.gin', '--gin_file=gin/runs/pretrain.gin',
    "--gin.vocabularies.VocabularyConfig.kind='byte'", '--gin.VOCAB_SIZE=259',
    '--gin.gpt.GPTConfig.d_model=32', '--gin.gpt.GPTConfig.num_layers=2',
    '--gin.gpt.GPTConfig.d_ff=48', '--gin.SEQUENCE_LENGTH=32', '--gin.BATCH_SIZE=4',
    '--gin.NUM_STEPS=3', '--gin.loop.TrainConfig.eval_batches=1']


@pytest.mark.supports('precision and parallelism', 'training from a step compiled elsewhere')
def test_a_run_starts_from_the_saved_executable_of_its_own_program_alone(tmp_path):
  (tmp_path / 'a.txt').write_text('a text of some length ' * 200)
  (tmp_path / 'b.txt').write_text('another of some length ' * 200)
  data = [*TRAINED, f"--gin.FILES='{tmp_path}/*.txt'", f"--gin.CACHE_DIR='{tmp_path}/cache'"]
  saved = tmp_path / 'step'
  assert main.main(['compile', *data, '--topology=cpu:2', f'--save={saved}']) == 0
  env = os.environ | {'XLA_FLAGS': os.environ.get('XLA_FLAGS', '') +
                      ' --xla_force_host_platform_device_count=2', 'JAX_PLATFORMS': 'cpu'}

  def train(name, *flags):
    child = subprocess.run(
        [sys.executable, '-m', 'lm.main', 'train', *data, f'--run_dir={tmp_path / name}', *flags],
        env=env, capture_output=True, text=True, check=True,
        cwd=pathlib.Path(__file__).resolve().parents[2])
    rows = map(json.loads, (tmp_path / name / 'metrics.jsonl').read_text().splitlines())
    return child.stderr, [row['loss'] for row in rows if row['split'] in ('train', 'validation')]

  said, losses = train('loaded', f'--compiled={saved}')
  assert f'starts from the executable in {saved}' in said
  said, other = train('other', f'--compiled={saved}', '--gin.LEARNING_RATE=0.5')
  assert 'the digest of the program is' in said and said.count('; compiles') == 1
  assert train('alone')[1] == losses != other


def experiment(**changes):
  """A run that is not prepared."""
  settings = dict(rules=Rules(), train=TrainConfig(batch_size=64))
  model = GPTConfig(d_model=64, num_layers=32, num_heads=2, remat='dots')
  return run.Experiment(TextTask(), model, AdamW(), **{**settings, **changes})


def test_too_much_memory_is_a_sentence_with_what_is_missing_and_what_would_fit():
  topology, gib = Topology.parse('v5e:2x2'), 2**30
  mesh = dict(slice=1, data=2, stage=1, fsdp=2, expert=1, sequence=1, tensor=1)
  facts = {'mesh': mesh, 'needed_bytes': 18 * gib, 'parameter_bytes': 2 * gib,
           'optimizer_bytes': 4 * gib}
  said = remedies.explain(experiment(), facts, topology)
  assert '2.25 GiB are missing' in said and 'Traceback' not in said
  for change in ("Rules.embed=('data', 'fsdp')", 'num_microbatches=2', "remat='full'"):
    assert change in said
  said = remedies.explain(experiment(), facts | {'parameter_bytes': 20 * gib}, topology)
  assert 'take more devices' in said


def test_a_topology_that_the_compiler_does_not_know_is_a_sentence(capsys):
  assert main.main(['compile', '--gin_file=gin/experiments/gpt_7b.gin', '--topology=x9:1']) == 2
  assert 'such as v5e:16x16' in capsys.readouterr().err
