"""The perplexity filter: a run of ours tells its own kind of text from noise and repetition."""
import pathlib
import pickle
import random

import numpy as np
import pytest

from lm import main
from lm.commands.perplexity import Perplexity
from lm.corpus.document import Document
from lm.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORDS = 'the of and to in a is that for it as was with be by on not he his but at are'.split()
TINY = ('--gin_file=gin/models/gpt_small_cpu.gin', '--gin_file=gin/optim/adamw.gin',
        '--gin_file=gin/objectives/causal_lm.gin', '--gin_file=gin/runs/pretrain.gin',
        "--gin.vocabularies.VocabularyConfig.kind='byte'", '--gin.VOCAB_SIZE=259',
        '--gin.gpt.GPTConfig.d_model=32', '--gin.gpt.GPTConfig.num_layers=1',
        '--gin.gpt.GPTConfig.d_ff=64', '--gin.SEQUENCE_LENGTH=64', '--gin.BATCH_SIZE=8',
        '--gin.NUM_STEPS=60', '--gin.CHECKPOINT_EVERY=30', '--gin.EVAL_EVERY=60',
        '--gin.LEARNING_RATE=0.01', '--gin.WARMUP_STEPS=5')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run on words, and its directory."""
  directory = tmp_path_factory.mktemp('perplexity')
  rng = random.Random(0)
  for index in range(8):
    (directory / f'{index}.txt').write_text(' '.join(rng.choices(WORDS, k=600)))
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    assert main.main(['train', *TINY, f'--run_dir={directory / "run"}',
                      f"--gin.FILES='{directory}/*.txt'",
                      f"--gin.CACHE_DIR='{directory / 'cache'}'"]) == 0
  return directory / 'run'


def documents():
  rng = random.Random(1)
  prose = [' '.join(rng.choices(WORDS, k=80)) for _ in range(70)]
  noise = [''.join(rng.choices('qzxjkvw#%&0123456789', k=300)) for _ in range(10)]
  return [Document(str(index), text) for index, text in enumerate(prose + noise)]


def scores(stage, some):
  assert list(stage.apply_all(some)) == list(range(0, len(some), 64))
  return np.array([document.verdicts['perplexity.bits_per_byte'] for document in some])


@pytest.mark.supports('documents', 'a perplexity filter by a run of lm train')
def test_noise_is_removed_and_prose_stays(trained):
  stage = Perplexity(str(trained), max_bits_per_byte=4.0, min_bits_per_byte=0.5).prepare(trained)
  some = documents()
  found = scores(pickle.loads(pickle.dumps(stage)), some)
  assert found[:70].max() < 3.9 and found[70:].min() > 5
  assert [bool(document.removed_by) for document in some] == [False] * 70 + [True] * 10
  alone = Document('alone', some[3].text)
  stage.apply(alone)
  np.testing.assert_allclose(alone.verdicts['perplexity.bits_per_byte'], found[3], rtol=1e-4)


def test_only_the_beginning_is_scored(trained):
  stage = Perplexity(str(trained), max_bits_per_byte=9.0, max_tokens=50).prepare(trained)
  text = documents()[0].text
  short, long = Document('a', text[:50]), Document('b', text[:50] + '#%&' * 100)
  np.testing.assert_allclose(*scores(stage, [short, long]), rtol=1e-6)


def test_too_little_surprise_is_a_reason_too(trained):
  stage = Perplexity(str(trained), max_bits_per_byte=9.0, min_bits_per_byte=5.0).prepare(trained)
  document = documents()[0]
  stage.apply(document)
  assert document.removed_by == 'perplexity.bits_per_byte'


def test_mistakes_are_named(tmp_path):
  with pytest.raises(ValueError, match='min_bits_per_byte=3.0 must be at least 0 and below'):
    Perplexity('run', max_bits_per_byte=2.0, min_bits_per_byte=3.0)
  with pytest.raises(UserError, match='holds no checkpoint; train a small'):
    Perplexity(str(tmp_path), max_bits_per_byte=2.0).prepare(tmp_path)
