"""What the TPU compiler says, through the door that benches and tests use."""
import pathlib

import pytest

from pallas_kernels import tpu_compiler

BUNDLES = """
      0x0   : {  %a = vld }
      0x1 LB: {  %b = vmatmul }
      0x2   : {  %c = vst }
      0x3 LB: {  %d = vadd }
      0x4   : {  %p1 = scmp.ge.s32.totalorder %s1, 5 /* loop exit test */ }
      0x5   : {  %e = sbr.rel (!%p1) }
      0x6   : {  %p2 = scmp.ge.s32.totalorder (%p9), %s2, 3 /* loop exit test */ }
      0x7   : {  %f = sbr.rel (!%p2) }
      0x8   : {  %g = vst }
"""


def test_a_bundle_counts_as_often_as_the_loops_around_it_run():
  inner = 5 * 3
  assert tpu_compiler.count_cycles(BUNDLES) == 1 + 3 * (2 + inner + 2) + 1


def test_loops_whose_trips_are_not_stated_run_as_often_as_is_said():
  loop = ['0x1 LB: { %a = vld } /* Start region 7 */',
          '0x2 : { %e = sbr.rel (!%p1) target = $region7 }']
  around = ['0x0 LB: { %a = vld } /* Start region 6 */', *loop,
            '0x3 : { %e = sbr.rel (!%p2) target = $region6 }']
  assert tpu_compiler.count_cycles('\n'.join(loop)) == 2
  assert tpu_compiler.count_cycles('\n'.join(loop), trips=2.5) == 5
  assert tpu_compiler.count_cycles('\n'.join(around), trips=10.0) == 4 * 10


@pytest.mark.supports('kernels', 'compiled for v4, v5e, v5p, v6e and tpu7x without a TPU')
def test_the_compiler_counts_a_kernel_and_says_what_it_refuses(monkeypatch):
  pytest.importorskip('libtpu', reason='the tpu extra is not installed')
  monkeypatch.setenv('PYTHONPATH', str(pathlib.Path(__file__).parent))
  reports = tpu_compiler.reports('tpu_cases:cases', ['1 block', '64 blocks', 'too large'],
                                 tpu_compiler.TOPOLOGIES['v5e'])
  one, many, large = reports.values()
  assert set(one.kernels) == set(many.kernels) and len(one.kernels) == 1
  assert 64 <= one.cycles < 2 * 64 and 64 * 64 <= many.cycles < 2 * 64 * 64  # stores, one a cycle
  assert 'vmem' in large.refusal.lower() and not large.kernels and not one.refusal


def test_a_child_that_raises_is_one_sentence():
  with pytest.raises(RuntimeError, match="compiling 'x' for v5e:2x2 failed: .*nowhere"):
    tpu_compiler.reports('nowhere:cases', ['x'], 'v5e:2x2')


def test_a_program_that_ends_the_compiler_is_refused_and_the_next_ones_go_on(monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(pathlib.Path(__file__).parent))
  reports = tpu_compiler.stream('tpu_cases:deaths', ['one', 'other'], 'v5e:2x2')
  assert [(name, report.refusal) for name, report in reports] == [
      (name, f'it ends the compiler: F1122 {name}') for name in ('one', 'other')]
