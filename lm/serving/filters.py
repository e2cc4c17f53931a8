"""A backend that judges texts: a list of words, a classifier of harm, personal information.

It has a worker of its own, so that what reads a text never stands in the process that speaks HTTP.
Its one op, `judge`, has the fields

  text     of at most LONGEST characters
  start    up to where the text was judged before, and went out
  windows  (begin, end) of what the classifier shall read
  final    whether the text ends here, or is still being written

and its answer

  rule     which refuses the text: 'blocklist', 'harm'; None if it may go out
  score    of the classifier, the probability that the worst window is harmful; None without one
  upto     how far it may go out now: what stands behind may be the beginning of something
  spans    (begin, end, kind) of the personal information before that
"""
import bisect
import dataclasses
import itertools
import pathlib
import re
from typing import Any
import unicodedata

from lm.corpus.harm import Entries
from lm.corpus.privacy import Redact
from lm.errors import UserError
from lm.serving.protocol import Job, Tell
from lm.serving.reader import Reader

LONGEST = 1 << 16
HARMFUL = 'harmful'  # the label
BLOCKLIST, HARM = 'blocklist', 'harm'  # rules

_UNSEEN = re.compile('[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]')
_UNSPACED = re.compile('[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]')
_LETTER = '\u02d1'  # is one to a regular expression, and stands in no entry
_LONGEST_SPAN = 272  # characters of what `Redact` finds, and of what it must see behind it
# In words: where personal information of several words may begin, by a figure, two capitals before
# one (a British "NI AB 12 34 56 C") or a private key.
_SUSPECT = re.compile(r'\S*?(?:[0-9]|-----|(?<!\w)[A-Z]{2}(?:\s*\Z|\s[0-9]))')
_PUTTY = re.compile(r'PuTTY-User-Key-File-[23]: (?![\s\S]*Private-MAC: [0-9a-f]+\s)')


class Words:
  """Words and phrases that refuse a text. They match whole, in languages without blanks anywhere,
  whatever their case, width, number of blanks and invisible characters."""

  def __init__(self, path: str):
    """path: of a file with an entry a line; lines that begin with # are none.

    Raises:
      UserError: it cannot be read, or has no entry.
    """
    try:
      lines = pathlib.Path(path).read_text('utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'--blocklist={path} cannot be read ({error}); give a file of UTF-8 with a '
                      'word or phrase a line') from error
    entries = {_folded(line).strip() for line in lines if not line.startswith('#')} - {''}
    if not entries:
      raise UserError(f'--blocklist={path} has no entry; write a word or phrase a line, or leave '
                      'the flag out')
    unspaced = {entry for entry in entries if _UNSPACED.search(entry)}
    self._entries = Entries(unspaced, True), Entries(entries - unspaced, False)
    self._sorted = sorted(entries)
    self._longest = max(map(len, entries))

  def __len__(self):
    return len(self._sorted)

  def judge(self, text: str, final: bool) -> tuple[bool, bool]:
    """Whether an entry stands in the text, and whether one may begin at its end."""
    folded = _folded(text)
    # A word that the text goes on with may be a longer one.
    searched = folded if final else folded + _LETTER
    if any(entries.found(searched) for entries in self._entries):
      return True, False
    ends = (folded[i:] for i in range(max(0, len(folded) - self._longest), len(folded)))
    return False, not final and any(map(self._begins, ends))

  def _begins(self, part):
    place = bisect.bisect_left(self._sorted, part)
    return place < len(self._sorted) and self._sorted[place].startswith(part)


def _folded(text):
  plain = unicodedata.normalize('NFKC', _UNSEEN.sub('', text)).lower()
  return re.sub(r'\s+', ' ', plain)


class Privacy:
  """Personal information in a text that may still be being written."""

  def __init__(self):
    """Raises:
      UserError: a package is missing.
    """
    self._redact = Redact()
    self._redact.find('card 4111 1111 1111 1111, call 01 84 17 61 18')  # imports what it needs

  def judge(self, text: str, start: int, final: bool) -> tuple[list[tuple[int, int, str]], int]:
    """Spans that end after `start` and before where the text is certain, and where that is."""
    found = [span for span in self._redact.find(text) if span[1] > start]
    upto = len(text) if final else self._certain(text)
    for begin, end, _ in found:
      if begin < upto < end or (begin < upto and end == len(text) and not final):
        upto = begin  # It has not ended.
    return [span for span in found if span[1] <= upto], max(upto, start)

  def _certain(self, text):
    """Up to where no letter that follows changes what is found."""
    last, word = max(0, len(text) - _LONGEST_SPAN), len(text)
    while word > last and not text[word - 1].isspace():
      word -= 1
    suspect, putty = _SUSPECT.search(text, last), _PUTTY.search(text)
    return min(word, suspect.start() if suspect else word, putty.start() if putty else word)


@dataclasses.dataclass
class _Judged:
  """A text whose windows the classifier has not all read."""
  tell: Tell
  answer: dict[str, Any]
  left: set[int] = dataclasses.field(default_factory=set)
  score: float = 0.0


class Filter:
  """Judges texts by as many of the three as there are.

  Attributes:
    abilities, facts: see `protocol.Backend`; the facts say what it judges by.
  """
  abilities = ('judge',)

  def __init__(self, words: Words | None = None, privacy: Privacy | None = None,
               classifier: Reader | None = None, threshold: float = 0.5,
               measured: list[dict[str, Any]] | None = None):
    """Takes what judges.

    Args:
      classifier: of texts, with the label HARMFUL.
      threshold: probability from which a text is refused.
      measured: precision and recall at the threshold, as they were recorded: for `facts`.

    Raises:
      UserError: the classifier has no such label.
    """
    if classifier is not None and HARMFUL not in classifier.facts['labels']:
      raise UserError(f'the labels of --harm_filter are {classifier.facts["labels"]}, and one must '
                      f'be {HARMFUL!r}; see gin/tasks/harmful_tweets.gin')
    self._words, self._privacy, self._classifier = words, privacy, classifier
    self._threshold = threshold
    self.facts = {
        **({'blocklist': len(words)} if words else {}), 'redacts': privacy is not None,
        **({'threshold': threshold, 'measured': measured or []} if classifier else {})}
    self._judged: dict[int, _Judged] = {}
    self._numbers = itertools.count()

  def warm_up(self):
    """See `Backend`."""
    if self._classifier is not None:
      self._classifier.warm_up()

  def submit(self, job: Job, tell: Tell):
    """See `Backend`."""
    text, start, final = job['text'], job['start'], job['final']
    if len(text) > LONGEST:
      raise UserError(f'a text has {len(text)} characters, and the filter of this server reads '
                      f'{LONGEST}; send it in parts')
    answer = {'done': 'stop', 'rule': None, 'score': None, 'upto': len(text), 'spans': []}
    if self._words is not None:
      is_bad, may_begin = self._words.judge(text, final)
      if is_bad:
        tell(answer | {'rule': BLOCKLIST})
        return
      answer['upto'] = start if may_begin else len(text)
    if self._privacy is not None:
      spans, upto = self._privacy.judge(text, start, final)
      answer['upto'] = min(upto, answer['upto'])
      answer['spans'] = [span for span in spans if span[1] <= answer['upto']]
    read = [text[begin:end] for begin, end in job['windows'] if text[begin:end].strip()]
    if self._classifier is None or not read:
      tell(answer)
      return
    judged = _Judged(tell, answer)
    for part in read:
      self._classify(job['id'], judged, part)
    self._judged[job['id']] = judged

  def cancel(self, number: int):
    """See `Backend`."""
    judged = self._judged.pop(number, None)
    if judged is not None:
      for part in judged.left:
        self._classifier.cancel(part)
      judged.tell({'done': 'cancelled'})

  def step(self) -> float | None:
    """See `Backend`."""
    return self._classifier.step() if self._classifier else None

  def _classify(self, number, judged, text):
    """Hands a text to the classifier, by halves where it has more tokens than that reads."""
    part = next(self._numbers)
    try:
      self._classifier.submit({'id': part, 'op': 'classify', 'input': text},
                              lambda event: self._classified(number, judged, part, event))
      judged.left.add(part)
    except UserError:
      if len(text) < 2:
        raise
      middle = text.rfind(' ', 1, len(text) // 2 + 1) + 1 or len(text) // 2
      self._classify(number, judged, text[:middle])
      self._classify(number, judged, text[middle:])

  def _classified(self, number, judged, part, event):
    if number not in self._judged:  # it was cancelled
      return
    judged.score = max(judged.score, event['scores'][HARMFUL])
    judged.left.discard(part)
    if not judged.left:
      del self._judged[number]
      rule = HARM if judged.score >= self._threshold else None
      judged.tell(judged.answer | {'rule': rule, 'score': judged.score})
