"""Every table and figure of the paper, ours beside it, from recorded results alone: no model, no data, no GPU."""
