"""How fast and how exact the GPU kernels are, on the GPU in hand, beside XLA's and cuDNN's forms.

    python -m pallas_kernels.gpu_times [--kernel norm ...] [--spec gpt2 ...] [--json FILE]

prints a table of each kernel: for each spec and pass the milliseconds of the kernel, of XLA's form
(`reference`) and, where it takes the case, of cuDNN's attention or a product of unquantised
weights, medians of rounds in turns; the share of the card's peak (products) or of its memory's
rate that the kernel reaches; and its error beside XLA's, |x - y| / |y| of all results, where y is
XLA's form in float32 with products of the highest precision. Calls follow one another without a
wait for their results; the host takes some 10 us to send one.
"""
import argparse
from collections.abc import Callable
import concurrent.futures
import functools
import itertools
import json
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import cross_entropy, decode_attention, flash_attention, grouped_matmul
from pallas_kernels import measure, norm, quantized_matmul
from pallas_kernels.flash_attention import bench as attention_bench

# Part of jax's device_kind: dense bfloat16 FLOP/s, and bytes a second, of the vendor's data sheet.
CARDS = {'H100': (989e12, 3.35e12), 'H200': (989e12, 4.8e12), 'A100': (312e12, 2.04e12)}
KERNELS = ('flash_attention', 'cross_entropy', 'norm', 'decode_attention', 'grouped_matmul',
           'quantized_matmul')
SECONDS_A_TURN, ROUNDS, TOGETHER = 0.01, 7, 4  # so many specs are compiled at once


class Case(NamedTuple):
  """A call in several forms.

  forms: {name: function of the arguments}, 'gpu' the kernel and 'XLA' its reference among them.
  args: a tuple of trees of arrays.
  flops, moved: of the products that it needs, and bytes of its arguments and results.
  is_checked: whether float32's form of it fits into memory.
  """
  forms: dict[str, Callable]
  args: tuple
  flops: int
  moved: int
  is_checked: bool = True


def normal(seed: int, shape, dtype=jnp.bfloat16) -> jax.Array:
  """Random numbers."""
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def bytes_of(*trees) -> int:
  """Of all arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def with_gradients(function, wrt):
  """The value and the gradients of the arguments `wrt`; the last argument is the cotangent."""
  def both(*args):
    *args, g = args
    part = lambda *chosen: function(*[chosen[wrt.index(i)] if i in wrt else x
                                      for i, x in enumerate(args)])
    out, vjp = jax.vjp(part, *(args[i] for i in wrt))
    return out, vjp(g)
  return both


def attention_cases(spec) -> dict[str, Case]:
  """Forward, and both passes."""
  if spec.relative:
    return {}
  B, T, N, K, H = spec[:5]
  args = tuple(normal(i, (B, T, heads, H)) for i, heads in enumerate((N, K, K)))
  ids = jnp.where(jnp.arange(T) < T - T // 8, 1, 0) * jnp.ones((B, 1), jnp.int32)
  options = {'causal': spec.causal, 'window': spec.window}
  if spec.padded:
    options |= {'query_segment_ids': ids, 'key_segment_ids': ids}
  if spec.reach:
    options |= {'distance_bias': normal(5, (N, 2 * spec.reach + 1), jnp.float32)}
  forms = {name: functools.partial(flash_attention.flash_attention, implementation=form, **options)
           for name, form in (('gpu', 'gpu'), ('XLA', 'reference'))}
  if not (spec.padded or spec.reach) and H % 8 == 0 and H <= 128:
    window = None if spec.window is None else (spec.window - 1, 0)
    forms['cuDNN'] = lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=spec.causal, local_window_size=window, implementation='cudnn')
  forward, both = attention_bench.flops(spec)
  moved = bytes_of(args, args[0])
  return {'forward': Case(forms, args, forward, moved),
          'both': Case({name: with_gradients(form, (0, 1, 2)) for name, form in forms.items()},
                       (*args, normal(4, args[0].shape)), both, 3 * moved)}


def cross_entropy_cases(spec) -> dict[str, Case]:
  """The loss and its gradients."""
  T, D, V = spec.tokens, spec.d_model, spec.vocab_size
  args = (normal(0, (1, T, D)), normal(1, (V, D)) * jnp.bfloat16(D**-0.5),
          jax.random.randint(jax.random.key(2), (1, T), 0, V))
  bias = normal(3, (V,), jnp.float32) if spec.has_bias else None
  options = {name: value for name, value in spec.options._asdict().items()}

  def form(implementation):
    loss = lambda hidden, embedding, targets: cross_entropy.cross_entropy(
        hidden, embedding, targets, jnp.ones((1, T), jnp.float32), bias=bias,
        implementation=implementation, **options)
    return jax.value_and_grad(loss, (0, 1))

  forms = {'gpu': form('gpu'), 'XLA': form('reference'), 'XLA, in blocks': form('blocks')}
  return {'both': Case(forms, args, 6 * T * D * V, bytes_of(args, args), T * V < 2**29)}


def norm_cases(spec) -> dict[str, Case]:
  """Both passes of x + residual."""
  M, D, kind = spec
  args = (normal(0, (M, D)), normal(1, (M, D)), normal(2, (D,), jnp.float32),
          normal(3, (D,), jnp.float32), (normal(4, (M, D)), normal(5, (M, D))))

  def form(implementation):
    def both(x, residual, scale, bias, g):
      call = lambda x, residual, scale: norm.norm(
          x, scale, bias if kind == 'layernorm' else None, residual=residual, kind=kind,
          epsilon=1e-6, implementation=implementation)
      out, vjp = jax.vjp(call, x, residual, scale)
      return out, vjp(g)
    return both

  return {'both': Case({'gpu': form('gpu'), 'XLA': form('reference')}, args, 0, 7 * 2 * M * D)}


def decode_cases(spec) -> dict[str, Case]:
  """A step of decoding over full rows."""
  from pallas_kernels.decode_attention import bench
  page = spec.page or spec.length
  shape = spec.B * spec.length // page, spec.K, page, spec.H
  key, value, scales = normal(0, shape), normal(1, shape), {}
  if spec.is_scaled:
    (key, key_scale), (value, value_scale) = (
        decode_attention.quantize(x, spec.dtype) for x in (key, value))
    scales = {'key_scale': key_scale, 'value_scale': value_scale}
  table = {} if spec.page is None else {'page_table': jax.random.permutation(
      jax.random.key(3), shape[0]).reshape(spec.B, -1).astype(jnp.int32)}
  args = (normal(2, (spec.B, spec.tokens, spec.N, spec.H)), key, value,
          jnp.full((spec.B,), spec.length, jnp.int32), scales | table)

  def form(implementation):
    return lambda query, key, value, lengths, more: decode_attention.decode_attention(
        query, key, value, lengths, window=spec.window, implementation=implementation, **more)

  return {'step': Case({'gpu': form('gpu'), 'XLA': form('reference')}, args, 0, bench.moved(spec))}


def grouped_cases(spec) -> dict[str, Case]:
  """The product, and both passes, of groups of uneven sizes."""
  M, K, N, G = spec
  share = jax.random.dirichlet(jax.random.key(3), jnp.full(G, 4.0))
  sizes = jnp.floor(share * M).astype(jnp.int32)
  sizes = sizes.at[0].add(M - sizes.sum())
  args = normal(0, (M, K)), normal(1, (G, K, N)) * jnp.bfloat16(K**-0.5), sizes
  forms = {name: functools.partial(grouped_matmul.grouped_matmul, implementation=form)
           for name, form in (('gpu', 'gpu'), ('XLA', 'reference'))}
  flops = 2 * M * K * N
  return {'product': Case(forms, args, flops, bytes_of(args)),
          'both': Case({name: with_gradients(form, (0, 1)) for name, form in forms.items()},
                       (*args, normal(2, (M, N))), 3 * flops, 3 * bytes_of(args))}


def quantized_cases(spec) -> dict[str, Case]:
  """A product with quantised weights, beside one with the weights in bfloat16."""
  x, w = normal(0, (spec.M, spec.K)), normal(1, (spec.K, spec.N)) * jnp.bfloat16(spec.K**-0.5)
  values, scales = quantized_matmul.quantize(w, spec.bits, spec.group_size)
  more = {}
  if spec.x == 'int8':
    largest = jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32) / 127
    x, more = jnp.round(x / largest).astype(jnp.int8), {'x_scale': largest}

  def form(implementation):
    return lambda x, values, scales, more: quantized_matmul.quantized_matmul(
        x, values, scales, implementation=implementation, dtype=jnp.bfloat16, **more)

  forms = {'gpu': form('gpu'), 'XLA': form('reference'),
           'bfloat16': lambda x, values, scales, more: jnp.bfloat16(x) @ w}
  moved = spec.K * spec.N * spec.bits // 8 + bytes_of(scales, x) + 2 * spec.M * spec.N
  return {'product': Case(forms, (x, values, scales, more), 2 * spec.M * spec.K * spec.N, moved)}


CASES = dict(zip(KERNELS, (attention_cases, cross_entropy_cases, norm_cases, decode_cases,
                           grouped_cases, quantized_cases)))
# Forms that compute something else: they have a time and no error.
OTHER = ('bfloat16',)


def exact(function: Callable) -> Callable:
  """The same of float32 arguments, with products of the highest precision."""
  wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
  def upcast(*args):
    with jax.default_matmul_precision('highest'):
      return function(*jax.tree.map(wide, args))
  return upcast


def error(got: Any, want: Any) -> float:
  """The largest |x - y| / |y| of all results; NaN counts as infinite."""
  norm_of = jax.jit(lambda x, y: jnp.linalg.norm((x.astype(jnp.float32) - y).ravel())
                    / jnp.linalg.norm(y.astype(jnp.float32).ravel()))
  errors = [float(norm_of(x, y)) for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want))]
  return max(x if x == x else float('inf') for x in errors)


def compiled(case: Case) -> dict[str, Any]:
  """Each form, and the exact one, compiled and called once; or the reason why not."""
  def make(function):
    try:
      made = jax.jit(function)
      jax.block_until_ready(made(*case.args))
      return made
    except Exception as problem:  # a form that a compiler refuses is a row that says so
      return f'{type(problem).__name__}: {str(problem).splitlines()[0][:160]}'
  made = {name: make(form) for name, form in case.forms.items()}
  return made | {'exact': make(exact(case.forms['XLA'])) if case.is_checked else ''}


def seconds(programs: dict[str, Any], args: tuple, times: int) -> dict[str, float]:
  """The median of each, measured in turns of so many calls."""
  found = {name: [] for name in programs}
  for _, name in itertools.product(range(ROUNDS), programs):
    start = time.perf_counter()
    for _ in range(times):
      out = programs[name](*args)
    jax.block_until_ready(out)
    found[name].append((time.perf_counter() - start) / times)
  return {name: statistics.median(rounds[1:]) for name, rounds in found.items()}


def measured(case: Case, programs: dict[str, Any], peaks) -> dict[str, Any]:
  """A row of the table."""
  exact_form = programs.pop('exact')
  working = {name: made for name, made in programs.items() if not isinstance(made, str)}
  row = {'refusals': {name: made for name, made in programs.items() if name not in working},
         'errors': {}}
  if not isinstance(exact_form, str):
    want = exact_form(*case.args)
    row['errors'] = {name: error(made(*case.args), want) for name, made in working.items()
                     if name not in OTHER}
    del want
  floor = max(case.flops / peaks[0], case.moved / peaks[1])
  row['seconds'] = seconds(working, case.args, min(max(int(SECONDS_A_TURN / floor), 3), 300))
  if 'gpu' in working:
    mine = row['seconds']['gpu']
    row['peak_share'], row['memory_share'] = (case.flops / mine / peaks[0],
                                              case.moved / mine / peaks[1])
  return row


def line(spec: str, name: str, row: dict[str, Any]) -> str:
  """A row in Markdown."""
  times = row['seconds']
  mine = times.get('gpu')
  cell = lambda form: f'{1e3 * times[form]:.3f}' if form in times else '-'
  others = [form for form in times if form not in ('gpu', 'XLA')]
  ratio = lambda form: f' ({times[form] / mine:.2f}x)' if mine and form in times else ''
  errors = row['errors']
  return ' | '.join([
      f'| {spec}', name, cell('gpu'), cell('XLA') + ratio('XLA'),
      '; '.join(f'{form} {cell(form)}{ratio(form)}' for form in others) or '-',
      f'{100 * row.get("peak_share", 0):.0f} %', f'{100 * row.get("memory_share", 0):.0f} %',
      f'{errors.get("gpu", float("nan")):.1e}, {errors.get("XLA", float("nan")):.1e}',
      '; '.join(f'{form}: {why}' for form, why in row['refusals'].items()) + ' |'])


def main():
  """Reads the command line and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kernel', nargs='+', default=list(KERNELS), choices=KERNELS)
  parser.add_argument('--spec', nargs='+', help='of these alone')
  parser.add_argument('--json', type=pathlib.Path, help='all figures go here')
  flags = parser.parse_args()
  kind = jax.devices()[0].device_kind
  peaks = next((peaks for name, peaks in CARDS.items() if name in kind), None)
  if peaks is None:
    sys.exit(f'the device in use is {kind}; this measures kernels on {", ".join(CARDS)}')
  print(f'{kind}, jax {jax.__version__}')
  rows = {}
  for kernel in flags.kernel:
    print(f'\n## {kernel}\n\n| spec | pass | ms | XLA | others | of peak | of memory | error, '
          "XLA's | refused |\n|---|---|---|---|---|---|---|---|---|", flush=True)
    _, specs = measure.bench_and_specs(kernel)
    chosen = [name for name in specs if not flags.spec or name in flags.spec]
    for first in range(0, len(chosen), TOGETHER):
      made = _compiled_together(kernel, {name: specs[name]
                                         for name in chosen[first:first + TOGETHER]})
      for (spec, name), (case, programs) in made.items():
        row = measured(case, programs, peaks)
        rows[f'{kernel}|{spec}|{name}'] = row
        print(line(spec, name, row), flush=True)
        if flags.json:
          flags.json.write_text(json.dumps(rows, indent=1))


def _compiled_together(kernel, specs) -> dict[tuple[str, str], tuple]:
  """{(spec, pass): (case, programs)}; nothing is compiled while a kernel is timed, since XLA tries
  its products on the same GPU."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = {(spec, name): (case, pool.submit(compiled, case)) for spec in specs
             for name, case in CASES[kernel](specs[spec]).items()}
  return {key: (case, programs.result()) for key, (case, programs) in found.items()}


if __name__ == '__main__':
  main()
