"""Python's standard library as a corpus: the same in every process, and nothing of this machine."""

import collections
import hashlib
import os
import re
import subprocess
import sys
import sysconfig

import pytest

from lm.corpus import stdlib


@pytest.fixture(scope='module')
def corpus():
  return list(stdlib.documents())


@pytest.mark.supports('documents', "Python's standard library")
def test_it_has_every_kind_of_document_once(corpus):
  kinds = collections.Counter(document.name.split('/')[0] for document in corpus)
  assert kinds['lib'] > 300 and kinds['docs'] > 20
  assert len({document.name for document in corpus}) == len(corpus)
  assert all(document.text.strip() for document in corpus)


def test_another_process_reads_the_same_bytes(corpus):
  code = (
      'import hashlib; from lm.corpus import stdlib;'
      'documents = [(d.name, d.text) for d in stdlib.documents()];'
      'print(hashlib.sha256(repr(documents).encode()).hexdigest())'
  )
  environment = dict(os.environ, PYTHONHASHSEED='7', PYTHONPATH=os.pathsep.join(sys.path))
  found = subprocess.run(
      [sys.executable, '-c', code], env=environment, check=True, capture_output=True, text=True
  ).stdout.strip()
  assert found == hashlib.sha256(repr([(d.name, d.text) for d in corpus]).encode()).hexdigest()


def test_it_holds_nothing_of_this_machine(corpus):
  prefix = sysconfig.get_path('stdlib')
  for name, text in ((document.name, document.text) for document in corpus):
    assert not re.search(r' at 0x[0-9a-f]{6,}>', text) or name.startswith('lib/'), name
    assert prefix not in text, name


def test_tests_and_generated_files_are_left_out(corpus):
  for name in (document.name for document in corpus):
    assert not re.search(r'/(tests?|idle_test|site-packages|config-[^/]*)/', name), name
    assert '_sysconfigdata' not in name
    assert not re.search(r'encodings/cp\d|pydoc_data', name), name


def test_the_stamp_stands_still():
  assert stdlib.stamp() == stdlib.stamp()
