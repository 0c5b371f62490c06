"""Triton kernels of the decode step, and what chooses between them and the libraries' products."""
