"""`lm corpus why`: from what it says of a row, that row is made again, as it was trained on."""
import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import shutil

import numpy as np
import pytest

from lm import main
from lm.commands import corpus_why
from lm.corpus import passports, write
from lm.corpus.document import Document
from lm.data import loader, vocabularies
from lm.data.tasks import TextTask
from lm.errors import UserError
from lm.parallel import batches

TINY = ('--gin_file=gin/models/gpt_small_cpu.gin', '--gin_file=gin/optim/adamw.gin',
        '--gin_file=gin/objectives/causal_lm.gin', '--gin_file=gin/runs/pretrain.gin',
        "--gin.vocabularies.VocabularyConfig.kind='byte'", '--gin.VOCAB_SIZE=259',
        '--gin.gpt.GPTConfig.d_model=16', '--gin.gpt.GPTConfig.num_layers=1',
        '--gin.gpt.GPTConfig.d_ff=32', '--gin.SEQUENCE_LENGTH=256', '--gin.BATCH_SIZE=4',
        '--gin.NUM_STEPS=7', '--gin.CHECKPOINT_EVERY=4', '--gin.EVAL_EVERY=99',
        '--gin.loop.TrainConfig.batch_ramp=((2, 2),)')
WORDS = 'the of and to in a is that for 日本 it as was\n with be by \x1b[31m on not he'.split(' ')


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).resolve().parents[2])


def make_corpus(directory, form, name):
  """A corpus of 40 documents in two shards, one document written twice, one that has duplicates."""
  rng = random.Random(name)
  documents = [Document(
      f'{name}/crawl-0{i % 2}.warc.gz:{i}', ' '.join(rng.choices(WORDS, k=250 if i == 7 else 12)),
      source=name, url=f'https://example.org/{i}', address=i, language='en',
      verdicts={'gopher.word_count': 12 + i, 'privacy.email': 0}) for i in range(40)]
  documents[9].cluster = documents[9].address
  duplicate = Document(f'{name}/copy:1', 'x', source=name, address=99, cluster=9)
  duplicate.remove('minhash.duplicate')
  for shard, part in enumerate((documents[:25], [*documents[25:], documents[30]])):
    written = write.Writer(form).write(write.stem(directory / 'data', name, shard, 2), part)
    block = directory / 'block'
    passports.write(block, part)
    passports.merge([block], write.stem(directory / 'passports', 'kept', shard, 2) + '.parquet',
                    written.file)
    block.unlink()
  passports.write(directory / 'passports' / 'removed-00000-of-00001.parquet', [duplicate])
  return documents


def make_plain(directory):
  """Files of a user: lines of JSON, some of them empty, and a text."""
  rng = random.Random(0)
  directory.mkdir()
  lines = [json.dumps({'text': ' '.join(rng.choices(WORDS, k=20))}) for _ in range(30)]
  (directory / 'x.jsonl').write_text('\n\n'.join(lines))
  (directory / 'y.txt').write_text(' '.join(rng.choices(WORDS, k=300)))


MIXTURE = """
from __gin__ import dynamic_registration
from lm import run
from lm.data import mixtures
from lm.data import tasks
run.Experiment.task = @mixtures.Mixture()
mixtures.Mixture.components = (@a/mixtures.Component(), @b/mixtures.Component())
a/mixtures.Component.task = @tasks.TextTask()
b/mixtures.Component.task = @tasks.TextTask()
a/mixtures.Component.rate = 3.0
b/mixtures.Component.rate = 1.0
FILES = ('{home}/web/data/*', '{home}/wiki/data/*', '{home}/books/data/*', '{home}/plain/*')
CACHE_DIR = '{home}/cache'
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Where three corpora, a user's files and a run on their mixture lie; the corpora's documents;
  the targets of each step's batch as they were trained on."""
  home, documents, rows = tmp_path_factory.mktemp('why'), {}, []
  for name, form in (('web', 'parquet'), ('wiki', 'array_record'), ('books', 'jsonl')):
    documents |= {document.name: document for document in make_corpus(home / name, form, name)}
  make_plain(home / 'plain')
  (home / 'mixture.gin').write_text(MIXTURE.format(home=home))
  place = batches.GlobalBatch.place
  with contextlib.chdir(pathlib.Path(__file__).resolve().parents[2]), pytest.MonkeyPatch.context(
  ) as patch:
    patch.setattr(batches.GlobalBatch, 'place',
                  lambda self, found: rows.append(found) or place(self, found))
    assert main.main(['train', *TINY, f'--gin_file={home}/mixture.gin',
                      f'--run_dir={home}/run']) == 0
  return home, documents, [batch['decoder_target_tokens'] for batch in rows[:7]]


def why(run_dir, step, index, gin_file=(), bindings=()):
  """What the command prints and returns."""
  args = argparse.Namespace(gin_file=list(gin_file), run_dir=str(run_dir), step=step, index=index)
  with contextlib.redirect_stdout(io.StringIO()) as out:
    result = corpus_why.execute(args, list(bindings))
  return out.getvalue(), result


def rebuilt(example, length=256):
  """The packed row, made of what stands in the files that the pieces name."""
  row, vocabulary = np.zeros(length, np.int32), vocabularies.ByteVocabulary()
  for piece in example['pieces']:
    tokens = [*vocabulary.encode(text_of(piece)), vocabulary.eos_id]
    assert len(tokens) == piece['of']
    row[slice(*piece['place'])] = tokens[slice(*piece['tokens'])]
  return row


def text_of(piece):
  """The text that a piece names, by another way than the command's."""
  if 'record' in piece:
    return list(write.read(piece['file']))[piece['record']]['text']
  text = pathlib.Path(piece['file']).read_text()
  return json.loads(text.split('\n')[piece['line'] - 1])['text'] if 'line' in piece else text


@pytest.mark.supports('documents', 'from a row of a batch back to its sources (`lm corpus why`)')
def test_what_is_told_of_a_row_gives_it_back(trained):
  home, documents, rows = trained
  assert [len(batch) for batch in rows] == [2, 2, 4, 4, 4, 4, 4]
  files, went_on = set(), False
  for step, batch in enumerate(rows, start=1):
    for index, row in enumerate(batch):
      _, result = why(home / 'run', step, index)
      (example,) = result['examples']
      np.testing.assert_array_equal(rebuilt(example), row)
      for piece in example['pieces']:
        files.add(os.path.basename(piece['file']))
        went_on |= piece['tokens'][0] > 0
        assert ('passport' in piece) == ('/plain/' not in piece['file'])
        if 'passport' in piece:
          check_origin(piece, documents[piece['name']])
  assert went_on
  assert files > {'x.jsonl', 'y.txt'} and {name.split('-')[0] for name in files} > {
      'web', 'wiki', 'books'}


def check_origin(piece, document):
  """What a piece says of its source is what the document was made with."""
  number = document.address
  assert piece['source'] == {'name': document.source, 'file': f'crawl-0{number % 2}.warc.gz',
                             'record': number}
  assert piece['passport']['verdicts'] == {'gopher.word_count': str(12 + number),
                                           'privacy.email': '0'}
  assert piece['passport']['url'] == document.url
  assert piece['duplicates'] == ([f'{document.source}/copy:1'] if number == 9 else [])
  assert piece['text'].strip('\ufffd') in document.text


def test_a_single_task_is_told_of_too(trained, tmp_path):
  home, _, _ = trained
  files, bindings = zip(*((flag.partition('=')[2], None) if flag.startswith('--gin_file')
                          else (None, tuple(flag.removeprefix('--gin.').split('=', 1)))
                          for flag in TINY))
  patterns = tuple(f'{home}/{name}/data/*' for name in ('web', 'wiki', 'books'))
  patterns += (f'{home}/plain/*',)
  bindings = [*filter(None, bindings), ('FILES', repr(patterns)), ('CACHE_DIR', f"'{home}/cache'")]
  _, result = why(tmp_path, 4, 3, filter(None, files), bindings)
  task = TextTask(patterns, vocabularies.VocabularyConfig('byte', 259), cache_dir=f'{home}/cache')
  rows = loader.Loader(task.prepare().cache('train'), 256, 1, 0)
  row = 2 * 2 + 4 + 3  # of the ramp's two steps, of step 3, and of step 4
  assert result['row'] == row
  np.testing.assert_array_equal(rebuilt(result['examples'][0]),
                                rows.batch(row)['decoder_target_tokens'][0])


def test_what_is_printed_is_safe_and_names_all(trained, tmp_path):
  home, _, _ = trained
  with contextlib.redirect_stdout(io.StringIO()) as out:
    for step in range(1, 8):
      assert main.main(['corpus', 'why', f'--run_dir={home}/run', f'--step={step}', '--index=0',
                        f'--json={tmp_path}/{step}.json']) == 0
  said = out.getvalue()
  assert json.loads((tmp_path / '7.json').read_text())['examples'] == why(
      home / 'run', 7, 0)[1]['examples']
  assert '\x1b' not in said and '\\u001b[31m' in said
  for word in ('tokens 0-', 'verdicts   gopher.word_count = ', ': crawl-0', '-of-00002.parquet, '
               'record ', 'https://example.org/', 'sha256', ', line ', "task 'text'"):
    assert word in said


def test_a_row_that_is_not_there_is_refused(trained):
  home, _, _ = trained
  for step, index, flag in ((0, 0, '--step=0'), (8, 0, '--step=8'), (1, 2, '--index=2'),
                            (3, 4, '--index=4'), (3, -1, '--index=-1')):
    with pytest.raises(UserError, match=flag):
      why(home / 'run', step, index)
  with pytest.raises(UserError, match='--step'):
    why(home / 'run', None, 0)


def test_data_that_changed_since_are_refused(trained, tmp_path):
  home, _, _ = trained
  shutil.copytree(home / 'run', tmp_path / 'run')
  for path in (tmp_path / 'run' / 'checkpoints').glob('*/*.json'):
    path.write_text(path.read_text().replace('"data": "', '"data": "not-'))
  with pytest.raises(UserError, match='was trained on data not-'):
    why(tmp_path / 'run', 1, 0)


def test_a_shard_that_is_not_its_passport_s_is_named(tmp_path):
  make_corpus(tmp_path, 'parquet', 'web')
  files, name = str(tmp_path / 'data' / '*.parquet'), 'web/crawl-01.warc.gz:3'
  assert corpus_why.origin(files, name)['record'] == 3
  first, second = sorted((tmp_path / 'data').iterdir())
  shutil.copy(second, first)
  with pytest.raises(UserError, match='is not what its passport says'):
    corpus_why.origin(files, name)
