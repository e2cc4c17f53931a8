"""Every optimiser against steps computed by hand; its memory; what all of them share."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.errors import UserError
from lm.training import optimizers
from lm.training.checkpoint import Checkpointer
from lm.training.optimizers import (
    Adafactor, Adagrad, Adam, AdamW, evaluated, Group, LAMB, Lion, Muon, RMSprop, Schedule,
    ScheduleFree, SGD, SOAP, Sophia)
from lm.training.optimizers import muon, paths, quantized

RATE = Schedule(kind='constant', learning_rate=0.1, warmup_steps=0)
ALL = [SGD, AdamW, Adam, Adagrad, RMSprop, Adafactor, Lion, LAMB, Muon, Sophia, SOAP, ScheduleFree]
IN_8_BITS = AdamW, Muon, SOAP, ScheduleFree
DECAY, CLIP, STEPS = 0.3, 2.0, 4
SETTINGS = {SGD: dict(nesterov=True), RMSprop: dict(momentum=0.5), Sophia: dict(every=2, gamma=0.3),
            Adafactor: dict(min_size_to_factor=2), SOAP: dict(every=2, block_size=3)}


def make_params():
  """Two layers of an [4, 6] kernel, and all else that a model has; float64."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape)
  return {'blocks': {'layers': {'wi': {'kernel': draw(2, 4, 6), 'bias': draw(2, 6)},
                                'norm': {'scale': draw(2, 4)}}},
          'token_embedding': draw(5, 4)}


def gradient(p, t):
  return np.sin((t + 1) * np.float64(p)) * 2


def build(cls, **fields):
  return cls(**{'schedule': RATE, 'weight_decay': DECAY, 'clip_norm': CLIP, **SETTINGS.get(cls, {}),
                **fields}).build(10)


def update(cls, optimizer, t, grads, state, params):
  """A step; Sophia also asks for a gradient of sampled tokens, of which there are 7."""
  sampled = lambda: (jax.tree.map(lambda p: jnp.float32(gradient_of_sample(p, t)), params), 7.0)
  extra = {'sampled_gradient': sampled} if cls is Sophia else {}
  updates, state = optimizer.update(grads, state, params, **extra)
  return optax.apply_updates(params, updates), state


def gradient_of_sample(p, t):
  return jnp.cos((t + 2) * p)


@pytest.fixture(scope='module')
def trained():
  """{class: parameters after each step, float64}; all compiled at once."""
  built = {cls: build(cls) for cls in ALL}
  start = jax.tree.map(jnp.float32, make_params())

  def steps():
    out = {cls.__name__: [] for cls in ALL}
    for cls, optimizer in built.items():
      params, state = start, optimizer.init(start)
      for t in range(STEPS):
        grads = jax.tree.map(lambda p: jnp.sin((t + 1) * p) * 2, params)
        params, state = update(cls, optimizer, t, grads, state, params)
        out[cls.__name__].append((params, evaluated_in(state, params)))
    return out

  return jax.device_get(jax.jit(steps)())


def evaluated_in(state, params):
  """`evaluated` while tracing, where nothing can be placed."""
  return params if not isinstance(state[1], optax.contrib.ScheduleFreeState) else (
      optax.contrib.schedule_free_eval_params(state[1], params))


# The direction of a step, of one leaf: gradient, its own memory, t = 0, 1, ..., parameter.


def adam(g, s, t, b1, b2, epsilon):
  s['m'] = b1 * s.get('m', 0) + (1 - b1) * g
  s['v'] = b2 * s.get('v', 0) + (1 - b2) * g**2
  return s['m'] / (1 - b1**(t + 1)) / (np.sqrt(s['v'] / (1 - b2**(t + 1))) + epsilon)


def sgd(g, s, t, p, is_matrix):
  s['m'] = 0.9 * s.get('m', 0) + g
  return g + 0.9 * s['m']


def adagrad(g, s, t, p, is_matrix):
  s['v'] = s.get('v', 0.1) + g**2
  return g / np.sqrt(s['v'] + 1e-7)


def rmsprop(g, s, t, p, is_matrix):
  s['v'] = 0.99 * s.get('v', 0) + 0.01 * g**2
  s['m'] = 0.5 * s.get('m', 0) + g / (np.sqrt(s['v']) + 1e-8)
  return s['m']


def lion(g, s, t, p, is_matrix):
  sign = np.sign(0.9 * s.get('m', 0) + 0.1 * g)
  s['m'] = 0.99 * s.get('m', 0) + 0.01 * g
  return sign


def adafactor(g, s, t, p, is_matrix):
  """Algorithm 4 of the paper, of one matrix or vector."""
  b2 = 1 - (t + 1)**-0.8
  square = g**2 + 1e-30
  if g.ndim == 2:
    s['r'] = b2 * s.get('r', 0) + (1 - b2) * square.sum(1)
    s['c'] = b2 * s.get('c', 0) + (1 - b2) * square.sum(0)
    v = np.outer(s['r'], s['c']) / s['r'].sum()
  else:
    s['v'] = v = b2 * s.get('v', 0) + (1 - b2) * square
  u = g / np.sqrt(v)
  u /= max(1, np.sqrt((u**2).mean()))
  return u * max(1e-3, np.sqrt((p**2).mean()))


def muon_by_hand(g, s, t, p, is_matrix):
  if not is_matrix:
    return adam(g, s, t, 0.9, 0.95, 1e-8)
  s['m'] = 0.95 * s.get('m', 0) + g
  x = 0.95 * s['m'] + g
  a, b, c = muon.COEFFICIENTS
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return 0.2 * np.sqrt(max(x.shape)) * x


def sophia(g, s, t, p, is_matrix):
  s['m'] = 0.965 * s.get('m', 0) + 0.035 * g
  m = s['m'] / (1 - 0.965**(t + 1))
  direction = np.clip(m / np.maximum(0.3 * s.get('h', np.zeros_like(g)), 1e-15), -1, 1)
  if t % 2 == 0:  # used from the next step on
    s['h'] = 0.99 * s.get('h', 0) + 0.01 * 7 * np.cos((t + 2) * p)**2
  return direction


def soap_block(g, s, t):
  """Algorithm 3 of the paper, of one block; the first gradient moves nothing, as in its code."""
  direction = np.zeros_like(g)
  if t:
    rotate = lambda x: s['ql'].T @ x @ s['qr']
    s['m'] = 0.95 * s.get('m', 0) + 0.05 * g
    s['v'] = 0.95 * s.get('v', 0) + 0.05 * rotate(g)**2
    step = rotate(s['m']) / (1 - 0.95**t) / (np.sqrt(s['v'] / (1 - 0.95**t)) + 1e-8)
    direction = s['ql'] @ step @ s['qr'].T
  for side, gram in (('l', g @ g.T), ('r', g.T @ g)):
    s[side] = 0.95 * s.get(side, 0) + 0.05 * gram
    basis = s.get(f'q{side}')
    if t == 0:
      s[f'q{side}'] = np.linalg.eigh(s[side])[1][:, ::-1]
    elif t % 2 == 0:
      order = np.argsort(-np.diag(basis.T @ s[side] @ basis))
      s[f'q{side}'] = np.linalg.qr(s[side] @ basis[:, order])[0]
      s['v'] = s['v'][order] if side == 'l' else s['v'][:, order]
  return direction


def soap(g, s, t, p, is_matrix):
  if not is_matrix:
    return adam(g, s, t, 0.95, 0.95, 1e-8)
  out = np.zeros_like(g)
  for i in range(0, 4, 2):  # blocks of [2, 3]: divisors of 4 and 6 up to 3
    for j in range(0, 6, 3):
      place = slice(i, i + 2), slice(j, j + 3)
      out[place] = soap_block(g[place], s.setdefault((i, j), {}), t)
  return out


def rms_debiased(g, s, t, p, is_matrix):
  s['v'] = 0.999 * s.get('v', 0) + 0.001 * g**2
  return g / (np.sqrt(s['v'] / (1 - 0.999**(t + 1))) + 1e-8)


BY_HAND = {
    SGD: sgd, Adagrad: adagrad, RMSprop: rmsprop, Lion: lion, Adafactor: adafactor,
    Muon: muon_by_hand, Sophia: sophia, SOAP: soap, ScheduleFree: rms_debiased,
    AdamW: lambda g, s, t, p, is_matrix: adam(g, s, t, 0.9, 0.95, 1e-8),
    Adam: lambda g, s, t, p, is_matrix: adam(g, s, t, 0.9, 0.999, 1e-8),
    LAMB: lambda g, s, t, p, is_matrix: adam(g, s, t, 0.9, 0.999, 1e-6)}


def layers_of(tree):
  """[(name, arrays of each layer)]: stacked arrays are cut, as their authors know them."""
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = '/'.join(paths.names_of(path))
    yield name, list(x) if 'layers' in name else [x]


def by_hand(cls):
  """Parameters, and those to evaluate, after each step, as {(name, layer): array}."""
  flat = lambda tree: {(name, i): np.float64(x) for name, xs in layers_of(tree)
                       for i, x in enumerate(xs)}
  params = flat(make_params())
  memory = {key: {} for key in params}
  z, total = dict(params), 0
  for t in range(STEPS):
    grads = {key: gradient(p, t) for key, p in params.items()}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > CLIP  # else clipping is not tested
    average = {}
    total += 0.1**2
    for key, p in params.items():
      g = grads[key] * CLIP / norm
      u = BY_HAND[cls](g, memory[key], t, p, 'kernel' in key[0])
      decays = not key[0].endswith(('bias', 'scale'))
      u = u + DECAY * decays * p
      if cls is LAMB:
        u = u * np.linalg.norm(p) / np.linalg.norm(u)
      if cls is not ScheduleFree:
        params[key] = average[key] = p - 0.1 * u
        continue
      x = (p - 0.1 * z[key]) / 0.9  # arXiv:2405.15682, with b1 = 0.9
      z[key] = z[key] - 0.1 * u
      average[key] = x + 0.1**2 / total * (z[key] - x)
      params[key] = 0.1 * z[key] + 0.9 * average[key]
    yield dict(params), average


@pytest.mark.supports('optimisers', 'SGD, momentum and Nesterov', 'AdamW', 'Adam', 'Adagrad',
                      'RMSprop', 'Adafactor', 'Lion', 'LAMB', 'Sophia', 'SOAP', 'schedule-free')
@pytest.mark.parametrize('cls', ALL)
def test_each_step_is_the_papers_by_hand(cls, trained):
  # Muon's products are bfloat16.
  tolerance = dict(atol=0.02) if cls is Muon else dict(rtol=2e-4, atol=2e-5)
  for ours, theirs in zip(trained[cls.__name__], by_hand(cls), strict=True):
    for tree, hand in zip(ours, theirs):
      for name, xs in layers_of(tree):
        for i, x in enumerate(xs):
          np.testing.assert_allclose(x, hand[name, i], **tolerance, err_msg=f'{name} {i}')


def test_adamw_is_optax_adamw_bit_for_bit():
  params = jax.tree.map(jnp.float32, make_params())
  grads = jax.tree.map(jnp.sin, params)
  mask = lambda tree: jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key not in ('bias', 'scale'), tree)
  theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
      RATE.build(10), 0.9, 0.95, weight_decay=0.1, mask=mask))
  ours = AdamW(RATE).build(10)
  steps = [jax.jit(lambda state, o=o: o.update(grads, state, params))(o.init(params))
           for o in (ours, theirs)]
  jax.tree.map(np.testing.assert_array_equal, *(updates for updates, _ in steps))
  flat = [[jax.tree_util.keystr(path, simple=True) for path, _ in
           jax.tree_util.tree_leaves_with_path(state)] for _, state in steps]
  assert flat[0] == flat[1]  # so that old checkpoints are restored


def wide_params():
  """Large enough for 8 bits."""
  draw = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)
  return {'blocks': {'layers': {'wi': {'kernel': draw(0, 2, 64, 64)}}},
          'token_embedding': draw(1, 96, 64)}


@pytest.mark.supports('optimisers', '8-bit state')
def test_a_state_saved_and_restored_gives_the_same_next_step_bit_for_bit(tmp_path):
  """Every optimiser, some also with 8 bits, in one checkpoint."""
  start = wide_params()
  small = {SOAP: dict(block_size=32)}
  built = {(cls, bits): build(cls, state_bits=bits, **small.get(cls, {})) for bits, classes in (
      (32, ALL), (8, IN_8_BITS)) for cls in classes}
  average = 'average', 32
  built[average] = AdamW(RATE, average_decay=0.9).build(10)
  key = lambda name: f'{getattr(name[0], "__name__", name[0])}-{name[1]}'

  @jax.jit
  def step(t, carried):
    return {key(name): update(name[0], optimizer, t, jax.tree.map(
        lambda p: jnp.sin((t + 1) * p), carried[key(name)][0]), carried[key(name)][1],
        carried[key(name)][0]) for name, optimizer in built.items()}

  begin = jax.jit(lambda: {key(name): (start, o.init(start)) for name, o in built.items()})()
  state = step(jnp.float32(0), begin)
  saver = Checkpointer(tmp_path)
  saver.save(1, state, {})
  whole = step(jnp.float32(1), state)
  _, restored, _ = saver.restore(jax.eval_shape(lambda: state))
  saver.close()
  resumed = step(jnp.float32(1), restored)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  # 8 bits are near 32 and not the same.
  for cls in IN_8_BITS:
    exact, rough, before = (tree['token_embedding'] for tree in (
        whole[f'{cls.__name__}-32'][0], whole[f'{cls.__name__}-8'][0], start))
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact - before)
    assert 0 < error < 0.05, cls


@functools.cache
def documented_bytes():
  """{optimiser: bytes of a matrix, of others, of a matrix with 8 bits}."""
  rows = re.findall(r'^  (\w+) +([\d.]+) +([\d.]+) +([\d.]+)$', optimizers.__doc__, re.M)
  return {name: tuple(map(float, numbers)) for name, *numbers in rows}


@pytest.mark.parametrize('cls', ALL)
def test_state_takes_the_bytes_that_are_documented(cls):
  def bytes_of(params, bits):
    state = jax.eval_shape(cls(state_bits=bits).build(10).init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / sum(
        x.size for x in jax.tree.leaves(params))

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  matrix = {'blocks': {'layers': {'wi': {'kernel': shape((2, 256, 256))}}}}
  other = {'token_embedding': shape((256, 256))}
  found = bytes_of(matrix, 32), bytes_of(other, 32), bytes_of(matrix, 8)
  assert found == pytest.approx(documented_bytes()[cls.__name__], abs=0.006)
  assert set(documented_bytes()) == {cls.__name__ for cls in ALL}


@pytest.mark.parametrize('signed', [True, False])
def test_eight_bits_are_near_and_second_moments_never_zero(signed):
  x = jax.random.normal(jax.random.key(0), (4, 512)) * 10.0 ** jnp.linspace(-5, 3, 512)
  x = (x if signed else jnp.square(x)).at[1, :256].set(0)
  there_and_back = jax.jit(lambda x: quantized.dequantize(quantized.quantize(x, signed)))
  y = there_and_back(x)
  assert not np.any(y[1, :256])  # a block of zeros stays one
  largest = np.abs(x).reshape(4, 2, 256).max(-1).repeat(256, -1)
  share = np.abs(x) / np.where(largest > 0, largest, 1)
  error = np.abs(y - x) / np.where(largest > 0, largest, 1)
  bits = 6 if signed else 7
  assert np.all(error[share > 0.1] < 0.46 / 2**bits)  # half of 2**bits parts of (0.1, 1)
  assert np.all(error < 0.01 * (1 if signed else 0.5))
  if not signed:
    assert np.all(np.asarray(y)[np.asarray(x) > 0] > 0)
  np.testing.assert_allclose(there_and_back(y), y, rtol=1e-5)


def step_of(config, params, grads):
  optimizer = config.build(10)
  updates, state = optimizer.update(grads, optimizer.init(params), params)
  return updates, state


def ones_like(params):
  return jax.tree.map(jnp.ones_like, params)


@pytest.mark.supports('optimisers', 'groups of parameters by path')
def test_the_first_group_that_matches_decides_rate_and_decay():
  params = jax.tree.map(jnp.float32, make_params())
  groups = Group('.*bias', rate=0.0), Group('blocks/.*', rate=0.5, decay=2.0), Group('.*')
  updates, _ = step_of(SGD(RATE, momentum=0.0, weight_decay=0.3, clip_norm=None, groups=groups),
                       params, ones_like(params))
  layers, before = updates['blocks']['layers'], params['blocks']['layers']
  assert not np.any(layers['wi']['bias'])
  np.testing.assert_allclose(layers['wi']['kernel'], -0.05 * (1 + 0.6 * before['wi']['kernel']),
                             rtol=1e-5)
  np.testing.assert_allclose(layers['norm']['scale'], -0.05 * (1 + 0.6 * before['norm']['scale']),
                             rtol=1e-5)
  np.testing.assert_allclose(updates['token_embedding'],
                             -0.1 * (1 + 0.3 * params['token_embedding']), rtol=1e-5)


def test_a_parameter_that_no_group_covers_is_named():
  groups = Group('blocks/.*'),
  with pytest.raises(UserError, match=r"the parameter token_embedding; .* 'blocks/\.\*'; end them"):
    AdamW(groups=groups).build(10).init(make_params())


@pytest.mark.supports('optimisers', 'layer-wise decay of the learning rate')
def test_lower_layers_learn_slower():
  params = {**make_params(), 'output_embedding': np.zeros((5, 4))}
  updates, _ = step_of(SGD(RATE, momentum=0.0, clip_norm=None, layer_decay=0.5), params,
                       ones_like(params))
  kernel = updates['blocks']['layers']['wi']['kernel']
  for x, factor in ((updates['output_embedding'], 1), (kernel[1], 0.5), (kernel[0], 0.25),
                    (updates['token_embedding'], 0.125)):
    np.testing.assert_allclose(x, -0.1 * factor, rtol=1e-6)


@pytest.mark.supports('optimisers', 'global and adaptive clipping')
def test_the_gradient_of_a_unit_is_clipped_to_a_share_of_its_weights():
  kernel = np.ones((1, 4, 3)) * np.arange(1, 4)
  params = {'blocks': {'layers': {'wi': {'kernel': kernel, 'bias': np.zeros((1, 3))}}},
            'token_embedding': np.ones((2, 9))}
  grads = jax.tree.map(lambda p: jnp.full(p.shape, 5.0), params)
  grads['token_embedding'] = grads['token_embedding'].at[1].set(1e-3)
  updates, _ = step_of(SGD(RATE, momentum=0.0, clip_norm=None, clip_units=0.1), params, grads)
  wi = updates['blocks']['layers']['wi']
  np.testing.assert_allclose(wi['kernel'], -0.1 * 0.1 * kernel, rtol=1e-5)  # a unit is a column
  np.testing.assert_allclose(np.linalg.norm(wi['bias']), 0.1 * 0.1 * 1e-3, rtol=1e-5)
  np.testing.assert_allclose(updates['token_embedding'][0], -0.1 * 0.1, rtol=1e-5)
  np.testing.assert_allclose(updates['token_embedding'][1], -0.1 * 1e-3, rtol=1e-5)


@pytest.mark.supports('optimisers', 'moving average of the parameters, evaluated')
def test_the_average_follows_the_parameters():
  params = {'token_embedding': jnp.ones((2, 2))}
  optimizer = SGD(RATE, momentum=0.0, clip_norm=None, average_decay=0.75).build(10)
  state, average = optimizer.init(params), np.ones((2, 2))
  for _ in range(3):
    updates, state = optimizer.update(ones_like(params), state, params)
    params = optax.apply_updates(params, updates)
    average = 0.75 * average + 0.25 * np.asarray(params['token_embedding'])
  np.testing.assert_allclose(evaluated(state, params)['token_embedding'], average, rtol=1e-6)
  assert evaluated((), params) is params


@pytest.mark.parametrize('power, cls', [(1, AdamW), (1, Lion), (0.5, Muon)])
def test_a_wider_model_moves_its_kernels_less_and_decays_as_much(power, cls):
  params = jax.tree.map(jnp.float32, make_params())
  grads = jax.tree.map(jnp.sin, params)
  one, wide, still = (cls(RATE, weight_decay=decay).build(10, width=width)
                      for width, decay in ((1.0, 0.0), (4.0, 0.0), (4.0, 0.3)))
  one, wide, still = (o.update(grads, o.init(params), params)[0] for o in (one, wide, still))
  kernel = lambda tree: tree['blocks']['layers']['wi']['kernel']
  np.testing.assert_allclose(kernel(wide), kernel(one) / 4**power, rtol=1e-4)
  np.testing.assert_allclose(wide['token_embedding'], one['token_embedding'], rtol=1e-6)
  np.testing.assert_allclose(kernel(still), kernel(wide) - 0.1 * 0.3 * kernel(params), rtol=1e-4,
                             atol=1e-6)


def test_an_optimiser_without_a_rule_for_width_says_so():
  with pytest.raises(ValueError, match='4 times as wide, and SGD has no rule'):
    SGD().build(10, width=4.0)


@pytest.mark.parametrize('cls', [AdamW, Muon])
@pytest.mark.parametrize('fields, message', [
    ({'b1': 1.0}, r'b1=1.0 must be in \[0, 1\)'),
    ({'b2': -0.1}, r'b2=-0.1 must be in \[0, 1\)'),
    ({'weight_decay': -1}, 'weight_decay=-1 must not be negative'),
    ({'clip_norm': 0.0}, 'clip_norm=0.0 must be greater than 0'),
    ({'clip_units': -1.0}, 'clip_units=-1.0 must be greater than 0'),
    ({'layer_decay': 1.5}, r'layer_decay=1.5 must be in \(0, 1\]'),
    ({'average_decay': 1.0}, r'average_decay=1.0 must be in \[0, 1\)')])
def test_an_optimizer_that_cannot_be_is_refused(cls, fields, message):
  with pytest.raises(ValueError, match=message):
    cls(**fields)


@pytest.mark.parametrize('make, message', [
    (lambda: ScheduleFree(average_decay=0.9), 'average_decay=0.9 would average once more'),
    (lambda: ScheduleFree(b1=0.0), 'b1=0 leaves the average out'),
    (lambda: SOAP(every=0), 'every=0 must be at least 1'),
    (lambda: Group('a('), r"pattern='a\(' is no regular expression"),
    (lambda: Group('a', rate=-1.0), 'rate=-1.0 must not be negative')])
def test_what_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
