"""WMT news translation: newstest2017-2020 to train on, WMT22 (general test set, reference A) to test on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from firstlab.data.parallel_text import ParallelText

PAIRS = ("en-de", "en-zh")
TEST_YEAR = 2022


class WMTTranslation(ParallelText):
    """The paper's translation tasks (section 5, Table 8); the test sets of `train_years` are the training pool.

    `root` has `newstestYYYY.PAIR.SOURCE` and `newstestYYYY.PAIR.TARGET`; None fetches them with sacrebleu.
    """

    def __init__(
        self,
        pair: str,
        root: str | None = None,
        train_years: Sequence[int] = (2017, 2018, 2019, 2020),
        drop_empty: bool = False,
    ) -> None:
        if pair not in PAIRS:
            raise ValueError(f"data.task.pair={pair} is unknown: choose one of {', '.join(PAIRS)}")
        source, target = pair.split("-")
        super().__init__(
            source,
            target,
            root,
            train=[f"newstest{year}.{pair}" for year in train_years],
            test=f"newstest{TEST_YEAR}.{pair}",
            drop_empty=drop_empty,
        )
        self.pair = pair

    def _paths(self, names: Sequence[str]) -> list[tuple[Path, Path]]:
        if self.root is not None:
            return super()._paths(names)
        return [self._sacrebleu_paths(name) for name in names]

    def _sacrebleu_paths(self, name: str) -> tuple[Path, Path]:
        import sacrebleu

        data_set = f"wmt{name.removesuffix(f'.{self.pair}')[-2:]}"
        try:
            source = sacrebleu.DATASETS[data_set].get_source_file(self.pair)
            # The first permitted reference; for WMT22 sacrebleu permits A only.
            reference = sacrebleu.DATASETS[data_set].get_reference_files(self.pair)[0]
        except (Exception, SystemExit) as error:  # sacrebleu leaves the process on a bad download
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            files = ", ".join(self._file_names((*self.train_names, self.test_name)))
            raise ValueError(
                f"cannot fetch {data_set} {self.pair} with sacrebleu ({reason}). Leave that year out, or without a "
                f"connection set data.root=DIR, a directory with {files}"
            ) from error
        return Path(source), Path(reference)
