"""What the benches of the kernels print, with a compiler that answers at once."""
import importlib

import pytest

from pallas_kernels import measure, tpu_compiler

KERNELS = ('cross_entropy', 'flash_attention', 'glu', 'grouped_matmul', 'norm', 'quantized_matmul',
           'rotary')


def answer(cases, names, topology):
  """Refuses every second program, and reads what the child process would compile."""
  made = measure.programs()
  assert cases == 'pallas_kernels.measure:programs' and topology in tpu_compiler.TOPOLOGIES.values()
  for i, name in enumerate(names):
    assert isinstance(made[name], measure.Program)
    yield name, (tpu_compiler.Report(refusal='too large') if i % 2 else
                 tpu_compiler.Report({'kernel': 1_000_000 - i}, temp_bytes=2**20))


def printed(monkeypatch, capsys, kernel, *flags):
  monkeypatch.setattr(tpu_compiler, 'stream', answer)
  monkeypatch.setattr(measure, 'traffic', lambda *_: {'kernel': (546, 5460)})
  monkeypatch.setattr('sys.argv', ['bench', *flags])
  measure.main(kernel)
  return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize('kernel', KERNELS)
def test_a_bench_has_a_row_for_each_program_or_why_there_is_none(monkeypatch, capsys, kernel):
  spec, *_ = importlib.import_module(f'pallas_kernels.{kernel}.specs').SPECS
  header, *rows = printed(monkeypatch, capsys, kernel, '--spec', spec, '--generation', 'v5e')
  assert header.startswith('v5e') and 'cycles' in header and len(rows) > 1
  assert all(row.startswith(spec) for row in rows)
  assert all('1,000,000' in row or '999,' in row for row in rows[::2])
  assert all(row.endswith('too large') for row in rows[1::2])


def test_tuning_names_the_blocks_of_the_fewest_cycles(monkeypatch, capsys):
  rows = printed(monkeypatch, capsys, 'grouped_matmul', '--spec', 'OLMoE 1B-7B up', '--tune')
  best = [row for row in rows if ' best: ' in row]
  assert [row.split()[0].split('|')[0] for row in best] == ['v5e'] * 3
  assert best[0].endswith('(512, 1024)') and sum('too large' in row for row in rows) == 7


def test_each_option_is_a_variant(monkeypatch, capsys):
  monkeypatch.setattr(measure, '_cells', lambda *_: ())
  rows = printed(monkeypatch, capsys, 'flash_attention', '--spec', 'bert_base', '--variants')
  assert {'packed', 'bias', 'softcap', 'prefix', 'window'} <= {row.split()[1] for row in rows[1:]}
