"""Telephone numbers in running text, in the forms in which people write them.

A number of seven to fifteen digits (E.164) is a telephone number if its form says so, or a word
beside it ("phone", "call me on", "电话"), or if the numbering plan of one of the regions holds it
and it is grouped as there (phonenumbers). Dates, years, ISBN and post codes are not.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import re

from lm.errors import UserError

Span = tuple[int, int]

_EXTENSION = r'(?: ?(?:x|ext\.?|extension|#) ?\d{1,6})?'
_SEPARATOR = r'[ \u00a0.\u2010-\u2015-]'
_BEFORE = r'(?<![\w/=#$€£-])(?<!\d[.,:])'
_AFTER = r'(?![\w/]|[.,:-]\d|%)'
# Each form by itself is rare outside of telephone numbers; the figures say how it was named below.
_FORMS = {
    # +46 (0)8 928 571 38
    'international': r'\+\(?[1-9](?:[().\u00a0 \u2010-\u2015/-]{0,3}\d){6,14}(?!\d)',
    # 001-253-366-9781
    'prefixed': rf'00{_SEPARATOR}?[1-9](?:{_SEPARATOR}?\d){{0,2}}(?:{_SEPARATOR}\d{{2,5}}){{2,4}}',
    # (602)272-9781, 541-714-1388, 1-800-991-9019, 713/345-7942, 259.735.7502
    'american': (
        rf'(?:1{_SEPARATOR})?(?:\([2-9]\d\d\)[ \u00a0]?|[2-9]\d\d[.\u2010-\u2015/-])\d{{3}}'
        r'[.\u2010-\u2015-]\d{4}'
    ),
    # 0490 75 40 81, 01.84.17.61.18, (08) 8747 6301, 0961-7596216
    'trunk': (
        rf'\(0[1-9]\d{{0,3}}\)(?:{_SEPARATOR}?\d{{2,4}}){{2,4}}'
        rf'|0[1-9]\d{{0,3}}(?:{_SEPARATOR}\d{{2,4}}){{2,4}}'
        r'|(?:\(0[1-9]\d{0,3}\) ?|0[1-9]\d{1,3}[- ])\d{6,8}'
    ),
    # (64) 3591-3246
    'area': r'\((?!1[5-9]\d\d|20\d\d)[1-9]\d{1,3}\) ?\d{3,5}[ -]\d{3,5}',
}
_FORM = re.compile(
    _BEFORE
    + '(?:'
    + '|'.join(f'(?P<{name}>{form})' for name, form in _FORMS.items())
    + ')'
    + _EXTENSION
    + _AFTER,
    re.ASCII,  # Chinese characters may stand next to a number.
)
# Any figures in groups: what a word beside them, or a numbering plan, has to tell.
_ANY = re.compile(
    _BEFORE
    + rf'(?<!\.)\(?\d{{1,15}}\)?(?:(?:{_SEPARATOR}\(?|\(|(?<=\)))\d{{1,12}}\)?){{0,6}}'
    + _EXTENSION
    + r'(?![\w/]|[.,:]\d|%)',
    re.ASCII,
)
_CUE_WIDTH = 40
_CUE_BEFORE = re.compile(
    # Words that speak of telephones, with some between them and the number ...
    r'(?i)(?:\b(?:(?:tele|smart)?(?:ph|f)one?s?(?:no|nummer)?|tel|ph|t[ée]l[ée]phone|tel[ée]fono'
    r'|telefone|cell|cellular|cellphone|mob|mobile?|pager|(?:tele)?fax|facsimile|whatsapp|viber|sms'
    r'|dial|hotline|helpline)\b|телефон|\bтел\b|电话|電話|手机|手機|致电|热线|熱線|传真|傳真|携帯)'
    r'[^\d\n]{0,16}\n?[^\d\n]{0,4}$'
    # ... and words that may speak of anything: the number follows.
    r'|\b(?:(?:call|ring|text|contact|reach(?:ed)?)(?: \w{1,12})?(?: at| on)?'
    r'|(?:messages?|answer(?:ing|ed)?|registered)(?: to| at| on| number)?'
    r'|office|desk|home|work|voice|direct)[:.(#]{0,2}[ (]$'
)
_CUE_AFTER = re.compile(r'(?i)[ ,;(-]{0,2}(?:office|fax|mobile|cell|home|work|voice|direct)\b')
_OTHER_CUE = re.compile(r'(?i)(?:isbn|issn|doi|oclc|pmid|isni|lccn|arxiv)\W{0,8}$')
_DATE = re.compile(
    r'(?:[0-3]?\d([./-])[01]?\d\1|[01]?\d([./-])[0-3]?\d\2)(?:1[5-9]|20)?\d\d(?:\D|$)'
    r'|(?:1[5-9]|20)\d\d([./-])[01]?\d\3[0-3]?\d(?:\D|$)'
)
_YEARS = re.compile(r'\D*(?:(?:1\d|20)\d\d\D+)+(?:(?:1\d|20)\d\d|\d\d)\D*')
_DECIMAL = re.compile(r'\+\d+\.\d+')
_UNIFORM = re.compile(r'\d{2,6}([ .-])\d{2,8}(?:\1\d{2,6})*')
_OTHER_FORM = re.compile(r'\d{5}-\d{3,4}|\d{3}-\d{2}-\d{4}')  # post code, social security


def phones(text: str, places: list[Span], regions: tuple[str, ...]) -> Iterator[Span]:
  """Yields telephone numbers; of two that overlap the first is the better one.

  Args:
    text: to search.
    places: where figures stand, of `privacy_numbers.figures`.
    regions: ISO 3166 codes of the countries whose national forms count without a word beside them.
  """
  for start, end in places:
    begin, stop = max(0, start - 3), min(len(text), end + 12)
    for match in _FORM.finditer(text, begin, stop):
      if match.start() < end and _form_holds(match):
        yield match.span()
    for match in _ANY.finditer(text, begin, stop):
      number = re.split('[x#e]', match[0])[0].rstrip()
      digits = sum(character.isdigit() for character in number)
      if not 7 <= digits <= 15 or _DATE.match(number) or _YEARS.fullmatch(number):
        continue
      if not _OTHER_FORM.fullmatch(number) and (
          _cued(text, *match.span()) or _in_plan(text, match.start(), number, digits, regions)
      ):
        yield match.span()


def _form_holds(match: re.Match[str]) -> bool:
  form, number = match.lastgroup, match[0]
  digits = sum(character.isdigit() for character in number)
  if form in ('international', 'american'):
    return not _DECIMAL.fullmatch(number)
  if _DATE.match(number) or _OTHER_FORM.fullmatch(number):
    return False
  if _continues(match.string, match.start()):
    return False
  return 9 <= digits <= (15 if form == 'prefixed' else 11)


def _cued(text: str, start: int, end: int) -> bool:
  before = text[max(0, start - _CUE_WIDTH) : start]
  if _OTHER_CUE.search(before):
    return False
  return _CUE_BEFORE.search(before) is not None or _CUE_AFTER.match(text, end) is not None


def _in_plan(text: str, start: int, number: str, digits: int, regions: tuple[str, ...]) -> bool:
  """Whether the number has a region's form, groups included, and is assigned there."""
  if digits < 9 or not _UNIFORM.fullmatch(number) or _continues(text, start):
    return False
  library = _library()
  return any(
      library.PhoneNumberMatcher(number, region, library.Leniency.EXACT_GROUPING).has_next()
      for region in regions
  )


def _continues(text: str, start: int) -> bool:
  """Whether figures stand before it, so that it may be the end of a number in groups."""
  return re.match(r'\d ', text[max(0, start - 2) : start]) is not None


@functools.cache
def _library():
  try:
    import phonenumbers
  except ImportError as error:
    raise UserError(
        f'Privacy needs phonenumbers ({error}); install it with `pip install lm[corpus]`.'
    ) from error
  return phonenumbers
