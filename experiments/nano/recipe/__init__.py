"""The recipe of the bundled model and tasks: grammars, corpus, tokenizer, training."""
