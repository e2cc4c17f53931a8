"""What the model is asked to predict: numpy functions from packed tokens to SeqIO's feature names.

`causal_lm`, next token given all before it in the same document. One packed row of length 8: the
end of a document that began in an earlier sequence (its ids 7 8 1; the id before them was 6), a
whole document (4 9 1), and two places of padding. 1 is the end of a document, 0 is both padding and
the beginning:

    decoder_target_tokens    7   8   1   4   9   1   0   0
    decoder_input_tokens     6   7   8   0   4   9   0   0
    decoder_loss_weights     1.  1.  1.  1.  1.  1.  0.  0.
    decoder_segment_ids      1   1   1   2   2   2   0   0
    decoder_positions        0   1   2   0   1   2   0   0
"""

from __future__ import annotations

from typing import Callable

import numpy as np

Batch = dict[str, np.ndarray]
Objective = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Batch]

BOS_ID = 0  # The input at the beginning of a document: padding's id, which is never a target.


def causal_lm(
    tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray, previous: np.ndarray
) -> Batch:
  """Returns the features of next-token prediction.

  Args:
    tokens: int32 [batch, length], 0 where padded.
    segment_ids: int32 [batch, length], 1.. for the documents of a row in order, 0 where padded.
    positions: int32 [batch, length], counted from each document's first token in the row.
    previous: int32 [batch], the token before the row's first one in the same document; 0 if the row
      begins with a document.

  Returns:
    The five features above, [batch, length] int32 each, weights float32.
  """
  inputs = np.empty_like(tokens)
  inputs[:, 1:] = tokens[:, :-1]
  inputs[positions == 0] = BOS_ID  # First tokens, and padding, which has position 0 throughout.
  inputs[:, 0] = previous
  return {
      'decoder_input_tokens': inputs,
      'decoder_target_tokens': tokens,
      'decoder_loss_weights': (segment_ids > 0).astype(np.float32),
      'decoder_segment_ids': segment_ids,
      'decoder_positions': positions,
  }
