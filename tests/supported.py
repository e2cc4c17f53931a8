"""What is supported, as the marks of the tests say it.

A test that shows a capability is marked `@pytest.mark.supports(area, case, ...)`. `python
tests/supported.py` writes all of them into SUPPORTED.md, and a row an area into README.md;
test_supported.py compares.
"""
import ast
import pathlib

TESTS = pathlib.Path(__file__).resolve().parent
README, WHOLE = TESTS.parent / 'README.md', TESTS / 'SUPPORTED.md'
WIDTH = 84  # characters of what the README says of an area
BEGIN, END = '<!-- supported: python tests/supported.py -->\n', '<!-- end -->\n'
AREAS = ('documents', 'vocabularies', 'data', 'objectives', 'models', 'sizes', 'layers',
         'kernels', 'precision and parallelism', 'optimisers', 'faults survived', 'watching',
         'fine-tuning', 'evaluation', 'decoding', 'compression', 'weights of others', 'export',
         'serving')


def marks(source: str) -> list[tuple[str, ...]]:
  """The arguments of every `pytest.mark.supports` on a function, in the order of the file."""
  functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
  calls = [call for function in functions for call in function.decorator_list
           if isinstance(call, ast.Call) and ast.unparse(call.func) == 'pytest.mark.supports']
  return [tuple(ast.literal_eval(argument) for argument in call.args) for call in calls]


def shown() -> dict[str, dict[str, str]]:
  """Of each area its cases, and the first test file that shows each."""
  areas = {area: {} for area in AREAS}
  for path in sorted(TESTS.rglob('test_*.py')):
    for area, *cases in marks(path.read_text('utf-8')):
      if area not in areas:
        raise SystemExit(f'{path.name}: area {area!r} is not one of {AREAS}')
      for case in cases:
        areas[area].setdefault(case, path.relative_to(TESTS).as_posix())
  return areas


def table() -> str:
  """A row an area: how much of it a test shows, and the cases that fit, the shortest first."""
  lines = []
  for area, cases in shown().items():
    said = ''
    for case in sorted(cases, key=lambda case: (len(case), case)):
      if len(said) + len(case) > WIDTH:
        break
      said += f'{case}, '
    lines.append(f'| {area} | {len(cases)} | {said}... |\n')
  return '| area | shown | such as |\n|---|---|---|\n' + ''.join(lines)


def whole() -> str:
  """All cases, each with the test that shows it."""
  lines = ['# What is supported\n\nWritten by `python tests/supported.py`: what a test shows, and '
           'which.\n']
  for area, cases in shown().items():
    lines += [f'\n## {area}\n\n', *(f'- {case} ([{path}]({path}))\n'
                                    for case, path in cases.items())]
  return ''.join(lines)


def split_readme() -> tuple[str, str, str]:
  """README.md before its table, the table, and after it."""
  before, rest = README.read_text('utf-8').split(BEGIN)
  middle, after = rest.split(END)
  return before + BEGIN, middle, END + after


if __name__ == '__main__':
  start, _, end = split_readme()
  README.write_text(start + table() + end, 'utf-8')
  WHOLE.write_text(whole(), 'utf-8')
