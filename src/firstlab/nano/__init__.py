"""Trains the nano model: a small deep Llama and its tokenizer, from generated or parallel text, on a plain CPU.

    python -m firstlab.nano                                            # the bundled model, conf/nano.yaml
    python -m firstlab.nano --config-name nano_parallel data_root=DIR  # a larger one, on real parallel text

The same command started again goes on where a killed one stopped, and gives the same weights. Processes share the
work of every step and add up their gradients; how many there are changes the weights by rounding only.
"""
