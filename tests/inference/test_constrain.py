"""Completions follow their rule, whatever the model would rather say."""
import dataclasses
import functools
import json
import pathlib
import re

from hypothesis import given, settings, strategies as st
import jsonschema
import numpy as np
import pytest
from test_generate import GPT2, params_of

from lm.corpus.document import Document
from lm.data import vocabulary_training
from lm.data.pretrained_vocabularies import open_pretrained
from lm.data.token_bytes import token_bytes
from lm.data.vocabularies import ByteVocabulary, VocabularyConfig
from lm.errors import UserError
from lm.inference import complete, SamplingConfig
from lm.inference.constrain import Automata, of_vocabulary, Rule

pytest.importorskip('llguidance', reason="pip install 'lm[constrain]'")
BYTES = ByteVocabulary(extra_ids=5)
MODEL = dataclasses.replace(GPT2, vocab_size=BYTES.size)
SCHEMA = {'type': 'object', 'properties': {
    'name': {'type': 'string', 'maxLength': 5}, 'age': {'type': 'integer', 'minimum': 0,
                                                        'maximum': 150},
    'tags': {'type': 'array', 'items': {'enum': ['a', 'bc', None]}, 'maxItems': 2}},
    'required': ['name', 'age', 'tags'], 'additionalProperties': False}


def allowed(constraint):
  bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder='little')
  return np.flatnonzero(bits).tolist()


def finished(automata, rule, seed, most=400):
  """Tokens of a model that likes all tokens alike, but what ends the text more."""
  rng, constraint, tokens = np.random.default_rng(seed), automata.constraint(rule), []
  while len(tokens) < most:
    choice = allowed(constraint)
    ends = automata.eos_id in choice and rng.random() < 0.3
    token = automata.eos_id if ends else int(rng.choice(choice))
    constraint.advance(token)
    if token == automata.eos_id:
      return tokens
    tokens.append(token)
  return None


ATOMS = st.sampled_from(['a', 'b', '[a-f]', '[^a-y]', '[0-9]', 'é', '€+', '(ab|cde|)', '.', '\\.'])
REGEXES = st.recursive(ATOMS, lambda inner: st.one_of(
    st.tuples(inner, inner).map(''.join), inner.map('({})?'.format),
    inner.map('({}){{1,3}}'.format),
    st.tuples(inner, inner).map('({0[0]}|{0[1]})'.format)), max_leaves=6)


@pytest.mark.supports('decoding', 'constrained: regular expression')
@settings(max_examples=60, deadline=None)
@given(REGEXES, st.integers(0, 99))
def test_a_finished_text_matches_the_regular_expression(regex, seed):
  tokens = finished(of_vocabulary(BYTES, 1, BYTES.size), Rule(regex=regex), seed)
  assert tokens is None or re.fullmatch(regex, BYTES.decode(tokens))


NUMBERS = st.fixed_dictionaries({'type': st.just('integer'), 'minimum': st.integers(-9, 0),
                                 'maximum': st.integers(0, 200)})
SCHEMAS = st.recursive(
    st.one_of(NUMBERS, st.sampled_from([
        {'type': 'boolean'}, {'type': 'null'}, {'type': 'string', 'maxLength': 4},
        {'enum': ['x', 1, None, 'é"']}, {'type': 'string', 'pattern': '^[a-c]{2,3}$'}])),
    lambda inner: st.one_of(
        inner.map(lambda item: {'type': 'array', 'items': item, 'minItems': 1, 'maxItems': 2}),
        st.tuples(inner, inner).map(lambda two: {
            'type': 'object', 'properties': dict(zip('ab', two)), 'required': ['a'],
            'additionalProperties': False}),
        st.tuples(inner, inner).map(lambda two: {'anyOf': list(two)})), max_leaves=4)


@pytest.mark.supports('decoding', 'constrained: JSON schema')
@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.integers(0, 99))
def test_a_finished_text_is_json_of_the_schema(schema, seed):
  rule = Rule(json_schema=json.dumps(schema))
  tokens = finished(of_vocabulary(BYTES, 1, BYTES.size), rule, seed)
  assert tokens is not None
  jsonschema.validate(json.loads(BYTES.decode(tokens)), schema)


@pytest.mark.supports('decoding', 'constrained: choices', 'constrained: grammar')
def test_completions_of_a_model_follow_their_rules_beside_free_ones():
  grammar = 'start: sum\nsum: number ("+" number)*\nnumber: /[1-9][0-9]{0,2}/ | "(" sum ")"'
  rules = [None, Rule(choices=('red', 'green "apple"', 'grün')), Rule(grammar=grammar),
           Rule(regex='(dog|cat)s? €'), Rule(json_schema=json.dumps(SCHEMA))]
  free = SamplingConfig(temperature=1.0, max_new_tokens=40)
  configs = [dataclasses.replace(free, rule=rule) for rule in rules]
  ask = lambda configs, prompts: complete(
      MODEL.build(), params_of(MODEL), BYTES, prompts, configs, 3, 48)
  prompts = ['abc'] * len(rules)
  done = ask(configs, prompts)
  assert done[0] == ask(configs[:1], prompts[:1])[0], 'others changed a free text'
  assert done[3] == ask(configs[3:4], prompts[:1])[0], 'others changed a constrained text'
  assert done[1]['text'] in rules[1].choices and done[1]['stopped'] == 'eos'
  assert re.fullmatch('(dog|cat)s? €', done[3]['text']) and done[3]['stopped'] == 'eos'
  if done[2]['stopped'] == 'eos':
    assert eval(done[2]['text'], {}) > 0  # pylint: disable=eval-used
  if done[4]['stopped'] == 'eos':
    jsonschema.validate(json.loads(done[4]['text']), SCHEMA)
  assert re.fullmatch(r'[1-9(][0-9+()]*', done[2]['text'])


def test_where_one_text_may_follow_it_follows():
  only, = complete(MODEL.build(), params_of(MODEL), BYTES, ['x'], SamplingConfig(
      temperature=1.0, rule=Rule(regex='grün(e Äpfel)'), max_new_tokens=40), 0, 48)
  assert only['text'] == 'grüne Äpfel' and only['stopped'] == 'eos'


@functools.cache
def vocabulary_of(kind):
  """Whose tokens are pieces of words; of llama2c from the shared data."""
  if kind == 'llama2c':
    shared = pathlib.Path(__file__).resolve().parents[3] / 'shared'
    path = shared / 'data/weights/stories260K/tok512.bin'
    if not path.exists():
      pytest.skip(f'{path} is not there')
    return open_pretrained(path)
  text = 'once upon a time there was a cat called {"Tim"}: yes, no, maybe?\n' * 40
  config = VocabularyConfig(kind, {'wordpiece': 75, 'byte_bpe': 295}.get(kind, 330))
  return vocabulary_training.train(config, [Document('one', text)], len(text))


@pytest.mark.parametrize('kind', ['llama2c', 'bpe', 'byte_bpe', 'wordpiece'])
def test_what_must_follow_is_spelt_with_the_pieces_of_the_vocabulary(kind):
  vocabulary = vocabulary_of(kind)
  automata = of_vocabulary(vocabulary, vocabulary.eos_id, vocabulary.size + 3)
  text = vocabulary.decode(vocabulary.encode('a cat called: upon yes, a time'))
  tokens = finished(automata, Rule(choices=(text,)), 0)
  assert vocabulary.decode(tokens) == text and len(tokens) <= len(vocabulary.encode(text)) + 1
  for seed in range(8):
    tokens = finished(automata, Rule(regex='(yes|a cat|no, maybe){1,2}'), seed)
    assert re.fullmatch('(yes|a cat|no, maybe){1,2}', vocabulary.decode(tokens))


@pytest.mark.parametrize('rule, says', [
    (dict(regex='ye[s'), 'unclosed character class'), (dict(json_schema='{"type": "foo"}'), 'foo'),
    (dict(json_schema='{'), 'is no JSON'), (dict(grammar='start: a'), 'unknown name'),
    (dict(json_schema='{"type": "integer", "minimum": 5, "maximum": 3}'), 'Unsatisfiable')])
def test_a_rule_that_cannot_be_followed_is_refused_in_a_sentence(rule, says):
  with pytest.raises(UserError, match=says) as error:
    of_vocabulary(BYTES, 1, BYTES.size).constraint(Rule(**rule))
  assert '\n' not in str(error.value) and next(iter(rule)) in str(error.value)


def test_what_the_vocabulary_cannot_spell_is_refused():
  few = token_bytes(BYTES)
  spelt = tuple(data if data in (b'a', b'b', b'') else b'' for data in few.within)
  automata = Automata(few._replace(within=spelt, first=spelt), 1)
  assert BYTES.decode(finished(automata, Rule(regex='ab|b'), 0)) in ('ab', 'b')
  with pytest.raises(UserError, match='no token of the vocabulary spells'):
    automata.constraint(Rule(regex='c'))
  constraint = automata.constraint(Rule(regex='abc'))
  with pytest.raises(UserError, match='no token of the vocabulary spells'):
    for token in (100, 101, 102):  # a, b, c
      constraint.mask()
      constraint.advance(token)


def test_a_rule_is_one_thing():
  for rule in ({}, {'regex': 'a', 'choices': ('b',)}):
    with pytest.raises(ValueError, match='one of regex, choices'):
      Rule(**rule)
