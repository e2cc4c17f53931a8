"""Training examples changed at random, anew in each epoch: what `ExampleTask.augmentations` takes.

    base.py              what augmentations share: which texts of which kinds they change, how often
    words.py             EDA: synonyms, insertion, swap and deletion of words
    wordnet.py           synonyms by the files of WordNet's database
    typos.py             slips of fingers on a QWERTY keyboard
    cutoff.py            tokens that nobody sees
    back_translation.py  paraphrases that a model made before training

Every choice is drawn from the generator of the row in which an example stands, so that it is a
function of (seed, row). Labels never change. Mixup, which mixes vectors and labels inside of a
model, is `heads.ClassifierConfig.mixup_alpha`.
"""

from lm.data.examples.augment.back_translation import BackTranslation
from lm.data.examples.augment.cutoff import TokenCutoff
from lm.data.examples.augment.typos import Typos
from lm.data.examples.augment.words import RandomDeletion
from lm.data.examples.augment.words import RandomInsertion
from lm.data.examples.augment.words import RandomSwap
from lm.data.examples.augment.words import Synonyms
