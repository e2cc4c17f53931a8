"""Checks, on the user's own model and mesh, that what should be equal is equal.

In: a model's config, an optimiser, a mesh, rules. Out: for each invariant whether it holds, the
largest difference and the tolerance. Change `doctor_compare.py` for what is compared and how
closely; add an invariant as a small function here, and to `invariants()`.

Comparisons run in float32, where a true difference stands out from rounding, and but for dropout's
own without dropout. Kernels also run in bfloat16, and resuming exactly as the run trains.
"""
from collections.abc import Mapping
import dataclasses
import functools
import math
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np
import optax
import tqdm

from lm.data.objectives import CausalLM
from lm.doctor_compare import change, difference, KEEP_GRADIENT, pack, Skipped, Subject, tolerance
from lm.parallel.rules import Rules, axes_of
from lm.training import checkpoint
from lm.training.losses import Prediction
from lm.training.state import abstract_state, init_state
from lm.training.step import jit_train_step
from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.matmul import matmul

Result = dict[str, Any]
CACHED_STEPS = 8  # tokens decoded one by one; the others fill the cache


def packed_equals_unpacked(s: Subject) -> tuple[float, float]:
  """Two texts in one row, as segments, are what they are in rows of their own."""
  rows, length = s.shape
  if length < 2:
    raise Skipped('sequence_length=1 has no room for two texts; make it longer')
  if s.objective.contiguous:
    raise Skipped('rows go on from batch to batch, so they are not packed')
  config, apart = s.exact, s.random_batch(2 * rows, length // 2)
  if getattr(config, 'moe', None):  # whose penalties are of rows
    free = dataclasses.replace(config.moe, balance_weight=0.0, z_weight=0.0)
    config = dataclasses.replace(config, moe=free)
  return difference(s.gradients(config, batch=pack(apart)),
                    s.gradients(config, batch=apart)), s.tolerance


def accumulated_equals_whole(s: Subject) -> tuple[float, float]:
  """Gradients summed over microbatches are those of the batch."""
  batch_size, shards = s.shape[0], _batch_shards(s.rules)
  if not _microbatches(s, shards):
    raise Skipped(f'batch_size={batch_size} over {shards} devices leaves nothing to accumulate; '
                  f'try {2 * shards}')
  return difference(s.gradients(num_microbatches=_microbatches(s, shards)[0]),
                    s.usual), s.tolerance


def _microbatches(s, shards):
  """Numbers of them into which the batch can be cut."""
  return [n for n in range(2, s.shape[0] + 1) if s.shape[0] % (n * shards) == 0]


def _batch_shards(rules: Rules) -> int:
  return math.prod(rules.mesh.shape[axis] for axis in axes_of(rules.batch))


def sharded_equals_single(s: Subject) -> tuple[float, float]:
  """The mesh computes what one of its devices computes."""
  if s.rules.mesh.size == 1:
    raise Skipped('the mesh has one device')
  return difference(s.usual, s.gradients(rules=_on_one_device(s.rules))), s.tolerance


def _on_one_device(rules: Rules) -> Rules:
  names, device = rules.mesh.axis_names, rules.mesh.devices.flat[0]
  return rules.on(jax.make_mesh((1,) * len(names), names, (AxisType.Auto,) * len(names),
                                devices=[device]))


def dropout_equals_however_computed(s: Subject) -> tuple[float, float]:
  """What is dropped does not depend on mesh, microbatches, scan and rematerialisation: all of them
  at once are changed."""
  is_ring = s.rules.attention == 'ring' and s.rules.shards('length') > 1
  config = change(s.exact, dropout_rate=0.1, layer_drop_rate=0.1,
                  attention_dropout_rate=0.0 if is_ring else 0.1)  # a ring draws by its own parts
  other = change(config, scan_layers=not s.config.scanned,
                 remat='none' if s.config.remat == 'full' else 'full')
  found = s.gradients(other, _on_one_device(s.rules), num_microbatches=[
      *_microbatches(s, 1), 1][0])
  return difference(found, s.gradients(config)), s.tolerance


def scanned_equals_unrolled(s: Subject) -> tuple[float, float]:
  """A loop over layers computes what the layers written out compute."""
  other = change(s.exact, scan_layers=not s.config.scanned)
  return difference(s.gradients(other), s.usual), s.tolerance


def rematerialised_equals_not(s: Subject) -> tuple[float, float]:
  """Activations computed again are those that would have been kept."""
  others = [policy for policy in ('none', 'full', 'dots') if policy != s.config.remat]
  changed = [change(s.exact, remat=policy) for policy in others]
  return max(difference(s.gradients(config), s.usual)
             for config in changed), s.tolerance


def _kernel_difference(kernel, arrays, num_differentiable, chosen=None, **options) -> float:
  """Between the chosen implementation and the reference: the output and its gradients."""
  def run(implementation):
    call = functools.partial(kernel, implementation=implementation, **options)

    def loss(differentiable, rest):
      out = call(*differentiable, *rest)
      weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
      return jnp.vdot(out.astype(jnp.float32), weights), out
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return gradient(arrays[:num_differentiable], arrays[num_differentiable:])
  return difference(run(chosen), run('reference'))


def _normal(seed: int, *shapes, dtype) -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes)


def attention_equals_reference(s: Subject, dtype: str) -> tuple[float, float]:
  """The attention kernel at the model's heads and this batch's segments."""
  cfg, causal = s.config, 'decoder_input_tokens' in s.batch
  segment_ids = s.batch.get(f'{"decoder" if causal else "encoder"}_segment_ids')
  B, T = s.shape if segment_ids is None else segment_ids.shape
  key = B, T, cfg.kv_heads, cfg.head_dim
  arrays = _normal(s.seed, (B, T, cfg.num_heads, cfg.head_dim), key, key, dtype=dtype)
  segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
  masking = {'causal': causal, 'query_segment_ids': segment_ids, 'key_segment_ids': segment_ids}
  return (_kernel_difference(flash_attention, arrays, 3, cfg.attention_implementation, **masking),
          tolerance(dtype, cfg.head_dim, T))


def cross_entropy_equals_reference(s: Subject, dtype: str) -> tuple[float, float]:
  """The loss kernel at the model's width and vocabulary."""
  cfg = s.config
  name = next((name for name in ('masked', 'decoder') if f'{name}_target_tokens' in s.batch), None)
  if name is None:
    raise Skipped('the objective predicts no tokens')
  targets, weights = s.batch[f'{name}_target_tokens'], s.batch[f'{name}_loss_weights']
  hidden, embedding = _normal(s.seed, (*targets.shape, cfg.d_model), (cfg.vocab_size, cfg.d_model),
                              dtype=dtype)
  arrays = hidden, embedding * jnp.asarray(cfg.d_model**-0.5, dtype), targets, weights
  return (_kernel_difference(cross_entropy, arrays, 2),
          tolerance(dtype, cfg.d_model, cfg.vocab_size, targets.size))


def matmul_equals_reference(s: Subject, dtype: str) -> tuple[float, float]:
  """The product of the layers, at the largest of them, with float32 weights."""
  cfg, (B, T) = s.config, s.shape
  x, = _normal(s.seed, (B, T, cfg.d_model), dtype=dtype)
  w, = _normal(s.seed + 1, (cfg.d_model, cfg.d_ff), dtype='float32')
  return (_kernel_difference(matmul, (x, w), 2),
          tolerance(dtype, cfg.d_model, cfg.d_ff, B * T))


def cached_equals_full(s: Subject) -> tuple[float, float]:
  """Decoding token by token behind prompts of different lengths sees what a full pass sees."""
  cfg = s.exact
  if not hasattr(cfg, 'init_cache') or 'decoder_input_tokens' not in s.batch:
    raise Skipped('the model does not decode with a cache of keys and values')
  tokens_BT = jnp.asarray(s.batch['decoder_input_tokens'])
  B, T = tokens_BT.shape
  if hasattr(cfg, 'memory_length'):  # a full pass sees all of a segment, decoding this many tokens
    cfg = dataclasses.replace(cfg, memory_length=max(cfg.memory_length, T))
  module, num_steps = cfg.build(s.rules), min(CACHED_STEPS, T - 1)
  if not num_steps:
    raise Skipped('sequence_length=1 has nothing to decode; make it longer')
  inputs = s.batch.get('encoder_input_tokens')  # of an encoder-decoder
  inputs = None if inputs is None else jnp.asarray(inputs)
  lengths_B = (T - num_steps) - jnp.arange(B) % max(1, (T - num_steps) // 2)

  @jax.jit
  def both(params, tokens_BT):
    variables = {'params': params}
    take = lambda x, place_B: jax.vmap(lambda row, i: row[i][None])(x, place_B)
    apply, memory = functools.partial(module.apply, variables), {}
    if inputs is not None:
      memory = {'memory_BSD': apply({'encoder_input_tokens': inputs}, method='encode')}
      apply = functools.partial(apply, method='decode')
    full_BTD, _ = apply(tokens_BT, **memory)
    prompt_BTD, cache = apply(tokens_BT[:, :T - num_steps], cache=cfg.init_cache(B, T), **memory)
    def decode(cache, _):
      place_B = cache.length_B
      hidden_B1D, cache = apply(take(tokens_BT, place_B), cache=cache)
      return cache, (hidden_B1D, take(full_BTD, place_B))
    cache = dataclasses.replace(cache, length_B=lengths_B)
    decoded, expected = jax.lax.scan(decode, cache, None, num_steps)[1]
    return (prompt_BTD, decoded), (full_BTD[:, :T - num_steps], expected)
  return difference(*both(s.params, tokens_BT)), tolerance(
      'float32', cfg.num_layers * (cfg.d_model + cfg.d_ff + T))


def memory_equals_concatenation(s: Subject) -> tuple[float, float]:
  """A segment that remembers the one before it sees what it sees behind it in one row."""
  rows, length = s.shape
  if s.exact.init_carry(1) is None:
    raise Skipped('the model carries no memory from batch to batch')
  # As far back as a token sees in one layer; deeper ones reach further in one row than in two.
  config = dataclasses.replace(s.exact, memory_length=length, num_layers=1)
  module = config.build(s.rules)
  params = jax.device_get(init_state(module, KEEP_GRADIENT, s.rules, s.seed, rows).params)
  tokens = s.random_batch(rows, 2 * length)['decoder_input_tokens']

  @jax.jit
  def both(params, tokens):
    apply = functools.partial(module.apply, {'params': params})
    whole, _ = apply(tokens)
    _, memory = apply(tokens[:, :length], config.init_carry(rows))
    return apply(tokens[:, length:], memory)[0], whole[:, length:]
  return difference(*both(params, tokens)), tolerance('float32', s.config.d_model, s.config.d_ff,
                                                      length)


def resumed_equals_uninterrupted(s: Subject) -> tuple[float, float]:
  """Four steps are, bit for bit, two steps, a checkpoint on the disk, and two more."""
  module = s.config.build(s.rules)
  abstract = abstract_state(module, s.optimizer, s.rules, s.shape[0])
  step = jit_train_step(module, s.loss, s.optimizer, s.rules, abstract)

  def train(state, steps):
    for i in steps:  # another batch each step: the rows turned by one
      state, _ = step(state, {name: np.roll(x, i, axis=0) for name, x in s.batch.items()})
    return state

  state = train(s.new_state(module, s.optimizer, s.rules, s.shape[0]), range(2))
  with tempfile.TemporaryDirectory() as directory:
    saver = checkpoint.Checkpointer(directory)
    saver.save(2, state, {})
    whole = jax.device_get(train(state, (2, 3)))
    saver.close()
    loader = checkpoint.Checkpointer(directory)
    _, state, _ = loader.restore(abstract)
    loader.close()
  resumed = jax.device_get(train(state, (2, 3)))
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), resumed,
                      whole)
  # A difference of bits counts even where the numbers are equal or their difference rounds to 0.
  return 0.0 if all(jax.tree.leaves(same)) else max(
      difference(resumed, whole), float(np.finfo(np.float32).tiny)), 0.0


def more_hosts_equal_one(s: Subject) -> tuple[float, float]:
  """The rows that several hosts read, laid together, are the batch that one host reads."""
  if s.loader is None:
    raise Skipped('no loader of data was given')
  size = s.loader.batch_size
  counts = [n for n in range(2, size + 1) if size % n == 0]
  if not counts:
    raise Skipped(f'batch_size={size} cannot be divided among hosts')
  worst = 0.0
  for hosts in {counts[0], counts[-1]}:
    cuts = [slice(i * size // hosts, (i + 1) * size // hosts) for i in range(hosts)]
    for step in (0, 1, 1000):
      parts = [s.loader.batch(step, rows) for rows in cuts]
      together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
      worst = max(worst, difference(together, s.loader.batch(step)))
  return worst, 0.0


def invariants() -> dict[str, Any]:
  """Name -> function of a `Subject`, in the order in which they are checked."""
  kernels = {'attention': attention_equals_reference, 'matmul': matmul_equals_reference,
             'cross_entropy': cross_entropy_equals_reference}
  return {
      'packed == unpacked': packed_equals_unpacked,
      'accumulated == one big batch': accumulated_equals_whole,
      'sharded == single device': sharded_equals_single,
      'scanned == unrolled': scanned_equals_unrolled,
      'rematerialised == not': rematerialised_equals_not,
      'dropout == dropout, however computed': dropout_equals_however_computed,
      **{f'kernel == reference ({name}, {dtype})': functools.partial(function, dtype=dtype)
         for name, function in kernels.items() for dtype in ('float32', 'bfloat16')},
      'cached decoding == full forward': cached_equals_full,
      'memory == concatenated segments': memory_equals_concatenation,
      'resumed == uninterrupted': resumed_equals_uninterrupted,
      'more hosts == one host': more_hosts_equal_one,
  }


def check(model_config: Any, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules,
          sequence_length: int, batch_size: int, loader: Any = None, seed: int = 0,
          only: tuple[str, ...] | None = None, objective: Any = None, loss: Any = Prediction()
          ) -> dict[str, Result]:
  """Checks every invariant, or `only` those named.

  Args:
    model_config: as it trains; nothing of it is made smaller.
    optimizer: as it trains.
    sequence_length: tokens a row, at most the model's context.
    batch_size: rows; a multiple of the devices that share a batch, twice that to check
      accumulation.
    loader: of `lm.data.loader`, for what concerns the reading of data; None skips it.
    objective, loss: as it trains; the objective is bound to the vocabulary. None is the next token.

  Returns:
    By name: `holds` (None where it cannot be checked here), `difference` relative to the scale of
    what is compared, `tolerance`, `seconds`; and a `reason` where it could not be checked or
    computed.
  """
  objective = objective or CausalLM(model_config.vocab_size)
  subject = Subject(model_config, loss, optimizer, rules.on(mesh), objective,
                    (batch_size, sequence_length), loader, seed)
  chosen = {name: f for name, f in invariants().items() if only is None or name in only}
  return {name: _examine(f, subject) for name, f in tqdm.tqdm(
      chosen.items(), desc='doctor', unit=' invariants', disable=None, leave=False)}


def _examine(invariant, subject: Subject) -> Result:
  start, result = time.perf_counter(), {}
  try:
    found, allowed = invariant(subject)
    result = {'holds': found <= allowed, 'difference': found, 'tolerance': allowed}
  except Skipped as skipped:
    result = {'holds': None, 'difference': None, 'tolerance': None, 'reason': str(skipped)}
  except Exception as error:  # pylint: disable=broad-except  # the others are still worth knowing
    message = (str(error).strip().splitlines() or [''])[0]
    result = {'holds': False, 'difference': None, 'tolerance': None,
              'reason': f'{type(error).__name__}: {message}'}
  return {**result, 'seconds': time.perf_counter() - start}


def format_table(results: Mapping[str, Result]) -> str:
  """One line an invariant, for people."""
  words = {True: 'holds', False: 'BROKEN', None: 'skipped'}
  width = max(map(len, results), default=0)
  lines = []
  for name, r in results.items():
    detail = r.get('reason') or f'difference {r["difference"]:.1e}, tolerance {r["tolerance"]:.1e}'
    lines.append(f'{name:<{width}}  {words[r["holds"]]:<7}  {r["seconds"]:5.1f} s  {detail}')
  return '\n'.join(lines)
