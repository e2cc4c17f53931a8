"""Batches that grow on the way show each sequence once, and a run goes on exactly where it was."""
import guarded_runs as runs
import numpy as np
import pytest

from lm import run as run_lib
from lm.data.loader import Loader
from lm.errors import UserError
from lm.training.loop import TrainConfig
from lm.training.position import BatchSizes, Position

RAMP = (4, 1), (9, 2)  # and 4 from step 10 on


def test_sequences_are_the_sum_of_the_sizes_of_the_steps():
  sizes = BatchSizes(4, RAMP)
  each = [sizes.of(step)[0] for step in range(1, 15)]
  assert each == [1] * 4 + [2] * 5 + [4] * 5
  assert [sizes.sequences(n) for n in range(15)] == [0, *np.cumsum(each).tolist()]
  assert [sizes.of(step)[1] for step in (1, 4, 5, 9, 10)] == [4, 4, 9, 9, None]
  assert sizes.all == [1, 2, 4] and BatchSizes(8).sequences(5) == 40


def test_a_rollback_in_a_ramp_counts_batches_of_the_step_that_it_goes_back_to():
  start = Position(BatchSizes(4, RAMP))
  back = start.after_spike(step=5, end=start.sequences(7), batches_over=3, rollbacks=1)
  assert start.sequences(5) == 6 and back.stepped_over == ((6, 12),)
  assert back.sequences(5) == 12 and back.sequences(10) == 12 + 4 * 2 + 4


def test_batches_of_all_stretches_laid_together_are_the_rows_in_order():
  class Rows:
    def __len__(self):
      return 100

    def __getitem__(self, row):
      return {'row': np.int32(row)}

  sizes, shown = BatchSizes(4, RAMP), []
  loader = Loader.of_rows(Rows(), 4)
  for done, last in (0, 4), (4, 9), (9, 12):
    size = sizes.of(done + 1)[0]
    with loader.from_row(sizes.sequences(done), size).iterate(0, last - done) as batches:
      shown += [batch['row'].tolist() for batch in batches]
  assert [len(rows) for rows in shown] == [1] * 4 + [2] * 5 + [4] * 3
  assert sum(shown, []) == list(range(4 + 10 + 12))


@pytest.mark.supports('optimisers', 'batch sizes that grow')
def test_a_ramp_that_is_killed_on_the_way_repeats_itself_bit_for_bit(folder, tmp_path):
  changes = {'NUM_STEPS': 8, 'CHECKPOINT_EVERY': 2, 'EVAL_EVERY': 8,
             'loop__TrainConfig__batch_ramp': ((5, 1),)}
  result = runs.train(folder, tmp_path / 'whole', **changes)
  rows = runs.rows(tmp_path / 'whole')
  assert [row['weight'] / 32 for row in rows] == [1] * 5 + [2] * 3
  assert runs.data_of(tmp_path / 'whole', 8)['sequences'] == 5 + 6
  for step in 4, 7:
    with runs.killed():
      runs.train(folder, tmp_path / 'run', kill_at=(step, 1), **changes)
  assert runs.train(folder, tmp_path / 'run', **changes)['losses'] == result['losses']
  ours, theirs = (runs.arrays_of(tmp_path / name, 8) for name in ('run', 'whole'))
  for name, x in ours.items():
    np.testing.assert_array_equal(x, theirs[name], err_msg=name)
  with pytest.raises(UserError, match="'sequences': 11, .* this run has {'sequences': 16"):
    runs.train(folder, tmp_path / 'run', **changes | {'loop__TrainConfig__batch_ramp': ()})


@pytest.mark.parametrize('ramp', [((4, 2), (3, 2)), ((4, 2), (8, 1)), ((4, 16),), ((0, 1),),
                                  ((4, 0),)])
def test_a_ramp_that_is_none_is_refused(ramp):
  with pytest.raises(ValueError, match='must name rising steps'):
    TrainConfig(batch_size=8, batch_ramp=ramp)


def test_a_ramp_is_refused_where_rows_go_on_from_batch_to_batch_or_do_not_divide(folder):
  with pytest.raises(ValueError, match='batch_size=3 does not divide into num_microbatches=2'):
    TrainConfig(batch_size=8, batch_ramp=((4, 3),), num_microbatches=2)
  with pytest.raises(run_lib.UserError, match='does not go with contiguous=True'):
    runs.experiment(folder, BATCH_SIZE=4, loop__TrainConfig__batch_ramp=RAMP,
                    objectives__CausalLM__contiguous=True)
