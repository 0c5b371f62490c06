"""Order samples into batches and shards, each sample exactly once and the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain, islice, pairwise


def cut(items: Sequence[int], parts: int) -> list[list[int]]:
    """`items` in `parts` runs whose lengths differ by at most 1, the longer ones first; none for 0."""
    size, extra = divmod(len(items), max(parts, 1))
    starts = [part * size + min(part, extra) for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in pairwise(starts)]


def batch_count(n: int, batch_size: int) -> int:
    """How many batches of at most `batch_size` hold `n` samples."""
    return -(-n // batch_size)


@dataclass(frozen=True)
class Buckets:
    """Batches of samples of similar length, so that little is padded.

    So many `batches` of shuffled samples are sorted by length together: more of them pad less and mix less.
    """

    lengths: Sequence[int]
    batches: int

    def sort(self, batches: list[list[int]], generator: random.Random) -> list[list[int]]:
        """The same samples in batches of the same sizes, which come in random order."""
        found = []
        for start in range(0, len(batches), self.batches):
            together = batches[start : start + self.batches]
            # Stable, so that equal lengths stay shuffled.
            samples = iter(sorted(chain.from_iterable(together), key=self.lengths.__getitem__))
            found += [list(islice(samples, len(batch))) for batch in together]
        generator.shuffle(found)
        return found


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, buckets: Buckets | None = None) -> list[list[int]]:
    """The global batches of one epoch: 0 to n - 1 permuted, in ceil(n / batch_size) runs of near equal size.

    No small last batch gives few samples a large weight. The order depends on `seed` + `epoch` alone.
    """
    order = list(range(n))
    generator = random.Random(seed + epoch)
    generator.shuffle(order)
    batches = cut(order, batch_count(n, batch_size))
    return batches if buckets is None else buckets.sort(batches, generator)


def shard_batches(n: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Batches of samples `rank`, `rank` + `world_size`, ... below `n`, for validation and generation.

    Every rank gets the same number of batches, as far as its samples go, so that ranks which talk in each step stay in
    step.
    """
    shard = range(rank, n, world_size)
    return cut(shard, min(batch_count(batch_count(n, world_size), batch_size), len(shard)))


@dataclass(eq=False)
class DistributedBatches:
    """The batches of one rank over a whole training run, epoch after epoch (a batch sampler).

    Rank r of `world_size` gets the r-th run of every global batch of `epoch_batches`. The union over ranks is the batch
    that a single process sees; ranks differ by at most one row, the lower ranks have more. ValueError if a global batch
    would leave a rank without a row, or there is no sample.
    """

    n: int
    batch_size: int
    seed: int
    _: KW_ONLY
    total_batches: int
    rank: int = 0
    world_size: int = 1
    start_batch: int = 0  # so many are done already; iteration starts behind them
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("data.train_size=0 leaves nothing to train on: set it to at least 1")
        self.batches_per_epoch = batch_count(self.n, self.batch_size)
        smallest = self.n // self.batches_per_epoch
        if smallest < self.world_size:
            raise ValueError(
                f"trainer.devices (with trainer.num_nodes) gives {self.world_size} processes, but batch_size="
                f"{self.batch_size} over {self.n} training samples makes global batches of {smallest}: every process "
                "needs a row; raise batch_size of the phase or lower trainer.devices"
            )

    def __len__(self) -> int:
        """Batches of the whole run, done ones included: Lightning adds restored progress to its count."""
        return self.total_batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch, skip = divmod(self.start_batch, self.batches_per_epoch)
        left = self.total_batches - self.start_batch
        while left > 0:
            batches = epoch_batches(self.n, self.batch_size, self.seed, epoch, self.buckets)
            for batch in batches[skip : skip + left]:
                yield cut(batch, self.world_size)[self.rank]
                left -= 1
            epoch, skip = epoch + 1, 0
