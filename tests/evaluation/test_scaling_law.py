"""The law is found again in losses that were made by it, and intervals hold what they promise."""
import numpy as np
import pytest
from scipy import optimize

from lm.evaluation import scaling_law
from lm.evaluation.scaling_law import Law, Run

HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # arXiv:2203.15556, equation 10
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # arXiv:2404.10102, their fit
SMALL = Law(1.0, 30.0, 300.0, 0.35, 0.38)  # as of bytes


def isoflop(law, budgets, ratios=(5, 10, 20, 40, 80), noise=0.0, rng=None):
  """Runs of each budget, by tokens a parameter; noise is of log loss."""
  runs = []
  for flops in budgets:
    for ratio in ratios:
      params = (flops / 6 / ratio)**0.5
      off = noise * rng.standard_normal() if rng else 0.0
      runs.append(Run(params, ratio * params, law.loss(params, ratio * params) * np.exp(off)))
  return runs


@pytest.mark.parametrize('law', [HOFFMANN, BESIROGLU], ids=['Hoffmann', 'Besiroglu'])
def test_published_laws_are_found_in_their_losses(law):
  runs = isoflop(law, np.geomspace(6e18, 3e21, 9))  # their budgets
  found = scaling_law.fit(runs, num_resamples=2).law
  for name in ('E', 'A', 'B', 'alpha', 'beta'):
    assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-6)
  params, tokens = found.optimum(5.76e23)  # Chinchilla's
  assert 6 * params * tokens == pytest.approx(5.76e23)
  assert params == pytest.approx({HOFFMANN: 32.2e9, BESIROGLU: 72.2e9}[law], rel=0.01)


def test_an_optimum_has_the_least_loss_of_its_budget():
  params, tokens = SMALL.optimum(1e13)
  for other in (0.9, 1.1):
    assert SMALL.loss(params * other, tokens / other) > SMALL.loss(params, tokens)


@pytest.mark.supports('evaluation', "Chinchilla's scaling law with bootstrap intervals")
def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch):
  quantities = [lambda law: law.alpha, lambda law: law.beta, lambda law: law.E,
                lambda law: law.loss(*law.optimum(6e13)), lambda law: law.optimum(6e13)[0]]
  rng, hits, of_runs = np.random.default_rng(1), {0.8: [], 0.95: []}, []
  for seed in range(20):
    runs = isoflop(SMALL, [2e11, 6e11, 2e12, 6e12], noise=0.003, rng=rng)
    fit = scaling_law.fit(runs, num_resamples=100, seed=seed)
    for share, held in hits.items():
      monkeypatch.setattr(scaling_law, 'COVERAGE', share)
      for of in quantities:
        low, high = fit.interval(of)
        held.append(low <= of(SMALL) <= high)
    for flops in (1e12, 6e13):  # one more run, among those that were fitted and far above them
      size = SMALL.optimum(flops)
      low, high = fit.loss_interval(*size)
      loss = SMALL.loss(*size) * np.exp(0.003 * rng.standard_normal())
      of_runs.append((low <= loss <= high, (high - low) / loss))
  assert 0.6 <= np.mean(hits[0.8]) <= 0.9
  assert 0.8 <= np.mean(hits[0.95])
  near, far = np.mean(of_runs[::2], axis=0), np.mean(of_runs[1::2], axis=0)
  assert near[0] >= 0.8 and far[0] >= 0.8
  assert 2 * 1.96 * 0.003 < near[1] < far[1]  # no narrower than the noise of a run


def test_a_run_that_diverged_does_not_move_the_law():
  runs = isoflop(SMALL, [2e11, 6e11, 2e12, 6e12])
  runs[7] = Run(runs[7].params, runs[7].tokens, 2 * runs[7].loss)
  found = scaling_law.fit(runs, num_resamples=2).law
  assert found.alpha == pytest.approx(SMALL.alpha, rel=0.03)
  assert found.E == pytest.approx(SMALL.E, rel=0.03)


def test_gradients_are_those_of_the_values():
  rng = np.random.default_rng(0)
  x, y, z = rng.normal(12, 1, 7), rng.normal(16, 1, 7), rng.normal(0.5, 0.2, (1, 7))
  objective = scaling_law._Objective(x, y, z)
  theta, rows = rng.normal(0.3, 0.1, (3, 5)), np.arange(3)
  _, gradients = objective(theta, rows)
  for i in range(5):
    h = 1e-7 * np.eye(5)[i]
    numeric = (objective(theta + h, rows)[0] - objective(theta - h, rows)[0]) / 2e-7
    np.testing.assert_allclose(gradients[:, i], numeric, rtol=1e-4, atol=1e-4)


def test_the_minimum_is_no_higher_than_that_of_scipy():
  runs = isoflop(SMALL, [2e11, 6e11, 2e12, 6e12], noise=0.003, rng=np.random.default_rng(3))
  x, y, z = (np.log([getattr(run, name) for run in runs]) for name in ('params', 'tokens', 'loss'))
  objective, row = scaling_law._Objective(x, y, z[None]), np.arange(1)
  starts = objective.centred(np.array([[0.5, 0.5, 0, 5, 5], [0.5, 0.5, 0, 5, 10]]))
  least = min(optimize.minimize(
      lambda theta: [part[0] for part in objective(theta[None], row)], start, jac=True,
      method='L-BFGS-B', tol=1e-14, options={'maxiter': 5000}).fun for start in starts)
  law = scaling_law.fit(runs, num_resamples=2).law
  off = np.abs(np.log([law.loss(run.params, run.tokens) / run.loss for run in runs]))
  huber = np.where(off < 1e-3, off**2 / 2e-3, off - 5e-4).sum()
  assert huber == pytest.approx(least, rel=1e-6)


def test_parabolas_find_their_minima_and_how_they_grow():
  runs = {}
  for flops in (1e12, 1e13, 1e14):
    centre = np.log(2e4 * (flops / 1e12)**0.45)
    sizes = np.exp(centre + np.array([-1.0, -0.4, 0.3, 0.9]))
    runs[flops] = [Run(n, flops / 6 / n, 1.5 + 0.07 * (np.log(n) - centre)**2) for n in sizes]
  runs[1e15] = [Run(n, 1e15 / 6 / n, 1.0 - 0.1 * np.log(n)**2) for n in (1e5, 2e5, 3e5)]
  found = scaling_law.parabolas(runs)
  assert [minimum['flops'] for minimum in found['minima']] == [1e12, 1e13, 1e14]
  assert [m['params'] for m in found['minima']] == pytest.approx(
      [2e4, 2e4 * 10**0.45, 2e4 * 10**0.9])
  assert found['minima'][1]['loss'] == pytest.approx(1.5)
  c = found['minima'][0]['coefficients']
  run = runs[1e12][0]
  assert c[0] + c[1] * np.log(run.params) + c[2] * np.log(run.params)**2 == pytest.approx(run.loss)
  assert found['exponent'] == pytest.approx(0.45)
  assert found['exponent_interval'] == pytest.approx((0.45, 0.45))


def test_too_few_runs_are_refused():
  with pytest.raises(ValueError, match='5 runs cannot tell five numbers'):
    scaling_law.fit(isoflop(SMALL, [1e12]))
