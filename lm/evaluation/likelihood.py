"""How likely a model holds texts: log-likelihoods of continuations, of choices and of whole texts.

Tokens and windows are those of lm-evaluation-harness (`lm_eval.api.model.TemplateLM`), so that the
numbers are comparable with published ones; which tasks there are is `harness`'s.
"""
import collections
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from lm.errors import UserError
from lm.evaluation import likelihood_rows
from lm.evaluation.likelihood_rows import Text
from lm.inference.generate import begin_id
from lm.inference.prompts import BOS_ID
from lm.parallel.batches import GlobalBatch
from lm.parallel.distributed import Hosts
from lm.training.losses import token_nats

Ids = Sequence[int] | np.ndarray


class Likelihood(NamedTuple):
  """log_likelihood: natural logarithm of the probability, float64.
  greedy: whether the likeliest token is right every time.
  """
  log_likelihood: float
  greedy: bool


def score(module: nn.Module, params: Any, requests: Sequence[tuple[Ids, Ids]],
          batch_size: int = 16, max_length: int | None = None, progress: bool = True,
          hosts: Hosts = Hosts()) -> list[Likelihood]:
  """How likely each continuation is behind its context; see `batches`.

  Args:
    progress: whether to show a bar.
  """
  found: list[Likelihood | None] = [None] * len(requests)
  with tqdm.tqdm(total=len(requests), desc='likelihood', unit=' requests',
                 disable=not (progress and hosts.is_main)) as bar:
    for answers in batches(module, params, requests, batch_size, max_length, hosts):
      for i, answer in answers.items():
        found[i] = answer
      bar.update(len(answers))
  return found


def batches(module: nn.Module, params: Any, requests: Sequence[tuple[Ids, Ids]],
            batch_size: int = 16, max_length: int | None = None, hosts: Hosts = Hosts(),
            done: Collection[int] = ()) -> Iterator[dict[int, Likelihood]]:
  """Yields how likely each continuation is behind its context, batch by batch, by its number.

  Requests are packed into rows of 128, 256, ... tokens, each length one program, in which equal
  beginnings are computed once and logits are formed of the continuations alone. All hosts call it;
  each brings the rows that its devices score, and gets every result.

  Args:
    module: a decoder or an encoder-decoder, whose encoder gets the context.
    requests: (context, continuation), ids. Of a context that is too long the beginning is cut off.
    batch_size: rows of 128 tokens at a time, or half as many of 256, ...
    max_length: tokens of context and continuation but for the last one; None is the model's.
    hosts: who compute together, all with the same arguments.
    done: requests whose answers are known; a batch of these alone is left out.

  Raises:
    UserError: the model gives texts no probability, or a continuation is empty or longer than the
      model's context.
  """
  config = module.config
  if hasattr(config, 'masked_lm') or not hasattr(module, 'logits'):
    raise UserError(f'{type(module).__name__} gives a text no likelihood: it does not predict '
                    'tokens from those before them; take a decoder or an encoder-decoder')
  longest = min(max_length or config.max_length, config.max_length)
  texts = [_text(i, *request, longest, hasattr(module, 'decode'))
           for i, request in enumerate(requests)]
  shares = getattr(module, 'takes_paths', False)
  for shape in likelihood_rows.pack(texts, shares, longest, batch_size):
    yield from _score(module, params, shape, hosts, done)


def tokenize(vocabulary: Any, pairs: Sequence[tuple[str, str]], encodes: bool = False
             ) -> list[tuple[np.ndarray, np.ndarray]]:
  """The ids of (context, continuation), split as lm-evaluation-harness does it.

  Spaces at the end of a context go to its continuation. Both are then encoded together, and the
  continuation is what follows as many ids as the context has alone. What a tokenizer puts before
  every text (of a vocabulary made here: the id 0, with which documents begin in training) stands
  before the context; where that is nothing, an empty context is the token that begins a text or,
  where there is none, that ends one.

  Args:
    encodes: whether contexts are an encoder's: then both are encoded apart, and the end of a text
      stands behind the context.
  """
  moved = [(context.rstrip(), context[len(context.rstrip()):] + continuation)
           for context, continuation in pairs]
  encode = _encoder(vocabulary, [text for context, continuation in moved for text in
                                 (context, continuation if encodes else context + continuation)])
  if encodes:
    return [(np.append(encode[context], vocabulary.eos_id), encode[continuation])
            for context, continuation in moved]
  begin, found = begin_id(vocabulary), []
  for context, continuation in moved:
    whole, length = encode[context + continuation], len(encode[context])
    before = [first_id(vocabulary)] if begin is not None or not context else []
    if len(whole) and before == whole[:1].tolist():  # the text spells it
      before, length = [], max(length, 1)
    found.append((np.append(before, whole[:length]).astype(np.int32), whole[length:]))
  return found


def _encoder(vocabulary: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
  """The ids of each text, every one encoded once."""
  different = list(dict.fromkeys(texts))
  return dict(zip(different, vocabulary.encode_batch(different, num_threads=2)))


def first_id(vocabulary: Any) -> int:
  """What stands before the first token of a text that is scored as a whole."""
  begin = begin_id(vocabulary)
  if begin is None:
    begin = vocabulary.eos_id if vocabulary.bos_id is None else vocabulary.bos_id
  return begin


def _text(index: int, context: Ids, continuation: Ids, longest: int, encodes: bool) -> Text:
  """What a request asks of the model; raises where nobody could answer."""
  context, continuation = (np.asarray(x, np.int32).reshape(-1) for x in (context, continuation))
  if not len(continuation):
    raise UserError(f'request {index} has an empty continuation, which nothing can be said of; '
                    'leave it out, or give it a text')
  if len(continuation) > longest:
    raise UserError(f'request {index} has a continuation of {len(continuation)} tokens, and the '
                    f'model sees {longest}; shorten it, or score it by windows as a whole text')
  if encodes:
    inputs = np.concatenate([[BOS_ID], continuation[:-1]]).astype(np.int32)
    return Text(inputs, continuation, context[-longest:])
  if not len(context):
    raise UserError(f'request {index} has an empty context, so that nothing precedes its first '
                    'token; put the token that begins a text there')
  inputs = np.concatenate([context, continuation])[-longest - 1:-1]
  return Text(inputs, continuation)


def _score(module: nn.Module, params: Any, shape: likelihood_rows.Shape, hosts: Hosts,
           done: Collection[int]) -> Iterator[dict[int, Likelihood]]:
  """Scores rows of one shape, batch by batch."""
  program = hosts.same_program(_token_nats_of(module))
  size, where = shape.batch_size, GlobalBatch(module.rules, shape.batch_size)
  by_batch = collections.defaultdict(list)
  for answer in shape.answers:
    by_batch[answer[1] // size * size].append(answer)
  for first in range(0, len(shape.batch['scored_places']), size):
    members = by_batch[first]
    if all(number in done for number, _, _ in members):
      continue
    own = slice(first + where.own.start, first + where.own.stop)
    batch = where.place({name: array[own] for name, array in shape.batch.items()})
    nats_BM, right_BM = map(np.asarray, program(params, batch))
    yield {number: Likelihood(-float(nats_BM[row - first, slots].sum(dtype=np.float64)),
                              bool(right_BM[row - first, slots].all()))
           for number, row, slots in members}


@functools.lru_cache(maxsize=2)
def _token_nats_of(module: nn.Module) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
  """The jitted function from (params, batch) to nats [B, M] of the targets that are asked for, and
  whether they are the likeliest."""
  def run(params, batch):
    outputs, _ = module.apply({'params': params}, batch, method='outputs')
    places_BM = batch['scored_places']
    take = lambda x_BTD: jnp.take_along_axis(x_BTD, places_BM[..., None], axis=1)
    return token_nats(_of_hidden(outputs['tokens'], take), batch['scored_targets'])

  mesh = module.rules.mesh
  return jax.jit(run, **({} if mesh is None else {'out_shardings': module.rules.sharding()}))


def _of_hidden(scores: Any, take: Callable[[jax.Array], jax.Array]) -> Any:
  """The scores of some of the hidden states; of a softmax in steps, each step's."""
  if hasattr(scores, 'clusters'):
    return scores._replace(clusters=tuple(_of_hidden(x, take) for x in scores.clusters))
  return dataclasses.replace(scores, hidden=take(scores.hidden))


def windows(ids: Ids, first: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Cuts a text into (context, continuation) for `score`, so that every token is scored once.

  As lm-evaluation-harness does it: windows of `length` tokens lie end to end, and the last one
  begins so early that it is whole too. (`evaluator.windows` gives each token more context.)

  Args:
    first: id that stands before the text.
  """
  before = np.concatenate([[first], ids]).astype(np.int32)  # before[i] precedes ids[i]
  for done in range(0, len(ids), length):
    end = min(done + length, len(ids))
    yield before[max(0, end - length):done + 1], before[done + 1:end + 1]


def score_texts(module: nn.Module, params: Any, vocabulary: Any, texts: Sequence[str],
                max_length: int | None = None, **options: Any) -> np.ndarray:
  """Log-likelihoods of whole texts, of any length: float64 [texts].

  A text stands behind the token that begins texts (see `tokenize`); neither that nor its end is
  scored. (Where the tokenizer puts one before every text, the harness scores it behind another.) An
  encoder-decoder decodes the text, and its encoder sees each window's context.

  Args:
    max_length: of windows; None is the model's.
    options: those of `score`.
  """
  longest = min(max_length or module.config.max_length, module.config.max_length)
  encode, first = _encoder(vocabulary, texts), first_id(vocabulary)
  requests = [(i, window) for i, text in enumerate(texts)
              for window in windows(encode[text], first, longest)]
  found = score(module, params, [window for _, window in requests], max_length=longest, **options)
  totals = np.zeros(len(texts))
  for (i, _), one in zip(requests, found):
    totals[i] += one.log_likelihood
  return totals


def predict_choices(module: nn.Module, params: Any, vocabulary: Any,
                    examples: Sequence[Mapping[str, Any]], **options: Any) -> list[dict[str, Any]]:
  """Rows of predictions of the kind multiple_choice: the likeliest continuation, of equal ones the
  first.

  Args:
    examples: of `id`, `contexts`, `continuations` (a choice is a pair of these) and `label`.
    options: those of `score`.

  Returns:
    For each `id`, `inputs` (the context, or all that there are), `targets` and `prediction`
    (indices), `scores` (log-likelihoods), `lengths` (UTF-8 bytes of continuations), `greedy`.

  Raises:
    UserError: see `score`; it names the example.
  """
  pairs = [pair for example in examples
           for pair in zip(example['contexts'], example['continuations'], strict=True)]
  ids = tokenize(vocabulary, pairs, hasattr(module, 'decode'))
  for (context, continuation), (_, tokens) in zip(pairs, ids):
    if not len(tokens):
      raise UserError(f'the continuation {continuation!r} of {context[-80:]!r} has no token, so it '
                      'is no choice; give it a text')
  found = iter(score(module, params, ids, **options))
  return [choices_row(example, [next(found) for _ in example['continuations']])
          for example in examples]


def choices_row(example: Mapping[str, Any], answers: Sequence[Likelihood]) -> dict[str, Any]:
  """The row of predictions of a multiple choice, from the answers to its continuations."""
  scores = [answer.log_likelihood for answer in answers]
  return {'id': example['id'], 'inputs': '\n'.join(dict.fromkeys(example['contexts'])),
          'targets': example['label'], 'prediction': int(np.argmax(scores)), 'scores': scores,
          'lengths': [len(text.encode()) for text in example['continuations']],
          'greedy': [answer.greedy for answer in answers]}


def predict_texts(module: nn.Module, params: Any, vocabulary: Any,
                  examples: Sequence[Mapping[str, Any]], **options: Any) -> list[dict[str, Any]]:
  """Rows of predictions of the kind language_modelling.

  Args:
    examples: of `id` and `text`.
    options: those of `score_texts`.

  Returns:
    For each `id`, `inputs` (the text), `targets` and `prediction` (None), `scores` ([nats], minus
    the log-likelihood), `words` (parts between runs of white space, as lm-evaluation-harness counts
    them for word perplexity: exp(nats / words)), `tokens` and `bytes` (UTF-8), all without an end
    of text.
  """
  texts = [example['text'] for example in examples]
  totals = score_texts(module, params, vocabulary, texts, **options)
  return [text_row(example, float(total), len(ids)) for example, total, ids in
          zip(examples, totals, vocabulary.encode_batch(texts))]


def text_row(example: Mapping[str, Any], log_likelihood: float, tokens: int) -> dict[str, Any]:
  """The row of predictions of a text, from its log-likelihood and its number of tokens."""
  text = example['text']
  return {'id': example['id'], 'inputs': text, 'targets': None, 'prediction': None,
          'scores': [-log_likelihood], 'words': len(re.split(r'\s+', text)), 'tokens': tokens,
          'bytes': len(text.encode())}
