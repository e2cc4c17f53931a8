"""A dual encoder learns from labelled pairs, by `lm train`, from the files of gin/."""
import contextlib
import io
import json
import pathlib

import pytest

from lm import main

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
RUN = """
include 'gin/models/embedder_small_cpu.gin'
include 'gin/objectives/contrastive.gin'
include 'gin/optim/adamw.gin'
include 'gin/runs/pretrain.gin'
include 'gin/tasks/stsb_pairs.gin'
from __gin__ import dynamic_registration
from lm import run
from lm.data import examples
from lm.data import vocabularies
from lm.models import bert
from lm.training import losses
run.Experiment.task = %TASK
examples.ExampleTask.cache_dir = %CACHE_DIR
examples.ExampleTask.vocabulary = @vocabularies.VocabularyConfig()
LOSS = @losses.Contrastive()
VOCAB_SIZE = 1000
SEQUENCE_LENGTH = 32
BATCH_SIZE = 16
NUM_STEPS = 60
LEARNING_RATE = 2e-3
WARMUP_STEPS = 5
CHECKPOINT_EVERY = 60
EVAL_EVERY = 60
DTYPE = 'float32'
bert.BERTConfig.vocab_size = 1002
bert.BERTConfig.d_model = 64
bert.BERTConfig.num_layers = 1
bert.BERTConfig.d_ff = 128
"""


@pytest.mark.supports('fine-tuning', 'embedders of labelled pairs, with hard negatives')
def test_a_dual_encoder_learns_which_captions_say_the_same(tmp_path):
  if not SHARED.exists():
    pytest.skip(f'{SHARED} is not there')
  (tmp_path / 'run.gin').write_text(RUN)
  with contextlib.redirect_stdout(io.StringIO()):
    assert main.main(['train', f'--gin_file={tmp_path}/run.gin', f'--run_dir={tmp_path}/run',
                      f'--gin.CACHE_DIR={str(tmp_path)!r}']) == 0
  rows = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  last = [row for row in rows if row['split'] == 'validation'][-1]
  assert last['retrieval_at_1'] > 0.5  # Of 16; chance is 1/16.
