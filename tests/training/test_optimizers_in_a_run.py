"""What an optimiser has to do with the step, the checkpoint and the model's width."""
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import config, run
from lm.interop.run_weights import read_run_params
from lm.layers.heads import Scores
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import checkpoint
from lm.training import state as state_lib
from lm.training import step as step_lib
from lm.training.losses import Prediction
from lm.training.optimizers import (
    AdamW, evaluated, Schedule, ScheduleFree, Sophia, sophia)

RULES = Rules().on(MeshConfig(data=1).build(jax.devices()[:1]))


def make_batch(B, T, vocab_size):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, vocab_size, (2, B, T)).astype(np.int32)
  return {'decoder_input_tokens': tokens[0], 'decoder_target_tokens': tokens[1],
          'decoder_loss_weights': (rng.random((B, T)) > 0.3).astype(np.float32)}


def test_the_curvature_is_the_diagonal_of_the_gauss_newton_matrix():
  """Of a linear softmax model it is the mean over tokens of p_v (1 - p_v) h_d^2."""
  V, D, B, T = 5, 3, 2, 4
  embedding = jax.random.normal(jax.random.key(1), (V, D))
  hidden = jax.random.normal(jax.random.key(2), (B, T, D))
  batch = jax.tree.map(jnp.asarray, sophia.with_rows(make_batch(B, T, V)))
  counts = np.asarray(batch['decoder_loss_weights']).reshape(-1)

  def estimate(key):
    loss = sophia.SampledLoss(key)
    mean = lambda e: (loss({'tokens': Scores(hidden, e)}, batch)['tokens']
                      / loss.weights(batch)['tokens'])
    sampled = lambda: (jax.grad(mean)(embedding), loss.weights(batch)['tokens'])
    return sophia.gauss_newton_bartlett().update(None, None, sampled_gradient=sampled)[0]

  keys = jax.random.split(jax.random.key(0), 4000)
  found = jax.jit(lambda: jax.lax.map(estimate, keys, batch_size=500).mean(0))()
  h = np.asarray(hidden).reshape(-1, D)
  p = np.asarray(jax.nn.softmax(h @ np.asarray(embedding).T))
  exact = np.einsum('n,nv,nd->vd', counts / counts.sum(), p * (1 - p), h**2)
  np.testing.assert_allclose(found, exact, rtol=0.12)
  assert np.abs(found / exact - 1).mean() < 0.04


def test_microbatches_change_nothing_of_the_curvature(tiny_configs):
  module = tiny_configs['llama'](num_layers=1).build(RULES)
  optimizer = Sophia(Schedule('constant', 0.01, 0)).build(10)
  moments = {}
  for count in (1, 4):
    state = state_lib.init_state(module, optimizer, RULES, seed=1)
    step = step_lib.jit_train_step(module, Prediction(), optimizer, RULES, state, count)
    state, _ = step(state, make_batch(8, 10, 37))
    moments[count] = [x for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
                      if '.nu' in jax.tree_util.keystr(path)]
  assert sum(float(x.sum()) for x in moments[1]) > 0
  for x, y in zip(moments[1], moments[4], strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6 * np.abs(y).max())


def test_sophia_refuses_an_objective_without_tokens():
  with pytest.raises(run.UserError, match='Sophia draws tokens'):
    sophia.SampledLoss(jax.random.key(0)).weights({'query_tokens': jnp.zeros((2, 3))})


@pytest.fixture(scope='module')
def cooled(tmp_path_factory):
  """(directory of a run of constant rate, one that goes on from its last checkpoint and cools
  down); both keep an average of the parameters."""
  folder = tmp_path_factory.mktemp('cooled')
  (folder / 'a.txt').write_text('to be or not to be ' * 400)
  (folder / 'b.txt').write_text('that is the question ' * 400)

  def train(directory, **bindings):
    parts = 'models/gpt_small_cpu', 'objectives/causal_lm', 'optim/adamw', 'runs/pretrain'
    tiny = {'FILES': repr(f'{folder}/*.txt'), 'CACHE_DIR': repr(f'{folder}/cache'),
            'vocabularies.VocabularyConfig.kind': "'byte'", 'VOCAB_SIZE': 259,
            'gpt.GPTConfig.d_model': 16, 'gpt.GPTConfig.num_layers': 1, 'gpt.GPTConfig.d_ff': 16,
            'SEQUENCE_LENGTH': 32, 'BATCH_SIZE': 2, 'WARMUP_STEPS': 2, 'LEARNING_RATE': 0.1,
            'optimizers.Schedule.kind': "'constant'", 'optimizers.AdamW.average_decay': 0.9,
            **{name.replace('__', '.'): value for name, value in bindings.items()}}
    config.parse([f'gin/{name}.gin' for name in parts],
                 [(name, str(value)) for name, value in tiny.items()])
    run.fit(config.build(run.Experiment), directory)

  train(folder / 'constant', NUM_STEPS=4)
  shutil.copytree(folder / 'constant', folder / 'cooled')
  train(folder / 'cooled', NUM_STEPS=8, optimizers__Schedule__cooldown_from=4)
  return folder / 'constant', folder / 'cooled'


def rows(directory, split):
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if row['split'] == split]


def test_a_run_of_constant_rate_goes_on_with_a_cool_down(cooled):
  constant, both = (rows(directory, 'train') for directory in cooled)
  assert [row['loss'] for row in both[:4]] == [row['loss'] for row in constant]
  assert [row['step'] for row in both] == list(range(1, 9))
  rates = [row['learning_rate'] for row in both]
  np.testing.assert_allclose(rates[2:], 0.1 * np.array([1, 1, 1, 0.775, 0.55, 0.325]), rtol=1e-5)


def test_the_average_is_what_a_run_evaluates_and_later_commands_load(cooled):
  checkpoints = cooled[0] / 'checkpoints'
  _, loaded = checkpoint.restore_params(checkpoints)
  state = checkpoint.checkpoint_io.read(
      checkpoints / '00000004' / 'state',
      json.loads((checkpoints / '00000004' / 'checkpoint.json').read_text())['arrays'])
  average = state['opt_state']['1']['1']['average']  # behind the clipping and the step
  jax.tree.map(np.testing.assert_array_equal, loaded, average)
  streamed = read_run_params(cooled[0])['token_embedding'].read()
  np.testing.assert_array_equal(streamed, average['token_embedding'])
  assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(loaded),
                                            jax.tree.leaves(state['params']), strict=True))
  # At this learning rate the average, still near the start, is far from the last parameters.
  trained, validated = (rows(cooled[0], split)[-1]['loss'] for split in ('train', 'validation'))
  assert validated > trained + 0.3


def test_of_schedule_free_the_average_is_computed_from_the_checkpoint(tmp_path):
  params = {'token_embedding': jnp.ones((3, 2))}
  optimizer = ScheduleFree(Schedule('constant', 0.1, 0)).build(10)
  opt_state = optimizer.init(params)
  for t in range(3):
    updates, opt_state = optimizer.update(
        jax.tree.map(lambda p, t=t: jnp.sin(p + t), params), opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
  saver = checkpoint.Checkpointer(tmp_path / 'checkpoints')
  saver.save(3, state_lib.TrainState(jnp.int32(3), params, opt_state, jnp.zeros(2)), {})
  saver.close()
  _, loaded = checkpoint.restore_params(tmp_path / 'checkpoints', jax.eval_shape(lambda: params))
  wanted = evaluated(opt_state, params)['token_embedding']
  np.testing.assert_allclose(loaded['token_embedding'], wanted, rtol=1e-6)
  np.testing.assert_allclose(read_run_params(tmp_path)['token_embedding'].read(slice(1, 3)),
                             wanted[1:], rtol=1e-6)
  assert np.abs(wanted - params['token_embedding']).max() > 1e-3


def logits_moved(tiny, base_width, d_model):
  """The root mean square of what two steps change in the logits of the targets."""
  tiny = tiny(d_model=d_model, num_heads=d_model // 16, d_ff=2 * d_model, num_layers=1,
              base_width=base_width, num_kv_heads=None, init_std=0.18)
  module = tiny.build(RULES)
  optimizer = AdamW(Schedule('constant', 0.002, 0), clip_norm=None).build(10, tiny.width)
  state = state_lib.init_state(module, optimizer, RULES, seed=0)
  step = step_lib.jit_train_step(module, Prediction(), optimizer, RULES, state)
  # What many tokens, and other logits, change adds up like noise, which falls with the width.
  batch = make_batch(1, 8, 37)

  @jax.jit
  def logits(params):
    hidden, _ = module.apply({'params': params}, jnp.asarray(batch['decoder_input_tokens']))
    scores = module.apply({'params': params}, hidden, method='logits')
    return jnp.take_along_axis(scores, batch['decoder_target_tokens'][..., None], axis=-1)

  before = logits(state.params)
  for _ in range(2):
    state, _ = step(state, batch)
  return float(jnp.sqrt(jnp.square(logits(state.params) - before).mean()))


@pytest.mark.supports('optimisers', 'muP: one learning rate for all widths')
def test_under_mup_logits_move_alike_at_every_width_and_else_they_do_not(tiny_configs):
  widths = 32, 256
  slope = lambda moves: np.polyfit(np.log(widths), np.log(moves), 1)[0]
  tiny = tiny_configs['llama']
  with_mup = slope([logits_moved(tiny, 32, width) for width in widths])
  without = slope([logits_moved(tiny, None, width) for width in widths])
  print(with_mup, without)
  assert abs(with_mup) < 0.15 and without > 0.4
