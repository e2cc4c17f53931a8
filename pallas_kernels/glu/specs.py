"""Shapes of real models' gated feed-forwards: (rows of a chip's batch, d_ff, activation)."""
SPECS = {
    't5_1_1_base': (16384, 2048, 'geglu'),
    'modernbert_large': (16384, 2624, 'geglu_exact'),
    'tinyllama_1_1b': (8192, 5632, 'swiglu'),
    'llama3_2_1b': (8192, 8192, 'swiglu'),
    'gemma2_2b': (8192, 9216, 'geglu'),
    'llama2_7b': (4096, 11008, 'swiglu'),
    'llama3_1_8b': (4096, 14336, 'swiglu'),
    'llama3_70b': (4096, 28672, 'swiglu'),
}
