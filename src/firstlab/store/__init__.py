"""What stands on disk: result records, atomic files, and which process may write them."""
