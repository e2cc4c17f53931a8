"""GPT-2's tokenizer with the special tokens of families of chat models, and conversations."""
import gzip
import json
import pathlib

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
# Of each family the special tokens, then which of them begin and end a text.
FAMILIES = {
    'chatml': (['<|im_start|>', '<|im_end|>'], '<|endoftext|>', '<|im_end|>'),
    'llama3': (['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'],
               '<|begin_of_text|>', '<|eot_id|>'),
    'llama2': (['<s>', '</s>'], '<s>', '</s>'),
    'mistral': (['<s>', '</s>'], '<s>', '</s>'),
    'gemma': (['<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'], '<bos>', '<eos>'),
}


def save(name, directory, template=None):
  """Writes the tokenizer's files; returns the directory."""
  from tokenizers import AddedToken

  from lm.data import tokenizer_config

  gpt2 = SHARED / 'tokenizers' / 'gpt2'
  files = {file: gzip.decompress((gpt2 / f'gpt2_{file}.gz').read_bytes())
           for file in ('vocab.json', 'merges.txt')}
  tokenizer, (special, bos, eos) = tokenizer_config.build(files), FAMILIES[name]
  tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
  directory.mkdir()
  tokenizer.save(str(directory / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': bos, 'eos_token': eos}
  (directory / 'tokenizer_config.json').write_text(json.dumps(
      config | ({'chat_template': template} if template else {})))
  return directory


def conversations(name):
  """Of one turn, of three with blanks and line ends around them, and of a system's message."""
  made = lambda *contents: [{'role': ('user', 'assistant')[i % 2], 'content': content}
                            for i, content in enumerate(contents)]
  found = [made('Who wrote Faust?', 'Goethe.'),
           made('  Add 1 and 2\n', '\n1 + 2 = 3\n\n', 'And 中文, 🙂?', ' Yes!  ', 'é\n\nok',
                'So be it'),
           made('x' * 30 + '\t"quoted"', '"quoted" back')]
  if name not in ('mistral', 'gemma'):
    found.append([{'role': 'system', 'content': ' Be brief.\n'}, *found[1]])
  return found
