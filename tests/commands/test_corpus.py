"""A corpus of real pages and texts by the command that users give: its products, and kills."""
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from lm import main
from lm.corpus import collect, passports, write
from lm.corpus.document import ADDRESS_BITS

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / 'shared' / 'data'
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason='needs ../shared/data')
GIN = """
include 'gin/corpus/clean.gin'
from __gin__ import dynamic_registration
from lm.corpus import collect
from lm.corpus import pipeline
pipeline.Corpus.sources = (
    @warc/collect.Source(), @wiki/collect.Source(), @lines/collect.Source(),
    @books/collect.Source())
warc/collect.Source.name = 'warc'
warc/collect.Source.files = '{shared}/raw/warc/ai2-cc-sample.warc.gz'
wiki/collect.Source.name = 'wiki'
wiki/collect.Source.files = '{home}/wiki.xml'
wiki/collect.Source.format = 'wikipedia'
wiki/collect.Source.licence = 'CC-BY-SA-3.0'
lines/collect.Source.name = 'lines'
lines/collect.Source.files = '{home}/*.jsonl.gz'
lines/collect.Source.weight = 1.5
books/collect.Source.name = 'books'
books/collect.Source.files = ('{home}/*.txt', '{home}/missing')
SHARD_BYTES = 200000
FORMAT = 'jsonl'
LANGUAGES = ()
EVALUATIONS = '{home}/evaluation.jsonl'
"""


def speech():
  """Sentences that all rules let pass."""
  import zipfile
  with zipfile.ZipFile(SHARED / 'lm/inaugural/inaugural.zip') as archive:
    names = sorted(name for name in archive.namelist() if name.endswith('.txt'))
    return [archive.read(name).decode('utf-8', 'replace') for name in names]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """The input of the corpus: some of it is broken, some stands twice."""
  import bz2
  directory = tmp_path_factory.mktemp('corpus')
  dump = bz2.open(SHARED / 'raw/enwiki-xml/enwiki-shortened.xml.bz2', 'rt', encoding='utf-8').read()
  head, *pages = dump.split('  <page>')
  (directory / 'wiki.xml').write_text('  <page>'.join([head, *pages[:12]]) + '</mediawiki>')
  speeches = speech()
  rng = random.Random(0)
  with gzip.open(directory / 'a.jsonl.gz', 'wt') as file:
    for index, text in enumerate(speeches[:30]):
      file.write(json.dumps({'text': text, 'url': f'https://a.org/{index}'}) + '\n')
      if index % 3 == 0:  # Nearly the same, elsewhere; and the same address again.
        words = text.split(' ')
        words[rng.randrange(len(words))] = 'never'
        file.write(json.dumps({'text': ' '.join(words), 'url': f'https://b.org/{index}'}) + '\n')
        file.write(json.dumps({'text': 'other', 'url': f'http://www.a.org/{index}#top'}) + '\n')
    mail = 'My mail is jane.doe@company.com. ' + speeches[31]
    file.write(json.dumps({'text': mail}) + '\n')
    file.write('{"text": "no end\n[1, 2]\n')
  with gzip.open(directory / 'b.jsonl.gz', 'wt') as file:
    file.write(json.dumps({'text': speeches[32]}) + '\n')
  (directory / 'b.jsonl.gz').write_bytes((directory / 'b.jsonl.gz').read_bytes()[:-20])
  (directory / 'book.txt').write_text(speeches[40])
  (directory / 'empty.txt').write_text('')
  leaked = ' '.join(speeches[45].split()[100:130])
  (directory / 'leak.txt').write_text(speeches[45])
  (directory / 'evaluation.jsonl').write_text(json.dumps({'question': leaked}) + '\n')
  (directory / 'missing').symlink_to(directory / 'nowhere')
  (directory / 'corpus.gin').write_text(GIN.format(shared=SHARED, home=directory))
  return directory


def command(home, out, *flags):
  return ['corpus', f'--gin_file={home / "corpus.gin"}', f'--run_dir={out}', '--workers=2', *flags]


def products(out):
  """Every byte that must be the same, by file."""
  return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob('*'))
          if path.is_file() and path.name not in ('throughput.json', '.lock')}


@pytest.fixture(scope='module')
def whole(home):
  """A run that nothing disturbs."""
  out = home / 'whole'
  previous = os.getcwd()
  os.chdir(ROOT)
  try:
    assert main.main(command(home, out)) == 0
  finally:
    os.chdir(previous)
  return out


@needs_data
@pytest.mark.supports('documents', 'lm corpus: raw files to shards, passports and a card')
def test_each_document_is_kept_or_removed_by_a_named_rule(home, whole):
  result = json.loads((whole / 'corpus.json').read_text())
  kept = [row for path in sorted((whole / 'passports').glob('kept*')) for row in
          passports.read(path)]
  removed = [row for path in sorted((whole / 'passports').glob('removed*')) for row in
             passports.read(path)]
  unique = {row['name']: row for row in kept}
  assert sum(count for count, _ in result['collected'].values()) == len(unique) + len(removed)
  assert not unique.keys() & {row['name'] for row in removed}
  assert all(row['removed_by'] for row in removed) and not any(row['removed_by'] for row in kept)
  rules = {row['name']: row['removed_by'] for row in removed}
  assert rules['books/leak.txt'] == 'decontaminate.hits'
  assert sum(rule == 'url.duplicate' for rule in rules.values()) >= 10
  assert sum(rule == 'minhash.duplicate' for rule in rules.values()) >= 10
  records = [record for path in sorted((whole / 'data').iterdir()) for record in write.read(path)]
  assert [record['name'] for record in records] == [row['name'] for row in kept]
  assert len(result['shards']) > 2
  mail = next(record for record in records if 'My mail is' in record['text'])
  assert '<EMAIL>' in mail['text'] and 'jane.doe' not in mail['text']
  assert unique[mail['name']]['verdicts']['privacy.email'] == '1'
  wiki = [row for row in kept if row['source'] == 'wiki']
  assert wiki and all(row['licence'] == 'CC-BY-SA-3.0' for row in wiki)


@needs_data
def test_what_is_broken_is_named(whole):
  faults = json.loads((whole / 'corpus.json').read_text())['fault_examples']
  named = {name for examples in faults.values() for name, _ in examples}
  assert {'books/empty.txt', 'books/missing', 'lines/b.jsonl.gz'} <= named
  assert sum(name.startswith('lines/a.jsonl.gz:') for name in named) == 2


def page(text):
  """A web page with this text."""
  paragraphs = ''.join(f'<p>{line}</p>' for line in text.split('\n') if line.strip())
  return f'<html><head><title>t</title></head><body><article>{paragraphs}</article></body></html>'


def archived(index, text):
  """A response of a WARC, a gzip member by itself."""
  body = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n' + page(text).encode()
  head = (f'WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://w{index}.org/\r\n'
          'Content-Type: application/http; msgtype=response\r\n'
          f'Content-Length: {len(body)}\r\n\r\n')
  return gzip.compress(head.encode() + body + b'\r\n\r\n')


def make_hostile(directory, texts):
  """Files that are broken, too large or made to do harm, between others that are sound."""
  directory.mkdir()
  put = lambda name, data: (directory / name).write_bytes(data)
  put('good.html', page(texts[0]).encode())
  put('nested.html', b'<div>' * 200_000 + b'x' + b'</div>' * 200_000)
  put('unclosed.html', b'<b><i>' * 300_000 + b'hello')
  put('attributes.html', b'<p %s>x</p>' % b' '.join(b'a%d="1"' % i for i in range(300_000)))
  put('nul.html', page(texts[1]).encode().replace(b'<p>', b'<p>\0\0'))
  put('charset.html', b'<meta charset="utf-8">' + page(texts[2].replace('the', 'th\xe9')).encode(
      'latin-1'))
  put('empty.html', b'')
  put('large.html', b'<html><body>%s</body></html>' % (b'<p>word word word</p>' * (3 << 20)))
  with gzip.open(directory / 'bomb.html.gz', 'wb', 9) as file:
    for _ in range(400):
      file.write(bytes(1 << 20))
  with gzip.open(directory / 'bomb.jsonl.gz', 'wb', 9) as file:
    file.write(b'{"text": "')
    for _ in range(200):
      file.write(b'a' * (1 << 20))
  members = [archived(index, texts[index]) for index in range(4, 8)]
  members[1] = members[1][:200] + os.urandom(60) + members[1][260:]
  put('damaged.warc.gz', b''.join(members))
  put('truncated.warc.gz', b''.join(archived(i, texts[i]) for i in range(8, 11))[:-2000])
  (directory / 'broken.html').symlink_to(directory / 'nowhere.html')
  (directory / 'folder.html').mkdir()
  os.mkfifo(directory / 'pipe.html')


@needs_data
@pytest.mark.supports('faults survived', 'bombs, damaged archives, deep nesting, pipes, wrong '
                      'charsets in a corpus')
def test_hostile_input_is_named_and_the_rest_is_kept(tmp_path):
  make_hostile(tmp_path / 'in', speech())
  out = tmp_path / 'out'
  argv = ['corpus', '--gin_file=gin/corpus/web.gin', f"--gin.FILES='{tmp_path / 'in'}'",
          f'--run_dir={out}', '--gin.LANGUAGES=()']
  code = ('import resource, sys\nfrom lm import main\nif __name__ == "__main__":\n'
          f'  assert main.main({argv!r}) == 0\n'
          '  own = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]\n'
          '  print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) >> 10)')
  script = tmp_path / 'script.py'
  script.write_text(code)
  child = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True,
                         check=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert int(child.stdout.split()[-1]) < 400  # MiB of the largest process.
  rows = {row['name']: row for path in (out / 'passports').iterdir() for row in
          passports.read(path)}
  kept = {name.removeprefix('web/') for name, row in rows.items() if not row['removed_by']}
  assert kept == {'good.html', 'nul.html', 'charset.html', 'truncated.warc.gz:1',
                  'truncated.warc.gz:2', *(f'damaged.warc.gz:{n}' for n in (1, 2, 3))}
  removed = {name.removeprefix('web/'): row['removed_by'] for name, row in rows.items()
             if row['removed_by']}
  assert removed == dict.fromkeys(('nested.html', 'unclosed.html', 'attributes.html'),
                                  'extract.complexity')
  assert 'th\xe9' in ' '.join(record['text'] for path in (out / 'data').iterdir()
                              for record in write.read(path))
  examples = json.loads((out / 'corpus.json').read_text())['fault_examples']
  found = {kind: {name.removeprefix('web/') for name, _ in some} for kind, some in examples.items()}
  assert found == {
      'is longer than max_document_bytes': {'large.html', 'bomb.html.gz'},
      'is truncated or damaged': {'bomb.jsonl.gz', 'damaged.warc.gz', 'truncated.warc.gz'},
      'is empty': {'empty.html'}, 'cannot be read': {'broken.html'},
      'is a pipe, a socket or a device': {'pipe.html'}}


@needs_data
@pytest.mark.supports('faults survived', 'kill -9 of lm corpus: the same bytes')
def test_killed_at_any_time_it_ends_with_the_same_bytes(home, whole):
  out, rng, kills, seen = home / 'killed', random.Random(1), 0, {}
  flags = [sys.executable, '-m', 'lm.main', *command(home, out)]
  patterns = 'work/*/*.done', 'work/*/complete.json', 'work/*/shards-*/data/*'
  # Directories come and go meanwhile, which `glob` does not bear.
  made = lambda: sum(any(pathlib.PurePath(folder, name).match(pattern) for pattern in patterns)
                     for folder, _, names in os.walk(out) for name in names)
  for limit in (1, 6, 11, 16, 21, 29, 999):  # 24 blocks are done in 6 segments, then 3 shards.
    process = subprocess.Popen(flags, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and made() < limit:
      time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.1))
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob('work/*/*.done')}
    if limit < 999:
      assert all(done.get(path) == when for path, when in seen.items())  # Not done again.
    seen = done
  assert process.returncode == 0 and kills >= 5
  assert products(out) == products(whole)


@needs_data
def test_another_form_after_a_kill_leaves_no_shard_of_the_first(home, whole):
  out = home / 'changed'
  flags = [sys.executable, '-m', 'lm.main', *command(home, out)]
  process = subprocess.Popen(flags, cwd=ROOT, stderr=subprocess.DEVNULL)
  while process.poll() is None and not list(out.glob('work/*/shards-*/shard-*.json')):
    time.sleep(0.002)
  process.kill()
  process.wait()
  assert not (out / 'corpus.json').exists() and not (out / 'data').exists()
  subprocess.run([*flags, '--gin.FORMAT="parquet"', '--gin.SHARD_BYTES=400000'], cwd=ROOT,
                 check=True, capture_output=True)
  found = json.loads((out / 'corpus.json').read_text())['shards']
  assert {path.name for path in (out / 'data').iterdir()} == {shard['file'] for shard in found}
  assert all(shard['file'].endswith('.parquet') for shard in found)
  assert len(list((out / 'passports').iterdir())) == 2 * len(found) and not (out / 'work').exists()
  records = lambda run: [record['text'] for path in sorted((run / 'data').iterdir())
                         for record in write.read(path)]
  assert records(out) == records(whole)


@needs_data
def test_files_of_somebody_else_are_not_touched(home, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'mine').write_text('mine')
  assert main.main(command(home, tmp_path)) == 2
  assert 'data is in the way of the corpus' in capsys.readouterr().err
  assert (tmp_path / 'data' / 'mine').read_text() == 'mine' and not (tmp_path / 'work').exists()


@needs_data
@pytest.mark.supports('documents', 'lm corpus by Apache Beam: the same bytes')
def test_beam_and_other_numbers_of_processes_make_the_same_bytes(home, whole, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert main.main(command(home, home / 'beam', '--runner=DirectRunner')) == 0
  assert products(home / 'beam') == products(whole)
  assert main.main([*command(home, home / 'one'), '--workers=1']) == 0
  assert products(home / 'one') == products(whole)


@needs_data
def test_it_trains_with_one_binding(home, whole):
  names = {document.name for document in collect.documents(str(whole / 'data' / '*'))}
  kept = [row['name'] for path in sorted((whole / 'passports').glob('kept*')) for row in
          passports.read(path)]
  assert names == set(kept) and len(kept) > len(names)  # lines have the weight 1.5


def test_every_value_of_a_corpus_is_explained(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  assert main.main(['explain', '--gin_file=gin/corpus/web.gin', "--gin.FILES='x'"]) == 0
  rows = capsys.readouterr().out.splitlines()
  assert any('collect.Source.files' in row and '--gin.FILES' in row for row in rows)
  assert any('deduplicate.MinHash.threshold' in row and 'default' in row for row in rows)


@needs_data
def test_a_finished_corpus_stands_and_another_is_refused(home, whole, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  before = {path: path.stat().st_mtime_ns for path in whole.rglob('*')}
  assert main.main(['corpus', f'--run_dir={whole}']) == 0
  assert {path: path.stat().st_mtime_ns for path in whole.rglob('*')
          if path.name != '.lock'} == {path: when for path, when in before.items()
                                       if path.name != '.lock'}
  (whole / 'work').mkdir()  # As if a kill had come while it was deleted.
  assert main.main(['corpus', f'--run_dir={whole}']) == 0 and not (whole / 'work').exists()
  assert main.main([*command(home, whole), '--gin.LANGUAGES=("en",)']) == 2
  assert 'choose another --run_dir' in capsys.readouterr().err
  assert main.main([*command(home, home / 'x'), '--bogus=1']) == 2
  assert '--bogus=1 is neither a flag of `lm corpus`' in capsys.readouterr().err
  assert main.main(['corpus', 'why', f'--run_dir={whole}', '--setp=1']) == 2
  assert '--setp=1 is no flag of `lm corpus why`' in capsys.readouterr().err


def test_addresses_count_more_blocks_than_there_will_be():
  assert 63 - ADDRESS_BITS - 20 >= 19
