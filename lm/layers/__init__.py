"""The parts that models share: parameters and activations in, activations out.

`linear.py` products and embeddings; `norms.py`; `positions.py` rotary positions, `relative_bias.py`
T5's and ALiBi's, `relative_attention.py` Transformer-XL's; `attention.py` projections;
`cache.py` what decoding keeps of them, by rows or in pages, `rolling.py` of a window of tokens;
`kernels.py` the attention kernels on a mesh; `mlp.py` and `moe.py`, experts in its place;
`stack.py` a stack of equal blocks, scanned or unrolled, rematerialised or not; `heads.py` what
stands on a trunk, `adaptive.py` a vocabulary in clusters, `adapted.py` what an adapter's parameters
do. A layer names logical axes, never mesh
axes.

Letters: B batch, T query length, S key length, D d_model, F d_ff, N query heads, K key-value heads,
H head dim, V vocabulary, L layers.
"""
