"""Shapes of real models' rotary positions: (B, T, N, K, H) of a chip's batch."""
SPECS = {
    'smollm2_135m': (8, 2048, 9, 3, 64),
    'qwen2_0_5b': (4, 4096, 14, 2, 64),
    'llama3_2_1b': (2, 4096, 32, 8, 64),
    'gemma2_2b': (2, 4096, 8, 4, 256),
    'llama3_1_8b': (1, 8192, 32, 8, 128),
    'llama3_70b': (1, 4096, 64, 8, 128),
}
