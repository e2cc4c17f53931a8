"""Distributions are read as they are written, and what is no distribution stays a value."""
import pytest

from lm.commands import sweep_space
from lm.commands.sweep_space import Parameter
from lm.errors import UserError


def test_distributions_are_told_from_values():
  fixed, space = sweep_space.split([
      ('LR', 'log(1e-4, 1e-2)'), ('STEPS', '30'), ('F', "'log(1, 2)'"), ('RATE', 'uniform(0, .3)'),
      ('D', 'int(64, 500, 64)'), ('O', "choice(@o.A(), 'a, b', (1, 2), None)")])
  assert fixed == [('STEPS', '30'), ('F', "'log(1, 2)'")]
  assert space == [
      Parameter('LR', 'log', low=1e-4, high=1e-2), Parameter('RATE', 'uniform', low=0, high=0.3),
      Parameter('D', 'int', low=64, high=448, step=64),
      Parameter('O', 'choice', ('@o.A()', "'a, b'", '(1, 2)', 'None'))]
  for parameter in space:
    again = sweep_space.split([(parameter.name, parameter.text())])[1]
    assert again == [parameter]


def test_a_later_binding_replaces_an_earlier_one():
  assert sweep_space.split([('A', '1'), ('A', 'int(1, 2)'), ('A', '3')]) == ([('A', '3')], [])
  fixed, space = sweep_space.split([('A', '1'), ('A', 'int(1, 2)')])
  assert not fixed and space[0].edges() == [1, 2]


def test_a_grid_has_every_combination_once():
  _, space = sweep_space.split([('A', 'choice(x, y)'), ('B', 'int(1, 5, 2)')])
  assert list(sweep_space.grid(space)) == [
      {'A': a, 'B': b} for a in ('x', 'y') for b in (1, 3, 5)]
  _, space = sweep_space.split([('A', 'log(1, 2)')])
  with pytest.raises(UserError, match='--gin.A: --sampler=grid tries every value'):
    list(sweep_space.grid(space))


@pytest.mark.parametrize('text, why', [
    ('int(1.5, 2)', 'whole ones'), ('log(0, 1)', 'LOW above 0'),
    ('uniform(2, 1)', 'LOW below HIGH'), ('uniform(1, 2, 3)', 'LOW below HIGH'),
    ('int(1, 2, 0)', 'LOW below HIGH'),
    ('log(1)', 'two numbers'), ('choice(1)', 'two different values'),
    ('choice(1, 1)', 'two different values'), ('choice(1,, 2)', 'nothing between two commas'),
    ('choice((1, 2)', 'close its brackets')])
def test_what_cannot_be_read_is_said(text, why):
  with pytest.raises(UserError, match=f'--gin.A=.*{why}'):
    sweep_space.split([('A', text)])
