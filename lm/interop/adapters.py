"""Adapters on their way to Hugging Face: merged into plain kernels, or as `peft` keeps them.

What is merged or written goes by the leaves of a run's checkpoint (`lm/layers/adapted.py`).
"""
from collections.abc import Iterator, Mapping
import collections
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.interop import certificate, plan
from lm.interop.mapping import Matrix, Place
from lm.interop.run_weights import Index, read_run_params, RunLeaf
from lm.interop.tensors import write_safetensors

LOW_RANK = 'lora_a', 'lora_b', 'lora_scale', 'magnitude'
OTHERS = 'adapter_', 'prefix_', 'prompt'  # no change of a kernel


@dataclasses.dataclass(frozen=True)
class Merged:
  """A kernel with what its low-rank leaves add, read as a `RunLeaf` is."""
  kernel: RunLeaf
  leaves: Mapping[str, RunLeaf]

  def read(self, index: Index | None = None) -> np.ndarray:
    """Reads `leaf[index]`, such as one layer, or all of it."""
    kernel = self.kernel.read(index)
    parts = {name: leaf.read(index).astype(np.float64) for name, leaf in self.leaves.items()}
    added = parts['lora_scale'][..., None, None] * (parts['lora_a'] @ parts['lora_b'])
    matrix = kernel.astype(np.float64).reshape(added.shape)
    merged = matrix + added
    if 'magnitude' in parts:
      merged *= ((_norms(matrix) + parts['magnitude']) / _norms(merged))[..., None, :]
    return merged.reshape(kernel.shape).astype(kernel.dtype)


def _norms(matrix: np.ndarray) -> np.ndarray:
  """Of the columns."""
  return np.sqrt(np.square(matrix).sum(-2))


def merge(leaves: Mapping[str, RunLeaf]) -> dict[str, RunLeaf | Merged]:
  """A run's leaves without those of an adapter, which is in the kernels instead.

  Raises:
    UserError: the adapter is no change of kernels.
  """
  for path in leaves:
    if path.rpartition('/')[2].startswith(OTHERS):
      raise UserError(f'{path} of this run is no change of a kernel, so no plain model computes '
                      'the same; only LoRA and DoRA can be merged')
  plain = {path: leaf for path, leaf in leaves.items() if path.rpartition('/')[2] not in LOW_RANK}
  return plain | {path: Merged(plain[path], found) for path, found in _low_rank(leaves).items()}


def _low_rank(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """What adapts each kernel that is adapted, by its path."""
  found = collections.defaultdict(dict)
  for path, leaf in leaves.items():
    module, _, name = path.rpartition('/')
    if name in LOW_RANK:
      found[f'{module}/kernel'][name] = leaf
  return dict(found)


def write_peft(run_dir: str | os.PathLike, model: Any, directory: str | os.PathLike
               ) -> dict[str, Any]:
  """Writes a run's LoRA or DoRA as `peft` opens it on the model that the run began with.

  What stands on a trunk is not written. Kernels that the architecture fuses, such as GPT-2's query,
  key and value, become one of the sum of their ranks, whose B is in blocks: the same numbers.

  Args:
    run_dir: of `lm train`.
    model: its config.
    directory: to be made.

  Returns:
    {'peft_type', 'tensors', 'parameters', 'modules'}.

  Raises:
    UserError: the run has no such adapter, or no architecture computes what the model does.
  """
  leaves = read_run_params(run_dir)
  adapted = _low_rank(leaves)
  if not adapted:
    raise UserError(f'--run_dir={run_dir} has no LoRA and no DoRA, which are what --format=peft '
                    'writes; leave --format out')
  trunk, inside = plan.of_trunk(model)
  made = plan.write(trunk)
  modules = dict(_modules(made, inside, leaves, adapted))
  if not modules:
    raise UserError(f'none of {", ".join(adapted)} is in the trunk, of which --format=peft writes')
  tensors = [(name, value.shape, value.dtype, lambda value=value: value)
             for module, found in modules.items() for name, value in found.tensors(module)]
  config = _config(made, modules, any('magnitude' in found for found in adapted.values()))

  def beside(unfinished: pathlib.Path) -> None:
    (unfinished / 'adapter_config.json').write_text(json.dumps(config, indent=2) + '\n', 'utf-8')
    (unfinished / 'model.safetensors').rename(unfinished / 'adapter_model.safetensors')

  write_safetensors(pathlib.Path(directory), tensors, beside=beside)
  return {'peft_type': 'LORA', 'tensors': len(tensors), 'modules': len(modules),
          'parameters': sum(value.size for _, _, _, read in tensors for value in [read()])}


@dataclasses.dataclass(frozen=True)
class _Module:
  """One of theirs: a [K, R], b [R, N], and perhaps the norms of its columns [N]."""
  a: np.ndarray
  b: np.ndarray
  scale: float
  magnitude: np.ndarray | None

  def tensors(self, module: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) as a file of `peft` has them."""
    name = f'base_model.model.{module}'
    yield f'{name}.lora_A.weight', np.ascontiguousarray(self.a.T)
    yield f'{name}.lora_B.weight', np.ascontiguousarray(self.b.T)
    if self.magnitude is not None:
      yield f'{name}.lora_magnitude_vector', self.magnitude


def _modules(made: plan.Plan, inside: str, leaves: Mapping[str, RunLeaf],
             adapted: Mapping[str, Mapping[str, RunLeaf]]) -> Iterator[tuple[str, _Module]]:
  """(name, module) of each of theirs that has a kernel of ours which is adapted."""
  for name, place in made.places.items():
    paths = [inside + path for path in place.paths]
    if isinstance(place.layout, Matrix) and any(path in adapted for path in paths):
      module = name.removesuffix('.weight')
      if certificate.auto_class(made.model) == 'AutoModel':  # the trunk alone, without its name
        module = module.removeprefix(plan.trunk_name(made))
      yield module, _fused(place, paths, leaves, adapted)


def _fused(place: Place, paths: list[str], leaves: Mapping[str, RunLeaf],
           adapted: Mapping[str, Mapping[str, RunLeaf]]) -> _Module:
  """Kernels beside each other as one; one that is not adapted has a block of 0."""
  a, blocks, norms, scales = [], [], [], set()
  for path in paths:
    kernel = leaves[path].read(place.layer).astype(np.float64)
    kernel = kernel.reshape(place.layout.flat(kernel.shape))
    parts = {name: leaf.read(place.layer) for name, leaf in adapted.get(path, {}).items()}
    a += [parts['lora_a']] if parts else []
    blocks.append(parts['lora_b'] if parts else np.zeros((0, kernel.shape[1]), np.float32))
    norms.append(_norms(kernel) + parts.get('magnitude', 0))
    scales |= {float(parts['lora_scale'])} if parts else set()
  scale, = scales  # one adapter has one scale
  ranks = np.cumsum([0, *(len(block) for block in blocks)])
  b = np.zeros((ranks[-1], sum(block.shape[1] for block in blocks)), np.float32)
  column = 0
  for start, block in zip(ranks, blocks):
    b[start:start + len(block), column:column + block.shape[1]] = block
    column += block.shape[1]
  has_norms = any('magnitude' in adapted.get(path, {}) for path in paths)
  return _Module(np.concatenate(a, 1).astype(np.float32), b, scale,
                 np.concatenate(norms).astype(np.float32) if has_norms else None)


def _config(made: plan.Plan, modules: Mapping[str, _Module], is_dora: bool) -> dict[str, Any]:
  """The content of adapter_config.json."""
  ranks = {name: module.b.shape[0] for name, module in modules.items()}
  rank = collections.Counter(ranks.values()).most_common(1)[0][0]
  alphas = {name: module.scale * ranks[name] for name, module in modules.items()}
  alpha = next(alphas[name] for name in ranks if ranks[name] == rank)
  other = {name: r for name, r in ranks.items() if r != rank}
  task = {'AutoModelForCausalLM': 'CAUSAL_LM', 'AutoModelForSeq2SeqLM': 'SEQ_2_SEQ_LM'}
  return {
      'peft_type': 'LORA', 'task_type': task.get(certificate.auto_class(made.model)),
      'base_model_name_or_path': None, 'inference_mode': True, 'r': rank, 'lora_alpha': alpha,
      'lora_dropout': 0.0, 'bias': 'none', 'use_dora': is_dora, 'use_rslora': False,
      'fan_in_fan_out': made.hf['model_type'] == 'gpt2', 'target_modules': sorted(modules),
      'rank_pattern': other, 'alpha_pattern': {name: alphas[name] for name in other}}
