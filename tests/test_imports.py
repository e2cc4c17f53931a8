"""Who may import whom: the table of the design, over every import statement of every file."""
import ast
import fnmatch
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(str(path.relative_to(REPOSITORY)) for folder in ('lm', 'pallas_kernels')
               for path in (REPOSITORY / folder).rglob('*.py'))

RECEIVE_A_MODEL = ['lm/training/step.py', 'lm/training/loop.py',
                   'lm/training/validation.py', 'lm/training/probe.py', 'lm/evaluation/*',
                   'lm/inference/*', 'lm/run.py', 'lm/doctor*.py']

# A package: the only files that may import it.
ONLY = {
    'gin': ['lm/config.py'],
    # Those who receive a model may name its type and no more: see the test of `nn.Module`.
    'flax': ['lm/layers/*', 'lm/models/*', 'lm/training/state.py', *RECEIVE_A_MODEL],
    'tensorflow': ['lm/corpus/*', 'lm/data/tasks.py', 'lm/data/seqio_*.py'],
    'seqio': ['lm/corpus/*', 'lm/data/tasks.py', 'lm/data/seqio_*.py'],
    'apache_beam': ['lm/corpus/*', 'lm/data/*'],
    'optax': ['lm/training/*', 'lm/run.py', 'lm/doctor*.py'],
    'orbax': ['lm/training/*'],
    'tensorstore': ['lm/interop/run_weights.py'],
    'gguf': ['lm/interop/tensors_gguf.py', 'lm/export/gguf*.py', 'lm/data/tokenizer_files.py'],
    'safetensors': [],  # maps files and takes all tensors at once; see lm/interop
    'torch': ['lm/interop/*'],
    'transformers': ['lm/interop/*'],
    'llguidance': ['lm/inference/constrain.py'],
    'fastapi': ['lm/serving/*'],
    'optuna': ['lm/commands/sweep_study.py'],
    'lm_eval': ['lm/evaluation/harness.py', 'lm/commands/harness.py'],
    'onnx': ['lm/export/onnx_*.py'],
    'onnxruntime': ['lm/export/onnx_*.py'],
    'ai_edge_litert': ['lm/export/litert*.py'],
    'lm.main': [],
    'lm.serving': ['lm/serving/*', 'lm/commands/*'],
    'lm.run': ['lm/main.py', 'lm/run.py', 'lm/commands/*'],
    'lm.models': ['lm/models/*', 'lm/compression/*', 'lm/export/*', 'lm/interop/*', 'lm/main.py',
                  'lm/run.py', 'lm/commands/*'],
    'lm.layers': ['lm/layers/*', 'lm/models/*', 'lm/export/*'],
}

# A room: what its files may not import.
NEVER = {
    'pallas_kernels/*': ['lm', 'flax', 'optax', 'numpy', 'jaxtyping', 'orbax', 'tensorflow'],
    'lm/layers/*': ['lm.models', 'lm.training', 'lm.data', 'lm.corpus', 'optax', 'lm.inference'],
    'lm/models/*': ['lm.training', 'lm.data', 'lm.corpus', 'optax', 'lm.inference',
                    'pallas_kernels'],
    'lm/parallel/*': ['lm.layers', 'lm.models', 'lm.training', 'lm.data', 'flax'],
    'lm/corpus/*': ['jax', 'flax', 'lm.models', 'lm.layers', 'lm.training', 'lm.data'],
    'lm/data/*': ['jax', 'flax', 'lm.models', 'lm.layers', 'lm.training', 'lm.parallel'],
    'lm/training/losses.py': ['flax', 'lm.models', 'lm.layers', 'optax', 'lm.parallel'],
    'lm/training/optimizers/*': ['flax', 'lm.models', 'lm.layers', 'lm.parallel'],
    'lm/training/*': ['lm.models', 'lm.layers', 'lm.corpus', 'lm.inference', 'lm.evaluation'],
    'lm/config*.py': ['jax', 'flax', 'tensorflow', 'lm.training', 'lm.models', 'lm.data'],
    # The process that speaks HTTP loads no model.
    **{f'lm/serving/{name}.py': ['jax', 'flax', 'numpy', 'tensorflow', 'lm.inference', 'lm.data',
                                'lm.corpus', 'lm.serving.filters']
       for name in ('protocol', 'pool', 'admission', 'schemas', 'answers', 'app', 'clouds',
                    'guard', 'sentences', 'metrics', 'server')},
    'lm/errors.py': ['lm', 'jax', 'numpy'],
}

# Slow to import and needed by few commands: only inside functions, and under TYPE_CHECKING.
LAZY = ['tensorflow', 'apache_beam', 'tensorboard', 'sentencepiece', 'zstandard', 'orbax',
        'array_record', 'torch', 'transformers', 'tensorstore', 'gguf', 'tokenizers', 'optuna',
        'pyarrow', 'msgpack', 'ftfy', 'fasttext', 'sklearn', 'scipy', 'fastwarc', 'trafilatura',
        'resiliparse', 'lxml', 'tensorflow_datasets', 'charset_normalizer',
        'phonenumbers', 'stdnum', 'seqeval', 'sacrebleu', 'rouge_score', 'nltk', 'lm_eval',
        'jinja2', 'llguidance', 'onnx', 'onnxruntime', 'ai_edge_litert']
EAGER = {'lm/data/seqio_tasks.py', 'lm/data/seqio_examples.py'}  # itself imported lazily


def names(nodes, file):
  """(line, dotted name) of everything that these nodes import; relative imports made absolute."""
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      package = '.'.join(pathlib.PurePath(file).parts[:-node.level]) + '.' if node.level else ''
      yield from ((node.lineno, f'{package}{node.module}.{alias.name}') for alias in node.names)


def imports(file):
  return list(names(ast.walk(ast.parse((REPOSITORY / file).read_text())), file))


def is_in(name, package):
  return name == package or name.startswith(package + '.')


def matches(file, patterns):
  return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def forbidden(file, imported):
  """The (line, name) of `imported` that the table does not allow in `file`."""
  for line, name in imported:
    for package, users in ONLY.items():
      if is_in(name, package) and not matches(file, users):
        yield line, name, f'only {users or "nobody"} may import {package}'
    for room, packages in NEVER.items():
      if matches(file, [room]) and any(is_in(name, package) for package in packages):
        yield line, name, f'{room} may not'
    if file.startswith('lm/') and is_in(name, 'pallas_kernels'):
      module = REPOSITORY.joinpath(*name.split('.')).with_suffix('.py')
      if module.exists() and module.parent.name != 'pallas_kernels' or name.count('.') > 2:
        yield line, name, 'an implementation: import what the kernel\'s package exports'


def test_there_are_files_to_check():
  assert len(FILES) > 40 and 'lm/models/gpt.py' in FILES


@pytest.mark.parametrize('file', FILES)
def test_imports_follow_the_table(file):
  assert not list(forbidden(file, imports(file)))


@pytest.mark.parametrize('file', FILES)
def test_slow_packages_are_imported_where_they_are_needed(file):
  tree = ast.parse((REPOSITORY / file).read_text())
  at_import = [(line, name) for line, name in names(tree.body, file)
               if any(is_in(name, package) for package in LAZY)]
  assert file in EAGER or not at_import


@pytest.mark.parametrize('file, statement', [
    ('pallas_kernels/matmul/api.py', 'import numpy'), ('lm/training/loop.py', 'import gin'),
    ('lm/training/losses.py', 'from lm.models import gpt'), ('lm/data/packing.py', 'import jax'),
    ('lm/data/packing.py', 'import tensorflow'), ('lm/training/step.py', 'from lm import run'),
    ('lm/models/gpt.py', 'from pallas_kernels.matmul import matmul'),
    ('lm/layers/mlp.py', 'from pallas_kernels.matmul import cpu'),
    ('lm/corpus/a.py', 'from ..data import cache'),
    ('lm/layers/mlp.py', 'from lm.models.gpt import GPT')])
def test_the_table_refuses(file, statement):
  assert list(forbidden(file, names(ast.parse(statement).body, file)))


@pytest.mark.parametrize('file', [file for file in FILES if matches(file, RECEIVE_A_MODEL)])
def test_those_who_receive_a_model_use_flax_for_its_type_alone(file):
  uses = [node.attr for node in ast.walk(ast.parse((REPOSITORY / file).read_text()))
          if isinstance(node, ast.Attribute) and getattr(node.value, 'id', '') in ('nn', 'flax')]
  assert set(uses) <= {'Module'}


def test_no_module_of_gin_files_shadows_gin():
  assert not list((REPOSITORY / 'gin').rglob('*.py'))
