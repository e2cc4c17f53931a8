"""What a model answers to labelled examples, kept as it comes, and the metrics of it.

    contract.py   what all predictors share: items, batches, rows
    heads.py      an encoder with a head: classes, numbers, tags
    vectors.py    an encoder of two texts: similarity, retrieval
    texts.py      a model that writes: continuations scored, answers generated
    store.py      answers on disk, batch by batch, so that a killed evaluation goes on
    evaluate.py   a task and a split: predictions, metrics, the page
"""

from lm.evaluation.predictions.contract import Model
from lm.evaluation.predictions.evaluate import as_asked
from lm.evaluation.predictions.evaluate import evaluate
from lm.evaluation.predictions.evaluate import is_answered
from lm.evaluation.predictions.evaluate import name_of
from lm.evaluation.predictions.evaluate import with_labels
