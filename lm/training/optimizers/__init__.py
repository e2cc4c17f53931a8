"""From gradients to updates: a config an optimiser, through optax wherever optax has it.

`configs.py` the optimisers and what they share; `schedules.py` learning rates by step; `paths.py`
groups, decay, clipping and matrices by a parameter's path; `averaging.py` averages that are
evaluated; `quantized.py` 8-bit state; `muon.py`, `soap.py`, `sophia.py` what optax has not.

Bytes of state for each number of a parameter, of float32 parameters (a test compares). A matrix is
a kernel of a block or head, here in blocks of 256 by 256; Muon and SOAP leave the rest to AdamW. An
average (`average_decay`) adds 4.

  optimiser      matrix   others   with state_bits=8
  SGD             4        4        1.02
  AdamW           8        8        2.03
  Adam            8        8        2.03
  Adagrad         4        4        1.02
  RMSprop         4        4        1.02
  Adafactor       0.03     0.03     0.03
  Lion            4        4        1.02
  LAMB            8        8        2.03
  Muon            4        8        1.02
  Sophia          8        8        2.03
  SOAP           24        8       18.03
  ScheduleFree    8        8        5.02
"""
from lm.training.optimizers.averaging import evaluated
from lm.training.optimizers.configs import (
    Adafactor, Adagrad, Adam, AdamW, LAMB, Lion, Muon, Optimizer, RMSprop, ScheduleFree, SGD, SOAP,
    Sophia)
from lm.training.optimizers.paths import Group
from lm.training.optimizers.schedules import Schedule
