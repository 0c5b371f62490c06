"""The decode engine: static key-value caches, CUDA graphs, sampling."""
