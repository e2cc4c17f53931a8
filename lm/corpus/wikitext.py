"""The text of an article in MediaWiki's markup, in time that grows as its length.

Gone are templates, tables, references, files, categories and tags; kept are the text of links,
headings over what has text, lists, and code. No template is expanded: of a few that stand for text
in the middle of a sentence, the text is taken from their arguments.

Reference: https://www.mediawiki.org/wiki/Help:Formatting
"""

from __future__ import annotations

from collections.abc import Iterator
import html
import re

_COMMENT = re.compile(r'<!--.*?(?:-->|\Z)', re.DOTALL)
# Tags whose content is no text, and those whose content is no markup.
_DROPPED = frozenset((
    'ref', 'gallery', 'timeline', 'imagemap', 'score', 'graph', 'mapframe', 'maplink', 'references',
    'templatedata', 'templatestyles', 'inputbox', 'hiero', 'chem', 'ce', 'categorytree',
))  # fmt: skip
_VERBATIM = frozenset(('nowiki', 'pre', 'syntaxhighlight', 'source', 'math', 'code', 'tt'))
_PAIRED = re.compile(
    '<(' + '|'.join(sorted(_DROPPED | _VERBATIM)) + r')\b([^<>]{0,2000})>', re.IGNORECASE
)
_BRACKETS = re.compile(r'\{\{|\}\}|\[\[|\]\]|^[ \t:]*\{\||^[ \t]*\|\}(?!\})', re.MULTILINE)
_DEEPEST = 40  # Levels of brackets in brackets; what is deeper is no article.
_CLOSES = {'}}': '{{', ']]': '[[', '|}': '{|'}

_FILE = re.compile(
    r'(?:file|image|media|datei|bild|fichier|archivo|imagen|immagine|ficheiro|imagem|bestand|plik'
    r'|файл|изображение|文件|檔案|图像|ファイル|画像|파일|category|kategorie|catégorie|categoría|categoria'
    r'|categorie|kategoria|категория|分类|分類|カテゴリ|분류)\s*:', re.IGNORECASE
)  # fmt: skip
_PICTURE = re.compile(r'\.(?:jpe?g|png|gif|svg|tiff?|webp|og[gv]|webm|pdf|djvu)\s*(?:\||$)', re.I)
_LANGUAGE = re.compile(r'(?:[a-z]{2,3}|simple|zh-[a-z-]+|be-[a-z-]+):')
_EXTERNAL = re.compile(r'\[(?:[a-z]{2,8}:)?//[^\s\[\]]*+[ \t]*+([^\[\]\n]*+)\]', re.IGNORECASE)
_BREAK = re.compile(r'<br\b[^<>]{0,200}>', re.IGNORECASE)
_TAG = re.compile(r'</?[a-zA-Z][^<>]{0,2000}>')
_QUOTES = re.compile(r"'{5}|'{2,3}")
_SWITCH = re.compile(r'__[A-Z]{3,24}__')
_EMPTY = re.compile(r'[ \t]?[(（][\s,;:]*[)）]')
_BEGUN = re.compile(r'([(（])\s*[,;]\s*')
_BLANKS = re.compile(r'[ \t\u00a0]+')
_LIST = re.compile(r'([*#:;]+)\s*')
_SAVED = re.compile('\ufdd0(\\d+)\ufdd1')

# Templates that stand for text: which argument (counted from 1), or the text itself.
_ARGUMENT = {
    'lang': 2, 'transl': -1, 'transliteration': -1, 'nowrap': 1, 'nobr': 1, 'small': 1,
    'smaller': 1, 'big': 1, 'larger': 1, 'abbr': 1, 'sc': 1, 'smallcaps': 1, 'em': 1, 'strong': 1,
    'val': 1, 'quote': 1, 'blockquote': 1, 'cquote': 1, 'quotation': 1, 'ill': 1,
    'interlanguage link': 1,
    'tq': 1, 'angbr': 1, 'code': 1, 'mvar': 1, 'math': 1, 'sup': 1, 'sub': 1, 'bce': 1, 'rp': 0,
    'as of': 1, 'linktext': 1, 'sic': 1, 'not a typo': 1, 'poemquote': 1, 'visible anchor': 1,
}  # fmt: skip
_TEXT = {
    'nbsp': ' ', 'spaces': ' ', 'ndash': '–', 'mdash': '—', 'spaced ndash': ' – ', 'snd': ' – ',
    'spnd': ' – ', 'spaced en dash': ' – ', 'en dash': '–', 'em dash': '—', '!': '|', '=': '=',
    'circa': 'c. ', 'c.': 'c. ', '\'': "'", "'s": "'s", '-': '', 'thinsp': ' ', 'times': '×',
}  # fmt: skip


def text(source: str) -> str:
  """Returns the text: blocks apart by an empty line, items of lists on lines of their own."""
  saved: list[str] = []
  source = _COMMENT.sub('', source.replace('\r\n', '\n'))
  source = ''.join(_without_tags(source, saved))
  source = _without_brackets(source)
  source = _BREAK.sub('\n', _EXTERNAL.sub(r'\1', source))
  source = html.unescape(_QUOTES.sub('', _TAG.sub('', source)))
  source = _BEGUN.sub(r'\1', _EMPTY.sub('', _SWITCH.sub('', source)))
  blocks = '\n\n'.join(_with_text(_blocks(source)))
  return _SAVED.sub(lambda match: saved[int(match[1])], blocks).strip()


def _without_tags(source: str, saved: list[str]) -> Iterator[str]:
  """Drops what tags say is no text, and puts aside what they say is no markup."""
  lower, at, unclosed = source.lower(), 0, set()
  for match in _PAIRED.finditer(source):
    tag = match[1].lower()
    if match.start() < at:
      continue
    yield source[at : match.start()]
    at = match.end()
    end = -1 if match[2].endswith('/') or tag in unclosed else lower.find(f'</{tag}', at)
    if end < 0:  # So is every other one behind it, if none is closed.
      if not match[2].endswith('/'):
        unclosed.add(tag)
      continue
    if tag in _VERBATIM:
      content = html.unescape(source[at:end])
      content = content.strip('\n') if '\n' in content else content.strip()
      saved.append(f'${content}$' if tag == 'math' and '\n' not in content else content)
      yield f'\ufdd0{len(saved) - 1}\ufdd1'
    at = source.find('>', end) + 1 or len(source)
  yield source[at:]


def _without_brackets(source: str) -> str:
  """Replaces templates, tables and links, the inner ones first."""
  output: list[str] = []
  open_: list[tuple[str, int]] = []  # What was opened, and where in the output its content begins.
  count = dict.fromkeys(_CLOSES.values(), 0)
  at = 0
  for match in _BRACKETS.finditer(source):
    output.append(source[at : match.start()])
    at = match.end()
    bracket = match[0].strip(' \t:')
    if bracket in count:
      if len(open_) < _DEEPEST:
        open_.append((bracket, len(output)))
        count[bracket] += 1
    elif count[_CLOSES[bracket]]:
      while True:
        opened, begin = open_.pop()
        count[opened] -= 1
        if opened == _CLOSES[bracket]:
          break
      content = ''.join(output[begin:])
      output[begin:] = [_REPLACED[opened](content)]
  output.append(source[at:])
  return ''.join(output)


def _template(content: str) -> str:
  name, *arguments = content.split('|')
  name = name.strip().lower().replace('_', ' ')
  if name in _TEXT:
    return _TEXT[name] + ' '.join(arguments[:1] if name in ('circa', 'c.') else ())
  plain = [part.strip() for part in arguments if not re.match(r'\s*[\w -]{1,40}=', part)]
  if name in ('convert', 'cvt') and len(plain) >= 2:
    return f'{plain[0]} {plain[1]}'
  if name in ('frac', 'sfrac') and plain:
    return '/'.join(plain[-2:])
  name = 'lang' if name.startswith('lang-') and len(plain) == 1 else name
  which = _ARGUMENT.get(name, 0)
  named = re.search(r'(?:^|\|)\s*(?:1|text|quote)\s*=([^|]*)', content) if which == 1 else None
  if named:
    return named[1].strip()
  which = min(which, len(plain))
  return plain[which - 1 if which > 0 else -1] if which and plain else ''


def _link(content: str) -> str:
  target, bar, label = content.partition('|')
  target = target.strip()
  if _FILE.match(target) or _PICTURE.search(target + bar) or _LANGUAGE.match(target):
    return ''
  if not bar:
    return target.lstrip(':').strip()
  label = label.rpartition('|')[2]  # Of what once was a picture.
  return label.strip() or re.split('[(,]', target.rpartition(':')[2])[0].strip()


def _table(content: str) -> str:
  return ''


_REPLACED = {'{{': _template, '[[': _link, '{|': _table}


def _blocks(source: str) -> Iterator[tuple[int, str]]:
  """Yields (level of a heading, 0 for others; text) of each block."""
  lines: list[str] = []
  kind, number = '', 0
  for line in source.split('\n'):
    if line[:1] in ('|', '!') or line.startswith('----'):  # Of a table that was not closed.
      continue
    line = line.rstrip()
    heading = len(line) > 2 and line[0] == line[-1] == '='
    item = _LIST.match(line)
    now = 'heading' if heading else 'item' if item else 'line'
    line = _BLANKS.sub(' ', line).strip()
    if lines and (now != kind or now == 'line' or not line):
      yield 0, '\n'.join(lines)
      lines, number = [], 0
    kind = now
    if heading:
      yield len(line) - len(line.lstrip('=')), line.strip('= ')
    elif item:
      marks, body = item[1], line[len(item[1]):].strip()
      number = number + 1 if marks == '#' else 0 if len(marks) == 1 else number
      sign = f'{number}. ' if marks == '#' else '- ' if marks[-1] in '*#' else ''
      if body:
        lines.append('  ' * (len(marks) - 1) * bool(sign) + sign + body)
    elif line:
      lines.append(line)
  if lines:
    yield 0, '\n'.join(lines)


def _with_text(blocks: Iterator[tuple[int, str]]) -> list[str]:
  """Leaves out headings that have nothing below them."""
  kept: list[str] = []
  has_text, last = False, 0  # Since the last heading that was kept; its level.
  for level, block in reversed(list(blocks)):
    if not level:
      kept.append(block)
      has_text = True
    elif has_text or level < last:
      kept.append(block)
      has_text, last = False, level
  return kept[::-1]
