"""Bad input of tasks: one sentence that says what is wrong and what to do, and nothing is lost."""
import contextlib
import io
import json

import numpy as np
import pytest

from lm import main

RUN = """
include 'gin/models/bert_tiny.gin'
include 'gin/optim/adamw.gin'
include 'gin/objectives/causal_lm.gin'
include 'gin/runs/pretrain.gin'
include 'gin/tasks/parts/files.gin'
from __gin__ import dynamic_registration
from lm import run
from lm.data import examples
from lm.data import vocabularies
from lm.data.examples import convert
from lm.models import bert
from lm.models import heads
run.Experiment.task = %TASK
run.Experiment.model = @heads.ClassifierConfig()
heads.ClassifierConfig.trunk = @bert.BERTConfig()
bert.BERTConfig.masked_lm = False
bert.BERTConfig.num_layers = 1
bert.BERTConfig.sentence_classes = 0
examples.ExampleTask.name = 'bad'
examples.ExampleTask.kind = @examples.Classification()
examples.ExampleTask.cache_dir = %CACHE_DIR
examples.ExampleTask.vocabulary = @vocabularies.VocabularyConfig()
examples.Files.fields = (('a', 'text'), ('label', 'class'))
vocabularies.VocabularyConfig.kind = 'byte'
SEQUENCE_LENGTH = 64
BATCH_SIZE = 4
NUM_STEPS = 2
CHECKPOINT_EVERY = 2
EVAL_EVERY = 2
WARMUP_STEPS = 1
"""
GOOD = [{'text': f'text {i}', 'class': 'yes' if i % 2 else 'no'} for i in range(8)]


def lines_of(*records):
  return ''.join((record if isinstance(record, str) else json.dumps(record)) + '\n'
                 for record in records)


def lm(tmp_path, *extra, command='train', train=None, validation=None, more=''):
  """Writes the files and runs the command; returns its status and what it said."""
  (tmp_path / 'run.gin').write_text(RUN + more)
  files = {'TRAIN_FILES': train, 'VALIDATION_FILES': validation}
  for macro, content in files.items():
    if isinstance(content, tuple):
      name, text = content
      (tmp_path / name).write_text(text, 'utf-8')
      files[macro] = str(tmp_path / name)
  argv = [command, f'--gin_file={tmp_path}/run.gin', f'--gin.CACHE_DIR={str(tmp_path)!r}',
          *(f'--gin.{macro}={path!r}' for macro, path in files.items()), *extra]
  if command == 'train':
    argv.append(f'--run_dir={tmp_path}/run')
  with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(err):
    status = main.main(argv)
  return status, err.getvalue()


def refused(*args, **kwargs):
  status, said = lm(*args, **kwargs)
  assert status == 2 and 'Traceback' not in said, said
  sentence = said.strip().splitlines()[-1]
  assert sentence.startswith('error: ')
  return sentence


TABLE = 'text\tclass\n' + ''.join(f'{r["text"]}\t{r["class"]}\n' for r in GOOD)
BAD = {
    'a label outside the set': (
        dict(more="examples.Classification.labels = ('no', 'yes')",
             train=('a.jsonl', lines_of(*GOOD, {'text': 'x', 'class': 'yse'}))),
        ["a.jsonl:9 has the label 'yse', which is none of the 2 labels", '1 of 9 records']),
    'a label that training lacks': (
        dict(train=('a.jsonl', lines_of(*GOOD)),
             validation=('b.jsonl', lines_of({'text': 'x', 'class': 'may'}))),
        ["The label 'may' of split 'validation' is none of the 2 of the training split", 'bind']),
    'an empty example': (
        dict(train=('a.jsonl', lines_of(*GOOD, {'text': ' ', 'class': 'yes'}))),
        ["a.jsonl:9 has an empty 'a'", 'mend']),
    'no example at all': (dict(train=('a.jsonl', '')), ['has no example', 'name files']),
    'a row of too few columns': (
        dict(train=('a.tsv', TABLE + 'alone\n')),
        ['a.tsv:10 has 1 columns and 2 are named (text, class)', 'mend the line']),
    'broken JSON': (
        dict(train=('a.jsonl', lines_of(*GOOD, '{"text": "x", "cla'))),
        ['a.jsonl:9 is no JSON', 'mend or remove the line']),
    'a broken document of JSON': (dict(train=('a.json', '[{"text":')), ['a.json is no JSON']),
    'JSON that is no object': (
        dict(train=('a.jsonl', lines_of(*GOOD, '[1, 2]'))), ['a.jsonl:9 is no JSON object']),
    'a wrong name of a field': (
        dict(train=('a.jsonl', lines_of({'texts': 'x', 'class': 'no'}))),
        ["fields names 'text' for 'a'; did you mean 'texts'?"]),
    'text in another encoding': (
        dict(train='latin.jsonl'), ["is not in encodings=('utf-8',)", "('latin-1',)"]),
    'a file of an unknown format': (
        dict(train=('a.foo', 'x')), ['a.foo has a name from which its format does not follow']),
    'no such file': (dict(train='nowhere/*.jsonl'), ["No file matches train='nowhere/*.jsonl'"]),
    'a damaged archive': (
        dict(train=('a.jsonl.gz', 'no gzip')), ['a.jsonl.gz cannot be read', 'fetch it again']),
    'another convert': (
        dict(train=('a.jsonl', lines_of(*GOOD)), more='examples.Files.convert = @convert.scitldr'),
        ["a.jsonl:1 is nothing that scitldr reads (KeyError: 'source')"]),
    'no training split': (
        dict(validation=('b.jsonl', lines_of(*GOOD))),
        ["has no split 'train'; it has ['validation']", 'bind files']),
    'no validation split': (
        dict(train=('a.jsonl', lines_of(*GOOD))),
        ["has no split 'validation'; it has ['train']", 'held_out']),
}


@pytest.mark.supports('fine-tuning', 'bad labelled input is one sentence')
@pytest.mark.parametrize('what', BAD)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, what):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'latin.jsonl').write_bytes('{"text": "é"}'.encode('latin-1'))
  arguments, expected = BAD[what]
  sentence = refused(tmp_path, **arguments)
  assert all(text in sentence for text in expected), sentence
  caches = [path for path in tmp_path.glob('bad-*') if path.is_dir()]
  assert all((path / 'info.json').exists() for path in caches)  # None that is not whole.


def test_a_misspelt_field_of_the_held_out_share_is_refused(tmp_path):
  sentence = refused(tmp_path, '--gin.HELD_OUT=0.5', command='cache',
                     train=('a.jsonl', lines_of(*GOOD)), more="examples.Files.held_out_by = 'tex'")
  assert "held_out_by='tex'" in sentence and "['a', 'label']" in sentence


def test_bad_records_spoil_no_cache_that_stands(tmp_path):
  train = ('a.jsonl', lines_of(*GOOD))
  assert lm(tmp_path, command='cache', train=train)[0] == 0
  before = sorted(path.name for path in tmp_path.glob('bad-*/*'))
  refused(tmp_path, command='cache', train=('a.jsonl', lines_of(*GOOD, '{')))
  assert sorted(path.name for path in tmp_path.glob('bad-*/*')) == before
  assert lm(tmp_path, command='cache', train=train)[0] == 0


def test_a_sentence_of_10000_words_is_cut_and_told_once(tmp_path):
  long = {'text': 'word ' * 10_000, 'class': 'yes'}
  status, said = lm(tmp_path, train=('a.jsonl', lines_of(*GOOD, long)),
                    validation=('b.jsonl', lines_of(*GOOD)))
  assert status == 0, said
  told = [line for line in said.splitlines() if 'are cut' in line]
  assert told == ['1 of 9 train examples of bad are longer than sequence_length=64 and are cut (the'
                  ' longest has 50002 tokens)']
  rows = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  assert all(np.isfinite(row['loss']) for row in rows if 'loss' in row)
