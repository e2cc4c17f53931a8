"""`lm edit` fills what can only be filled one way, and keeps every other byte."""
import contextlib
import io
import json
import pathlib
from types import SimpleNamespace

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from lm import main, run
from lm.commands import edit
from lm.data import objectives
from lm.data.packing import Packed
from lm.data.vocabularies import ByteVocabulary
from lm.errors import UserError
from lm.evaluation import likelihood
from lm.inference import infill
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config

ROOT = pathlib.Path(__file__).resolve().parents[2]
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
RUN = ('--gin_file=gin/optim/adamw.gin', '--gin_file=gin/runs/pretrain.gin',
       "--gin.vocabularies.VocabularyConfig.kind='byte'", "--gin.DTYPE='float32'",
       '--gin.VOCAB_SIZE=267', '--gin.EXTRA_IDS=8', '--gin.SEQUENCE_LENGTH=32',
       '--gin.BATCH_SIZE=32', '--gin.NUM_STEPS=250', '--gin.LEARNING_RATE=0.01',
       '--gin.WARMUP_STEPS=10', '--gin.CHECKPOINT_EVERY=1000', '--gin.EVAL_EVERY=1000')
FAMILIES = {
    'gpt': ('gpt_small_cpu', 'fim', 'gpt.GPTConfig', '--gin.objectives.FillInTheMiddle.rate=0.9'),
    't5': ('t5_small', 'span_corruption', 't5.T5Config',
           '--gin.objectives.SpanCorruption.num_sentinels=8'),
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Trains a tiny model of a family on parts of the alphabet; returns its run's directory."""
  folder, runs = tmp_path_factory.mktemp('edit'), {}
  rng = np.random.default_rng(0)
  starts = rng.integers(0, 8, 400)
  (folder / 'letters.jsonl').write_text('\n'.join(
      json.dumps({'text': LETTERS[start:start + 18]}) for start in starts))

  def train(family):
    if family not in runs:
      model, objective, name, binding = FAMILIES[family]
      runs[family] = folder / family
      assert main.main([
          'train', f'--gin_file=gin/models/{model}.gin',
          f'--gin_file=gin/objectives/{objective}.gin', *RUN, binding,
          f'--gin.{name}.d_model=32', f'--gin.{name}.num_layers=2', f'--gin.{name}.num_heads=4',
          f'--gin.{name}.d_ff=64', f"--gin.FILES='{folder}/letters.jsonl'",
          f"--gin.CACHE_DIR='{folder}/cache'", f'--run_dir={runs[family]}']) == 0
    return runs[family]

  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    yield train


def lm_edit(directory, *flags):
  """What --json holds, and what is printed."""
  result = directory.parent / 'result.json'
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert main.main(['edit', f'--run_dir={directory}', f'--json={result}', *flags]) == 0
  return json.loads(result.read_text())['candidates'], out.getvalue()


@pytest.mark.supports('decoding', 'infilling by FIM and by T5 sentinels; lm edit')
@pytest.mark.parametrize('family', FAMILIES)
def test_a_span_that_can_only_be_one_is_filled_with_it(trained, family):
  candidates, out = lm_edit(trained(family), '--text=defghi[[??]]mnopqrstu', '--max_new_tokens=8',
                            '--temperature=0.8')
  assert candidates[0]['span'] == 'jkl' and candidates[0]['text'] == 'defghijklmnopqrstu'
  assert out.splitlines()[0].endswith('  defghijklmnopqrstu')
  assert len({one['span'] for one in candidates}) == len(candidates) <= 4


def test_all_bytes_outside_the_span_of_a_file_stay(trained, tmp_path):
  path = tmp_path / 'text.txt'
  before = b'\xef\xbb\xbf \t\r\n\xff\r defg'
  after = 'no \u2028\u00e9\U0001f600\r\r\n'.encode() + b'\x80'
  path.write_bytes(before + b'\xe9gone' + after)
  flags = f'--file={path}', f'--start={len(before)}', f'--end={len(before) + 5}', f'--out={path}'
  candidates, _ = lm_edit(trained('gpt'), *flags, '--max_new_tokens=4', '--candidates=2')
  assert path.read_bytes() == before + candidates[0]['span'].encode() + after
  for one in candidates:
    assert one['text'].encode('utf-8', 'surrogateescape') == before + one['span'].encode() + after


def test_a_decoders_score_is_the_likelihood_of_the_whole_text(trained):
  candidates, _ = lm_edit(trained('gpt'), '--text=abcd[[]]ijk', '--max_new_tokens=6', '--top_k=3',
                          '--temperature=1.5', '--candidates=6')
  assert len(candidates) > 1
  experiment = run.open_experiment([], [], str(trained('gpt')))
  _, module, params = run.load(experiment, str(trained('gpt')))
  wanted = likelihood.score_texts(module, params, ByteVocabulary(8),
                                  [one['text'] for one in candidates], progress=False)
  np.testing.assert_allclose([one['log_prob'] for one in candidates], wanted, rtol=1e-5)
  order = [(-one['is_whole'], -one['log_prob']) for one in candidates]
  assert order == sorted(order)


def lossless(text):
  """What the shell may give us: any text, any byte that is none as a lone surrogate."""
  return text.encode('utf-8', 'surrogateescape')


ODD = ['\r\n', '\r', '\n', '\t', '  ', '\x00', '\u2028', '\ufeff', '\u00a0', '\udc80', '\udcff',
       '[', ']', 'e\u0301', '\U0001f600']
PLAIN = st.lists(st.sampled_from(ODD) | st.characters(exclude_categories=['Cs']),
                 max_size=12).map(''.join)


@settings(deadline=None, max_examples=200)
@given(before=PLAIN, span=PLAIN, after=PLAIN, middle=st.text(st.characters(
    exclude_categories=['Cs'])))
def test_what_is_not_marked_stays_byte_for_byte(before, span, after, middle):
  # A bracket beside a mark would be part of it.
  if any('[[' in part or ']]' in part for part in (before + '|', span, after)) or (
      before.endswith('[') or span.startswith('[') or span.endswith(']') or after.startswith(']')):
    with contextlib.suppress(UserError):
      edit.marked_text(f'{before}[[{span}]]{after}')
    return
  marked = edit.marked_text(f'{before}[[{span}]]{after}')
  assert marked.span == lossless(span)
  assert marked.rewritten(middle) == lossless(before) + middle.encode() + lossless(after)


@given(before=st.lists(st.integers(0, 9)), after=st.lists(st.integers(0, 9)),
       room=st.integers(1, 30))
def test_the_model_reads_as_much_as_it_can_of_what_is_nearest(before, after, room):
  left, right = infill.nearest(np.array(before, np.int32), np.array(after, np.int32), room)
  assert before[len(before) - len(left):] == left.tolist() and after[:len(right)] == right.tolist()
  assert len(left) + len(right) == min(room, len(before) + len(after))
  assert min(len(left), len(right)) >= min(room // 2, len(before), len(after))


@pytest.mark.parametrize('order, spm_rate', [('psm', 0.0), ('spm', 1.0)])
def test_the_model_is_asked_as_it_was_trained(order, spm_rate):
  objective = objectives.FillInTheMiddle(rate=1.0, spm_rate=spm_rate).bind(ByteVocabulary(3))
  text = np.arange(10, 22, dtype=np.int32)
  packed = Packed(np.append(text, 1).astype(np.int32), np.ones(13, np.int32),
                  np.arange(13, dtype=np.int32), np.int32(-1))
  features = objective(packed, np.random.default_rng(3), lambda: packed)
  row = features['decoder_target_tokens'].tolist()
  sentinels = infill.FIM(*objective.fim_ids, order)
  middle_at, suffix_at = row.index(sentinels.middle_id), row.index(sentinels.suffix_id)
  after = row[suffix_at + 1:middle_at]
  before = row[1:suffix_at] if order == 'psm' else row[middle_at + 1:middle_at + 4]
  prompt = sentinels.prompt(np.array(before, np.int32), np.array(after, np.int32)).tolist()
  assert len(after) > 1 and row[:len(prompt)] == prompt
  rest = row[len(prompt):]
  assert before + rest[:sentinels.length(rest, 1)] + after == text.tolist()


def test_a_middle_keeps_its_first_space():
  class Dropping(ByteVocabulary):
    """Drops the space that begins a text, as SentencePiece's decoder does."""

    def decode(self, ids):
      return super().decode(ids).removeprefix(' ')

  vocabulary = Dropping()
  ids = lambda text: vocabulary.encode(text).tolist()
  assert infill.text_behind(vocabulary, ids('one'), ids(' two')) == ' two'
  assert infill.text_behind(vocabulary, [], ids('two')) == 'two'


def refused(*argv):
  """Runs `lm edit`; it must refuse in one sentence, with status 2."""
  with contextlib.redirect_stderr(io.StringIO()) as err:
    assert main.main(['edit', *map(str, argv)]) == 2
  line, = err.getvalue().strip().splitlines()
  return line


def test_mistakes_are_named(tmp_path):
  here = f'--run_dir={tmp_path}'
  assert '--text=TEXT with a span' in refused(here)
  assert 'needs --run_dir' in refused('--text=a[[b]]c')
  for text in ('no mark', 'a[[b', 'a]]b[[c', 'a[[b]]c[[d]]'):
    assert 'must mark one span to rewrite in [[double brackets]]' in refused(here, f'--text={text}')
  assert '--candidates=0' in refused(here, '--text=a[[b]]c', '--candidates=0')
  assert 'cannot be read' in refused(here, f'--file={tmp_path}/none', '--start=0', '--end=1')
  (tmp_path / 'file').write_text('four')
  for span in (('--start=0',), ('--start=3', '--end=2'), ('--start=0', '--end=5')):
    assert 'mark no span of the 4 bytes' in refused(here, f'--file={tmp_path}/file', *span)


def test_models_that_cannot_be_asked_say_what_could():
  causal, vocabulary = objectives.CausalLM(), ByteVocabulary(0)
  ask = lambda model: edit.sentinels(SimpleNamespace(model=model, objective=causal), vocabulary)
  with pytest.raises(UserError, match='no sentinels of prefix, middle and suffix'):
    ask(GPTConfig())
  with pytest.raises(UserError, match='no sentinels .<extra_id_0>.'):
    ask(T5Config())
  with pytest.raises(UserError, match='BERTConfig cannot fill a span in'):
    ask(BERTConfig())
  vocabulary.special_tokens = {'<fim_prefix>': 7, '<fim_middle>': 8, '<fim_suffix>': 9}
  assert ask(GPTConfig()) == infill.FIM(7, 8, 9, 'psm', 0)
  vocabulary.sentinel_ids = 90, 89, 88
  assert ask(T5Config()) == infill.Spans(90, 89)
