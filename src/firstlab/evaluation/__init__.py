"""Generate predictions, score them, time them."""
