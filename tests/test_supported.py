"""The README's table of what is supported, and the whole list, are those of the tests' marks."""
import ast

import supported


def test_the_readme_has_the_table_of_the_marks():
  assert supported.split_readme()[1] == supported.table(), 'run python tests/supported.py'
  assert supported.WHOLE.read_text('utf-8') == supported.whole(), 'run python tests/supported.py'


def test_every_area_is_shown_by_a_test():
  assert all(supported.shown().values())


def test_the_readme_takes_two_screens():
  lines = supported.README.read_text('utf-8').splitlines()
  assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_a_mark_is_read_and_other_decorators_are_not():
  source = '@pytest.mark.skip\n@pytest.mark.supports("data", "x", "y")\ndef test_a(): pass\n'
  assert supported.marks(source) == [('data', 'x', 'y')]
  assert supported.marks(ast.unparse(ast.parse(source)).replace('supports', 'other')) == []
