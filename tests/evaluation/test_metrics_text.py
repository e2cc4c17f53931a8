"""Metrics of text are those of sacrebleu, rouge-score and the script of SQuAD."""
import json
import random
import subprocess
import sys

import pytest
import real_examples as real
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from lm.errors import UserError
from lm.evaluation import metrics

NAMES = {'bleu': 'BLEU', 'chrf': 'chrF2', 'ter': 'TER'}


def sacrebleu(rows, directory, *options):
  """{metric: (score, signature)} by sacrebleu's own command."""
  texts = {'hypothesis': '\n'.join(row['prediction'] for row in rows),
           'reference': '\n'.join(row['targets'][0] for row in rows)}
  for name, text in texts.items():
    (directory / name).write_text(text + '\n', 'utf-8')
  child = subprocess.run(
      [sys.executable, '-m', 'sacrebleu', directory / 'reference', '-i', directory / 'hypothesis',
       '-m', 'bleu', 'chrf', 'ter', '-w', '13', *options], check=True, capture_output=True)
  return {one['name']: (one['score'], one['signature']) for one in json.loads(child.stdout)}


@pytest.mark.parametrize('pair, options', [
    ('eng-deu', ()), ('eng-cmn', ('-tok', 'zh', '--ter-normalized', '--ter-asian-support'))])
def test_scores_and_signatures_are_those_of_the_sacrebleu_command(tmp_path, pair, options):
  examples = [{**one, 'targets': one['targets'][:1]} for one in real.translations(pair, 300)]
  about, rows = real.generated(examples, characters=pair == 'eng-cmn', language=pair[4:])
  scorer = metrics.scorer(about, rows)
  found = scorer.metrics()
  for key, (score, signature) in sacrebleu(rows, tmp_path, *options).items():
    ours = next(name for name, theirs in NAMES.items() if theirs == key)
    assert round(found[ours], 13) == score
    parts = f'nrefs:1|{signature.split("|", 1)[1]}' if 'nrefs' in signature else signature
    assert sorted(scorer.notes[ours].split('|')) == sorted(parts.split('|'))
  assert ('tok:zh' in scorer.notes['bleu']) == (pair == 'eng-cmn')


def test_several_references_are_all_given_to_sacrebleu():
  examples = [one for one in real.translations('eng-deu', 3000) if len(one['targets']) > 1][:60]
  about, rows = real.generated(examples, language='de')
  most = max(len(row['targets']) for row in rows)
  streams = [[row['targets'][i] if i < len(row['targets']) else None for row in rows]
             for i in range(most)]
  expected = BLEU().corpus_score([row['prediction'] for row in rows], streams).score
  scorer = metrics.scorer(about, rows)
  assert scorer.metrics()['bleu'] == expected and 'nrefs:var' in scorer.notes['bleu']
  alone = metrics.compute(about, [{**row, 'targets': row['targets'][:1]} for row in rows])
  assert expected > alone['bleu']


def test_rouge_is_rouge_scores_best_reference():
  about, rows = real.generated(real.summaries(40), language='en')
  found = metrics.compute(about, rows)
  scorer = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL', 'rougeLsum'], use_stemmer=True)
  expected = dict.fromkeys(('rouge1', 'rouge2', 'rougeL', 'rougeLsum'), 0.0)
  for row in rows:
    each = [scorer.score(target, row['prediction']) for target in row['targets']]
    for key in expected:
      expected[key] += max(one[key].fmeasure for one in each) / len(rows)
  assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)


def test_rouge_sees_the_characters_of_chinese():
  about, rows = real.generated(real.translations('eng-cmn', 50), characters=True, language='cmn')
  found = metrics.compute(about, rows)
  assert 0.5 < found['rougeL'] < 1
  # rouge-score's own tokenizer finds nothing to compare.
  assert metrics.compute({**about, 'language': 'en'}, rows)['rougeL'] < 0.1


@pytest.mark.parametrize('code, expected', [
    ('zh', 'zh'), ('cmn', 'zh'), ('zho', 'zh'), ('zh-CN', 'zh'), ('zh_Hant', 'zh'), ('deu', 'deu'),
    ('en', 'en'), ('eng', 'en'), (None, 'en')])
def test_languages_have_the_code_that_sacrebleu_asks_for(code, expected):
  assert metrics.generation.language({'language': code}) == expected


def test_a_language_without_its_tokenizer_is_one_sentence():
  with pytest.raises(UserError, match=r'the tokenizer for .ja.; pip install .sacrebleu\[ja\].'):
    metrics.compute({'kind': 'generation', 'language': 'ja'},
                    [{'id': '0', 'targets': ['a'], 'prediction': 'a'}])


@pytest.mark.parametrize('code, expected', [('en', 1.0), ('de', 0.0)])
def test_english_words_are_stemmed_for_rouge(code, expected):
  rows = [{'id': '0', 'targets': ['walking dogs'], 'prediction': 'walked dog'}]
  found = metrics.compute({'kind': 'generation', 'language': code}, rows)
  assert found['rouge1'] == found['rougeL'] == expected


def test_predictions_with_nothing_in_common_have_no_self_bleu():
  rows = [{'id': str(i), 'targets': ['x'], 'prediction': ' '.join(f'{i}{j}w' for j in range(6))}
          for i in range(4)]
  found = metrics.compute({'kind': 'generation'}, rows)
  assert found['self_bleu'] == 0 and found['distinct_1'] == 1 and found['distinct_2'] == 5 / 6


def test_copies_are_perfect_and_alike():
  rows = [{'id': str(i), 'targets': ['the cat sat on the mat'],
           'prediction': 'the cat sat on the mat'} for i in range(3)]
  found = metrics.compute({'kind': 'generation'}, rows)
  assert found['bleu'] == pytest.approx(100) and found['ter'] == 0 and found['rougeLsum'] == 1
  assert found['self_bleu'] == pytest.approx(100)
  assert found['distinct_1'] == 5 / 18 and found['distinct_2'] == 5 / 18
  assert found['distinct_3'] == 4 / 18


@pytest.mark.parametrize('prediction, answers, exact, f1', [
    ('The Broncos!', ['Broncos'], 100.0, 100.0), ('', ['x'], 0.0, 0.0), ('', [], 100.0, 100.0),
    ('a', [], 100.0, 100.0), ('x', [], 0.0, 0.0), ('the', ['a'], 100.0, 100.0),
    ('the', ['a', 'b'], 0.0, 0.0),
    ("Levi's Stadium in Santa Clara", ['Levi’s Stadium', 'Santa Clara, California'], 0.0, 50.0),
    ('Denver Denver', ['Denver Broncos'], 0.0, 50.0), ('U.S.', ['US'], 100.0, 100.0),
    ('theatre', ['atre'], 0.0, 0.0)])
def test_answers_are_those_of_the_script_of_squad(prediction, answers, exact, f1):
  # By its rules, by hand.
  rows = [{'id': '0', 'targets': answers, 'prediction': prediction}]
  found = metrics.compute({'kind': 'span_extraction'}, rows)
  assert found == {'exact_match': exact, 'f1': pytest.approx(f1)}


def test_answers_of_xquad_are_scored_as_lm_evaluation_harness_does():
  rng, rows = random.Random(0), []
  for one in real.questions():
    words, answer = one['context'].split(), one['answers'][0]
    i = rng.randrange(len(words))
    prediction = rng.choice([answer, f'{answer} {words[i]}', ' '.join(answer.split()[1:]),
                             ' '.join(words[i:i + 4]), f'{answer.upper()}.'])
    rows.append({'id': one['id'], 'inputs': one['question'], 'prediction': prediction,
                 'targets': [*one['answers'], ' '.join(words[i:i + 3])]})
  found = metrics.compute({'kind': 'span_extraction'}, rows)
  # squad_em_agg and squad_f1_agg of lm_eval 0.4.13, tasks/super_glue/record/t5_utils.py.
  assert found == {'exact_match': 46.38655462184874, 'f1': 84.3721297062928}
