"""Completions that follow a rule: a regular expression, a choice, a JSON schema, a grammar.

An automaton over the bytes of tokens (the package llguidance, extra `constrain`) says before each
token which may follow, as bits that `sampling.sample` takes; there the model's probabilities are
renormalised over these. It is built once for a vocabulary, and costs microseconds a token.

    automata = of_vocabulary(vocabulary, vocabulary.eos_id, config.vocab_size)
    constraint = automata.constraint(Rule(regex='[0-9]+'))   # of one text
    constraint.mask(); constraint.advance(token)
"""
from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
from typing import Any, Optional

import numpy as np

from lm.data.token_bytes import token_bytes, TokenBytes
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a whole completion must be; one of these.

  regex: it matches this regular expression of Rust's crate `regex`, from beginning to end: without
    look-around and references to groups.
  choices: it is one of these texts.
  json_schema: it is JSON of this schema, itself JSON; '{}' is any. Of the space between its parts
    there is as much as Python's `json.dumps` puts there.
  grammar: it is derived from `start` of this context-free grammar in the syntax of Lark, as
    llguidance reads it.
  """
  regex: Optional[str] = None
  choices: tuple[str, ...] = ()
  json_schema: Optional[str] = None
  grammar: Optional[str] = None

  def __post_init__(self):
    given = [name for name, value in dataclasses.asdict(self).items() if value not in (None, ())]
    if len(given) != 1:
      raise ValueError(f'a Rule is one of regex, choices, json_schema and grammar, not '
                       f'{" and ".join(given) or "nothing"}')


class Automata:
  """What all constraints over one vocabulary share."""

  def __init__(self, tables: TokenBytes, eos_id: int, vocab_size: int | None = None,
               encode: Callable[[str], Sequence[int]] | None = None):
    """Builds tries of tokens, which takes half a second for 50,000; keep it.

    Args:
      tables: bytes of each token.
      eos_id: ends a completion, where the rule allows it.
      vocab_size: V of the model, which may be more than the vocabulary has.
      encode: of the vocabulary: which tokens to take for a text that the rule demands.

    Raises:
      UserError: llguidance is not installed.
    """
    self.vocab_size, self.eos_id = vocab_size or len(tables.within), eos_id
    self._first_bytes = None if tables.first == tables.within else tables.first
    self._within = _tokenizer(tables.within, eos_id, self.vocab_size, encode)
    self._first = self._within
    if self._first_bytes is not None:
      self._first = _tokenizer(tables.first, eos_id, self.vocab_size, encode)

  def constraint(self, rule: Rule) -> 'Constraint':
    """A constraint of one text, at its beginning.

    Raises:
      UserError: the rule cannot be read, or no text fulfils it.
    """
    constraint = Constraint(self, rule)
    constraint.mask()
    return constraint

  def _matcher(self, tokenizer, rule):
    from llguidance import LLMatcher
    matcher = LLMatcher(tokenizer, _grammar(rule), log_level=0)
    if matcher.is_error():
      reason = ' '.join(matcher.get_error().split())[:200]
      raise UserError(f'{_told(rule)} cannot be followed: {reason}; mend it')
    return matcher


@functools.lru_cache(4)
def of_vocabulary(vocabulary: Any, eos_id: int, vocab_size: int) -> Automata:
  """The automata of a vocabulary of `lm.data`; see `Automata`."""
  return Automata(token_bytes(vocabulary), eos_id, vocab_size, vocabulary.encode)


class Constraint:
  """Where a text stands in its rule: what the engine asks of a constraint."""

  def __init__(self, automata: Automata, rule: Rule):
    """See `Automata.constraint`."""
    self._automata, self._rule = automata, rule
    self._matcher, self._is_first = automata._matcher(automata._first, rule), True

  @property
  def is_complete(self) -> bool:
    """Whether the text fulfils the rule as it is."""
    return self._matcher.is_accepting()

  def mask(self) -> np.ndarray:
    """Tokens that may follow: uint32 [ceil(V / 32)], a bit a token, the lowest first.

    Raises:
      UserError: none may: the vocabulary cannot spell what the rule demands.
    """
    V = self._automata.vocab_size
    bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[:-(-V // 32)].copy()
    bits[-1] &= np.uint32(0xffffffff >> -V % 32)  # virtual tokens of bytes stand behind V
    if not bits.any():
      raise UserError(f'{_told(self._rule)} demands what no token of the vocabulary spells; allow '
                      'something else')
    return bits

  def advance(self, token: int) -> None:
    """The text goes on with this token.

    Raises:
      ValueError: it may not.
    """
    tokens = [int(token)]
    own_bytes = self._automata._first_bytes if self._is_first else None
    if own_bytes is not None and token != self._automata.eos_id:
      # The first token's bytes are others than those behind it: they are read one by one.
      self._matcher = self._automata._matcher(self._automata._within, self._rule)
      tokens = [self._automata.vocab_size + byte for byte in own_bytes[token]]
    self._is_first = False
    if not all(map(self._matcher.consume_token, tokens)):
      raise ValueError(f'token {token} may not follow by {_told(self._rule)}')


class _Tokens:
  """What llguidance wants of a tokenizer; behind the tokens stand virtual ones, of each byte.

  Where a rule leaves one text alone, llguidance allows only the token with which the tokenizer
  would go on: that of `encode`, whose tokens the model has seen in training, else the longest.
  """

  def __init__(self, tokens, eos_id, vocab_size, encode):
    spelt = [bytes(token) for token in tokens] + [b''] * (vocab_size - len(tokens))
    spelt[eos_id] = b'<eos>'
    self.tokens = spelt + [bytes([byte]) for byte in range(256)]
    self.eos_token_id, self.bos_token_id, self.special_token_ids = eos_id, None, [eos_id]
    self._encode = encode
    # Those that stand first win, and a virtual one stands last.
    self._id_of = {data: id_ for id_, data in reversed(list(enumerate(self.tokens)))
                   if data and id_ != eos_id}
    self._longest = max(map(len, self._id_of))

  def __call__(self, data: bytes) -> list[int]:
    try:
      ids = [] if self._encode is None else [int(id_) for id_ in self._encode(data.decode())]
    except UnicodeDecodeError:
      ids = []
    return ids if b''.join(self.tokens[id_] for id_ in ids) == data else self._greedy(data)

  def _greedy(self, data):
    ids, place = [], 0
    while place < len(data):
      lengths = range(min(self._longest, len(data) - place), 0, -1)
      length = next(n for n in lengths if data[place:place + n] in self._id_of)
      ids.append(self._id_of[data[place:place + length]])
      place += length
    return ids


def _tokenizer(tokens, eos_id, vocab_size, encode):
  try:
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper
  except ImportError as error:
    raise UserError(f'constrained completions need llguidance ({error}); install it with '
                    "`pip install 'lm[constrain]'`") from error
  wrapped: Any = TokenizerWrapper(_Tokens(tokens, eos_id, vocab_size, encode))
  return LLTokenizer(wrapped, n_vocab=vocab_size + 256, eos_token=eos_id)


def _grammar(rule):
  """The rule as llguidance reads it."""
  from llguidance import LLMatcher
  if rule.regex is not None:
    return LLMatcher.grammar_from_regex(rule.regex)
  if rule.choices:
    return LLMatcher.grammar_from_lark('start: ' + ' | '.join(map(json.dumps, rule.choices)))
  if rule.grammar is not None:
    return LLMatcher.grammar_from_lark(rule.grammar)
  try:
    return LLMatcher.grammar_from_json_schema(rule.json_schema,
                                              overrides={'whitespace_flexible': False})
  except ValueError as error:
    raise UserError(f'{_told(rule)} is no JSON: {error}; mend it') from error


def _told(rule):
  """The rule, for a sentence."""
  name, value = next((name, value) for name, value in dataclasses.asdict(rule).items() if value
                     not in (None, ()))
  return f'the rule {name}={str(value)[:80]!r}'
