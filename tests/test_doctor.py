"""The doctor finds the tiny models healthy, and finds each illness that is really given to them."""
import json

import jax
import numpy as np
import pytest

from lm import doctor
from lm.data.loader import Loader
from lm.layers import cache, kernels, stack
from lm.models import gpt
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import checkpoint, step
from lm.training.optimizers import AdamW
from pallas_kernels import dropout
from pallas_kernels.cross_entropy import blocks
from pallas_kernels.flash_attention import cpu

GPT2 = gpt.GPTConfig(vocab_size=37, max_length=24, d_model=16, num_layers=1, num_heads=4, d_ff=24,
                     dtype='bfloat16', dropout_rate=0.1)
LLAMA = gpt.GPTConfig(vocab_size=37, max_length=24, d_model=16, num_layers=2, num_heads=4, d_ff=24,
                      num_kv_heads=2, norm='rmsnorm', positions='rotary', activation='swiglu',
                      use_bias=False, tie_embeddings=False, scan_layers=True)


class Documents:
  """Five documents of 30 tokens."""
  lengths = np.full(5, 30)

  def slice(self, index, start, stop):
    return np.arange(start, stop, dtype=np.int32) + 100 * index


def examine(config, only=None, loader=None, batch_size=4):
  mesh = MeshConfig(fsdp=-1, data=1).build()
  return doctor.check(config, AdamW().build(4), mesh, Rules(), 24, batch_size, loader, only=only)


def test_every_invariant_holds_and_what_needs_more_devices_says_so():
  results = examine(GPT2, loader=Loader(Documents(), 8, 4, seed=0))
  for name, reason in (('sharded == single device', 'one device'),
                       ('memory == concatenated segments', 'carries no memory')):
    skipped = results.pop(name)
    assert skipped['holds'] is None and reason in skipped['reason']
  assert len(results) == 14 and all(r['holds'] for r in results.values()), results
  assert all(r['difference'] <= r['tolerance'] < 0.05 for r in results.values())
  json.dumps(results)  # `--json` can hold it
  assert doctor.format_table(results).count('holds') == 14


def test_the_invariants_of_the_architecture_hold_for_a_llama():
  names = ('packed == unpacked', 'scanned == unrolled', 'kernel == reference (attention, bfloat16)',
           'cached decoding == full forward')
  results = examine(LLAMA, only=names)
  assert list(results) == list(names) and all(r['holds'] for r in results.values()), results


def without_segments(*args, **kwargs):
  kwargs.update(query_segment_ids=None, key_segment_ids=None)
  return doctor.flash_attention(*args, **kwargs)


def the_first_part_again(tree, num_parts, original=step._cut):
  return jax.tree.map(lambda x: jax.numpy.stack([x[0]] * num_parts), original(tree, num_parts))


def without_mask(options, query, key, value, bias, masking, original=cpu.forward):
  return original(options._replace(causal=False), query, key, value, bias, type(masking)())


def slightly_wrong(*args, original=blocks.loss_and_gradients, **kwargs):
  carry, dhidden = original(*args, **kwargs)
  return carry, dhidden * 1.1


def wrong_product(x, w, implementation, original=doctor.matmul):
  return original(x, w, implementation=implementation) * (1 if implementation else 1.1)


def twice_as_large(tree, original=stack.unstack):
  return original(jax.tree.map(lambda x: 2 * x, tree))


def one_place_late(old, rows, places, new, original=cache.scatter, **options):
  return original(old, rows, places + 1, new, **options)


def by_the_row(self, x, rate):
  """What depends on which rows stand beside one."""
  return x * jax.random.bernoulli(jax.random.key(0), 1 - rate, x.shape) / (1 - rate)


def forgetful(self, abstract, original=checkpoint.Checkpointer.restore):
  step, state, data = original(self, abstract)
  return step, jax.tree.map(lambda x: x if x.ndim else x * 0, state), data


ILLNESSES = [
    ('packed == unpacked', kernels, 'flash_attention', without_segments),
    ('accumulated == one big batch', step, '_cut', the_first_part_again),
    ('scanned == unrolled', stack, 'unstack', twice_as_large),
    ('rematerialised == not', jax, 'checkpoint',
     lambda f, **_: lambda x, *inputs: f(x * 1.01, *inputs)),
    ('dropout == dropout, however computed', dropout.Draws, 'dropout', by_the_row),
    ('kernel == reference (attention, bfloat16)', cpu, 'forward', without_mask),
    ('kernel == reference (cross_entropy, bfloat16)', blocks, 'loss_and_gradients', slightly_wrong),
    ('kernel == reference (matmul, bfloat16)', doctor, 'matmul', wrong_product),
    ('cached decoding == full forward', cache, 'scatter', one_place_late),
    ('resumed == uninterrupted', checkpoint.Checkpointer, 'restore', forgetful),
]


@pytest.mark.parametrize('name, where, what, broken', ILLNESSES, ids=[i[0] for i in ILLNESSES])
def test_an_illness_is_found_by_its_invariant(monkeypatch, name, where, what, broken):
  monkeypatch.setattr(where, what, broken)
  result = examine(GPT2, only=(name,))[name]
  assert result['holds'] is False and result['difference'] > result['tolerance'], result


def test_hosts_that_read_the_same_rows_are_found():
  class Same(Loader):
    def batch(self, step, rows=None):
      whole = super().batch(step)
      return whole if rows is None else {k: v[:rows.stop - rows.start] for k, v in whole.items()}

  name = 'more hosts == one host'
  result = examine(GPT2, only=(name,), loader=Same(Documents(), 8, 4, seed=0))[name]
  assert result['holds'] is False


def test_an_invariant_that_cannot_be_computed_is_reported_with_its_error(monkeypatch):
  def fails(*_, **__):
    raise RuntimeError('no such unit')
  monkeypatch.setattr(doctor, 'matmul', fails)
  name = 'kernel == reference (matmul, float32)'
  results = examine(GPT2, only=(name,))
  assert results[name]['holds'] is False and 'no such unit' in results[name]['reason']
  assert 'BROKEN' in doctor.format_table(results) and 'no such unit' in doctor.format_table(results)


def test_a_batch_that_cannot_be_divided_skips_with_a_reason():
  result, = examine(GPT2, only=('accumulated == one big batch',), batch_size=1).values()
  assert result['holds'] is None and 'batch_size=1' in result['reason']


def test_sharding_is_checked_on_eight_devices_and_its_illness_found(child_with_devices):
  healthy, ill = child_with_devices(__file__, devices=8)
  assert healthy['holds'] is True, healthy
  assert ill['holds'] is False and ill['difference'] > ill['tolerance'], ill


def main():
  """Run in a child with eight devices: prints what is found with sound and with broken sharding."""
  name = 'sharded == single device'
  healthy = examine(GPT2, only=(name,), batch_size=8)[name]
  original = gpt.constrain
  gpt.constrain = lambda x, rules, *names: original(x, rules, *names) * (1 + (rules.mesh.size > 1))
  print(json.dumps([healthy, examine(GPT2, only=(name,), batch_size=8)[name]]))


if __name__ == '__main__':
  main()
