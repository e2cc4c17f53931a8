"""Languages of real text are told, offline and silently."""

import gzip
import json
import pathlib
import subprocess
import sys

import pytest

from lm.corpus import language
from lm.corpus.document import Document

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
TATOEBA = {'deu': 'de', 'fra': 'fr', 'spa': 'es', 'cmn': 'zh', 'jpn': 'ja', 'rus': 'ru'}

OFFLINE = """
import socket
def refuse(*args, **kwargs):
  raise RuntimeError('a connection was tried')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from lm.corpus.language import Language
from lm.corpus.document import Document
document = Document('name', 'The cat sat on the mat, and nobody was surprised.')
Language().apply(document)
print(document.language)
"""


def _shared(*parts):
  path = SHARED.joinpath(*parts)
  if not path.exists():
    pytest.skip(f'{path.name} is not here')
  return path


def _accuracy(texts, expected):
  return sum(language.identify(text)[0] == expected for text in texts) / len(texts)


def _identified(text, **options):
  document = Document('name', text)
  language.Language(**options).apply(document)
  return document


@pytest.mark.parametrize('code', TATOEBA)
def test_short_sentences_of_seven_languages(code):
  folder = _shared('mt', 'tatoeba-laser-v1')
  sentences = (folder / f'tatoeba.{code}-eng.{code}').read_text('utf-8').splitlines()
  english = (folder / f'tatoeba.{code}-eng.eng').read_text('utf-8').splitlines()
  assert len(sentences) == 1000
  assert _accuracy(sentences, TATOEBA[code]) >= 0.98
  assert _accuracy(english, 'en') >= 0.98


@pytest.mark.supports('documents', 'languages identified, English and Chinese measured')
@pytest.mark.parametrize('code', ['en', 'zh'])
def test_paragraphs_of_xquad_are_all_identified_and_kept(code):
  file = _shared('eval', 'xquad', f'xquad.{code}.json.gz')
  articles = json.loads(gzip.decompress(file.read_bytes()))['data']
  documents = [_identified(p['context']) for article in articles for p in article['paragraphs']]
  assert len(documents) == 240
  assert all(d.language == code and not d.removed_by for d in documents)


def test_classical_chinese_is_not_taken_for_japanese():
  poems = json.loads(_shared('lm', 'chinese-classics', 'tangshi300.json').read_text('utf-8'))
  texts = ['\n'.join(poem.get('content') or poem.get('paragraphs')) for poem in poems]
  assert _accuracy(texts, 'zh') >= 0.97
  assert _accuracy(['国境の長いトンネルを抜けると雪国であった。', '東京都は日本の首都です。'], 'ja') == 1


def test_a_long_text_is_told_by_all_its_parts():
  english = 'The council met in the old town hall and agreed on the new budget. ' * 40
  german = 'Der Rat traf sich im alten Rathaus und beschloss den neuen Haushalt. ' * 400
  assert language.identify(german)[0] == 'de'
  assert language.identify(english + german)[0] == 'de'


def test_the_uncertain_and_the_unwanted_are_removed_by_name():
  unsure = _identified('xq 7 zzt')
  assert unsure.removed_by == 'language.score'
  assert unsure.verdicts['language.score'] < 0.65
  french = 'Le conseil municipal a voté hier soir le budget de la ville.'
  kept = _identified(french)
  assert (kept.language, kept.removed_by, kept.verdicts['language.allowed']) == ('fr', '', 'fr')
  assert _identified(french, languages=('en', 'zh')).removed_by == 'language.allowed'
  assert _identified(french, languages=('en', 'fr')).removed_by == ''


@pytest.mark.parametrize('text', ['', '  \n\n ', '\x00', '\ud83d', '12 34', 'a' * 3_000_000])
def test_what_holds_no_language_is_no_error(text):
  assert _identified(text).removed_by == 'language.score'


def test_nothing_is_downloaded_and_nothing_is_said():
  child = subprocess.run(
      [sys.executable, '-W', 'default', '-c', OFFLINE], capture_output=True, text=True, timeout=120,
      cwd=pathlib.Path(__file__).resolve().parents[2], check=True,
  )
  assert (child.stdout, child.stderr) == ('en\n', '')
