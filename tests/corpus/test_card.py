"""The card tells what happened, the same each time, and renders nothing of what it quotes."""

import dataclasses
import html.parser
import re

import pytest

from lm.corpus import card
from lm.corpus import card_page
from lm.corpus import passports
from lm.corpus import summary
from lm.corpus import write
from lm.corpus.document import Document

HOSTILE = (
    '</pre></figure></div><script>alert(1)</script>',
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    '```\n</code>\n\n<iframe src="https://evil.example"></iframe>\n\n[click](javascript:alert(1))',
    '    indented\n\n\n# heading\n- list\n![x](https://evil.example/track.png)\n<b>bold</b>',
    '`` ` <u>x</u> | cell | <https://evil.example> https://evil.example www.evil.example',
    '\r# after a carriage return\r\n<i>x</i>\x0b\x0c\x85\u2028<s>y</s>',
    '&lt;script&gt; &#60;script&#62; \x00\x1b[31m\u202egnp.exe\u200b',
    '---\nlicense: mit\n---\n<!-- --><style>*{display:none}</style>',
)


def hostile_corpus(directory):
  """A corpus whose every document, name and fact is made to do harm."""
  found, kept, removed = summary.Summary(), [], []
  for number, text in enumerate(HOSTILE * 3):
    document = Document(f'web/{text}:{number}', text * 3, source='web', address=number, title=text,
                        url=f'https://{text}/', licence=text, language=text, date=text)  # fmt: skip
    document.verdicts = {'gopher.word_count': number, 'privacy.email': number % 3,
                         'decontaminate.hits': [[text, text]] if number % 4 == 0 else []}
    found.add_input(document)
    if number % 4 == 0:
      document.remove('decontaminate.hits')
    if number % 9 == 8:
      document.cluster = 1
      document.remove(f'minhash.{text}')
    if document.removed_by:
      found.add_removed(document)
      removed.append(document)
    else:
      found.add_kept(document)
      found.add_written(document, 2)
      kept += [document, document]
    found.add_fault(document.name, f'{text}: {text}')
  shard = write.Writer().write(write.stem(directory / 'data', 'bad', 0, 1), kept)
  passports.write(directory / 'passports' / 'kept-00000-of-00001.parquet', kept)
  passports.write(directory / 'passports' / 'removed-00000-of-00001.parquet', removed)
  return card.Facts('bad', found, [dataclasses.asdict(shard)], {'web': 2.0},
                    'pipeline.Corpus.name = "<b>"\n', {'python': HOSTILE[0]})


class Tags(html.parser.HTMLParser):
  """All tags of a page with the names and values of their attributes, and its text."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.attributes, self.text = set(), set(), []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes |= {(name, value) for name, value in attrs}

  def handle_data(self, data):
    self.text.append(data)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A directory with the card of the hostile corpus."""
  directory = tmp_path_factory.mktemp('card')
  card.write(directory, hostile_corpus(directory))
  return directory


@pytest.mark.supports('documents', 'dataset card (Markdown, HTML)')
def test_the_page_renders_nothing_of_what_it_quotes(written):
  found = Tags((written / 'card.html').read_text())
  assert found.tags <= set('html head meta title style body h1 h2 p dl div dt dd small figure '
                           'figcaption svg g line path text rect circle span i table thead tbody '
                           'tr th td pre'.split())
  assert not [name for name, _ in found.attributes if name.startswith('on') or name in (
      'href', 'src', 'action', 'srcdoc')]
  text = ''.join(found.text)
  for quoted in ('<script>alert(1)</script>', '[click](javascript:alert(1))', '&#60;script&#62;'):
    assert quoted in text
  assert '\\u202egnp.exe\\u200b' in text and not re.search('[\u202e\u200b\x1b\x00\u2028]', text)


def test_the_markdown_renders_nothing_of_what_it_quotes(written):
  markdown_it = pytest.importorskip('markdown_it')
  text = (written / 'card.md').read_text()
  header, body = re.match(r'---\n(.*?)\n---\n(.*)', text, re.DOTALL).groups()
  assert 'license: other' in header and 'language' not in header
  assert all(re.match(r'[a-z_]+: |configs:|- config_name|  data_files', line)
             for line in header.splitlines())
  found = Tags(markdown_it.MarkdownIt('commonmark', {'html': True, 'linkify': False}).enable(
      'table').render(body))
  assert found.tags <= set('h1 h2 p code pre table thead tbody tr th td'.split())
  assert {name for name, _ in found.attributes} <= {'style'}
  assert '<iframe src="https://evil.example"></iframe>' in ''.join(found.text)
  headings = [line for line in body.splitlines() if line.startswith('#')]
  assert len(headings) == len(set(headings)) and '# heading' not in headings
  links = re.sub(r'`[^`\n]*`', '', re.sub(r'^    .*$', '', body, flags=re.MULTILINE))
  assert 'evil' not in links and '<' not in links  # GitHub makes links of bare addresses


def test_tables_have_as_many_cells_as_heads(written):
  lines = (written / 'card.md').read_text().splitlines()
  width = 0
  for line, after in zip(lines, lines[1:]):
    if after.startswith('| ---'):
      width = line.count('|')
    assert not line.startswith('|') or line.count('|') == width > 2, line
  assert width


def test_the_same_corpus_has_the_same_card(written, tmp_path):
  card.write(tmp_path, hostile_corpus(tmp_path))
  for name in ('card.md', 'card.html'):
    assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def tell(documents, weights=None):
  """The card's text of documents, and what the page is made of."""
  found = summary.Summary()
  for document in documents:
    found.add_input(document)
    (found.add_removed if document.removed_by else found.add_kept)(document)
    if not document.removed_by:
      found.add_written(document, write.copies(document.name, (weights or {}).get('web', 1)))
  shard = write.Shard('web-00000-of-00001.parquet', 3, 10, 20, 'ab' * 32)
  facts = card.Facts('web', found, [dataclasses.asdict(shard)], weights or {}, 'x = 1\n', {},
                     (1, 5, [('web/a:1', 5)]))  # fmt: skip
  return facts, card.markdown(facts)


def test_the_figures_are_those_of_the_documents():
  documents = [Document(f'web/a:{i}', 'x' * 100, source='web', language='en' if i % 4 else 'no',
                        licence='CC-BY-4.0', url=f'https://a{i % 2}.org/') for i in range(2000)]
  for i, document in enumerate(documents):
    document.verdicts = {'gopher.words': 1, 'privacy.email': 2, 'language.score': 0.75}
    if i % 10 == 0:
      document.remove('gopher.words')
  facts, text = tell(documents, {'web': 2.0})
  assert text.startswith('---\npretty_name: "web"\nlicense: cc-by-4.0\n')
  assert 'size_categories: [1K<n<10K]\nlanguage: ["en", "no"]\n' in text
  assert 'data_files: "data/web-*.parquet"' in text
  for row in ('| `web` | 2,000 | 200 kB | 1,800 | 180 kB | 2 | 3,600 | 360 kB | 100.0 % |',
              '| `gopher.words` | 2,000 | 200 | 10.0 % | 20 kB | 200 | 200 |',
              '| `en` | 1,400 | 140 kB | 77.8 % | 0.750 |',
              '| `a1.org` | 1,000 | 100 kB | 55.6 % |',
              '| `CC-BY-4.0` | 1,800 | 180 kB | 100.0 % |', '| `privacy.email` | 3,600 | 1,800 |',
              '| `web/a:1` | 5 |', '| 50.0 % | 96 |'):
    assert row in text
  assert '`SELECT' not in text and "lm train --gin_file" in text and '\n    x = 1\n' in text
  assert list(card_page._waterfall(facts)) == [
      ('collected', [1.0]), ('gopher', [0.9]), ('privacy', [0.9]), ('language', [0.9])]


@pytest.mark.parametrize('licence, stated', [
    ('CC0-1.0', 'cc0-1.0'), ('', 'unknown'), ('mit\nlanguage: [x]', 'other'), ('a: {b}', 'other')])
def test_a_licence_of_all_stands_in_the_header_if_it_is_a_name(licence, stated):
  _, text = tell([Document('web/a:1', 'x', source='web', licence=licence)])
  assert f'\nlicense: {stated}\ntask_categories' in text


@pytest.mark.parametrize('count, category', [
    (0, 'n<1K'), (999, 'n<1K'), (1000, '1K<n<10K'), (99_999, '10K<n<100K'), (100_000, '100K<n<1M'),
    (1_000_000, '1M<n<10M'), (10**9, '1B<n<10B')])
def test_the_category_of_size_is_hugging_faces(count, category):
  facts, _ = tell([])
  facts.summary.written['web'] = [1, 1, count, 1]
  assert f'size_categories: [{category}]' in card.markdown(facts)


def test_an_empty_corpus_has_a_card(tmp_path):
  facts, _ = tell([])
  card.write(tmp_path, facts)
  assert '0 documents' in (tmp_path / 'card.html').read_text()


def test_the_largest_clusters_are_named_and_followed(tmp_path):
  documents = [Document(f'd{i}', 'x', address=i, cluster={2: 1, 3: 1, 4: 3, 6: 5}.get(i, -1))
               for i in range(9)]
  documents[8].remove('gopher.words')
  documents[1].cluster, documents[5].cluster = 1, 5
  kept = [d for d in documents if d.cluster in (-1, d.address) and not d.removed_by]
  removed = [d for d in documents if d not in kept]
  passports.write(tmp_path / 'kept-0.parquet', kept)
  passports.write(tmp_path / 'removed-0.parquet', removed[:2])
  passports.write(tmp_path / 'removed-1.parquet', removed[2:])
  assert passports.clusters(tmp_path, 2) == (3, 4, [('d1', 2), ('d3', 1)])
  assert sorted(row['name'] for row in passports.duplicates(tmp_path, 1)) == ['d2', 'd3', 'd4']
  assert passports.duplicates(tmp_path, 7) == []
