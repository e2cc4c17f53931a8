"""What is read from the text of an optimised module, on one small enough to count by hand."""
import jax
import jax.numpy as jnp
import pytest

from lm.errors import UserError
from lm.parallel import compile_report, hlo
from lm.parallel.topology import Topology

TEXT = '''\
HloModule jit_step, is_scheduled=true

FileNames
1 "stack.py"

FunctionNames
1 "apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=78 end_line=78 column=18 end_column=18}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%all-reduce-scatter (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,2},{1,3}}
  ROOT %slice = f32[16,8]{1,0} dynamic-slice(%all-reduce.1)
}

%start (p: bf16[16,8]) -> u32[] {
  %p = bf16[16,8]{1,0} parameter(0)
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4]
  ROOT %begun = u32[] custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%body (t: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %t = (s32[], f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[64,8]{1,0} get-tuple-element(%t), index=1
  %gathered = u32[] fusion(%x), kind=kCustom, calls=%start
  %again = u32[] fusion(%x), kind=kCustom, calls=%start
  %w = f32[8,4]{1,0} constant({...})
  %product = f32[64,4]{1,0} dot(%x, %w), backend_config={"estimated_cycles":"100"}
  %kernel.2 = f32[64,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %part = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  ROOT %out = (s32[], f32[64,8]{1,0}) tuple(%next, %x)
}

%condition (t.1: (s32[], f32[64,8])) -> pred[] {
  %t.1 = (s32[], f32[64,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[64,8]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start.1 = (s32[], f32[64,8]{1,0}) tuple(%zero, %a)
  %while.1 = (s32[], f32[64,8]{1,0}) while(%start.1), condition=%condition, body=%body
  ROOT %last = f32[64,8]{1,0} copy(%a), metadata={stack_frame_id=1}, c={"estimated_cycles":"7"}
}
'''
MESH = {'data': 2, 'fsdp': 2}
MODULE = hlo.Module(TEXT)


def test_cycles_and_products_are_multiplied_through_loops():
  assert MODULE.estimated_cycles() == {'body': 600, 'main': 7}
  assert MODULE.flops() == 6 * 2 * 64 * 8 * 4


def test_each_collective_has_its_bytes_axes_and_overlap():
  found = {x.op: x for x in MODULE.collectives(MESH)}
  gathered, scattered = found['all-gather'], found['reduce-scatter']
  assert (gathered.bytes, gathered.times, gathered.axes) == (64 * 8 * 2, 6, ('data', 'fsdp'))
  assert gathered.overlapped and not scattered.overlapped
  assert (scattered.bytes, scattered.axes) == (16 * 8 * 4, ('data',))
  assert len(found) == len(MODULE.collectives(MESH)) == 2  # two pieces of one gather are one


@pytest.mark.parametrize('groups, axes', [
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", ('fsdp',)),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', ('data',)), ('replica_groups={{0,1},{2,3}}', ('fsdp',)),
    ('source_target_pairs={{0,2},{2,0}}', ('data',)), ('replica_groups={}', ('data', 'fsdp')),
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ('?',))])
def test_every_spelling_of_a_group_of_devices_is_read(groups, axes):
  text = TEXT.replace('replica_groups={{0,2},{1,3}}', groups)
  found = {x.op: x.axes for x in hlo.Module(text).collectives(MESH)}
  assert found['reduce-scatter'] == axes


def test_kernels_are_counted_and_buffers_have_their_source():
  assert MODULE.kernels() == [('kernel', 'f32[64,8]{1,0}', 6)]
  sources = {instruction.name: MODULE.source(instruction)
             for _, instruction, _ in MODULE.buffers()}
  assert sources['last'] == 'stack.py:78' and sources['product'] == ''


def test_bytes_and_products_are_those_that_xla_counts_where_it_counts_loops_too():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  args = shape(64, 256), shape(6, 256, 256), shape(512, 256)

  def function(turn, x, w, kept):
    x, _ = turn(lambda x, w: (jnp.tanh(x @ w), None), x, w)
    heads = x.reshape(4, 16, 256)
    return (jax.lax.dynamic_update_slice(kept, x[:1], (3, 0)),  # in place: one row is written
            jnp.einsum('bqd,bkd->bqk', heads, heads),
            jax.lax.dynamic_slice(w, (5, 7, 0), (1, 2, 9)))

  def unrolled(body, x, w):
    for i in range(6):
      x, _ = body(x, w[i])
    return x, None

  compiled = [jax.jit(lambda *args, turn=turn: function(turn, *args), donate_argnums=2).lower(
      *args).compile() for turn in (jax.lax.scan, unrolled)]
  by_xla = compiled[1].cost_analysis()
  modules = [hlo.Module(x.as_text()) for x in compiled]
  flops = 6 * 2 * 64 * 256**2 + 2 * 4 * 16**2 * 256
  assert modules[0].flops() == modules[1].flops() == flops
  assert flops <= by_xla['flops'] < 1.01 * flops  # XLA's holds what is no product, too
  assert modules[1].traffic() == pytest.approx(by_xla['bytes accessed'], rel=1e-3)
  assert modules[0].traffic() == pytest.approx(by_xla['bytes accessed'], rel=0.1)


def test_only_what_is_taken_written_or_in_hbm_is_moved():
  module = hlo.Module("""HloModule moved
ENTRY %main (a: f32[64,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %part = f32[2,8]{1,0} dynamic-slice(%a, %i, %i)
  %near = f32[64,8]{1,0:S(1)} copy(%a)
  ROOT %put = f32[64,8]{1,0} dynamic-update-slice(%a, %part, %i, %i)
}
""")
  part, whole = 4 * 2 * 8, 4 * 64 * 8
  assert module.traffic() == 2 * part + whole + 2 * part  # `near` is read, and written to VMEM


def test_collectives_of_one_channel_are_several_unless_they_are_pieces():
  ring = """%send.1 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) collective-permute-start(%a), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
  %send.2 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) collective-permute-start(%a), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
  %sent.1 = bf16[8,8]{1,0} collective-permute-done(%send.1)
  %sent.2 = bf16[8,8]{1,0} collective-permute-done(%send.2)
  ROOT %last ="""
  found = hlo.Module(TEXT.replace('ROOT %last =', ring)).collectives(MESH)
  assert [(x.op, x.bytes, x.axes) for x in found if x.op == 'collective-permute'] == [
      ('collective-permute', 8 * 8 * 2, ('fsdp',))] * 2
  assert len([x for x in found if x.op == 'all-gather']) == 1  # in two fusions


def test_what_slices_and_other_cores_exchange_is_a_collective():
  text = TEXT.replace('ROOT %last =', """%recv.3 = (f32[8,8]{1,0}, u32[], token[]) recv(%token), \
channel_id=9, x={_xla_host_transfer_rendezvous="sum.1",_xla_megascale_transfer_type="ALL_REDUCE"}
  %apart = ((f32[64,8]), f32[16,8]) call-start(%a), to_apply=%all-reduce-scatter
  ROOT %last =""")
  found = hlo.Module(text).collectives(MESH)
  between = [x for x in found if 'slice' in x.axes]
  assert [(x.op, x.bytes, x.axes, x.overlapped) for x in between] == [
      ('all-reduce', 8 * 8 * 4, ('slice',), True)]
  scattered = [(x.times, x.overlapped) for x in found if x.op == 'reduce-scatter']
  assert (1, True) in scattered


def test_time_is_a_range_and_the_network_counts():
  facts = {'mesh': MESH, 'parameters': 1000, 'parameter_bytes': 1000, 'optimizer_bytes': 2000,
           'peak_bytes': 9000, 'tokens': 64, 'flops_per_token': 6000}
  topology = Topology.parse('v5e:2x2')
  result = compile_report.make(MODULE, facts, {'kernel': 50}, topology, None)
  assert result['estimated_cycles'] == 607 and result['kernel_cycles'] == 300
  assert sum(result['hbm_bytes'].values()) == 9000 == result['hbm_peak_bytes']
  low, high = result['step_seconds']
  compute = 907 / topology.chip.clock_hz
  network = 6 * (64 * 8 * 2 * .75 / 180e9 + 16 * 8 * 4 / 90e9)
  assert low == pytest.approx(max(compute, network))
  assert high == pytest.approx(compute + network)
  assert result['mfu'][1] == pytest.approx(64 * 6000 / 4 / topology.chip.peak_flops / low)
  assert result['training_tokens'] == 20_000 and result['training_money'][0] > 0


def test_gpus_are_timed_by_products_and_memory_and_hosts_are_slower_than_their_inside():
  facts = {'mesh': MESH, 'parameters': 1000, 'parameter_bytes': 1000, 'optimizer_bytes': 2000,
           'peak_bytes': 9000, 'tokens': 64, 'flops_per_token': 6000}
  one, two = (compile_report.make(MODULE, facts, {}, Topology.parse(name), None)
              for name in ('h100:4', 'h100:2x2'))
  roofline = one['roofline_seconds']
  assert roofline['memory'] == MODULE.traffic() / 3352e9
  low, high = one['step_seconds']
  assert low == max(roofline['products'], roofline['memory'], roofline['network'])
  assert high == pytest.approx(sum(roofline[x] for x in ('products', 'memory', 'network')))
  gathered = 6 * 64 * 8 * 2 * .75  # both hosts, by two cards of each
  scattered = 6 * 16 * 8 * 4  # along `data`, which is from host to host
  assert roofline['network'] == pytest.approx((gathered + scattered) / 450e9)
  assert two['roofline_seconds']['network'] == pytest.approx(gathered / 100e9 + scattered / 50e9)


@pytest.mark.parametrize('name', ['v5e', 'v5litepod-16', 'v7:2x2', 'v5e:2x'])
def test_what_is_no_topology_is_refused(name):
  with pytest.raises(UserError, match='such as v5e:16x16'):
    Topology.parse(name)
