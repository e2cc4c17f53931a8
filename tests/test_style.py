"""What of the house style a machine can check."""
import ast
import pathlib
import re
import tokenize

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = 'lm', 'pallas_kernels', 'tests', 'scripts'
FILES = sorted(str(path.relative_to(REPOSITORY)) for folder in FOLDERS
               for path in (REPOSITORY / folder).rglob('*.py'))
LIBRARY = [file for file in FILES if file.startswith(('lm/', 'pallas_kernels/'))]

LETTERS = 'BTSDFNKGHVLPMX1'  # M rows of any kind, X = B * K, 1 an axis kept by a reduction
SUFFIX = re.compile(rf'_([{LETTERS}]+)$')
UNFINISHED = re.compile('|'.join((r'\bTO' + r'DO\b', r'\bFIX' + r'ME\b', r'\bX' + r'XX\b')))
# How and where the code is written is no business of its readers.
PLACES = re.compile('|'.join(('/' + 'work/', '/' + 'tmp/', '/' + 'root/', '/' + 'home/')))


def source(file):
  return (REPOSITORY / file).read_text()


def suffix(node):
  """The shape letters of `x_BTD`, `self.x_BTD` or `x_BTD.astype(...)`, or None."""
  if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'astype':
    return suffix(node.func.value)
  name = getattr(node, 'id', '') or getattr(node, 'attr', '')
  match = SUFFIX.search(name)
  return match and match.group(1)


def dishonest(tree):
  """(line, why) of every name whose shape letters disagree with an einsum or an annotation."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'einsum':
      spec = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
      if spec is not None:
        for letters, operand in zip(spec.split('->')[0].split(','), node.args[1:]):
          if suffix(operand) and suffix(operand).lower() != letters:
            yield node.lineno, f'{suffix(operand)} is {letters!r} in einsum {spec!r}'
    if (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        and getattr(node.value.func, 'attr', '') == 'einsum' and suffix(node.targets[0])
        and isinstance(node.value.args[0], ast.Constant)):
      result = node.value.args[0].value.split('->')[-1]
      if suffix(node.targets[0]).lower() != result:
        yield node.lineno, f'{node.targets[0].id} is the einsum\'s {result!r}'
    if isinstance(node, ast.arg) and SUFFIX.search(node.arg) and node.annotation is not None:
      shapes = [x.value for x in ast.walk(node.annotation)
                if isinstance(x, ast.Constant) and isinstance(x.value, str)]
      if shapes and shapes[0].replace(' ', '') != SUFFIX.search(node.arg).group(1):
        yield node.lineno, f'{node.arg} is annotated {shapes[0]!r}'


@pytest.mark.parametrize('file', LIBRARY)
def test_shape_letters_are_honest(file):
  assert not list(dishonest(ast.parse(source(file))))


@pytest.mark.parametrize('line', [
    "y = jnp.einsum('btd,vd->btv', x_BTS, w_VD)", "y_BTD = jnp.einsum('btd,vd->btv', x_BTD, w_VD)",
    "y = jnp.einsum('btd,vd->btv', x_BTD, w_DV.astype(d))",
    "def f(x_BTD: Float[Array, 'B T F']): pass"])
def test_dishonest_letters_are_seen(line):
  assert len(list(dishonest(ast.parse(line)))) == 1


@pytest.mark.parametrize('file', FILES)
def test_indentation_is_two_spaces(file):
  with tokenize.open(REPOSITORY / file) as f:
    indents = [token.string for token in tokenize.generate_tokens(f.readline)
               if token.type == tokenize.INDENT]
  for outer in ast.walk(ast.parse(source(file))):
    body = getattr(outer, 'body', None)
    for inner in body if isinstance(body, list) and hasattr(outer, 'lineno') else []:
      step = inner.col_offset - outer.col_offset
      assert step == 2 or inner.lineno == outer.lineno, f'line {inner.lineno}: {step} spaces'
  assert not any('\t' in indent for indent in indents)


@pytest.mark.parametrize('file', FILES)
def test_lines_and_files_are_short_and_finished(file):
  lines = source(file).splitlines()
  assert len(lines) <= 500
  for number, line in enumerate(lines, 1):
    assert len(line) <= 100, f'{file}:{number} has {len(line)} columns'
    assert not UNFINISHED.search(line), f'{file}:{number}'
    assert line == line.rstrip(), f'{file}:{number} ends with blanks'


@pytest.mark.parametrize('file', LIBRARY)
def test_no_machine_is_mentioned(file):
  assert not PLACES.search(source(file))


@pytest.mark.parametrize('file', LIBRARY)
def test_every_module_says_what_it_is(file):
  tree = ast.parse(source(file))
  assert ast.get_docstring(tree) or not tree.body
  public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith('_')]
  assert not [node.name for node in public if not ast.get_docstring(node)]


def test_names_of_test_files_are_unique():
  names = [pathlib.PurePath(file).name for file in FILES if '/test_' in file]
  assert len(names) == len(set(names))
