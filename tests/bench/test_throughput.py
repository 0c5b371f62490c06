"""A queue of prompts: the lengths that were drawn, and what both ways decode."""

from pathlib import Path

import pytest
import torch

from firstlab.bench.config import BenchmarkConfig
from firstlab.bench.models import Models
from firstlab.bench.throughput import Queue
from firstlab.model import RouterSettings
from support.models import tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return Models.load(str(folder), RouterSettings(), random_init=False, device=torch.device("cpu"))


def test_both_ways_decode_every_prompt_to_its_length(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BenchmarkConfig(queue=11, queue_batch_size=4, tokens=8, skip_rates=[0.33], seed=3)
    queue = Queue(config, models, quantization=None, prompt_length=20)
    assert min(map(len, queue.prompts)) >= 5 and max(map(len, queue.prompts)) <= 20
    assert min(queue.limits) >= 2 and max(queue.limits) <= 8
    assert len(set(map(len, queue.prompts))) > 3 and len(set(queue.limits)) > 3
    slow, fast = [], []
    generate, decode = models.routed.generate, queue.engine.generate

    def generate_and_keep(ids, mask, **options):
        out = generate(ids, mask, **options)
        slow.extend(out[:, ids.shape[1] :].tolist())
        return out

    def decode_and_keep(*arguments, **options):
        out = decode(*arguments, **options)
        fast.append(out.tokens)
        return out

    monkeypatch.setattr(models.routed, "generate", generate_and_keep)
    monkeypatch.setattr(queue.engine, "generate", decode_and_keep)
    records = queue.measure(warmup=0, repetitions=1)
    dense, skipping = records
    assert dense["skip_rate"] == 0 and skipping["skip_rate"] == pytest.approx(2 / 6)
    for record in records:
        assert record["new_tokens"] == sum(queue.limits) and record["prompt_tokens"] == sum(map(len, queue.prompts))
        assert record["speedup_over_generate"] > 0
    # The same tokens; generate goes on to the longest of its batch, which does not count.
    assert len(fast) == 2 and len(slow) == 2 * 11
    for place, tokens in enumerate(sum(fast, [])):
        assert len(tokens) == queue.limits[place % 11] and tokens == slow[place][: len(tokens)]
