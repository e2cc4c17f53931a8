"""`lm tokenizer`: what it writes is opened, what it measures is right, and mistakes are named."""
import json
import random
import re

import numpy as np
import pytest

from lm import config, main, run
from lm.corpus.document import Document
from lm.data import splits, vocabularies, vocabulary_measures
from lm.data.pretrained_vocabularies import open_pretrained
from lm.evaluation import tokenizer_report

GIN = 'gin/experiments/tokenizer.gin'


def write_documents(directory):
  """120 documents of random sentences in two languages; returns their path."""
  rng = random.Random(0)
  word = lambda: ''.join(rng.choices('abcdeghiklmnoprstu', k=rng.randint(1, 6)))
  words = {'en': [word() for _ in range(300)],
           'zh': list('學而時習之不亦說乎有朋自遠方來人不知而不慍不亦君子乎')}
  records = []
  for n in range(120):
    language, space = (('en', ' '), ('en', ' '), ('zh', ''))[n % 3]
    lines = [space.join(rng.choices(words[language], k=9)) + f'{n}。' for _ in range(20)]
    records.append({'text': '\n'.join(lines), 'language': language})
  path = directory / 'documents.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records), 'utf-8')
  return path


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
  """Four kinds at two sizes: its directory, and what --json holds."""
  directory = tmp_path_factory.mktemp('tokenizer')
  files = repr(str(write_documents(directory)))
  status = main.main([
      'tokenizer', f'--gin_file={GIN}', f'--run_dir={directory / "R"}', '--sizes=500,420',
      '--kinds=bpe,unigram,byte_bpe,wordpiece,byte', f'--json={directory / "result.json"}',
      f'--gin.FILES={files}', '--gin.tasks.TextTask.held_out_fraction=0.2', '--gin.EXTRA_IDS=20'])
  assert status == 0
  return directory / 'R', json.loads((directory / 'result.json').read_text())


@pytest.mark.supports('documents', 'vocabularies compared by fertility of each language')
def test_every_size_of_every_kind_is_measured_on_held_out_text(sweep):
  directory, result = sweep
  found = [(row['kind'], row['size']) for row in result['vocabularies']]
  kinds = ('bpe', 'unigram', 'byte_bpe', 'wordpiece')
  assert found == [(kind, size) for kind in kinds for size in (420, 500)] + [('byte', 279)]
  assert [facts['unspaced'] > 0.5 for facts in result['languages'].values()] == [False, True]
  assert list(result['languages']) == ['en', 'zh']
  files = result['files']
  rule = splits.survey(splits.documents(files), 0.2)
  held_out = [document.text for part, document in splits.split(splits.documents(files), rule, 0.2)
              if part == splits.VALIDATION]
  num_bytes = sum(len(text.encode()) for text in held_out)
  assert 0 < len(held_out) < 60
  for row in result['vocabularies'][:-1]:
    vocabulary = open_pretrained(row['path'])
    tokens = sum(map(len, vocabulary.encode_batch(held_out)))
    assert row['bytes_per_token'] == pytest.approx(num_bytes / tokens)
    assert (vocabulary.size, vocabulary.digest) == (row['size'], row['digest'])
    assert 0 < row['used'] <= 1 and (row['unknown'] == 0 or row['kind'] == 'wordpiece')
  assert result['vocabularies'][-1]['bytes_per_token'] == 1
  lengths = [row['bytes_per_token'] for row in result['vocabularies'][:-1]]
  assert all(larger > smaller for smaller, larger in zip(lengths[::2], lengths[1::2], strict=True))


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'byte_bpe', 'wordpiece'])
def test_a_run_takes_a_vocabulary_by_one_file(sweep, kind):
  directory, _ = sweep
  config.parse([GIN, str(directory / f'{kind}-500' / 'vocabulary.gin')], [('EXTRA_IDS', '20')])
  experiment = config.build(run.Experiment)
  assert experiment.model.vocab_size == 500
  given = experiment.task.vocabulary
  vocabulary = open_pretrained(given.path, given.extra_ids)
  assert (given.kind, vocabulary.size, vocabulary.extra_ids) == ('pretrained', 500, 20)
  assert len(vocabulary.encode('[NLU]')) == 1


def test_the_page_shows_curves_and_tables_and_loads_nothing(sweep):
  directory, result = sweep
  page = (directory / 'tokenizer.html').read_text('utf-8')
  assert '<svg' in page and '<script' not in page
  assert not re.findall(r'(?:src|href)\s*=', page) and 'prefers-color-scheme: dark' in page
  for row in result['vocabularies']:
    shown = f'{row["kind"]} {row["size"]}', f'{row["bytes_per_token"]:.3f}'
    assert all(text in page for text in shown)
    assert f'| {shown[0]} | {shown[1]} |' in (directory / 'tokenizer.md').read_text('utf-8')


def test_a_character_counts_as_a_word_where_there_are_no_spaces():
  texts = vocabulary_measures.by_language([
      Document('a', 'the cat, sat 12.5', language='en'),
      Document('b', '學而時習之，不亦說乎？', language='zh'),
      Document('c', 'カタ abc สวัสดี', language=''), Document('d', ' on it \n', language='en')])
  assert list(texts) == ['zh', '', 'en']  # The most bytes first.
  assert {language: text.num_words for language, text in texts.items()} == {
      'en': 6, 'zh': 11, '': 9}
  assert texts['zh'].unspaced == 1 and texts['en'].unspaced == 0
  row = vocabulary_measures.measure(vocabularies.ByteVocabulary(), 3, texts, ['ab', 'a'], 300)
  assert row['languages']['zh'] == {'bytes_per_token': 1, 'fertility': 3, 'unknown': 0}
  assert row['used'] == 2 / 256 and row['rarest'] == 0


class _Letters(vocabularies.ByteVocabulary):
  """Of 20 learnt ids, the n-th of which stands in the text n times; the last is unknown."""

  unk_id = 22

  def __init__(self):
    super().__init__()
    self.size = 23

  def encode_batch(self, texts, num_threads=1):
    return [np.array([3 + ord(c) - ord('a') for c in text], np.int32) for text in texts]


def test_the_rarest_pieces_are_counted_in_the_whole_training_split():
  sentence = ''.join(chr(ord('a') + n) * (n + 10) for n in range(20))
  texts = {'': vocabulary_measures.Text.of(['abtt'])}
  row = vocabulary_measures.measure(_Letters(), 3, texts, [sentence], 4 * len(sentence))
  assert row['rarest'] == 4 * 11  # of 20 pieces one is rarer
  assert row['unknown'] == 0.5


def test_the_largest_size_is_that_whose_pieces_are_often_enough():
  rows = [{'kind': kind, 'size': size, 'rarest': rarest} for kind, size, rarest in [
      ('bpe', 1000, 900), ('bpe', 2000, 100), ('bpe', 4000, 99), ('unigram', 1000, 3)]]
  assert tokenizer_report.largest(rows) == {'bpe': 2000, 'unigram': None}


@pytest.mark.parametrize('flags, message', [
    ([], 'needs --gin_file'), (['--run_dir=R'], 'needs --gin_file'),
    ([f'--gin_file={GIN}', '--run_dir={}', '--kinds=words'], "kind='words' is not a vocabulary"),
    ([f'--gin_file={GIN}', '--run_dir={}', '--sizes=4000,300'], 'size=300 is too small'),
    ([f'--gin_file={GIN}', '--run_dir={}', '--kinds=bpe,pretrained'], 'needs the path'),
])
def test_wrong_flags_are_refused_before_any_work(flags, message, tmp_path, capsys):
  assert main.main(['tokenizer', *(flag.format(tmp_path / 'R') for flag in flags)]) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.glob('R/*'))
