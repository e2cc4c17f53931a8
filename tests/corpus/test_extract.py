"""Raw documents to text: no text is lost, and nothing of the page around it comes along."""

import json
import pathlib
import time

import pytest

from lm.corpus import collect
from lm.corpus import decode
from lm.corpus import markdown
from lm.corpus import wikitext
from lm.corpus.document import Document
from lm.corpus.extract import Extract

RAW = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'raw'
SENTENCE = 'This is a sentence of real text in a paragraph. '


def extracted(raw, media_type='text/html', **fields):
  document = Document('d', '', raw=raw if isinstance(raw, bytes) else raw.encode(),
                      media_type=media_type, **fields)
  Extract().apply(document)
  return document


def gold():
  """Pages of raw/html-cc as (entry, bytes)."""
  folder = RAW / 'html-cc'
  if not folder.exists():
    pytest.skip('shared/data/raw/html-cc is not here')
  pages = json.loads((folder / 'pages.json').read_text())
  return [(page, (folder / page['file']).read_bytes()) for page in pages]


def f1(pages, extract):
  """Trafilatura's own measure: of segments that must be in the text, and that must not."""
  hits = misses = wrong = 0
  for page, raw in pages:
    text = extract(raw)
    found = sum(segment in text for segment in page['with'])
    hits, misses = hits + found, misses + len(page['with']) - found
    wrong += sum(segment in text for segment in page['without'])
  return 2 * hits / (2 * hits + misses + wrong)


@pytest.mark.supports('documents', 'main text of HTML, its licence, its encoding')
def test_main_text_is_found_as_well_as_by_trafilatura():
  trafilatura = pytest.importorskip('trafilatura', exc_type=ImportError)
  pages = gold()
  theirs = f1(pages, lambda raw: trafilatura.extract(raw.decode('utf-8', 'replace')) or '')
  assert f1(pages, lambda raw: extracted(raw).text) >= theirs > 0.98


def test_pages_declare_their_licence():
  pytest.importorskip('trafilatura', exc_type=ImportError)
  for page, raw in gold():
    licence = extracted(raw, licence='source').licence
    (declared,) = page['licence']
    assert declared.replace('/', '-').upper() in licence or declared in licence, page['file']


def test_lines_of_code_lists_and_tables_are_kept():
  pytest.importorskip('trafilatura', exc_type=ImportError)
  page = f'''<html><head><title>The  title</title></head><body><nav>Home About</nav><main><article>
<h1>Head</h1><p>{SENTENCE * 6}</p><pre><code>def f(x):
    if x:

        return 1
</code></pre><p>Use <code>f(3)</code> for<br>that.</p><ul><li>first</li><li>second <b>bold</b><ul>
<li>inner</li></ul></li></ul><ol><li>one</li><li>two</li></ol><table><tr><th>Name</th><th>Age</th>
</tr><tr><td>Bob</td><td>3</td></tr></table><p>{SENTENCE * 6}</p></article></main>
<footer>Imprint</footer><script>evil()</script></body></html>'''
  document = extracted(page)
  blocks = document.text.split('\n\n')
  assert document.title == 'The title' and blocks[0] == 'Head'
  assert 'def f(x):\n    if x:\n\n        return 1\n\nUse f(3) for\nthat.' in document.text
  assert '- first\n- second bold\n  - inner' in blocks and '1. one\n2. two' in blocks
  assert '| Name | Age |\n| Bob | 3 |' in blocks
  for word in ('Home', 'Imprint', 'evil'):
    assert word not in document.text


TEXTS = {
    'cp1252': 'Größe und Maß, “quoted” – naïve café für alle Straßen. ' * 9,
    'cp1251': 'Съешь ещё этих мягких французских булок, да выпей чаю. ' * 9,
    'koi8-r': 'Мама мыла раму, а папа читал газету каждый вечер дома. ' * 9,
    'gb18030': '天地玄黄，宇宙洪荒。我们今天去北京的学校上课。' * 9,
    'big5': '天地玄黃，宇宙洪荒。我們今天去學校上課，學習國語。' * 9,
    'shift_jis': '吾輩は猫である。名前はまだ無い。どこで生れたか。' * 9,
    'euc-jp': '吾輩は猫である。名前はまだ無い。どこで生れたか。' * 9,
    'iso-2022-jp': '吾輩は猫である。名前はまだ無い。どこで生れたか。' * 9,
    'euc-kr': '안녕하세요. 오늘은 날씨가 좋습니다. 우리는 학교에 갑니다. ' * 9,
    'utf-8': 'Größe und Maß für alle Straßen. ' * 9,
    'utf-16': 'Größe und Maß für alle Straßen. ' * 9,
    'utf-16-le': 'Größe und Maß für alle Straßen. ' * 9,
}


@pytest.mark.parametrize('declared', ['', 'right', 'iso-8859-1', 'utf-8', 'no-such-encoding'])
@pytest.mark.parametrize('encoding', TEXTS)
def test_an_encoding_is_found_whatever_is_declared(encoding, declared):
  pytest.importorskip('resiliparse')
  text = TEXTS[encoding]
  declared = encoding if declared == 'right' else declared
  assert decode.decode(text.encode(encoding), declared).text == text


def test_few_broken_bytes_do_not_make_utf8_something_else():
  data = ('é' * 100).encode()
  assert decode.decode(data + b'\xe9 end').text == 'é' * 100 + '\ufffd end'
  assert decode.decode(data[:-1]).text == 'é' * 99


def test_what_is_no_text_is_removed_by_a_rule():
  pytest.importorskip('resiliparse')
  assert extracted(bytes(range(256)) * 40, 'text/plain').removed_by.startswith('extract.')
  document = extracted(b'text ' + bytes([1, 2, 3, 4]) * 40, 'text/plain')
  assert document.removed_by == 'extract.binary'
  document = extracted(b'fine\r\n' + b'text ' * 40 + b'\0', 'text/plain')
  assert (document.text, document.removed_by) == ('fine\n' + 'text ' * 40 + '\0', '')
  assert document.verdicts == {
      'extract.encoding': 'utf-8', 'extract.binary': 0.0048, 'extract.empty': 206}


@pytest.mark.parametrize('body, rule', [
    ('<div>' * 100_000 + SENTENCE, 'extract.complexity'),
    ('<ul><li>' * 50_000 + SENTENCE, 'extract.complexity'),
    ('<b>' * 100_000 + SENTENCE, 'extract.complexity'),
    ('<p>' + '<span>a</span>' * 200_000, 'extract.complexity'),
    ('<div ' + ' '.join(f'a{n}=1' for n in range(100_000)) + '>' + SENTENCE, 'extract.complexity'),
    (f'<div data-x="{"a" * (8 << 20)}"><p>{SENTENCE * 9}</p></div>', None),
    (f'<p>{SENTENCE * 9}</p><script>' + 'x=1;' * (1 << 20), ''),
    (f'<p>{SENTENCE * 9}</p><!--' + 'x' * (4 << 20), ''),
], ids=['nested', 'lists', 'unclosed', 'elements', 'attributes', 'attribute', 'script', 'comment'])
@pytest.mark.supports('documents', 'pages made to exhaust a parser')
def test_evil_pages_are_bounded(body, rule):
  pytest.importorskip('trafilatura', exc_type=ImportError)
  begin = time.process_time()
  document = extracted(f'<html><body>{body}</body></html>')
  assert time.process_time() - begin < 5
  if rule is not None:
    assert document.removed_by == rule and bool(document.text) == (not rule)


@pytest.mark.supports('documents', 'wikitext')
def test_wikitext():
  source = """{{Infobox|a={{b|c}}|d=[[e]]}}'''Foo''' ([[Greek language|Greek]]: {{lang|el|Φου}};
born {{birth date|1990|1|1}}) is {{convert|5|km|mi}} long.<ref name=x>cite [http://a.b c]</ref>
<!-- comment -->[[File:x.jpg|thumb|A [[link]] in it]]
== History ==
* one
** two
# a
# b
== Empty ==
=== Empty too ===
== Parent ==
=== Child ===
[http://x.y label] and <code>x = [[1]]</code>, <math>x^2</math> &mdash; done.
{| class="wikitable"
! a !! b
|-
| c || {{x|{{y}}}}
|}
[[Category:Foo]] [[de:Foo]]"""
  assert wikitext.text(source) == (
      'Foo (Greek: Φου;\n\nborn ) is 5 km long.\n\nHistory\n\n- one\n  - two\n1. a\n2. b\n\nParent'
      '\n\nChild\n\nlabel and x = [[1]], $x^2$ — done.')


def test_articles_of_wikipedia_keep_no_markup():
  path = RAW / 'enwiki-xml' / 'enwiki-shortened.xml.bz2'
  if not path.exists():
    pytest.skip('shared/data/raw/enwiki-xml is not here')
  (group,) = collect.groups([collect.Source('s', str(path))])
  texts = []
  for block in collect.split(group, lambda *fault: None):
    for document in collect.read(block, lambda *fault: None):
      Extract().apply(document)
      texts.append(document.text)
  text = '\n'.join(texts)
  assert len(texts) == 106 and 2_500_000 < len(text) < 3_500_000
  for mark in ('[[', ']]', '{|', '<ref', "''", 'thumb|', '&nbsp;', '\n==', 'Category:'):
    assert mark not in text, mark
  assert 'Albedo depends on the frequency of the radiation.' in text


@pytest.mark.parametrize('source', [
    '{{' * 200_000, '[[' * 200_000, '{{[[' * 50_000 + '}}]]' * 50_000, '<ref>' * 100_000,
    '<!--' * 100_000, '{|\n' * 100_000, '[//' * 200_000, ('=' * 6 + ' ' * 5000) * 99 + 'x',
    '[[' * 39 + 'x' * 10**6 + ']]' * 39, ' ' * 10**6 + 'x', '```\n' * 50_000, '`' * 10**6,
    '[x](' * 100_000, '*a ' * 100_000, '|--' * 100_000, '- ' * 200_000 + 'x', '#' + ' ' * 10**6])
def test_markup_is_read_in_time_proportional_to_its_length(source):
  begin = time.process_time()
  wikitext.text(source)
  markdown.text(source)
  assert time.process_time() - begin < 3


def test_markdown():
  text, title = markdown.text('''---
title: "A *title*"
---
# Head **bold** #
Some *emph* and __strong__ snake_case_name, 2 * 3 * 4, `*x*` [link](http://x.y/(a)) ![img](a.png)
<!-- comment -->
* item [ref][1]

```python
f(*a*)

[x](y)
```
| a | b |
|---|:-:|
| 1 | 2 |

[1]: http://foo''')
  assert title == 'A *title*' and text == '''Head bold
Some emph and strong snake_case_name, 2 * 3 * 4, *x* link \n
- item ref

f(*a*)

[x](y)

| a | b |
| 1 | 2 |'''


def test_a_book_is_read_in_its_order():
  pytest.importorskip('resiliparse')
  document = extracted(b'<html><body><div><h1>Two</h1><p>a &amp; b</p></div><div><h1>One</h1><ul>'
                       b'<li>item</li></ul></div></body></html>', 'application/epub+zip')
  lines = [line.strip() for line in document.text.splitlines() if line.strip()]
  assert [line.lstrip('•*- ') for line in lines] == ['Two', 'a & b', 'One', 'item']


def test_text_that_is_there_is_left_alone():
  document = Document('d', ' as it is ')
  Extract().apply(document)
  assert document == Document('d', ' as it is ')
