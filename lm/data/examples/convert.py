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


def harmful_tweet(record: Record) -> Iterator[Record]:
  """A tweet of Davidson et al. (arXiv:1703.04009): hate (0) and offence (1) harm, neither (2) not.
  """
  label = {'0': 'harmful', '1': 'harmful', '2': 'harmless'}[record['class']]
  yield {'a': record['tweet'], 'label': label}


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
  {'sentence', 'option1', 'option2', 'answer'}, where 'label' may stand for 'answer'. Partial
  scoring: Trinh and Le 2018, arXiv:1806.02847, section 3.2.
  """
  if 'context_options' in record:
    contexts, rest, label = record['context_options'], record['continuation'], record['gold']
  else:
    before, _, rest = record['sentence'].partition('_')
    contexts = [before + record['option1'], before + record['option2']]
    label = int(record['answer'] if 'answer' in record else record['label']) - 1
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


def similar(record: Record) -> Iterator[Record]:
  """A pair of STS Benchmark that says the same, of a score of 4 or more: query and document."""
  if float(record['score']) >= 4:
    yield {'query': record['a'], 'documents': [record['b']]}


def triple(record: Record) -> Iterator[Record]:
  """A premise, what it entails and what it contradicts, as supervised SimCSE has them
  (arXiv:2104.08821, section 4.2)."""
  yield {'query': record['sent0'], 'documents': [record['sent1'], record['hard_neg']]}


def hellaswag(record: Record) -> Iterator[Record]:
  """A beginning of HellaSwag and four ends (arXiv:1905.07830), cleaned as lm-evaluation-harness
  does it; of the original's names or of TensorFlow Datasets'."""
  if 'ctx_a' in record:
    context = f'{record["ctx_a"]} {record["ctx_b"].capitalize()}'
  else:
    context = record['context']
  clean = lambda text: re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')
                              ).replace('  ', ' ')
  yield {'context': clean(f'{record["activity_label"]}: {context}'), 'label': int(record['label']),
         'continuations': [clean(ending) for ending in record['endings']]}


def arc(record: Record) -> Iterator[Record]:
  """A question of ARC and its answers (arXiv:1803.05457)."""
  labels = list(record['choices']['label'])
  yield {'id': record['id'], 'context': record['question'],
         'continuations': list(record['choices']['text']),
         'label': labels.index(record['answerKey'])}


def copa(record: Record) -> Iterator[Record]:
  """A premise of COPA and two causes or effects, as a sentence that goes on (SuperGLUE,
  arXiv:1905.00537)."""
  link = {'cause': 'because', 'effect': 'so'}[record['question']]
  small = lambda text: text[:1].lower() + text[1:]
  label = {'choice1': 0, 'choice2': 1}.get(record['label'], record['label'])
  yield {'context': f'{record["premise"].strip().removesuffix(".")} {link}', 'label': int(label),
         'continuations': [small(record['choice1']), small(record['choice2'])]}


def multirc(record: Record) -> Iterator[Record]:
  """An answer to a question of MultiRC about a paragraph: right or wrong, one at a time."""
  yield {'a': f'{record["question"]} {record["answer"]}', 'b': record['paragraph'],
         'label': record['label']}


def wic(record: Record) -> Iterator[Record]:
  """Two sentences of WiC: has the word one meaning in both?"""
  yield {'a': f'{record["word"]}: {record["sentence1"]}', 'b': record['sentence2'],
         'label': record['label']}


def wsc(record: Record) -> Iterator[Record]:
  """A sentence of WSC: does the pronoun mean the noun?"""
  yield {'a': record['text'], 'b': f'{record["span2_text"]} means {record["span1_text"]}',
         'label': record['label']}


def conll2003(record: Record) -> Iterator[Record]:
  """A sentence of CoNLL-2003 with its named entities, of either name of their column."""
  yield {'words': record['tokens'], 'tags': record['ner' if 'ner' in record else 'ner_tags']}


def translation(record: Record) -> Iterator[Record]:
  """A pair of WMT into English, of rows {'de', 'en'} or {'translation': {'de', 'en'}}."""
  pair = dict(record.get('translation', record))
  target = pair.pop('en')
  source, = pair.values()
  yield {'source': source, 'target': target}
