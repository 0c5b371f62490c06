import re

import pytest
import sacrebleu

from firstlab.data.wmt import WMTTranslation
from support.texts import write_parallel


@pytest.fixture
def root(tmp_path):
    for year in (2017, 2018, 2019, 2020, 2022):
        write_parallel(tmp_path, f"newstest{year}.en-zh", [(f"news {year}", f"新闻 {year}")] * 2, target="zh")
    return str(tmp_path)


def test_years_of_the_paper(root):
    task = WMTTranslation("en-zh", root)
    assert [example.source for example in task.train_pool()][::2] == [f"news {year}" for year in range(2017, 2021)]
    assert [example.id for example in task.test()] == ["newstest2022.en-zh:1", "newstest2022.en-zh:2"]
    assert task.target_language == "zh" and task.validation() is None


def test_other_training_years(root):
    assert [example.source for example in WMTTranslation("en-zh", root, [2019]).train_pool()] == ["news 2019"] * 2


def test_impossible_options(root):
    with pytest.raises(ValueError, match="data.task.pair=de-en is unknown: choose one of en-de, en-zh"):
        WMTTranslation("de-en")
    with pytest.raises(ValueError, match=r"newstest2022.en-de and data.task.test=newstest2022.en-de are the same text"):
        WMTTranslation("en-de", root, [2021, 2022])


def test_missing_files(root):
    with pytest.raises(
        ValueError, match=r"lacks newstest2022\.en-de\.en, newstest2022\.en-de\.de .* holds newstest2017"
    ):
        WMTTranslation("en-de", root).test()


def test_without_root_the_sets_come_from_sacrebleu(tmp_path, monkeypatch):
    write_parallel(tmp_path, "wmt22", [("news", "Nachrichten")], source="src", target="ref-A")
    data_set = sacrebleu.DATASETS["wmt22"]
    monkeypatch.setattr(data_set, "get_source_file", lambda pair: str(tmp_path / "wmt22.src"))
    monkeypatch.setattr(data_set, "get_reference_files", lambda pair: [str(tmp_path / "wmt22.ref-A"), "other"])
    (example,) = WMTTranslation("en-de").test()
    assert (example.id, example.references) == ("newstest2022.en-de:1", ("Nachrichten",))


@pytest.mark.parametrize("fault", [OSError("no network"), SystemExit("no network")])
def test_a_failed_download_says_which_files_help(monkeypatch, fault):
    def fail(pair):
        raise fault

    monkeypatch.setattr(sacrebleu.DATASETS["wmt22"], "get_source_file", fail)
    message = (
        "cannot fetch wmt22 en-de with sacrebleu (no network). Leave that year out, or without a connection set "
        "data.root=DIR, a directory with newstest2017.en-de.en, newstest2017.en-de.de, newstest2022.en-de.en, "
        "newstest2022.en-de.de"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        WMTTranslation("en-de", train_years=[2017]).test()


def test_a_year_that_sacrebleu_lacks():
    with pytest.raises(ValueError, match="cannot fetch wmt16 en-zh with sacrebleu .*Leave that year out"):
        WMTTranslation("en-zh", train_years=[2016]).train_pool()


def test_a_year_twice():
    with pytest.raises(ValueError, match="newstest2017.en-de and data.task.train=newstest2017.en-de are the same text"):
        WMTTranslation("en-de", train_years=[2017, 2017])
