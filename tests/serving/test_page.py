"""The web page, in a browser, over a server of tiny models."""
import contextlib
import shutil

from conftest import Server
import pytest
from test_content_filter import spelt
from tiny_worker import FIM, made

from lm.data.vocabularies import ByteVocabulary
from lm.inference import infill, SamplingConfig

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser')


@contextlib.contextmanager
def opened(url):
  """The page in headless Chromium; at the end it must have met no error."""
  if BROWSER is None:
    pytest.skip('there is no chromium on this machine')
  sync = pytest.importorskip('playwright.sync_api', reason='playwright is in the extra test')
  errors = []
  with sync.sync_playwright() as play:
    browser = play.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.on('pageerror', lambda error: errors.append(error))
    page.on('request', lambda request: request.url.startswith((url, 'data:')) or (
        errors.append(f'{request.url} is elsewhere')))
    page.goto(url)
    page.wait_for_selector('#tab-complete')
    yield page
    browser.close()
  assert not errors


@pytest.fixture
def page(writer):
  with opened(writer.url) as page:
    yield page


@pytest.fixture
def filtered(tmp_path):
  """The page of a server with filters."""
  (tmp_path / 'list').write_text('grumbo')
  server = Server('says', blocklist=str(tmp_path / 'list'))
  try:
    with opened(server.url) as page:
      yield page
  finally:
    server.close()


@pytest.mark.supports('serving', 'a web page: completions with the probability of each token')
def test_a_completion_comes_token_by_token_with_its_probability(page):
  page.fill('#prompt', 'abc')
  page.fill('#complete .tokens', '20')
  page.fill('#complete .seed', '3')
  page.click('#go')
  page.wait_for_function("/^20 tokens/.test(document.querySelector('#speed').textContent)")
  assert page.text_content('#text').startswith('abc')
  shares = page.eval_on_selector_all('#text span[title]', 'spans => spans.map(one => one.title)')
  assert len(shares) > 3 and all(0 <= float(share.split()[0]) <= 100 for share in shares)
  # The same seed, the same text.
  text = page.text_content('#text')
  page.evaluate("document.querySelector('#speed').textContent = ''")
  page.click('#go')
  page.wait_for_function("/^20 tokens/.test(document.querySelector('#speed').textContent)")
  assert page.text_content('#text') == text


@pytest.mark.supports('serving', 'a web page: a marked span is written anew, all else stays')
def test_a_marked_span_is_written_anew(page):
  page.select_option('#model', 'talk')
  page.click('#tab-infill')
  page.fill('#whole', 'abcXXXdef')
  page.click('#rewrite')  # nothing is marked
  page.wait_for_selector('#error:not([hidden])')
  assert 'no span is marked' in page.text_content('#error')
  page.fill('#infill .tokens', '9')
  page.fill('#infill .temperature', '0')
  page.evaluate("document.querySelector('#whole').setSelectionRange(3, 6)")
  page.click('#rewrite')
  page.wait_for_selector('#edited mark', state='attached')
  middle, = infill.infill(*made('talk'), ByteVocabulary(), FIM, 'abc', 'def',
                          SamplingConfig(max_new_tokens=9), 1, 0, 48)
  assert page.text_content('#edited mark') == middle.text
  assert page.text_content('#edited') == f'abc{middle.text}def'
  assert page.is_hidden('#error')


def test_the_tabs_are_what_the_model_can(page):
  tabs = lambda: page.eval_on_selector_all('#tabs button', 'tabs => tabs.map(one => one.id)')
  assert tabs() == ['tab-complete', 'tab-metrics']
  page.select_option('#model', 'classify')
  assert tabs() == ['tab-read', 'tab-metrics']
  page.fill('#input', 'some text')
  page.click('#ask')
  page.wait_for_selector('#found table')
  rows = page.eval_on_selector_all('#found tr', 'rows => rows.map(one => one.textContent)')
  assert len(rows) == 3
  page.click('#tab-metrics')
  page.wait_for_selector('#counts tr')
  assert 'lm_running' in page.text_content('#counts')


def test_with_filters_the_page_asks_for_no_probabilities(filtered):
  filtered.fill('#prompt', spelt('Yes.'))
  filtered.click('#go')
  filtered.wait_for_function("document.querySelector('#text').textContent.endsWith('Yes.')")
  assert filtered.is_hidden('#error') and not filtered.text_content('#speed')


def test_an_error_of_the_server_is_shown(page):
  page.fill('#prompt', 'a' * 100)
  page.click('#go')
  page.wait_for_selector('#error:not([hidden])')
  assert 'the prompt has 100 tokens' in page.text_content('#error')
  assert not page.is_disabled('#go')
