"""gin/tasks/: every file is a task, and the local ones read the real sets whole."""
import gzip
import json
import pathlib

import numpy as np
import pytest

from lm import config
from lm import run

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / 'shared' / 'data'
TASKS = sorted(path.stem for path in (REPOSITORY / 'gin' / 'tasks').glob('*.gin'))
FORMS = ['text_to_text', 'decoder']
RUN = """
include 'gin/models/bert_tiny.gin'
include 'gin/optim/adamw.gin'
include 'gin/objectives/causal_lm.gin'
include 'gin/runs/pretrain.gin'
from __gin__ import dynamic_registration
from lm import run
from lm.data import examples
from lm.data import vocabularies
run.Experiment.task = %TASK
examples.ExampleTask.cache_dir = %CACHE_DIR
examples.ExampleTask.vocabulary = @vocabularies.VocabularyConfig()
vocabularies.VocabularyConfig.kind = 'byte'
"""

# Counts as the sets' authors and their SOURCE.txt state them; where a share is held out, of both.
COUNTS = {
    'banking77': ((10_003,), 77, 'I am still waiting on my card?'),
    'blimp': ((34_000,), None, 'Who should Derek hug after shocking Richard?'),
    'hate_offensive': ((24_783,), 3, '!!! RT @mayasolovely: As a woman you'),
    'harmful_tweets': ((24_783,), 2, '!!! RT @mayasolovely: As a woman you'),
    'lambada': ((5_153,), None, 'In my palm is a clear stone'),
    'mr': ((10_662,), 2, 'simplistic , silly and tedious .'),
    'piqa': ((1_838,), None, 'How do I ready a guinea pig cage'),
    'scitldr': ((1_992, 619), None, 'Due to the success of deep learning'),
    'snips': ((13_784, 700), 7, 'Add another song to the Cita Romántica playlist.'),
    'snips_slots': ((13_784, 700), None, "['Add', 'another', 'song', 'to', 'the', 'Cita'"),
    'stsb_captions': ((1_000, 375), None, 'Two green and white trains sitting on the tracks.'),
    'tatoeba_eng_cmn': ((21_116,), None, 'Hi.'),
    'tatoeba_eng_deu': ((50_001,), None, 'Go.'),
    'tatoeba_laser_cmn': ((1_000,), None, None),
    'tatoeba_laser_deu': ((1_000,), None, 'Maria sagte, sie wisse nicht, wo Tom sei.'),
    'ud_chinese_gsd': ((500,), None, "['同樣', '，', '施力'"),
    'ud_english_ewt': ((12_544, 2_001), 17, "['Al', '-', 'Zaman', ':'"),
    'uner_english_ewt': ((2_001,), 7, "['where', 'can', 'I', 'get'"),
    'wikisplit': ((5_000, 5_000), None, "' ( 1990 ) was the second sequel"),
    'winogrande': ((1_267,), None, 'Sarah was a much better surgeon'),
    'wnut17': ((3_394, 1_009), 13, "['@paulwalk', 'It'"),
    'xquad_en': ((1_190,), None, 'How many points did the Panthers defense surrender?'),
    'xquad_zh': ((1_190,), None, None),
}
WORDS = {'ud_english_ewt': [204_577, 25_147], 'ud_chinese_gsd': [12_665],
         'uner_english_ewt': [25_149], 'wnut17': [62_730, 15_733]}


def task_of(name, tmp_path, **macros):
  """The task of a gin file, as a run with these macros has it; with SOURCE, of files."""
  (tmp_path / 'run.gin').write_text(RUN)
  macros = {'CACHE_DIR': str(tmp_path / 'cache'), **macros}
  values = {key: '@examples.Files()' if key == 'SOURCE' else repr(value)
            for key, value in macros.items()}
  config.parse([f'gin/tasks/{name}.gin', str(tmp_path / 'run.gin')], list(values.items()))
  return config.build(run.Experiment).task


def canonical(task, split):
  return [task.kind.canonical(record) for _, record in task.source.records(split)]


@pytest.fixture
def shared():
  if not SHARED.exists():
    pytest.skip(f'{SHARED} is not there')
  return SHARED


@pytest.mark.parametrize('name', TASKS)
def test_a_task_file_makes_a_task_of_its_name_in_every_form(name, tmp_path):
  for form in [None, *FORMS]:
    task = task_of(name, tmp_path, **({'FORM': form} if form else {}))
    assert task.name == name and form in (None, task.form)


@pytest.mark.supports('fine-tuning', 'tasks of local files: classes, tags, similarity, spans, '
                      'generation, choices, retrieval, language modelling')
@pytest.mark.parametrize('name', COUNTS)
def test_a_set_is_read_whole(name, tmp_path, shared):
  task = task_of(name, tmp_path)
  sizes, num_labels, first = COUNTS[name]
  found = {split: canonical(task, split) for split in task.source.splits()}
  counts = [len(examples) for examples in found.values()]
  assert ([sum(counts)] if task.source.held_out else counts) == list(sizes)
  labels = {label for examples in found.values() for e in examples for label in
            task.kind.labels_of(e)}
  assert num_labels in (None, len(labels))
  if task.source.held_out:
    assert abs(counts[1] / sum(counts) - task.source.held_out) < 0.015
  example = next(iter(found.values()))[0]
  text = str(example.get('words') or next(task.kind.texts(example)))
  assert first is None or text.startswith(first)
  if name in WORDS:
    assert [sum(len(e['words']) for e in examples) for examples in found.values()] == WORDS[name]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', COUNTS)
def test_prompts_and_targets_come_from_the_templates(name, form, tmp_path, shared):
  task = task_of(name, tmp_path, FORM=form)
  template = task.decoder_template if form == 'decoder' else task.template
  _, record = next(task.source.records(task.source.splits()[0]))
  example = task.kind.canonical(record)
  prompt, target = template.prompt(example), template.target(example)
  assert target.strip() and '{' not in prompt
  if form == 'decoder' and prompt:
    assert prompt == prompt.rstrip() and target.startswith(' ')
  else:
    assert target == target.strip() and prompt == prompt.strip()


def test_held_out_translations_share_no_source_with_training(tmp_path, shared):
  task = task_of('tatoeba_eng_deu', tmp_path)
  train, held = ({e['source'] for e in canonical(task, s)} for s in ('train', 'validation'))
  assert train and held and not train & held


def test_both_slots_and_intents_are_of_the_same_utterances(tmp_path, shared):
  intents, slots = (canonical(task_of(name, tmp_path), 'validation')
                    for name in ('snips', 'snips_slots'))
  assert [e['a'].split() for e in intents][:3] == [e['words'] for e in slots][:3]
  squeeze = lambda text: ''.join(text.split())
  assert [squeeze(e['a']) for e in intents] == [squeeze(''.join(e['words'])) for e in slots]


def test_wikitext_has_the_words_of_its_convention_and_all_of_its_text(tmp_path, shared):
  task = task_of('wikitext2', tmp_path)
  texts = [example['text'] for example in canonical(task, 'validation')]
  whole = gzip.decompress((SHARED / 'lm/wikitext-2/valid.txt.gz').read_bytes()).decode()
  assert ''.join(texts) == whole and len(texts) == 60
  assert sum(map(task.kind.words, texts)) == 217_646


def test_translations_are_beside_their_sentences(tmp_path, shared):
  found = canonical(task_of('tatoeba_laser_deu', tmp_path), 'test')
  assert found[3] == {'query': 'Wo musst du das machen?',
                      'documents': ['Where do you have to do that?']}


def test_choices_are_scored_as_their_sets_ask(tmp_path, shared):
  choices = {}
  for name, split in (('piqa', 'validation'), ('winogrande', 'validation'), ('lambada', 'test'),
                      ('blimp', 'test')):
    task = task_of(name, tmp_path)
    example = task.kind.canonical(next(task.source.records(split))[1])
    choices[name] = task.decoder_template.choices(example), example['label']
  (first, second), label = choices['piqa']
  assert first[0] == second[0] == ("Question: How do I ready a guinea pig cage for it's new "
                                   'occupants?\nAnswer:') and label == 0
  assert 'paper strips' in first[1] and 'jeans material' in second[1]
  (first, second), label = choices['winogrande']
  assert label == 1 and first[1] == second[1] == ' always got the easier cases.'
  assert [c[0][-10:] for c in (first, second)] == ['a so Sarah', 'a so Maria']
  assert [choice[1] for choice in choices['lambada'][0]] == [' signs']
  assert choices['blimp'][0] == [('', 'Who should Derek hug after shocking Richard?'),
                                 ('', 'Who should Derek hug Richard after shocking?')]


@pytest.mark.parametrize('name, form', [('stsb_captions', 'encoder'), ('wnut17', 'encoder'),
                                        ('stsb_captions', 'text_to_text'), ('scitldr', 'decoder')])
def test_a_task_gives_batches_in_its_form(name, form, tmp_path, shared):
  prepared = task_of(name, tmp_path, FORM=form).prepare(progress=False)
  batch = prepared.loader('validation', 256, 2, 0).batch(0)
  side = 'decoder_target_tokens' if form == 'decoder' else 'encoder_input_tokens'
  assert batch[side].shape == (2, 256) and np.count_nonzero(batch[side]) > 256


# Rows as Hugging Face's files or the original ones have them.
ROWS = {
    'glue_cola': ({'sentence': 's', 'label': 1, 'idx': 0}, {'a': 's', 'label': 'acceptable'}),
    'glue_mnli': ({'premise': 'p', 'hypothesis': 'h', 'label': 2},
                  {'a': 'p', 'b': 'h', 'label': 'contradiction'}),
    'glue_stsb': ({'sentence1': 'x', 'sentence2': 'y', 'label': 2.5},
                  {'a': 'x', 'b': 'y', 'score': 2.5}),
    'superglue_copa': (
        {'premise': 'It fell.', 'choice1': 'He hit it.', 'choice2': 'It sang.', 'question': 'cause',
         'label': 0},
        {'contexts': ['It fell because'] * 2, 'continuations': ['he hit it.', 'it sang.'],
         'label': 0}),
    'superglue_wic': ({'word': 'place', 'sentence1': 's', 'sentence2': 't', 'label': 0},
                      {'a': 'place: s', 'b': 't', 'label': 'False'}),
    'conll2003': ({'tokens': ['EU'], 'ner_tags': [3]}, {'words': ['EU'], 'tags': ['B-ORG']}),
    'wmt_de_en': ({'translation': {'de': 'ja', 'en': 'yes'}}, {'source': 'ja', 'targets': ['yes']}),
    'xsum': ({'document': 'd', 'summary': 's'}, {'source': 'd', 'targets': ['s']}),
    'hellaswag': (
        {'ctx_a': 'A man sits.', 'ctx_b': 'he', 'activity_label': 'Roof', 'label': '1',
         'endings': ['is [substeps] up.', 'falls  off.']},
        {'contexts': ['Roof: A man sits. He'] * 2, 'continuations': ['is up.', 'falls off.'],
         'label': 1}),
    'arc_easy': (
        {'id': 'A1', 'question': 'q', 'choices': {'text': ['x', 'y'], 'label': ['A', 'B']},
         'answerKey': 'B'},
        {'contexts': ['q', 'q'], 'continuations': ['x', 'y'], 'label': 1}),
    'winogrande': (
        {'sentence': 'Ann saw Eve so _ left.', 'option1': 'Ann', 'option2': 'Eve', 'answer': '2'},
        {'contexts': ['Ann saw Eve so Ann', 'Ann saw Eve so Eve'],
         'continuations': ['left.', 'left.'], 'label': 1}),
}


@pytest.mark.parametrize('name', ROWS)
def test_a_set_of_tfds_is_read_by_path_too(name, tmp_path):
  row, expected = ROWS[name]
  (tmp_path / 'train.jsonl').write_text(json.dumps(row) + '\n')
  task = task_of(name, tmp_path, TRAIN_FILES=str(tmp_path / '*.jsonl'), VALIDATION_FILES=None,
                 SOURCE=None)
  (_, record), = task.source.records('train')
  assert task.kind.canonical(record) == expected


def test_columns_of_hugging_face_are_read(tmp_path):
  arrow = pytest.importorskip('pyarrow')
  import pyarrow.parquet
  row, expected = ROWS['glue_cola']
  table = arrow.Table.from_pylist([row] * 3)
  pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
  with arrow.ipc.new_stream(tmp_path / 'b.arrow', table.schema) as writer:
    writer.write_table(table)
  task = task_of('glue_cola', tmp_path, SOURCE=None, VALIDATION_FILES=None,
                 TRAIN_FILES=(str(tmp_path / '*.parquet'), str(tmp_path / '*.arrow')))
  assert canonical(task, 'train') == [expected] * 6
