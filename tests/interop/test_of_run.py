"""What a run's model and vocabulary are for another run, whose config.gin then needs no other."""
import dataclasses
import shutil

import pytest

from lm import config, run
from lm.commands import convert
from lm.data import examples
from lm.data.vocabularies import ByteVocabulary, VocabularyConfig
from lm.errors import UserError
from lm.interop import of_run
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import (ClassifierConfig, DualEncoderConfig, EmbedderConfig, SpanConfig,
                             TaggerConfig)
from lm.models.t5 import T5Config

TINY = dict(vocab_size=300, max_length=64, d_model=16, num_layers=2, num_heads=4, d_ff=24)
BERT = BERTConfig(**TINY)
BARE = dataclasses.replace(BERT, masked_lm=False, sentence_classes=0)
APART = DualEncoderConfig(EmbedderConfig(BARE), EmbedderConfig(
    dataclasses.replace(BARE, num_layers=3, remat='full'), pooling='cls'))

GIN = """
from __gin__ import dynamic_registration
from lm import run
from lm.data import examples
from lm.data import tasks
from lm.interop import of_run
from lm.models import bert
from lm.models import heads
from lm.training import loop
from lm.training import optimizers
INITIAL = {source!r}
TASK = {task}
run.Experiment.task = @tasks.TextTask()
tasks.TextTask.vocabulary = @of_run.vocabulary()
of_run.vocabulary.run_dir = %INITIAL
run.Experiment.model = @of_run.model()
of_run.model.run_dir = %INITIAL
of_run.model.task = %TASK
run.Experiment.optimizer = @optimizers.AdamW()
run.Experiment.train = @loop.TrainConfig()
loop.TrainConfig.sequence_length = 32
"""


def source(directory, model):
  """A run as `lm convert` leaves it, without parameters."""
  directory.mkdir()
  ByteVocabulary(44).save(directory / 'vocabulary')
  convert._write_config(directory, model, directory / 'vocabulary', [])
  return directory


def write(tmp_path, model, task='None', more=''):
  """A gin file that goes on from such a run."""
  path = tmp_path / 'finetune.gin'
  path.write_text(GIN.format(source=str(source(tmp_path / 'source', model)), task=task) + more)
  return path


def task(form='encoder', kind=examples.Classification(('a', 'b', 'c'))):
  return examples.ExampleTask(examples.Files('none.jsonl'), kind, form)


@pytest.mark.parametrize('model, trunk, pooling', [
    (BERT, dataclasses.replace(BARE, pooler=False), 'cls'),
    (DualEncoderConfig(EmbedderConfig(BARE)), dataclasses.replace(BARE, pooler=False), 'mean'),
    (T5Config(**TINY), T5Config(decoder=False, **TINY), 'cls'),
    (GPTConfig(tie_embeddings=False, **TINY), GPTConfig(**TINY), 'last')])
def test_a_head_stands_on_the_trunk_of_any_run(tmp_path, model, trunk, pooling):
  directory = str(source(tmp_path / 'source', model))
  assert of_run.model(directory) == model
  trunk = dataclasses.replace(trunk, dropout_rate=0.25)
  make = lambda kind: of_run.model(directory, task(kind=kind), dropout_rate=0.25)
  assert make(examples.Classification(('a', 'b'))) == ClassifierConfig(trunk, 2, pooling)
  assert make(examples.Similarity()) == ClassifierConfig(trunk, 1, pooling)
  assert make(examples.Tagging(('O', 'B', 'I'))) == TaggerConfig(trunk, 3)
  assert make(examples.SpanExtraction()) == SpanConfig(trunk)
  with pytest.raises(UserError, match="no head answers a task of kind 'generation'"):
    make(examples.Generation())


def test_one_binding_says_how_a_task_is_put_to_a_model(tmp_path):
  bert, t5, gpt = (str(source(tmp_path / type(model).__name__, model)) for model in (
      BERT, T5Config(**TINY), GPTConfig(**TINY)))
  assert of_run.model(t5, task('text_to_text')) == T5Config(**TINY)
  assert of_run.model(gpt, task('decoder')) == GPTConfig(**TINY)
  assert of_run.model(bert, task('embedder', examples.Similarity())) == DualEncoderConfig(
      EmbedderConfig(dataclasses.replace(BARE, pooler=False), 'cls'))
  with pytest.raises(UserError, match="form='decoder' is not what a BERTConfig reads"):
    of_run.model(bert, task('decoder'))
  with pytest.raises(UserError, match="pooling='cls' is the first token, which in a GPT"):
    of_run.model(gpt, task(), pooling='cls')


def test_a_pooler_stays_where_the_head_uses_it(tmp_path):
  directory = source(tmp_path / 'source', BERT)
  assert of_run.model(str(directory), task(), pooling='pooler').trunk == BARE


def test_config_gin_holds_the_model_itself_and_its_fields_can_be_bound(tmp_path):
  path = write(tmp_path, BERT, '@examples.ExampleTask()', """
examples.ExampleTask.source = @examples.Files()
examples.ExampleTask.kind = @examples.Classification()
examples.Classification.labels = ('a', 'b', 'c', 'd', 'e', 'f', 'g')
heads.ClassifierConfig.head_dropout_rate = 0.125
""")
  config.parse([str(path)], [('bert.BERTConfig.attention_dropout_rate', '0.5')])
  first = config.build(run.Experiment)
  assert first.model.num_classes == 7 and first.model.trunk.num_layers == 2
  assert first.model.trunk.attention_dropout_rate == 0.5
  assert first.model.head_dropout_rate == 0.125
  assert first.task.vocabulary == VocabularyConfig('byte', extra_ids=44)
  config.save(tmp_path / 'config.gin')
  shutil.rmtree(tmp_path / 'source')
  text = (tmp_path / 'config.gin').read_text()
  assert 'of_run' not in text and 'INITIAL' not in text
  config.parse([str(tmp_path / 'config.gin')], [('bert.BERTConfig.num_layers', '1')])
  again = config.build(run.Experiment)
  trunk = dataclasses.replace(first.model.trunk, num_layers=1)
  assert again == dataclasses.replace(first, model=dataclasses.replace(first.model, trunk=trunk))


def test_what_it_takes_the_place_of_binds_it_no_more(tmp_path):
  """As where a run file binds one vocabulary, and an experiment takes that of a run instead."""
  path = write(tmp_path, BERT)
  first = tmp_path / 'first.gin'
  first.write_text("""
from __gin__ import dynamic_registration
from lm.data import tasks
from lm.data import vocabularies
SIZE = 777
tasks.TextTask.vocabulary = @vocabularies.VocabularyConfig()
vocabularies.VocabularyConfig.kind = 'bpe'
vocabularies.VocabularyConfig.size = %SIZE
""")
  config.parse([str(first), str(path)])
  assert config.build(run.Experiment).task.vocabulary == VocabularyConfig('byte', extra_ids=44)
  config.save(tmp_path / 'config.gin')
  assert '777' not in (tmp_path / 'config.gin').read_text()
  config.parse([str(tmp_path / 'config.gin')])
  assert config.build(run.Experiment).task.vocabulary == VocabularyConfig('byte', extra_ids=44)


def test_two_trunks_of_one_class_keep_their_own_fields(tmp_path):
  path, saved = write(tmp_path, DualEncoderConfig(APART.query)), tmp_path / 'source' / 'config.gin'
  saved.write_text(saved.read_text() + """
heads.DualEncoderConfig.document = @document/heads.EmbedderConfig()
document/heads.EmbedderConfig.pooling = 'cls'
document/bert.BERTConfig.num_layers = 3
document/bert.BERTConfig.remat = 'full'
""")
  config.parse([str(path)])
  first = config.build(run.Experiment)
  assert first.model == APART
  config.save(tmp_path / 'config.gin')
  config.parse([str(tmp_path / 'config.gin')])
  assert config.build(run.Experiment) == first


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='holds no config.gin, so it is no run'):
    of_run.model(str(tmp_path))
  (tmp_path / 'config.gin').write_text('')
  with pytest.raises(UserError, match='holds no vocabulary'):
    of_run.vocabulary(str(tmp_path))
