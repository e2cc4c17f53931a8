"""Personal information is replaced, ordinary numbers are not: on labelled text and on real text."""

import bz2
import collections
import gzip
import json
import pathlib
import re
import time

import pytest

from lm.corpus import privacy
from lm.corpus.document import Document
from lm.errors import UserError

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
# Of the labels, those that are claimed.
LABELS = {
    'EMAIL_ADDRESS': 'email', 'PHONE_NUMBER': 'phone', 'IP_ADDRESS': 'ip', 'CREDIT_CARD': 'card',
    'IBAN_CODE': 'iban', 'US_SSN': 'national_id',
}  # fmt: skip


def shared(name, opener=gzip.open):
  path = SHARED / name
  if not path.exists():
    pytest.skip(f'{name} is not in {SHARED}')
  with opener(path, 'rt', encoding='utf-8') as file:
    return file.read()


def letters():
  """E-mails, reviews and newsgroups of the English Web Treebank: numbers of real people."""
  lines = shared('seqlab/ud-english-ewt/en_ewt-ud-train.conllu.gz').splitlines()
  return '\n'.join(line[9:] for line in lines if line.startswith('# text = '))


def found(text, **fields):
  return [(text[start:end], kind) for start, end, kind in privacy.Redact(**fields).find(text)]


def redacted(text, **fields):
  document = Document('a', text)
  privacy.Redact(**fields).apply(document)
  return document.text


@pytest.mark.supports('documents', 'Personal information redacted, recall and precision >= 0.95')
def test_labelled_personal_information_is_found_with_its_exact_limits():
  records = json.loads(shared('safety/pii-presidio/synth_dataset_v2.json.gz'))
  right, missed, wrong = (collections.Counter() for _ in range(3))
  for record in records:
    gold = {
        (span['start_position'], span['end_position'], LABELS[span['entity_type']])
        for span in record['spans']
        if span['entity_type'] in LABELS
    }
    spans = set(privacy.Redact().find(record['full_text']))
    right.update(kind for *_, kind in gold & spans)
    missed.update(kind for *_, kind in gold - spans)
    wrong.update(kind for *_, kind in spans - gold)
  for kind in LABELS.values():
    print(f'{kind}: {right[kind]} found, {missed[kind]} missed, {wrong[kind]} wrong')
  assert sum(right.values()) > 300
  for kind in LABELS.values():
    assert right[kind] / (right[kind] + missed[kind]) >= 0.95, kind
    assert right[kind] / (right[kind] + wrong[kind]) >= 0.95, kind
  assert not wrong['secret']


def test_ordinary_text_is_left_alone():
  """No card, account, identity or telephone number stands in these; one company's does, thrice."""
  for name in ('lm/wikitext-2/valid.txt.gz', 'lm/kjv-bible/bible-kjv.txt.gz'):
    assert not found(shared(name))
  encyclopedia = shared('raw/enwiki-xml/enwiki-shortened.xml.bz2', bz2.open)
  spans = found(encyclopedia, kinds=('iban', 'card', 'national_id', 'phone'))
  assert spans == [('201-938-5500', 'phone')] * 3


def test_telephone_numbers_and_addresses_in_letters_are_found():
  import phonenumbers

  text = letters()
  spans = found(text)
  phones = [value for value, kind in spans if kind == 'phone']
  possible = 0
  for phone in phones:
    try:
      possible += phonenumbers.is_possible_number(phonenumbers.parse(phone, 'US'))
    except phonenumbers.NumberParseException:
      pass
  assert len(phones) > 100 and possible >= 0.95 * len(phones)
  assert not re.search(r'(?<!\d)\(?\d{3}\)?[-. ]\d{3}[-.]\d{4}(?!\d)', redacted(text))
  assert sum(kind == 'email' for _, kind in spans) > 50
  assert not re.search(r'\w@\w+\.(com|org|net|edu)\b', redacted(text))


@pytest.mark.parametrize('text, kind', [
    ('call me on 06 12 34 56 78 today', 'phone'), ('+1-541-754-3010x123', 'phone'),
    ('Büro: (030) 901820', 'phone'), ('联系电话：13812345678。', 'phone'),
    ('手机13812345678找我', 'phone'), ('卡号6222021234567894', 'card'),
    ('IP是93.184.216.34吗', 'ip'),
    ('手机 138 1234 5678', 'phone'), ('+86 10 6552 9988', 'phone'), ('020 7946 0958', 'phone'),
    ('4111 1111 1111 1111', 'card'), ('card 3782-822463-10005', 'card'),
    ('GB82 WEST 1234 5698 7654 32 is mine', 'iban'), ('账号DE89370400440532013000。', 'iban'),
    ('2001:4860:4860::8888', 'ip'), ('http://93.184.216.34/', 'ip'),
    ('邮箱ann@example.org或', 'email'), ('<o\'neil+x@a.b-c.co.uk>', 'email'),
    ('078-05-1121', 'national_id'), ('SSN 078051121', 'national_id'),
    ('912-71-3456', 'national_id'), ('NHS number 943 476 5919', 'national_id'),
    ('NI AB 12 34 56 C', 'national_id'), ('Steuer-ID 36 574 261 809', 'national_id'),
    ('2 95 10 99 126 111 93', 'national_id'), ('DNI 54362315K', 'national_id'),
    ('NIE X2482300W', 'national_id'), ('RCCMNL83S18D969H', 'national_id'),
    ('身份证号11010519491231002X号', 'national_id'), ('Aadhaar 2341 2341 2346', 'national_id'),
    ('PAN ACUPA7085R', 'national_id'), ('390.533.447-05', 'national_id'),
    ('756.9217.0769.85', 'national_id'), ('811228-9874', 'national_id'),
    ('PESEL 44051401359', 'national_id'), ('SIN 123-456-782', 'national_id'),
    ('131052-308T', 'national_id'), ('BOXW310820HNERXN09', 'national_id'),
])  # fmt: skip
def test_each_form_is_found(text, kind):
  assert [name for _, name in found(text)] == [kind]


@pytest.mark.parametrize('text', [
    'on 2015-12-22 04:34:22 and 22.12.2015, 1/14/1961 to 10/23/1951',
    'ISBN 978-0-306-40615-7 and 0-306-40615-2', 'doi:10.1126/science.162.3860.1387',
    'arXiv:2005.14165v4', 'costs $1,234,567.89, or 1 234 567,89 €, or 1000000000',
    'populations of 12345678 and 9876543210', '1990) 233-274 and 12(3): 211-227 (2003)',
    'in 1999-2000, 2001 2002 2003', '40.7128, -74.0060', '3.14159265358979 and 1e-10000000',
    'version 1.2.3.4, v10.20.30.40, Chrome/91.10.44.124', 'Section 14.12.1.3', '4.2.1.13',
    '192.168.17.12',
    '203.0.113.17 and 2001:db8::17', 'std::vector<a::b>', '12:34:56:07', '00:1a:2b:3c:4d:5e',
    '550e8400-e29b-41d4-a716-446655440000', 'da39a3ee5e6b4b0d3255bfef95601890afd80709',
    'cufft>=11.12.3.61', '[+000000120]', '+3.140000', '2.285 + 7.95001', '0.000 000 0038',
    '-2.002 319 304 3622', '28 024.951 4242', 'Math. 5 (1996) 329-3590', 'Soc. (1996) 329-359',
    'default_rng(6763691329830218206)', 'ffff:ffff:0:1:2:3:4:5',
    'git@github.com:a/b.git', 'image@2x.png', '@name and a@b', '4111 1111 1111 1112',
    'TX 77030-2707',
    '078-05-1120', '666-12-3456', 'GB82 WEST 1234 5698 7654 33', '36574261808',
    '110105194912310021',
    'password: forgotten', 'token = self.next_token()', 'api_key = os.environ["API_KEY"]',
    'the key: understanding', 'secret = "your-secret-here"',
    'Figures 1 2 3 4 5 6 7 8 9 10 11 12', 'scored 21-19 21-17 21-15',
])  # fmt: skip
def test_what_only_looks_like_it_is_left(text):
  assert redacted(text) == text


def test_only_the_kinds_asked_for_are_replaced_and_each_is_counted():
  document = Document('a', 'ann@example.org, bob@example.org, +1 541 754 3010')
  privacy.Redact(kinds=('email', 'ip')).apply(document)
  assert document.text == '<EMAIL>, <EMAIL>, +1 541 754 3010'
  assert document.verdicts == {'privacy.email': 2, 'privacy.ip': 0} and not document.removed_by
  with pytest.raises(UserError, match="'name'.*they are secret, email"):
    privacy.Redact(kinds=('name',))


def test_the_text_around_stays_and_a_second_pass_changes_nothing():
  text = letters()[:200_000]
  once = redacted(text)
  assert once != text and redacted(once) == once
  kept = re.split('<(?:EMAIL|PHONE|IP|SECRET)>', once)
  position = 0
  for piece in kept:
    position = text.index(piece, position) + len(piece)


@pytest.mark.parametrize(
    'unit',
    ['1', f'{1:0100}\n', '1 ',
     '(1)', '+1 ', '0', 'a@a.a.', ':', 'a:1:', '://a:', '-----BEGIN PRIVATE KEY-----',
     'eyJaaaaaaaaa.', 'api_key=', 'GB02 ABCD ', 'phone 123 4567 ', '12345678A ', 'PuTTY-User-Key-'
     'File-2: '])  # fmt: skip
def test_time_is_linear_in_hostile_text(unit):
  begin = time.process_time()
  privacy.Redact().find(unit * (40_000 // len(unit)))
  assert time.process_time() - begin < 5  # seconds; a square would take minutes
