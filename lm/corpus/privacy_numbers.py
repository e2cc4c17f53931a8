"""Numbers that name a person or an account: cards, IBAN and national identity numbers.

A number counts only where its check digits hold (python-stdnum) and where, besides, its form is
its own (`123-45-6789`) or a word before it says what it is (`SSN 123456789`): one in ten plain
numbers passes a check digit by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import importlib
import re

from lm.errors import UserError

Span = tuple[int, int]

SEPARATORS = ' \u00a0.()/\u2010-\u2015-'
# Where figures stand, with what separates their groups: every search for a number looks only here.
_FIGURES = re.compile(rf'[0-9][0-9{SEPARATORS}+]{{5,}}[0-9]')
_CUE_WIDTH = 48  # characters before a number in which a word may say what it is

# Issuer prefixes and lengths (ISO/IEC 7812): Visa, Mastercard, American Express, Discover and
# UnionPay, JCB, Diners Club, Maestro. Of other lengths than 14 to 16 digits, a word must say so.
_CARD = re.compile(
    r'4\d{12}(?:\d{3}){0,2}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}'
    r'|3[47]\d{13}|(?:6011|64[4-9]\d|65\d\d|62\d\d)\d{12,15}|35(?:2[89]|[3-8]\d)\d{12}'
    r'|(?:2131|1800)\d{11}|3(?:0[0-5]|095|[689]\d)\d{11}|(?:50|5[6-9]|6\d|06)\d{10,17}'
)
_CARD_CANDIDATE = re.compile(
    r'(?<![\w.,+-])\d{4}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{3})?(?![\w-])'
    r'|(?<![\w.,+-])\d{4}([ -])\d{6}\2\d{4,5}(?![\w-])|(?<![\w.,+-])\d{12,19}(?![\w-])',
    re.ASCII,
)
_CARD_CUE = re.compile(
    r'(?i)\b(?:(?:credit|debit|bank)?cards?|cc|visa|mastercard|maestro|amex|\w*karten?(?:nummer)?'
    r'|cartes?|tarjeta|carta di credito|cart[aã]o)\b|卡|カード'
)

_IBAN = re.compile(
    r'[0-9]{2}(?<=[A-Za-z]{2}..)'
    r'(?:[A-Za-z0-9]{11,30}|(?: [A-Za-z0-9]{4}){2,7}(?: [A-Za-z0-9]{1,3})?)(?![A-Za-z0-9])'
)

# form (figures with their separators), module of python-stdnum, words of which one stands before
# ('' where the form and the check are enough).
_NATIONAL = (
    (r'\d{3}-\d{2}-\d{4}', 'us.ssn', ''),
    (r'\d{3} \d{2} \d{4}|\d{9}', 'us.ssn', r'\bssn\b|social.security'),
    (r'9\d{2}-\d{2}-\d{4}', 'us.itin', ''),
    (r'9\d{2} \d{2} \d{4}|9\d{8}', 'us.itin', r'\bitin\b|taxpayer'),
    (r'\d{3} ?\d{3} ?\d{4}', 'gb.nhs', r'\bnhs\b'),
    (r'\d{3}[ -]?\d{3}[ -]?\d{3}', 'ca.sin', r'\bsin\b|social.insurance|\bnas\b'),
    (r'\d{2} ?\d{3} ?\d{3} ?\d{3}', 'de.idnr', r'steuer|\bidnr|tax.?id|identifikation|\btin\b'),
    (r'[12] ?\d{2} ?\d{2} ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}', 'fr.nir', ''),
    (r'\d{8}-?[A-Z]', 'es.dni', ''),
    (r'[1-9]\d{16}[\dXx]', 'cn.ric', ''),
    (r'[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}', 'in_.aadhaar', r'aadha?ar|\buid|आधार'),
    (r'\d{3}\.\d{3}\.\d{3}-\d{2}', 'br.cpf', ''),
    (r'\d{11}', 'br.cpf', r'\bcpf\b'),
    (r'756[. ]?\d{4}[. ]?\d{4}[. ]?\d{2}', 'ch.ssn', ''),
    (r'\d{2}\.\d{2}\.\d{2}[-.]\d{3}[.-]\d{2}', 'be.nn', ''),
    (r'\d{9}', 'nl.bsn', r'\bbsn\b|burgerservice|sofi'),
    (r'\d{11}', 'pl.pesel', r'pesel'),
    (r'\d{6} ?\d{5}', 'no.fodselsnummer', r'f[øo]dsels|personnummer'),
    (r'(?:\d{2})?\d{6}[-+]\d{4}', 'se.personnummer', ''),
    (r'\d{6}-?\d{4}', 'dk.cpr', r'\bcpr\b|personnummer'),
    (r'\d{6}[-+A]\d{3}[0-9A-Z]', 'fi.hetu', ''),
    (r'\d{13}', 'za.idnr', r'\bid\b|identity'),
    (r'\d{6}-[1-4]\d{6}', 'kr.rrn', ''),
    (r'\d{1,2}\.\d{3}\.\d{3}-[\dKk]', 'cl.rut', ''),
    (r'[1-9]\d{10}', 'tr.tckimlik', r'kimlik|\btckn?\b'),
    (r'\d{9}', 'pt.nif', r'\bnif\b|contribuinte'),
)
# The same for those that begin with letters; the British one has no check digit, only its form.
_LETTERED = (
    (r'[XYZ]-?\d{7}-?[A-Z]', 'es.nie', ''),
    (r'[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]', 'it.codicefiscale', ''),
    (r'[A-Z]{4}\d{6}[HMX][A-Z]{5}[0-9A-Z]\d', 'mx.curp', ''),
    (r'[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z]', 'in_.pan', ''),
    (
        r'(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]',
        '',
        '',
    ),
)
_ALL_FORMS = '|'.join(form for form, _, _ in _NATIONAL)
_LETTERED_BEGINNING = re.compile(r'[A-Z]{1,6}[ -]?\d{2}')


def figures(text: str) -> list[Span]:
  """Returns where at least seven figures stand together: the only places for numbers to be in."""
  return [match.span() for match in _FIGURES.finditer(text)]


def cards(text: str, places: list[Span]) -> Iterator[Span]:
  """Yields payment cards: an issuer's prefix and length, and the check digit of Luhn."""
  for start, end in places:
    if end - start < 12:
      continue
    for match in _CARD_CANDIDATE.finditer(text, start, end + 1):
      digits = re.sub('[ -]', '', match[0])
      if not _cue(text, match.start(), _CARD_CUE):
        if not 14 <= len(digits) <= 16 or not _CARD.fullmatch(digits):
          continue
      if _stdnum('luhn').is_valid(digits):
        yield match.span()


def ibans(text: str) -> Iterator[Span]:
  """Yields international bank account numbers: a country's form, and 1 modulo 97 (ISO 13616)."""
  for match in _IBAN.finditer(text):
    start, end = match.start() - 2, match.end()
    if re.match('[A-Za-z0-9]', text[max(0, start - 1) : start]):
      continue
    while end - start >= 15:  # The last groups may be words that follow it.
      if _stdnum('iban').is_valid(text[start:end], check_country=False):
        yield start, end
        break
      end = text.rfind(' ', start, end)


def national_ids(text: str, places: list[Span]) -> Iterator[Span]:
  """Yields identity numbers of persons in thirty countries, see the tables above."""
  for start, end in places:
    stop = min(end + 3, len(text))  # A check letter may follow the figures.
    if not _alone(_ALL_FORMS).search(text, start, stop):
      continue
    for form, module, cue in _forms(_NATIONAL):
      for match in form.finditer(text, start, stop):
        if _holds(text, match, module, cue):
          yield match.span()
  for beginning in _LETTERED_BEGINNING.finditer(text):
    for form, module, cue in _forms(_LETTERED):
      match = form.match(text, beginning.start())
      if match and _holds(text, match, module, cue):
        yield match.span()
        break


def _holds(text: str, match: re.Match[str], module: str, cue: re.Pattern[str] | None) -> bool:
  if cue is not None and not _cue(text, match.start(), cue):
    return False
  return not module or _stdnum(module).is_valid(match[0])


def _cue(text: str, start: int, words: re.Pattern[str]) -> bool:
  """Whether one of the words stands shortly before `start`."""
  return words.search(text, max(0, start - _CUE_WIDTH), start) is not None


@functools.cache
def _forms(table: tuple) -> tuple:
  """Returns the table with its expressions compiled: each form alone, not in a longer one."""
  return tuple(
      (_alone(form), module, re.compile(f'(?i){cue}') if cue else None)
      for form, module, cue in table
  )


@functools.cache
def _alone(form: str) -> re.Pattern[str]:
  return re.compile(rf'(?<![\w.,/+-])(?:{form})(?![\w/]|[.,-]\d)', re.ASCII)


@functools.cache
def _stdnum(name: str):
  try:
    return importlib.import_module(f'stdnum.{name}')
  except ImportError as error:
    raise UserError(
        f'Privacy needs python-stdnum ({error}); install it with `pip install lm[corpus]`.'
    ) from error
