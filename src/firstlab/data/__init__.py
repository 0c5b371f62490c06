"""Tasks, prompts and batches."""
