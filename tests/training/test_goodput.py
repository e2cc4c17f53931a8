"""Every second of a run counts once, over kills, restarts and rollbacks."""
import pytest

from lm.training import goodput as goodput_lib
from lm.training.goodput import Goodput
from lm.training.meters import StepTimer


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def spend(goodput, clock, category, seconds):
  with goodput.spent(category):
    clock.now += seconds


def positive(seconds):
  return {name: value for name, value in seconds.items() if value}


def test_time_within_a_category_is_no_time_of_the_one_around_it():
  clock = Clock()
  goodput = Goodput(None, clock, clock)
  clock.now += 3
  with goodput.spent('step'):
    clock.now += 4
    with goodput.spent('data'):
      clock.now += 2
    clock.now += 1
    with pytest.raises(ValueError), goodput.spent('checkpoint'):
      clock.now += 10
      raise ValueError
    clock.now += 20
  assert positive(goodput.seconds()) == {'start': 3, 'step': 25, 'data': 2, 'checkpoint': 10}
  assert sum(goodput.shares().values()) == pytest.approx(1)
  goodput.close(finished=True)


def test_a_restart_counts_the_time_between_and_the_steps_done_again(tmp_path):
  clock = Clock()
  first = Goodput(tmp_path, clock, clock)
  spend(first, clock, 'step', 100)
  spend(first, clock, 'compile', 7)
  first.mark(10)
  spend(first, clock, 'step', 50)
  spend(first, clock, 'evaluation', 5)
  clock.now += goodput_lib.SECONDS_BETWEEN_WRITES + 1  # of a start
  first.tick()
  clock.now += 3  # lost with the process: nobody was told, so it counts as down
  clock.now += 30
  second = Goodput(tmp_path, clock, clock)
  second.back_to(10)
  spend(second, clock, 'step', 40)
  expected = {'start': goodput_lib.SECONDS_BETWEEN_WRITES + 1, 'compile': 7, 'step': 140,
              'lost': 55, 'down': 33}
  assert positive(second.seconds()) == expected and sum(expected.values()) == clock.now
  # A run that is finished is not down; one that goes on from an unknown step lost all its steps.
  second.close(finished=True)
  before = second.seconds()
  clock.now += 1000
  third = Goodput(tmp_path, clock, clock)
  third.back_to(3)
  assert third.seconds() == before | {'lost': 195, 'step': 0}
  third.close(finished=True)


def test_a_rollback_loses_what_came_behind_its_checkpoint(tmp_path):
  clock = Clock()
  goodput = Goodput(tmp_path, clock, clock)
  for step in 10, 20, 30:
    spend(goodput, clock, 'step', 10)
    spend(goodput, clock, 'checkpoint', 1)
    goodput.mark(step)
  goodput.back_to(10)
  assert positive(goodput.seconds()) == {'step': 10, 'checkpoint': 1, 'lost': 22}
  spend(goodput, clock, 'step', 5)
  goodput.back_to(10)
  assert goodput.seconds()['lost'] == 27
  goodput.close(finished=True)


def test_an_account_that_cannot_be_read_or_written_stops_nothing(tmp_path):
  (tmp_path / 'goodput.json').write_text('{"seconds": ')
  Goodput(tmp_path).close(finished=False)
  assert goodput_lib.read(tmp_path)['seconds']['lost'] == 0
  (tmp_path / 'file').write_text('')
  Goodput(tmp_path / 'file').close(finished=True)


def test_rates_of_steps_leave_out_the_first_and_all_that_is_no_step():
  clock = Clock()
  goodput = Goodput(None, clock, clock)
  timer = StepTimer(goodput)
  spend(goodput, clock, 'compile', 20.0)
  timer.step_done(100)
  assert timer.first_step_seconds == 20.0 and timer.window() == {} and timer.total() == {}
  for _ in range(4):
    spend(goodput, clock, 'data', 0.5)
    spend(goodput, clock, 'step', 1.5)
    timer.step_done(100)
  assert timer.window() == {'tokens_per_second': 50.0, 'data_wait_share': 0.25}
  spend(goodput, clock, 'evaluation', 1000.0)
  spend(goodput, clock, 'step', 1.0)
  timer.step_done(100)
  assert timer.window() == {'tokens_per_second': 100.0, 'data_wait_share': 0.0}
  assert timer.total() == {'tokens_per_second': 500 / 9, 'data_wait_share': 2 / 9}
  goodput.close(finished=True)
