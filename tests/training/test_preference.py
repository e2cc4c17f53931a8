"""Preference tuning: the paper's loss, and a reference that is asked once."""
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_preference import LENGTH, MODEL, task_of

from lm import config, run
from lm.errors import UserError
from lm.evaluation import reference
from lm.training.preference import answer_logps, DPO



@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """The examples with some references, a model with its parameters, and a batch of 4 rows."""
  prepared = task_of(tmp_path_factory.mktemp('pairs') / 'cache').prepare(progress=False)
  for split, references in prepared.references.items():
    references[:] = -np.random.default_rng(len(split)).uniform(3, 9, references.shape)
  module = MODEL.build()
  params = module.init(jax.random.key(0), method='initialize')['params']
  batch = prepared.loader('train', LENGTH, 4, seed=0).batch(0)
  return prepared, module, params, jax.tree.map(jnp.asarray, batch)


def logps_of(module, params, prepared, index):
  """Nats of both answers of an example, by a model that sees one of them at a time, in float64."""
  example, found = prepared.cache('train').example(index), []
  for name in ('chosen', 'rejected'):
    answer = {'role': 'assistant', 'content': example[name]}
    turns = prepared.form.chat.encode([*example['prompt'], answer])
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, :len(turns.ids)] = turns.ids
    logits = np.asarray(LOGITS(module, params, ids), np.float64)[0, :len(turns.ids) - 1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, turns.ids[1:, None], axis=1)[:, 0]
    found.append((chosen * turns.is_answer[1:]).sum())
  return found


LOGITS = jax.jit(lambda module, params, ids: module.apply(
    {'params': params}, module.apply({'params': params}, ids)[0], method='logits'),
    static_argnums=0)


@pytest.fixture(scope='module')
def alone(made):
  """Nats [examples, 2] of the training split, answer by answer."""
  prepared, module, params, _ = made
  return np.array([logps_of(module, params, prepared, i)
                   for i in range(len(prepared.cache('train')))])


@pytest.mark.supports('fine-tuning', 'DPO, as the paper has it, of packed pairs')
@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_the_loss_is_that_of_the_paper(made, alone, smoothing):
  prepared, module, params, batch = made
  loss, rows = DPO(beta=0.3, label_smoothing=smoothing), prepared.rows('train', LENGTH, 0)
  members = np.concatenate([rows.members(row) for row in range(4)])
  assert len(members) > 4  # several pairs share a row
  rewards = 0.3 * (alone - prepared.references['train'])[members]
  margins = rewards[:, 0] - rewards[:, 1]
  log_sigmoid = lambda x: -np.log1p(np.exp(-x))
  want = -(1 - smoothing) * log_sigmoid(margins) - smoothing * log_sigmoid(-margins)

  outputs, _ = module.apply({'params': params}, batch, method='outputs')
  assert float(loss.weights(batch)['preference']) == len(members)
  assert float(loss(outputs, batch)['preference']) == pytest.approx(want.sum(), rel=1e-5)
  found = {name: float(total / weight)
           for name, (total, weight) in loss.metrics(outputs, batch).items()}
  assert found == pytest.approx({
      'loss': want.mean(), 'accuracy': (margins > 0).mean(), 'margin': margins.mean(),
      'chosen_reward': rewards[:, 0].mean(), 'rejected_reward': rewards[:, 1].mean()}, rel=1e-5)
  assert 0 < found['accuracy'] < 1


def test_the_gradient_is_that_of_the_loss_written_out(made):
  _, module, params, batch = made
  loss = DPO(beta=0.3, label_smoothing=0.1)

  def ours(params):
    return loss(module.apply({'params': params}, batch, method='outputs')[0], batch)['preference']

  def written_out(params):
    outputs, _ = module.apply({'params': params}, batch, method='outputs')
    log_p = jnp.take_along_axis(outputs['tokens'].log_probs(),
                                batch['decoder_target_tokens'][..., None], axis=-1)[..., 0]
    total = 0
    for pair in range(4):
      answers = [(log_p * batch['decoder_loss_weights']
                  * (batch['decoder_segment_ids'] == 2 * pair + side)).sum(1) for side in (1, 2)]
      margins = 0.3 * (answers[0] - batch['reference_chosen_logps'][:, pair]
                       - answers[1] + batch['reference_rejected_logps'][:, pair])
      total += (-(0.9 * jax.nn.log_sigmoid(margins) + 0.1 * jax.nn.log_sigmoid(-margins))
                * batch['pair_weights'][:, pair]).sum()
    return total

  (value, grads), (want, slopes) = (jax.jit(jax.value_and_grad(f))(params)
                                    for f in (ours, written_out))
  assert float(value) == pytest.approx(float(want), rel=1e-5)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slopes))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6 * scale), grads, slopes)


@pytest.mark.supports('fine-tuning', 'DPO the same in microbatches and on 8 devices')
def test_devices_and_microbatches_change_nothing(made, child_with_devices):
  prepared = made[0]
  found = child_with_devices(pathlib.Path(__file__).parent / 'sharded_preference.py',
                             prepared.task.cache_dir)
  alone = found.pop('alone')
  together = found['devices and microbatches']
  np.testing.assert_allclose(together['references'], alone['references'], rtol=1e-5)
  for key in ('loss', 'grad_norm', 'moved'):
    assert together[key] == pytest.approx(alone[key], rel=1e-4), key


def test_the_reference_says_of_packed_answers_what_it_says_of_each_alone(made, alone):
  prepared, module, params, batch = made
  found = reference.logps(module, params, prepared, 'train', LENGTH, 3, progress=False)
  np.testing.assert_allclose(found, alone, rtol=1e-5)
  outputs, _ = module.apply({'params': params}, batch, method='outputs')
  assert not answer_logps(outputs, batch)[batch['pair_weights'] == 0].any()


CONFIG = """
include 'gin/models/gpt_small_cpu.gin'
include 'gin/objectives/causal_lm.gin'
include 'gin/optim/adamw.gin'
include 'gin/runs/pretrain.gin'
from __gin__ import dynamic_registration
from lm import run
from lm.data import examples
from lm.data import vocabularies
from lm.inference import sampling
from lm.models import gpt
from lm.training import loop
from lm.training import preference
run.Experiment.task = @examples.ExampleTask()
examples.ExampleTask.source = @examples.Files()
examples.ExampleTask.kind = @examples.Preference()
examples.ExampleTask.form = 'preference'
examples.ExampleTask.chat_template = 'plain'
examples.ExampleTask.vocabulary = @vocabularies.VocabularyConfig()
examples.ExampleTask.cache_dir = %CACHE_DIR
examples.Files.train = '{folder}/pairs.jsonl'
examples.Files.held_out = 0.3
CACHE_DIR = '{folder}/cache'
LOSS = @preference.DPO()
run.Experiment.prompts = ('say 3',)
run.Experiment.sampling = @sampling.SamplingConfig()
sampling.SamplingConfig.temperature = 0.0
sampling.SamplingConfig.max_new_tokens = 8
vocabularies.VocabularyConfig.kind = 'byte'
vocabularies.VocabularyConfig.size = 259
VOCAB_SIZE = 259
gpt.GPTConfig.d_model = 16
gpt.GPTConfig.num_layers = 1
gpt.GPTConfig.d_ff = 16
gpt.GPTConfig.dtype = 'float32'
SEQUENCE_LENGTH = 160
BATCH_SIZE = 4
WARMUP_STEPS = 1
LEARNING_RATE = 0.02
NUM_STEPS = 8
CHECKPOINT_EVERY = 4
EVAL_EVERY = 4
"""


def experiment_of(folder, *bindings):
  task_of(folder / 'cache')
  (folder / 'pairs.gin').write_text(CONFIG.format(folder=folder))
  config.parse([str(folder / 'pairs.gin')], bindings)
  return config.build(run.Experiment)


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """A run of 8 steps: (its folder, its directory, what came of it)."""
  folder = tmp_path_factory.mktemp('tuned')
  return folder, folder / 'run', run.train(experiment_of(folder), str(folder / 'run'))


def rows_of(directory, split):
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if row['split'] == split]


def test_a_run_begins_where_nothing_is_preferred_and_learns_to(tuned):
  _, directory, result = tuned
  assert result['losses'][0] == pytest.approx(np.log(2), abs=1e-6)
  assert rows_of(directory, 'validation')[-1]['loss'] < 0.6
  evaluation = json.loads((directory / 'evaluation.json').read_text())
  assert evaluation['accuracy'] > 0.9
  assert evaluation['chosen_reward'] > evaluation['rejected_reward']
  assert evaluation['margin'] == pytest.approx(
      evaluation['chosen_reward'] - evaluation['rejected_reward'], rel=1e-4)
  kept = np.load(directory / reference.FILE)
  assert kept['train'].shape[1] == 2 and len(str(kept['parameters'])) == 16


def test_a_run_goes_on_with_the_reference_it_began_with(tuned, tmp_path):
  folder, directory, result = tuned
  shutil.copytree(directory, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '00000008')
  again = run.train(experiment_of(folder), str(tmp_path / 'run'))
  assert again['losses'] == result['losses']
  (tmp_path / 'run' / reference.FILE).unlink()
  with pytest.raises(UserError, match='reference.npz cannot be read .*start again'):
    run.evaluate(experiment_of(folder), str(tmp_path / 'run'))


@pytest.mark.supports('fine-tuning', 'answers by the chat template of the run')
def test_a_prompt_is_put_into_the_template_and_the_answer_ends_where_it_says(tuned):
  folder, directory, _ = tuned
  experiment = experiment_of(folder)
  said, = run.generate(experiment, str(directory), ['say 3'], experiment.sampling,
                       chat=True)['completions']
  plain, = run.generate(experiment, str(directory), ['User: say 3\nAssistant:'],
                        experiment.sampling)['completions']
  assert said['tokens'] == plain['tokens'] and said['prompt'] == 'say 3'
  assert json.loads((directory / 'samples.json').read_text())[0]['tokens'] == said['tokens']
  assert (directory / 'vocabulary' / 'chat.jinja').exists()


def test_a_loss_of_pairs_and_examples_of_pairs_belong_together(tmp_path):
  with pytest.raises(UserError, match='belong together'):
    experiment_of(tmp_path, ('LOSS', '@losses.Prediction()'))
  with pytest.raises(UserError, match='sees the answers of a preference once'):
    task_of(tmp_path / 'cache', augmentations=(lambda example, rng: example,))
  with pytest.raises(ValueError, match='beta=0.0 must be positive'):
    DPO(beta=0.0)
  with pytest.raises(ValueError, match='label_smoothing=0.5 must be below'):
    DPO(label_smoothing=0.5)
