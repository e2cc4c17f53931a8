"""`lm plan`: what it estimates without a compiler, what it chooses, and what it says if nothing
fits."""
import dataclasses
import json

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
import jax.numpy as jnp
import pytest

pytest.importorskip('libtpu')

from lm import main, run
from lm.commands import plan_search, plan_table
from lm.commands.plan_search import Choice
from lm.parallel import plan_cost, plan_memory, plan_program
from lm.parallel.mesh import MeshConfig
from lm.parallel.topology import Topology

FLAGS = {'gpt.GPTConfig.d_model': 256, 'gpt.GPTConfig.num_layers': 4, 'gpt.GPTConfig.num_heads': 2,
         'gpt.GPTConfig.d_ff': 512, 'gpt.GPTConfig.scan_layers': True, 'VOCAB_SIZE': 512,
         'mesh.MeshConfig.data': 4, 'SEQUENCE_LENGTH': 256, 'BATCH_SIZE': 64,
         'gpt.GPTConfig.remat': "'full'"}
MATRICES = 4 * (4 * 256**2 + 3 * 256 * 512)  # elements in the blocks


@pytest.fixture(scope='module')
def experiment():
  """Four layers of Llama's kind."""
  bindings = [(name, str(value)) for name, value in FLAGS.items()]
  return run.open_experiment(['gin/experiments/gpt_7b.gin'], bindings, None)


@pytest.fixture(scope='module')
def estimate(experiment):
  """Calls `plan_search.estimate` of a way to run it on 16 chips."""
  def one(remat='full', num_microbatches=1, embed=('data', 'fsdp'), **sizes):
    mesh = MeshConfig(**{'data': 4, 'fsdp': 4, **sizes})
    choice = Choice(mesh, embed, None, remat, num_microbatches)
    return plan_search.estimate(choice.of(experiment), Topology.parse('v5e:4x4'))
  return one


def test_the_table_has_every_point():
  assert list(plan_table.read()) == [point.cells() for point in plan_table.POINTS]


def test_the_table_keeps_what_it_says():
  """Memory within a tenth, time within a quarter, in at least 20 rows."""
  rows = plan_table.read()
  assert len(rows) >= 20
  for names, (compiled, estimated) in rows.items():
    assert abs(estimated.mib / compiled.mib - 1) <= 0.1, names
    assert abs(estimated.milliseconds / compiled.milliseconds - 1) <= 0.25, names


@pytest.mark.parametrize('point', [
    pytest.param(point, id=' '.join(point.cells()), marks=pytest.mark.slow if i % 3 else ())
    for i, point in enumerate(plan_table.POINTS)])
def test_estimates_of_today_are_those_of_the_table(point):
  _, stored = plan_table.read()[point.cells()]
  estimated = point.estimated()
  assert estimated.mib == pytest.approx(stored.mib, abs=1)
  assert estimated.milliseconds == pytest.approx(stored.milliseconds, rel=0.01, abs=0.1)


@pytest.mark.slow
def test_the_compiler_says_today_what_the_table_says():
  point = min(plan_table.POINTS, key=lambda point: plan_table.read()[point.cells()][0].mib)
  (stored, _), today = plan_table.read()[point.cells()], point.compiled()
  assert today.mib == pytest.approx(stored.mib, rel=0.02)
  assert today.milliseconds == pytest.approx(stored.milliseconds, rel=0.05)


@pytest.fixture(scope='module')
def two_results():
  """x -> (x a, (relu(x) b) c), of 64 x 64 floats on one device and b 64 x 128, as a plan reads
  it."""
  mesh = AbstractMesh((1,), ('data',), (AxisType.Auto,))
  x, b, c = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
             for shape in ((64, 64), (64, 128), (128, 64)))
  traced = jax.make_jaxpr(lambda x, a, b, c: (x @ a, jax.nn.relu(x) @ b @ c))(x, x, b, c)
  return plan_program.read(traced, [x, x, b, c], {'data': 1}, 'tpu')


def test_what_any_result_of_a_program_needs_is_in_memory_and_is_worked_for(two_results):
  """Results take the place of the caller's arrays; relu(x) b has none."""
  assert plan_memory.lifetimes(two_results).peak() == 64 * 128 * 4
  assert plan_cost.cost(two_results, {'data': 1}).flops == 2 * 64 * 64 * (64 + 128 + 128)


def test_what_a_product_alone_reads_is_made_with_it(two_results):
  """Two operands in and one result out for each: relu(x) is no array of its own."""
  traffic = [work.traffic / (64 * 64 * 4) for work in plan_cost.cost(two_results, {'data': 1}).work]
  assert sorted(traffic) == [1 + 1 + 1, 1 + 2 + 2, 2 + 2 + 1]


@pytest.mark.supports('precision and parallelism', 'plans: mesh, remat and microbatches')
def test_every_block_is_gathered_twice_in_bfloat16_and_its_gradient_scattered_once(estimate):
  moved = estimate().collective_bytes
  head, norms = 2 * 256 * 512, 2**15
  assert moved['all-gather data fsdp'] == pytest.approx(2 * 2 * MATRICES + head, abs=norms)
  # In float32, along one direction of the network after the other.
  scattered = 4 * (MATRICES + 256 * 512)
  assert moved['reduce-scatter data'] == pytest.approx(scattered / 4, rel=0.3)
  assert not any(name.startswith('all-reduce data fsdp') and size > norms
                 for name, size in moved.items())


def test_memory_and_work_change_as_they_must(estimate):
  full, none, halves = estimate(), estimate('none'), estimate('none', 2)
  assert none.peak_bytes > full.peak_bytes and none.flops < full.flops
  assert none.step_bytes > halves.step_bytes
  assert full.state_bytes == none.state_bytes
  tensor = estimate(data=2, fsdp=4, tensor=2)
  assert any('tensor' in name for name in tensor.collective_bytes)


def test_scaled_estimates_agree_with_traced_ones(experiment):
  topology = Topology.parse('v5e:4x4')
  search = plan_search.Search(experiment, topology)
  search.rough(Choice(MeshConfig(data=4, fsdp=4), ('data', 'fsdp'), None, 'full', 1))
  for data, embed, parts in ((1, 'fsdp', 1), (4, 'fsdp', 2)):
    choice = Choice(MeshConfig(data=data, fsdp=16 // data), embed, None, 'full', parts)
    rough, exact = search.rough(choice), plan_search.estimate(choice.of(experiment), topology)
    assert rough.state_bytes == pytest.approx(exact.state_bytes, rel=0.05)
    assert rough.step_bytes == pytest.approx(exact.step_bytes, rel=0.35)
  assert len(search.traced) == 1


def test_the_plan_is_a_gin_file_of_the_fastest_way_that_fits(experiment, tmp_path, monkeypatch):
  monkeypatch.setattr(plan_search, 'REMATS', ('full',))
  flags = [f'--gin.{name}={value}' for name, value in FLAGS.items()]
  status = main.main(['plan', '--gin_file=gin/experiments/gpt_7b.gin', '--topology=v5e:2x2',
                      '--compile=0', '--keep=3', f'--run_dir={tmp_path}', *flags])
  assert status == 0
  rows = json.loads((tmp_path / 'plan.json').read_text())['rows']
  times = [sum(row['step_seconds']) for row in rows]
  assert times == sorted(times)
  peaks = [row['hbm_peak_bytes'] for row in rows]
  assert peaks == sorted(peaks, reverse=True) and all(row['money'] > 0 for row in rows)
  bindings = [(name, str(value)) for name, value in FLAGS.items() if 'mesh' not in name]
  planned = run.open_experiment(['gin/experiments/gpt_7b.gin', str(tmp_path / 'plan.gin')],
                                bindings, None)
  choice = rows[0]['choice']
  assert dataclasses.asdict(planned.mesh) == choice['mesh']
  assert planned.model.remat == choice['remat']
  assert planned.train.num_microbatches == choice['num_microbatches']
  assert '<svg' in (tmp_path / 'plan.html').read_text()


def test_where_nothing_fits_the_devices_that_would_do_are_named(experiment, monkeypatch):
  monkeypatch.setattr(plan_search, 'REMATS', ('full',))
  model = dataclasses.replace(experiment.model, d_model=4096, d_ff=16384, num_layers=48)
  large = dataclasses.replace(experiment, model=model)
  with pytest.raises(plan_search.UserError, match='devices of v5e would do'):
    plan_search.Search(large, Topology.parse('v5e:2x2')).best(4)
