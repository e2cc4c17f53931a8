"""Sets of TensorFlow Datasets that lie prepared, read without TensorFlow in this process."""
import os
import pathlib
import subprocess
import sys

import pytest

from lm.data import examples
from lm.data.examples import convert
from lm.data.vocabularies import VocabularyConfig
from lm.errors import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
MAKE = '''
import sys
import numpy as np
import tensorflow_datasets as tfds
F = tfds.features

def make(name, features, splits):
  class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')
    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features),
                                   disable_shuffling=True)
    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(rows) for split, rows in splits.items()}
    def _generate_examples(self, rows):
      yield from enumerate(rows)
  builder = type(name, (Made,), {'__module__': __name__})
  builder(data_dir=sys.argv[1]).download_and_prepare()

rows = [{'sentence': f'Is \\u00fc {n}?', 'label': 'yes' if n % 2 else 'no'} for n in range(6)]
make('Toy', {'sentence': F.Text(), 'label': F.ClassLabel(names=['no', 'yes'])},
     {'train': rows, 'dev': rows[:2], 'hidden': [{'sentence': 'x', 'label': -1}]})
make('Marks', {'tokens': F.Sequence(F.Text()), 'ner': F.Sequence(F.ClassLabel(names=['O', 'B']))},
     {'train': [{'tokens': ['a', 'b'], 'ner': ['O', 'B']}]})
make('Asked', {'id': F.Text(), 'question': F.Text(), 'context': F.Text(),
               'answers': F.Sequence({'text': F.Text(), 'answer_start': np.int32})},
     {'train': [{'id': 'q1', 'question': 'who?', 'context': 'Ann is.',
                 'answers': {'text': ['Ann'], 'answer_start': [0]}},
                {'id': 'q2', 'question': 'why?', 'context': 'Ann is.',
                 'answers': {'text': [], 'answer_start': []}}]})
'''


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  pytest.importorskip('tensorflow_datasets')
  folder = tmp_path_factory.mktemp('tfds')
  done = subprocess.run([sys.executable, '-c', MAKE, str(folder)], capture_output=True, text=True,
                        env=dict(os.environ, TF_CPP_MIN_LOG_LEVEL='3'))
  assert not done.returncode, done.stderr
  return str(folder)


def read(source, split):
  return [record for _, record in source.records(split)]


@pytest.mark.slow
@pytest.mark.supports('fine-tuning', 'tasks of TensorFlow Datasets, without TensorFlow in the '
                      'process that trains')
def test_a_task_of_tfds_is_prepared_without_tensorflow(data_dir, tmp_path):
  source = examples.TFDS('train', 'dev', fields=(('a', 'sentence'),), name='toy', data_dir=data_dir)
  task = examples.ExampleTask(source, examples.Classification(('no', 'yes')),
                              vocabulary=VocabularyConfig('byte'), cache_dir=str(tmp_path))
  prepared = task.prepare(progress=False)
  assert {split: len(prepared.cache(split)) for split in ('train', 'validation')} == {
      'train': 6, 'validation': 2}
  assert prepared.cache('train').example(3) == {'id': 'train-3', 'a': 'Is ü 3?', 'label': 'yes'}
  assert task.prepare(progress=False).directory == prepared.directory
  code = ('import sys; from lm.data import examples; source = examples.TFDS("train", name="toy", '
          f'data_dir={data_dir!r}); print(len(list(source.records("train"))), '
          '"tensorflow" in sys.modules)')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                        cwd=REPOSITORY)
  assert done.stdout.split() == ['6', 'False'], done.stderr


@pytest.mark.slow
def test_tags_and_answers_are_as_their_kinds_want_them(data_dir):
  marks = examples.TFDS('train', name='marks/1.0.0', data_dir=data_dir, convert=convert.conll2003)
  assert read(marks, 'train') == [{'words': ['a', 'b'], 'tags': ['O', 'B']}]
  asked = examples.TFDS('train', name='asked', data_dir=data_dir, convert=convert.squad)
  kind = examples.SpanExtraction()
  assert [kind.canonical(record)['starts'] for record in read(asked, 'train')] == [[0], []]


@pytest.mark.slow
def test_what_is_not_there_is_one_sentence(data_dir, tmp_path):
  wrong = examples.TFDS('tran', name='toy', data_dir=data_dir)
  with pytest.raises(UserError, match=r"has no split 'tran'; it has \['dev', 'hidden', 'train'\]"):
    read(wrong, 'train')
  with pytest.raises(UserError, match="'glue/col' must be|glue/col lies not prepared in"):
    examples.TFDS('train', name='glue/col', data_dir=str(tmp_path)).digest()
  with pytest.raises(UserError, match="name='' must be a data set"):
    examples.TFDS('train')
  with pytest.raises(UserError, match="'.' must be one data set below .* asked/1.0.0, .*marks"):
    read(examples.TFDS('train', name='.', data_dir=data_dir), 'train')
  hidden = examples.TFDS(None, None, 'hidden', name='toy', data_dir=data_dir,
                         fields=(('a', 'sentence'),))
  with pytest.raises(Exception, match="has no 'label'"):
    examples.Classification().canonical(read(hidden, 'test')[0])
