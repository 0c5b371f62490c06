"""Where users already are: transformers' Auto classes, model cards, plain exports, lm-evaluation-harness."""
