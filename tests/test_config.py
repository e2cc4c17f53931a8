"""Properties of the configuration: what it builds, what it refuses, what it says about itself."""

import pathlib
import pickle
import subprocess
import sys

import gin
import pytest
import toy_configs as toy

from lm import config
from lm.errors import UserError

HEAD = 'from __gin__ import dynamic_registration\nimport toy_configs\n'
RUN = HEAD + '''
NUM_STEPS = 100
LEARNING_RATE = 0.001
FILES = %gin.REQUIRED
OPTIMIZER = @toy_configs.Adam()

toy_configs.Experiment.model = @toy_configs.Model()
toy_configs.Experiment.optimizer = %OPTIMIZER
toy_configs.Experiment.train = @toy_configs.Train()
toy_configs.Adam.learning_rate = %LEARNING_RATE
toy_configs.Train.num_steps = %NUM_STEPS
toy_configs.Train.files = %FILES
'''
FILES = ('FILES', "'books/*.txt'")


@pytest.fixture(autouse=True)
def in_temporary_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('run.gin').write_text(RUN)
  config.reset()
  yield
  config.reset()


def line_of(text: str, needle: str) -> int:
  return next(i for i, line in enumerate(text.splitlines(), 1) if needle in line)


def make(extra: str = '', *overrides, target=toy.Experiment, name='x.gin'):
  """Builds the run with an experiment file that includes it, then overrides."""
  pathlib.Path(name).write_text(HEAD + "include 'run.gin'\n" + extra)
  config.parse([name], overrides)
  return config.build(target)


def refusal(extra: str = '', *overrides, target=toy.Experiment) -> str:
  """Builds what must be refused and returns the sentence."""
  with pytest.raises(UserError) as caught:
    make(extra, *overrides, target=target)
  message = str(caught.value)
  assert '\n' not in message and 'In call to' not in message
  return message


def test_built_object_is_the_one_that_python_would_construct():
  built = make('', FILES)
  direct = toy.Experiment(toy.Model(), toy.Adam(0.001), toy.Train(100, 'books/*.txt'))
  assert built == direct and type(built) is toy.Experiment and type(built.model) is toy.Model
  assert pickle.loads(pickle.dumps(built)) == built
  assert hash(built.model) == hash(direct.model)


@pytest.mark.parametrize('extra', [
    '',
    'toy_configs.Model.shape = (1, -2)\ntoy_configs.Lion.interval = 2\n'
    'OPTIMIZER = @toy_configs.Lion()',
    'D = 32\ntoy_configs.Model.d_model = %D\ntoy_configs.Experiment.note = [{"a": %D}, (%D,)]',
    'toy_configs.Experiment.teacher = @big/toy_configs.Model()\n'
    'big/toy_configs.Model.d_model = 128\n'
    'toy_configs.Model:\n  dropout = 0.5\n  tied = False\n',
    'M = @toy_configs.Model()\nM/toy_configs.Model.d_model = 8\n'
    'toy_configs.Experiment.teacher = %M',
    'toy_configs.Experiment.note = [@toy_configs.pair(), @toy_configs.Model]\n'
    'toy_configs.pair.left = @a/toy_configs.Model()\n'
    'toy_configs.pair.right = @toy_configs.Model()\n'
    'a/toy_configs.Model.num_heads = 2\n',
])
def test_injection_follows_the_rules_of_gin_itself(extra):
  built = make(extra + "\nFILES = 'f'\n")
  try:
    gin.parse_config_file('x.gin')
    theirs = gin.get_configurable(toy.Experiment)()
  finally:
    gin.clear_config()
  if isinstance(built.note, list) and toy.Model in built.note:
    assert issubclass(theirs.note.pop(), built.note.pop())  # gin passes a subclass of its own.
  assert (built.model, built.optimizer, built.train, built.teacher, built.note) == (
      theirs.model, theirs.optimizer, theirs.train, theirs.teacher, theirs.note)


def test_later_definitions_override_earlier_ones():
  assert make('NUM_STEPS = 7', FILES).train.num_steps == 7
  assert make('NUM_STEPS = 7', FILES, ('NUM_STEPS', '9')).train.num_steps == 9
  assert make('', FILES, ('toy_configs.Model.d_model', '32')).model.d_model == 32
  built = make('', FILES, ('OPTIMIZER', '@toy_configs.Lion()'), ('toy_configs.Lion.interval', '3'))
  assert built.optimizer == toy.Lion(interval=3)
  pathlib.Path('more.gin').write_text('NUM_STEPS = 8\n')
  config.parse(['run.gin', 'more.gin'], [FILES])
  assert config.build(toy.Experiment).train.num_steps == 8


def test_parameters_of_a_replaced_object_need_no_unbinding():
  built = make('OPTIMIZER = @toy_configs.Lion()', FILES)
  assert built.optimizer == toy.Lion()
  assert [row.name for row in config.explain()].count('LEARNING_RATE') == 0
  message = refusal('OPTIMIZER = @toy_configs.Lion()', FILES, ('LEARNING_RATE', '0.1'))
  assert message.startswith('--gin.LEARNING_RATE: LEARNING_RATE=0.1 is never used')
  message = refusal('OPTIMIZER = @toy_configs.Lion()\ntoy_configs.Adam.b1 = 0.5', FILES)
  assert message.startswith('x.gin:5: toy_configs.Adam.b1=0.5 is never used')


def test_a_scope_may_shadow_a_binding_everywhere():
  built = make('toy_configs.Experiment.model = @wide/toy_configs.Model()\n'
               'toy_configs.Model.d_model = 8\nwide/toy_configs.Model.d_model = 128', FILES)
  assert built.model.d_model == 128


def test_lists_and_integers_become_what_the_annotation_says():
  model = make('toy_configs.Model.shape = [1, 2]\ntoy_configs.Model.names = ["a"]\n'
               'toy_configs.Model.dropout = 0\ntoy_configs.Model.d_head = 3', FILES).model
  assert model == toy.Model(shape=(1, 2), names=('a',), d_head=3)
  assert hash(model) and type(model.dropout) is float


@pytest.mark.parametrize('parameter, value, words', [
    ('Model.d_model', "'64'", ['must be int, not str', 'write 64 without quotes']),
    ('Model.d_model', 'True', ['must be int, not bool', 'its default is 64']),
    ('Model.dropout', 'False', ['must be float, not bool']),
    ('Model.d_model', '1e3', ['must be int, not float', 'write 1000']),
    ('Model.d_model', 'None', ['must be int, not NoneType']),
    ('Model.d_head', "'x'", ['must be int or None, not str']),
    ('Model.tied', '1', ['must be bool, not int']),
    ('Model.activation', "'gleu'", ["one of 'gelu', 'silu', 'relu'", "did you mean 'gelu'?"]),
    ('Model.shape', '[1, 2.5]', ['must be tuple[int, ...]; 2.5 does not fit']),
    ('Model.shape', '[True]', ['must be tuple[int, ...]']),
    ('Model.names', "'abc'", ['must be Sequence[str], not str']),
    ('Lion.interval', 'True', ['must be int or float, not bool']),
    ('Train.limits', "{'a': 'b'}", ["must be dict[str, float]; 'b' does not fit"]),
    ('Train.schedule', '3', ['not int']),
    ('Experiment.model', '@toy_configs.Lion()', ['must be Model, not Lion']),
    ('Experiment.model', '@toy_configs.Model', ['must be Model, not a class or function']),
])
def test_a_value_of_the_wrong_type_is_refused_at_its_line(parameter, value, words):
  used = 'OPTIMIZER = @toy_configs.Lion()\n' if 'Lion' in parameter else ''
  message = refusal(f'{used}\n\ntoy_configs.{parameter} = {value}', FILES)
  line = line_of(pathlib.Path('x.gin').read_text(), f'{parameter} =')
  assert message.startswith(f'x.gin:{line}: toy_configs.{parameter}=')
  assert all(word in message for word in words), message


def test_a_macro_of_the_wrong_type_is_refused_where_the_macro_is_bound():
  message = refusal("\nNUM_STEPS = 'many'", FILES)
  assert message.startswith("x.gin:5: NUM_STEPS='many' reaches toy_configs.Train.num_steps")
  message = refusal('', FILES, ('NUM_STEPS', '1.5'))
  assert message.startswith('--gin.NUM_STEPS: NUM_STEPS=1.5 reaches toy_configs.Train.num_steps')


@pytest.mark.parametrize('extra, words', [
    ('toy_configs.Model.d_modle = 4', ['x.gin:4: toy_configs.Model.d_modle=4', 'mean d_model?']),
    ('toy_configs.Modell.d_model = 4', ['x.gin:4: toy_configs.Modell', 'did you mean Model?']),
    ('toy_config.Model.d_model = 4', ['x.gin:4: toy_config.Model', 'mean toy_configs.Model?']),
    ('toy_configs.Experiment.teacher = @toy_configs.Mode()', ['x.gin:4:', 'did you mean Model?']),
    ('toy_configs.d_model = 4', ['x.gin:4: toy_configs is no class or function',
                                   'did you mean toy_configs.Model.d_model?']),
    ('from __gin__ import nope', ['x.gin:4: __gin__.nope', '__gin__.dynamic_registration?']),
    ('import toy_confgs', ['x.gin:4: there is no module toy_confgs', 'mean toy_configs?']),
    ('from lm import confi', ['x.gin:4: there is no module lm.confi', 'did you mean config?']),
    ("include 'rum.gin'", ['x.gin:4: there is no gin file rum.gin', 'did you mean run.gin?']),
    ("include 'x.gin'", ['x.gin:4: x.gin includes itself']),
    ('NUM_STEP = 5', ['x.gin:4: no binding refers to the macro NUM_STEP=5', 'mean NUM_STEPS?']),
    ('toy_configs.Model.d_head = %NUM_STEP', ['x.gin:4: toy_configs.Model.d_head refers to '
                                              '%NUM_STEP', 'did you mean NUM_STEPS?']),
    ('toy_configs.Lion.interval = 2', ['x.gin:4: toy_configs.Lion.interval=2 is never used',
                                       'toy_configs.Experiment refers to no toy_configs.Lion']),
    ('big/toy_configs.Model.d_model = 8', ['x.gin:4: big/toy_configs.Model.d_model=8',
                                           'no such scope']),
    ('A = %B\nB = %A\ntoy_configs.Model.d_model = %A', ['refers to itself']),
    ('NUM_STEPS = = 3', ['x.gin:4: cannot read `NUM_STEPS = = 3`']),
    ('toy_configs.Model.activation = gelu', ['x.gin:4:', "quote text as 'gelu'"]),
    ('toy_configs.Model.shape = (1,', ['x.gin:', 'cannot read']),
])
def test_a_wrong_name_is_refused_with_its_line_and_the_nearest_right_name(extra, words):
  message = refusal(extra, FILES)
  assert message.startswith('x.gin:') and all(word in message for word in words), message


@pytest.mark.parametrize('name, value, words', [
    ('NUM_STEP', '5', ['NUM_STEP=5', 'did you mean NUM_STEPS?']),
    ('num_steps', '5', ['did you mean NUM_STEPS?']),
    ('d_model', '5', ['did you mean toy_configs.Model.d_model?']),
    ('toy_configs.Model.d_modle', '5', ['did you mean d_model?']),
    ('Model.d_model', '5', ['did you mean toy_configs.Model?']),
    ('NUM_STEPS', 'many', ["quote text twice: --gin.NUM_STEPS=\"'many'\""]),
    ('FILES', 'books/*.txt', ["quote text twice: --gin.FILES=\"'books/*.txt'\""]),
    ('FILES', "'books", ["'books"]),
    ('FILES', '', ['must be a Python literal']),
    ('NUM_STEPS', '5 6', ['must be a Python literal']),
    ('NUM_STEPS', 'true', ['write True']),
    ('NUM STEPS', '5', ['the name must be a macro']),
])
def test_a_wrong_override_is_refused_by_its_flag_and_says_how_to_write_it(name, value, words):
  message = refusal('', FILES, (name, value))
  assert message.startswith(f'--gin.{name}') and all(word in message for word in words), message


def test_a_hole_that_nothing_fills_is_refused_where_it_is_dug():
  line = line_of(RUN, 'FILES = ')
  message = refusal()
  assert f'run.gin:{line}: FILES is %gin.REQUIRED' in message and '--gin.FILES=VALUE' in message
  message = refusal('toy_configs.Model.d_model = %gin.REQUIRED', FILES)
  assert message.startswith('x.gin:4: toy_configs.Model.d_model is %gin.REQUIRED')


def test_a_parameter_without_default_and_binding_is_refused_where_it_is_referred_to():
  pathlib.Path('run.gin').write_text(RUN.replace('toy_configs.Train.num_steps = %NUM_STEPS', '')
                                     .replace('NUM_STEPS = 100', ''))
  message = refusal('', FILES)
  assert 'run.gin:11: toy_configs.Train.num_steps has no default and no binding' in message


def test_a_constructors_refusal_keeps_its_sentence_and_gains_the_line():
  message = refusal('toy_configs.Model.d_model = 66', FILES)
  assert message == 'd_model=66 is not divisible by num_heads=4 (d_model at x.gin:4)'
  message = refusal('toy_configs.Model.dropout = 1.5', FILES)
  assert message == 'dropout=1.5 must be below 1 (dropout at x.gin:4)'
  message = refusal('H = 3\ntoy_configs.Model.num_heads = %H', FILES, ('H', '5'))
  assert message.endswith('(num_heads at --gin.H)')


def test_unknown_and_unreadable_files_are_refused():
  with pytest.raises(UserError, match=r'no gin file rnu\.gin; did you mean run\.gin\?'):
    config.parse(['rnu.gin'])
  pathlib.Path('latin.gin').write_bytes(b'A = "\xe9"\n')
  with pytest.raises(UserError, match='latin.gin cannot be read as UTF-8'):
    config.parse(['latin.gin'])
  pathlib.Path('static.gin').write_text('import toy_configs\n')
  with pytest.raises(UserError, match='static.gin:1: imports need `from __gin__'):
    config.parse(['static.gin'])


def test_files_are_found_from_the_repository_root_too(monkeypatch, tmp_path):
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  monkeypatch.setattr(config, 'ROOT', tmp_path)
  monkeypatch.chdir(elsewhere)
  config.parse(['run.gin'], [FILES])
  assert config.build(toy.Experiment).train.num_steps == 100


def test_a_missing_dependency_of_a_module_is_not_taken_for_a_misspelling(monkeypatch, tmp_path):
  monkeypatch.syspath_prepend(tmp_path)
  pathlib.Path('needy.py').write_text('import absent_package\n')
  assert 'x.gin:4: needy needs the package absent_package' in refusal('import needy', FILES)


def test_explanation_names_value_and_source_of_every_parameter():
  make('NUM_STEPS = 7\ntoy_configs.Model.d_model = 32', FILES)
  rows = {row.name: row[1:] for row in config.explain()}
  assert rows['NUM_STEPS'] == ('7', 'x.gin:4')
  assert rows['toy_configs.Train.num_steps'] == ('7', 'x.gin:4')
  assert rows['toy_configs.Model.d_model'] == ('32', 'x.gin:5')
  assert rows['toy_configs.Train.files'] == ("'books/*.txt'", '--gin.FILES')
  assert rows['toy_configs.Adam.learning_rate'][1] == f'run.gin:{line_of(RUN, "LEARNING_RATE =")}'
  assert rows['toy_configs.Model.num_heads'] == ('4', 'default')
  assert rows['toy_configs.Experiment.optimizer'][0] == '@toy_configs.Adam()'
  assert len(rows) == 4 + 8 + 2 + 5 + 5  # Macros, then every field of the five objects.


def test_explanation_is_filtered_by_macro_parameter_or_configurable():
  make('', FILES)
  names = lambda name: [row.name for row in config.explain(name)]
  assert names('NUM_STEPS') == ['NUM_STEPS', 'toy_configs.Train.num_steps']
  assert names('d_model') == names('toy_configs.Model.d_model') == ['toy_configs.Model.d_model']
  assert names('toy_configs.Adam') == names('Adam') == [
      'toy_configs.Adam.learning_rate', 'toy_configs.Adam.b1']
  with pytest.raises(UserError, match='did you mean d_model'):
    config.explain('d_modell')
  lines = config.format_explanation(config.explain('Adam')).splitlines()
  assert lines[0].index('0.001') == lines[1].index('0.9')


@pytest.mark.parametrize('extra', [
    '',
    'D = 32\nE = %D\ntoy_configs.Model.d_model = %E\ntoy_configs.Model.names = ["a\'b", "c\\n"]',
    'OPTIMIZER = @toy_configs.Lion()\ntoy_configs.Lion.interval = 2.5',
    'toy_configs.Experiment.teacher = @big/toy_configs.Model()\n'
    'big/toy_configs.Model.d_model = 128\n'
    'toy_configs.Model.shape = (1, 2)',
    'toy_configs.Train.schedule = @toy_configs.constant\ntoy_configs.constant.value = 2.0',
    'toy_configs.Train.schedule = @toy_configs.constant\n'
    'toy_configs.Train.limits = {"a": 1e999, "b": -1.5}\ntoy_configs.Experiment.note = (1,)',
    'D = 8\ntoy_configs.Model.d_model = %D\nwide/toy_configs.Model.d_model = 128\n'
    'toy_configs.Experiment.model = @wide/toy_configs.Model()',
])
def test_saved_file_alone_builds_the_equal_object_and_keeps_its_macros(extra):
  built = make(extra, FILES)
  config.save('out/config.gin')
  text = pathlib.Path('out/config.gin').read_text()
  assert str(pathlib.Path.cwd()) not in text and 'include' not in text
  pathlib.Path('x.gin').unlink()
  pathlib.Path('run.gin').unlink()
  config.parse(['out/config.gin'])
  assert config.build(toy.Experiment) == built
  config.save('out/again.gin')
  assert pathlib.Path('out/again.gin').read_text() == text
  config.parse(['out/config.gin'], [('NUM_STEPS', '3')])
  assert config.build(toy.Experiment).train.num_steps == 3


def test_saved_file_keeps_its_meaning_when_a_default_changes(monkeypatch):
  built = make('', FILES)
  config.save('config.gin')
  changed = (128, *toy.Model.__init__.__defaults__[1:])
  monkeypatch.setattr(toy.Model.__init__, '__defaults__', changed)
  assert toy.Model().d_model == 128
  config.parse(['config.gin'])
  assert config.build(toy.Experiment) == built


def test_saved_file_tells_modules_of_the_same_name_apart(monkeypatch, tmp_path):
  for package in ('left', 'right'):
    (tmp_path / package).mkdir()
    (tmp_path / package / 'part.py').write_text(
        'import dataclasses\n@dataclasses.dataclass(frozen=True)\n'
        f'class P:\n  {package}: int = 1\n')
  monkeypatch.syspath_prepend(tmp_path)
  built = make('from left import part\nfrom right import part as other\n'
               'toy_configs.Experiment.note = [@part.P(), @other.P()]\n'
               'part.P.left = 5\nother.P.right = 6', FILES)
  config.save('config.gin')
  config.parse(['config.gin'])
  assert config.build(toy.Experiment) == built
  assert (built.note[0].left, built.note[1].right) == (5, 6)


def test_a_failed_save_leaves_the_old_file_and_no_debris(monkeypatch):
  make('', FILES)
  config.save('config.gin')
  before = pathlib.Path('config.gin').read_text()

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(config.os, 'fsync', full)
  with pytest.raises(UserError, match='config.gin cannot be written: No space left'):
    config.save('config.gin')
  assert pathlib.Path('config.gin').read_text() == before
  assert sorted(p.name for p in pathlib.Path.cwd().iterdir()) == ['config.gin', 'run.gin', 'x.gin']


def test_two_configurations_in_one_process_do_not_leak():
  make('toy_configs.Model.d_model = 32', FILES, ('NUM_STEPS', '3'))
  config.reset()
  with pytest.raises(RuntimeError):
    config.explain()
  assert config.build(toy.Model) == toy.Model()
  built = make('', FILES)
  assert built.model == toy.Model() and built.train.num_steps == 100
  assert '%gin.REQUIRED' in refusal()


def test_config_needs_neither_jax_nor_tensorflow():
  code = ("import sys; import lm.config; "
          "sys.exit(bool({'jax', 'tensorflow', 'flax'} & set(sys.modules)))")
  root = pathlib.Path(config.__file__).resolve().parent.parent
  assert subprocess.run([sys.executable, '-c', code], cwd=root, check=False).returncode == 0
