"""Shapes of real models' norms: (rows of a chip's batch, d_model, kind)."""
SPECS = {
    't5_small': (16384, 512, 'rmsnorm'),
    'gpt2': (16384, 768, 'layernorm'),
    'bert_large': (16384, 1024, 'layernorm'),
    'gpt3_xl': (8192, 2048, 'layernorm'),
    'llama3_2_1b': (8192, 2048, 'rmsnorm'),
    'gemma2_2b': (8192, 2304, 'rmsnorm'),
    'llama3_1_8b': (4096, 4096, 'rmsnorm'),
    'gpt3_13b': (4096, 5120, 'layernorm'),
    'llama3_70b': (4096, 8192, 'rmsnorm'),
}
