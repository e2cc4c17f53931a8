"""The README's table of what is supported is that of the tests' marks."""
import ast

import supported


def test_the_readme_has_the_table_of_the_marks():
  assert supported.split_readme()[1] == supported.table(), 'run python tests/supported.py'


def test_every_area_is_shown_by_a_test():
  assert all(f'| {area} |' in supported.table() for area in supported.AREAS)


def test_a_mark_is_read_and_other_decorators_are_not():
  source = '@pytest.mark.skip\n@pytest.mark.supports("data", "x", "y")\ndef test_a(): pass\n'
  assert supported.marks(source) == [('data', 'x', 'y')]
  assert supported.marks(ast.unparse(ast.parse(source)).replace('supports', 'other')) == []
