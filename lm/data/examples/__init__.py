"""Labelled examples: files in, packed numpy batches out.

    sources.py   where the splits lie and how they are read: records, one dict each
    formats.py   what stands in a file
    tfds.py      sets of TensorFlow Datasets, read in a child process
    convert.py   records of well-known sets
    kinds.py     what an example is: classification, similarity, tagging, ... checked and canonical
    conversations.py, chat.py, chat_forms.py   kinds of conversations, chat templates, their forms
    template.py  prompts and targets of models that read and write text
    forms.py     from an example to tokens, for an encoder, a text-to-text model or a decoder
    spans.py     answers that stand in a text, from characters to tokens and back
    augment/     training examples changed anew in each epoch
    rows.py      short examples packed into rows of one length, anew in each epoch
    task.py      `ExampleTask`, which gin binds, and its cache
"""

from lm.data.examples.conversations import Conversation
from lm.data.examples.conversations import Preference
from lm.data.examples.kinds import Classification
from lm.data.examples.kinds import Generation
from lm.data.examples.kinds import LanguageModelling
from lm.data.examples.kinds import MultipleChoice
from lm.data.examples.kinds import Retrieval
from lm.data.examples.kinds import Similarity
from lm.data.examples.kinds import SpanExtraction
from lm.data.examples.kinds import Tagging
from lm.data.examples.sources import Files
from lm.data.examples.task import ExampleTask
from lm.data.examples.task import PreparedExamples
from lm.data.examples.template import Template
from lm.data.examples.tfds import TFDS
