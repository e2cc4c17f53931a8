"""What stands in a corpus more than once is kept once.

`Exact` and `URL` remove documents that are the same, `MinHash` those that are nearly the same,
`Lines`, `Paragraphs` and `Substrings` cut out of documents what stood before. Each is a `Grouping`:
what is kept does not depend on how the input is cut into blocks or spread over partitions, and a
corpus of twice the size takes twice the time.
"""

from lm.corpus.deduplicate.memory import run
from lm.corpus.deduplicate.minhash import MinHash
from lm.corpus.deduplicate.passages import Lines
from lm.corpus.deduplicate.passages import Paragraphs
from lm.corpus.deduplicate.substrings import Substrings
from lm.corpus.deduplicate.whole import Exact
from lm.corpus.deduplicate.whole import URL
