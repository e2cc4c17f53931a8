"""Records of well-known sets made records of our kinds, one function a set.

Each takes a record as the set's files (or TensorFlow Datasets, where that has other names) give it
and yields records with the fields of a kind. gin binds it: `examples.Files.convert =
@convert.squad`. A user's own set needs such a function only where renaming `fields` is not enough.
"""

from __future__ import annotations

import re
from typing import Any, Iterator

Record = dict[str, Any]


def movie_reviews(record: Record) -> Iterator[Record]:
  """A line of rt-polarity.pos or rt-polarity.neg (Pang and Lee 2005)."""
  label = {'pos': 'positive', 'neg': 'negative'}[record['file'].rpartition('.')[2]]
  yield {'a': record['text'].strip(), 'label': label}


def snips_intent(record: Record) -> Iterator[Record]:
  """A file of SNIPS: {intent: [{'data': [{'text', 'entity'?}]}]} (arXiv:1805.10190)."""
  for intent, utterances in record.items():
    for utterance in utterances:
      text = ''.join(piece['text'] for piece in utterance['data'])
      yield {'a': text.strip(), 'label': intent}


def snips_slots(record: Record) -> Iterator[Record]:
  """The slots of such a file as BIO tags of words, which are cut at blanks and where slots end."""
  for utterances in record.values():
    for utterance in utterances:
      words, tags = [], []
      for piece in utterance['data']:
        found, entity = piece['text'].split(), piece.get('entity')
        words += found
        tags += [f'{"I" if i else "B"}-{entity}' if entity else 'O' for i in range(len(found))]
      yield {'words': words, 'tags': tags}


def goemotions(record: Record) -> Iterator[Record]:
  """A comment of GoEmotions that has one label; those of several are left out."""
  if ',' not in record['labels']:
    yield {'id': record['id'], 'a': record['text'], 'label': int(record['labels'])}


def squad(record: Record) -> Iterator[Record]:
  """A file of SQuAD's form (arXiv:1606.05250), or one question of it as a row."""
  for article in record.get('data', ()):
    for paragraph in article['paragraphs']:
      for question in paragraph['qas']:
        yield {'id': question['id'], 'question': question['question'].strip(),
               'context': paragraph['context'],
               'answers': [answer['text'] for answer in question['answers']],
               'starts': [answer['answer_start'] for answer in question['answers']]}
  if 'question' in record:
    answers = record['answers']
    yield {'id': record['id'], 'question': record['question'].strip(),
           'context': record['context'], 'answers': list(answers['text']),
           'starts': list(answers['answer_start'])}


def scitldr(record: Record) -> Iterator[Record]:
  """A paper of SciTLDR: the sentences of its abstract, and several summaries (arXiv:2004.15011)."""
  source, targets = record['source'], record['target']
  yield {'id': record['paper_id'], 'source': ' '.join(sentence.strip() for sentence in source),
         'targets': [target.strip() for target in targets]}


def wikisplit(record: Record) -> Iterator[Record]:
  """A sentence of WikiSplit and the two that say the same (arXiv:1808.09468)."""
  yield {'source': record['source'], 'target': record['target'].replace(' <::::> ', ' ')}


def wikitext(record: Record) -> Iterator[Record]:
  """A file of WikiText as its articles, each from its line ' = Title = '; nothing is changed."""
  articles = re.split(r'(?m)(?=^ = [^=\n].* = \n)', record['text'])
  if len(articles) > 1 and not articles[0].strip():
    articles[:2] = [articles[0] + articles[1]]
  yield from ({'text': article} for article in articles)


def piqa(record: Record) -> Iterator[Record]:
  """A goal of PIQA and two ways to it (arXiv:1911.11641)."""
  yield {'context': record['goal'], 'continuations': [record['sol1'], record['sol2']],
         'label': int(record['label'])}


def winogrande(record: Record) -> Iterator[Record]:
  """A sentence of WinoGrande, each name put in: what follows is scored given what comes before.

  Of llm-foundry's form {'context_options', 'continuation', 'gold'}, or of the original's
  {'sentence', 'option1', 'option2', 'answer'}. Partial scoring: Trinh and Le 2018,
  arXiv:1806.02847, section 3.2.
  """
  if 'context_options' in record:
    contexts, rest, label = record['context_options'], record['continuation'], record['gold']
  else:
    before, _, rest = record['sentence'].partition('_')
    contexts = [before + record['option1'], before + record['option2']]
    label = record['label'] if 'label' in record else int(record['answer']) - 1
  yield {'contexts': list(contexts), 'continuations': [rest.strip()] * 2, 'label': int(label)}


def lambada(record: Record) -> Iterator[Record]:
  """A passage of LAMBADA and its last word (arXiv:1606.06031); alone or as {'text'}."""
  if 'continuation' not in record:
    context, _, word = record['text'].strip().rpartition(' ')
    record = {'context': context, 'continuation': word}
  yield {'context': record['context'], 'continuations': [record['continuation']], 'label': 0}


def blimp(record: Record) -> Iterator[Record]:
  """A minimal pair of BLiMP, the good sentence first (arXiv:1912.00582)."""
  yield {'id': f'{record["UID"]}-{record["pairID"]}', 'context': '', 'label': 0,
         'continuations': [record['sentence_good'], record['sentence_bad']]}
