"""One experiment: train the routers, compensate with LoRA, evaluate, record; and sweeps of such runs."""
