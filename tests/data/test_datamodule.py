from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from firstlab.data.datamodule import PromptDataModule
from firstlab.data.prompts import QuestionAnswering, Translation
from firstlab.data.task import Example
from support.texts import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def examples(name, count):
    return [Example(f"{name}{i}", f"the red house {i}", (f"das rote Haus {i}",)) for i in range(count)]


class Houses(Translation):
    language_names = ("English", "German")

    def __init__(self, pool=20, held_out=None, tests=7):
        self.pool, self.held_out, self.tests, self.reads = pool, held_out, tests, 0

    def train_pool(self):
        self.reads += 1
        return examples("train", self.pool)

    def validation(self):
        return None if self.held_out is None else examples("val", self.held_out)

    def test(self):
        return examples("test", self.tests)


def module(task=None, **options):
    defaults = {"train_size": 10, "val_size": 5, "seed": 1, "batch_size": 4, "total_batches": 3, "eval_batch_size": 3}
    return PromptDataModule(task or Houses(), TOKENIZER, **{**defaults, **options})


def on(data, rank, world_size):
    """`data` as in process `rank` of `world_size`."""
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


def names(split):
    return [example.id for example in split]


def rows(loader):
    return [index for batch in loader for index in batch["index"].tolist()]


def test_splits_are_fixed_for_all_time():
    data = module()
    assert names(data.val) == ["train11", "train5", "train17", "train19", "train9"]
    assert names(data.train) == [f"train{i}" for i in (0, 16, 1, 15, 6, 10, 13, 14, 12, 7)]
    assert names(data.test) == [f"test{i}" for i in range(7)]


def test_validation_comes_first_and_training_takes_what_is_left():
    data = module(train_size=100, val_size=18)
    assert len(data.val) == 18 and len(data.train) == 2
    assert sorted(names(data.train) + names(data.val)) == sorted(names(examples("train", 20)))
    assert names(data.val)[:5] == names(module().val)
    assert len(module(train_size=None).train) == 15


def test_seeds_draw_other_splits():
    assert names(module(seed=2).val) != names(module(seed=1).val)


def test_a_validation_set_of_the_task_is_used():
    data = module(Houses(held_out=8), train_size=None)
    assert len(data.train) == 20 and len(data.val) == 5 and all(name.startswith("val") for name in names(data.val))
    with pytest.raises(ValueError, match="data.val_size=9, but the validation set has 8 .* to at most 8"):
        _ = module(Houses(held_out=8), val_size=9).val


@pytest.mark.parametrize(("pool", "most"), [(5, 4), (3, 2), (0, 0)])
def test_a_pool_too_small(pool, most):
    message = f"data.val_size=5 leaves nothing to train on: the training pool has {pool} examples; .* at most {most}"
    with pytest.raises(ValueError, match=message):
        module(Houses(pool=pool)).setup("fit")


def test_test_examples_are_spread():
    chosen = names(module(test_size=3).test)
    # One of the first two, one of the next two, one of the last three; always the same.
    stretches = ({"test0", "test1"}, {"test2", "test3"}, {"test4", "test5", "test6"})
    assert len(chosen) == 3 and all(name in stretch for name, stretch in zip(chosen, stretches, strict=True))
    assert chosen == names(module(test_size=3, seed=5).test)
    assert len(module(test_size=50).test) == 7


def test_the_limit_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 300
    options = {"train_size": 10, "val_size": 5}
    PromptDataModule(Houses(), tokenizer, max_length=300, max_prompt_length=220, max_new_tokens=80, **options)
    with pytest.raises(ValueError, match="data.max_prompt_length=256 with data.max_new_tokens=80 exceeds .* of 300"):
        PromptDataModule(Houses(), tokenizer, max_length=256, max_new_tokens=80, **options)


class LongQuestion(QuestionAnswering, Houses):
    """The last example of each split asks at length."""

    def train_pool(self):
        return [*super().train_pool(), Example("long", "text", ("answer",), question="why " * 200)]

    def test(self):
        return [*super().test(), Example("long", "text", ("answer",), question="why " * 200)]


@pytest.mark.parametrize(("stage", "option"), [("fit", "data.max_length_lora"), ("predict", "data.max_prompt_length")])
def test_a_prompt_that_never_fits_stops_at_setup(stage, option):
    data = module(LongQuestion(), train_size=None, max_length=200, max_prompt_length=200)
    with pytest.raises(ValueError, match=f"{option} leaves .* of example 'long'"):
        data.setup(stage)
    module(LongQuestion(), train_size=None, max_length=2000, max_prompt_length=2000).setup()


def test_tight_frames_with_long_responses_stop_at_setup():
    class LongAnswer(Houses):
        def train_pool(self):
            return [Example("long", "the red house " * 9, ("Haus " * 99,)), *super().train_pool()]

    frame = len(TOKENIZER(Houses().prompt(Example("e", "", ("r",))))["input_ids"])
    data = module(LongAnswer(), train_size=None, max_length=2 * frame)
    with pytest.raises(ValueError, match=f"data.max_length_lora leaves {frame} tokens for .* example 'long'"):
        data.setup("fit")


class Repeating(Houses):
    """Trains on two of four test examples and, by position 16, on one that seed 1 draws for validation."""

    def train_pool(self):
        pool = examples("train", 20)
        return [*pool[:16], replace(pool[11], id="again"), *pool[17:]]

    def test(self):
        same, answered, asked, again = examples("test", 4)
        return [same, replace(answered, references=("anders",)), replace(asked, question="who?"), again]


def test_examples_that_are_trained_on_are_counted_once(capsys):
    data = module(Repeating(), train_size=None)
    data.prepare_data()
    data.setup("fit")
    data.setup("fit")
    assert capsys.readouterr().err == (
        "warning: 2 of 4 test examples and 1 of 5 validation examples are also training examples (same source and "
        "first reference), which flatters their scores: remove them from the training data\n"
    )


def test_one_process_warns_of_them(capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    module(Repeating(), train_size=None).setup("fit")
    assert capsys.readouterr().err == ""


def test_examples_apart_are_no_news(capsys):
    class Apart(Houses):
        def test(self):
            return [replace(example, references=("anders",)) for example in super().test()]

    module(Apart(), train_size=None).setup()
    assert capsys.readouterr().err == ""


def test_data_are_read_once():
    task = Houses()
    data = module(task)
    data.prepare_data()
    data.setup("fit")
    list(data.train_dataloader())
    assert task.reads == 1


def test_training_batches():
    data = module(total_batches=6, loss_on="response")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    assert sorted(len(batch["index"]) for batch in batches[:3]) == [3, 3, 4]
    assert sorted(rows(batches[:3])) == sorted(rows(batches[3:])) == list(range(10))
    batch = batches[0]
    for row, index in enumerate(batch["index"].tolist()):
        example = data.train[index]
        prompt, real = batch["prompt_mask"][row].bool(), batch["attention_mask"][row].bool()
        text = TOKENIZER.decode(batch["input_ids"][row][prompt], skip_special_tokens=True)
        assert text == data.task.prompt(example)
        assert TOKENIZER.decode(batch["labels"][row][real & ~prompt]) == example.references[0] + "</s>"
        assert (batch["labels"][row][~real | prompt] == -100).all()


def test_worker_processes_change_nothing():
    alone, workers = list(module().train_dataloader()), list(module(num_workers=2).train_dataloader())
    assert all(torch.equal(a[key], b[key]) for a, b in zip(alone, workers, strict=True) for key in a)


def test_ranks_share_every_split():
    alone = module(total_batches=5)
    ranks = [on(module(total_batches=5), rank, 2) for rank in range(2)]
    together = [
        a["index"].tolist() + b["index"].tolist() for a, b in zip(*(r.train_dataloader() for r in ranks), strict=True)
    ]
    assert together == [batch["index"].tolist() for batch in alone.train_dataloader()]
    assert [rows(rank.val_dataloader()) for rank in ranks] == [[0, 2, 4], [1, 3]]


def test_processes_out_of_step_are_refused():
    with pytest.raises(ValueError, match="data.val_size: 5 examples in evaluation.batch_size=1 give some of the 2"):
        on(module(eval_batch_size=1), 0, 2).val_dataloader()
    with pytest.raises(ValueError, match="trainer.devices"):
        on(module(), 0, 5).train_dataloader()


def test_no_validation():
    assert module(val_size=0).val_dataloader() == []


class Recorder(L.LightningModule):
    """Notes which rows it saw and counts its batches, as training code does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        self.trainer.datamodule.consumed_batches = batch_idx + 1
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options):
    return L.Trainer(
        enable_checkpointing="callbacks" in options,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    whole = Recorder()
    trainer().fit(whole, datamodule=module(total_batches=9))
    saver = ModelCheckpoint(tmp_path, "stop", every_n_train_steps=4, save_top_k=-1)
    first = Recorder()
    trainer(callbacks=[saver], max_steps=5).fit(first, datamodule=module(total_batches=9))
    second = Recorder()
    trainer().fit(second, datamodule=module(total_batches=9), ckpt_path=tmp_path / "stop.ckpt", weights_only=False)
    assert first.seen == whole.seen[:5] and second.seen == whole.seen[4:] and len(whole.seen) == 9
    assert sorted(second.validated) == list(range(5))
    with pytest.raises(ValueError, match="data.seed: 1 in the checkpoint, 2 now"):
        trainer().fit(
            Recorder(), datamodule=module(total_batches=9, seed=2), ckpt_path=tmp_path / "stop.ckpt", weights_only=False
        )


class Streets(Houses):
    """Houses in rows of very different length."""

    def train_pool(self):
        return [Example(f"s{i}", "red house " * (1 + 7 * i % 11), ("das rote Haus",)) for i in range(40)]


def padding(data):
    batches = list(data.train_dataloader())
    return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)


def test_bucketed_batches_pad_less_and_hold_every_example():
    options = {"train_size": 35, "total_batches": 18}
    plain, bucketed = (module(Streets(), **options, bucket=bucket) for bucket in (1, 100))
    assert padding(bucketed) < 0.5 * padding(plain)
    seen = rows(bucketed.train_dataloader())
    assert sorted(seen[:35]) == sorted(seen[35:]) == list(range(35))
    short = module(Streets(), train_size=35, total_batches=3, bucket=4)
    assert short.trained_on() == sorted(set(rows(short.train_dataloader())))


def test_a_bucketed_run_goes_on_where_it_was():
    whole = rows(module(Streets(), total_batches=9, bucket=2).train_dataloader())
    first = module(Streets(), total_batches=9, bucket=2)
    first.consumed_batches = 4
    resumed = module(Streets(), total_batches=9, bucket=2)
    resumed.load_state_dict(first.state_dict())
    rest = rows(resumed.train_dataloader())
    assert rest == whole[-len(rest) :] and 0 < len(rest) < len(whole)
    for saved, now in ((2, 3), (1, 2), (2, 1)):
        other = module(Streets(), total_batches=9, bucket=now)
        with pytest.raises(ValueError, match=r"data\.bucket: .* in the checkpoint"):
            other.load_state_dict(module(Streets(), total_batches=9, bucket=saved).state_dict())


def test_another_training_is_not_held_to_what_was_resumed():
    data = module(total_batches=6)
    state = {**data.state_dict(), "consumed_batches": 3}
    data.load_state_dict(state)
    assert len(list(data.train_dataloader())) == 3
    data.consumed_batches = 0
    data.batch_size = 2
    assert len(list(data.train_dataloader())) == 6
    with pytest.raises(ValueError, match="cannot resume in the middle of other training data"):
        data.load_state_dict(state)


def test_ids_and_copies_are_told(capsys):
    class Odd(Houses):
        def test(self):
            return [
                Example(name, name, (answer,)) for name, answer in [("a", "b"), ("a", "c"), ("a#2", "d"), ("e", "e")]
            ]

    data = module(Odd())
    assert names(data.test) == ["a", "a#2", "a#2#2", "e"]
    assert names(data.train) == names(module().train)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: 2 of 4 test examples have the id of an earlier one (for instance 'a'); they are")
    assert second.startswith("warning: 1 of 4 test examples (for instance 'e') have a reference that is their source")
