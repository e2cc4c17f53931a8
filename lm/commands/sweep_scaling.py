"""`lm sweep --scaling_law`: IsoFLOP runs, the law that they follow, and a larger model it predicts.

    lm sweep --scaling_law --gin_file=gin/experiments/scaling_law.gin --run_dir=DIR \
        --flops=2e11,6e11,2e12 --target_flops=2e13

For each budget of FLOPs some sizes are trained, each on as many tokens as the budget allows and
with a schedule of that length (arXiv:2203.15556, section 3.2): --size names the binding that sets
the size, NUM_STEPS is the length. When all are done the law is fitted, the best size for
--target_flops is predicted, trained and compared.

N is FLOPs of a token / 6 (see evaluation/scaling_law.py), D is budget / FLOPs of a token.
"""
from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from lm import config, run
from lm.commands import sweep_space
from lm.errors import UserError
from lm.evaluation import scaling_law
from lm.evaluation.scaling_law import Run
from lm.models.scaling import num_params


def points(settings: dict[str, Any]) -> dict[str, Any]:
  """The runs of all budgets and ratios, as settings: `points`, and the `config` of one of them.

  Raises:
    UserError: the configuration is wrong, a run would be shorter than a step, or there are too few.
  """
  sizes, found = _Sizes(settings), []
  for flops in settings['flops']:
    for ratio in settings['ratios']:
      point = sizes.point(flops, math.sqrt(flops / 6 / ratio))
      if point not in found:  # sizes are whole heads and layers, so two ratios may mean one
        found.append(point)
  if len(found) < scaling_law.MIN_RUNS:
    raise UserError(f'--flops and --ratios give {len(found)} runs of different sizes, and a law '
                    f'needs {scaling_law.MIN_RUNS}; give more of them')
  return {'points': found, 'config': config.text()}


class _Sizes:
  """What models there are, by the value of the binding that sets the size."""

  def __init__(self, settings: dict[str, Any]):
    self.settings, self.params, self.last = settings, {}, None

  def _experiment(self, size: int) -> run.Experiment:
    fixed, _ = sweep_space.split(self.settings['bindings'])
    binding = self.settings['size'], repr(size)
    experiment = run.open_experiment(self.settings['gin_files'], [*fixed, binding], None)
    train = experiment.train
    self.params[size] = experiment.model.flops_per_token(train.sequence_length) / 6
    return experiment

  def nearest(self, params: float) -> int:
    """The size whose N is nearest, by secants of log N over log size."""
    guess = round(params) if self.settings['size'].endswith('params') else 64
    size, power, tried = self.last or guess, 2, []
    while size not in tried and len(tried) < 20:
      if size not in self.params:
        self._experiment(size)
      tried.append(size)
      if len(tried) > 1:
        (x, n), (y, m) = ((math.log(s), math.log(self.params[s])) for s in tried[-2:])
        power = min(max((m - n) / (y - x), 0.5), 4) if m != n else power
      size = max(1, round(size * (params / self.params[size]) ** (1 / power)))
    self.last = min(tried, key=lambda size: abs(math.log(self.params[size] / params)))
    return self.last

  def point(self, flops: float, params: float) -> dict[str, Any]:
    """The run of this budget whose model has about `params` parameters as N counts them."""
    size = self.nearest(params)
    experiment, params = self._experiment(size), self.params[size]
    model, train = experiment.model, experiment.train
    step = train.batch_size * train.sequence_length
    steps = round(flops / 6 / params / step)
    if not steps:
      raise UserError(f'--flops={flops:g} is less than a step of {params:,.0f} parameters; raise '
                      'it, or lower BATCH_SIZE')
    return {'flops': flops, 'params': params, 'all_params': num_params(model),
            'd_model': model.d_model, 'num_layers': model.num_layers, 'steps': steps,
            'tokens': steps * step, 'bindings': [[self.settings['size'], repr(size)],
                                                 ['NUM_STEPS', str(steps)],
                                                 ['EVAL_EVERY', str(steps)]]}


def following(settings: dict[str, Any]) -> Callable[[Sequence[Any]], Any]:
  """What comes after some trials: the next point, and when all are done the predicted model."""
  def after(trials):
    if len(trials) < len(settings['points']):
      return {}, settings['points'][len(trials)]
    if settings['target_flops'] is None or not all(t.state.is_finished() for t in trials):
      return None
    if any(t.user_attrs.get('target') == settings['target_flops'] for t in trials):
      return None
    return {}, target(settings, [Run(t.user_attrs['params'], t.user_attrs['tokens'], t.value)
                                 for t in trials if t.state.name == 'COMPLETE'])
  return after


def target(settings: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
  """The best run of the target's budget, with what the law of `runs` predicts of it."""
  if len(runs) < scaling_law.MIN_RUNS:
    raise UserError(f'{len(runs)} of {len(settings["points"])} runs came to their end and a law '
                    f'needs {scaling_law.MIN_RUNS}; see why in the trials of sweep.html')
  flops, fit = settings['target_flops'], scaling_law.fit(runs)
  point = _Sizes(settings).point(flops, fit.law.optimum(flops)[0])
  size = point['params'], point['tokens']
  return point | {'target': flops, 'predicted': {
      'loss': fit.law.loss(*size), 'interval': fit.loss_interval(*size),
      'optimum': _optimum(fit, flops)}}


def _optimum(fit, flops):
  """Parameters, tokens and loss that the law finds best for a budget, with their intervals."""
  params, tokens = fit.law.optimum(flops)
  return {'params': params, 'params_interval': fit.interval(lambda law: law.optimum(flops)[0]),
          'tokens': tokens, 'tokens_interval': fit.interval(lambda law: law.optimum(flops)[1]),
          'loss': fit.law.loss(params, tokens),
          'loss_interval': fit.interval(lambda law: law.loss(*law.optimum(flops)))}


def law(trials: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """Both approaches fitted to the complete IsoFLOP trials, or None while they are too few."""
  done = [trial for trial in trials if trial['state'] == 'complete' and 'target' not in trial]
  runs = [Run(trial['params'], trial['tokens'], trial['loss']) for trial in done]
  if len(runs) < scaling_law.MIN_RUNS:
    return None
  fit = scaling_law.fit(runs)
  budgets = sorted({trial['flops'] for trial in done})
  by_budget = {flops: [r for r, trial in zip(runs, done) if trial['flops'] == flops]
               for flops in budgets}
  return {'law': dataclasses.asdict(fit.law),
          'intervals': {name: fit.interval(lambda law, name=name: getattr(law, name))
                        for name in dataclasses.asdict(fit.law)},
          'exponent': float(fit.law.exponent),
          'exponent_interval': fit.interval(lambda law: law.exponent),
          'spread': float(fit.residuals.std()),
          'optima': {str(flops): _optimum(fit, flops) for flops in budgets},
          'parabolas': scaling_law.parabolas(by_budget)}
