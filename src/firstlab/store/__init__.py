"""Store results on disk: records, atomic files, and which process may write them."""
