"""Measure the speed of decoding and of training."""
