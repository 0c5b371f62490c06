"""The recipe of the bundled model, on settings that take seconds."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import recipe.training as training
from firstlab.data.squad import Squad
from firstlab.data.task import Task
from recipe.corpus import (
    Corpus,
    collate,
    cut_by_tokens,
    encode_corpus,
    frame_lines,
    plan_steps,
    prepare,
    train_tokenizer,
    training_examples,
)
from recipe.finish import finish, greedy_responses
from recipe.qa import GeneratedQA
from recipe.recall import Recall
from recipe.settings import (
    EvaluationConfig,
    ModelConfig,
    RecipeConfig,
    StageConfig,
    TaskConfig,
    TrainingConfig,
)
from recipe.training import Muon, build_model, lr_scale, orthogonalized, train, train_in_processes, weighted_loss
from recipe.translation import GeneratedTranslation

TASKS: dict[str, Task] = {
    "mini_ende": GeneratedTranslation("en-de", pool_size=40, test_size=10),
    "mini_qa": GeneratedQA(pool_size=40, test_size=10),
}


def tiny(work: Path, **changes: Any) -> RecipeConfig:
    """Two tasks, two layers, one stage of six steps; `changes` are for the stage and the training settings."""
    training: dict[str, Any] = {
        "tokens_per_batch": 512,
        "batches_per_step": 2,
        "window": 32,
        "max_length": 512,
        "prompt_weight": 0.1,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    stage: dict[str, Any] = {
        "steps": 6,
        "weights": {"mini_ende": 1.0, "mini_qa": 2.0},
        "prompt_steps": 3,
        "matrix_lr": 0.02,
        "vector_lr": 0.005,
        "warmup_steps": 2,
        "decay_fraction": 0.5,
    }
    for name, value in changes.items():
        (stage if name in stage else training)[name] = value
    return RecipeConfig(
        seed=0,
        output_dir=str(work / "out"),
        work_dir=str(work),
        device="cpu",
        processes=1,
        threads=1,
        precision="fp32",
        compile=False,
        tokenizer_examples=40,
        tasks={
            "mini_ende": TaskConfig(task={}, count=60),
            "mini_qa": TaskConfig(task={}, count=0),
        },
        model=ModelConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            initializer_range=0.05,
        ),
        training=TrainingConfig(**training, stages={"all": StageConfig(**stage)}),
        evaluation=EvaluationConfig(examples=6, batch_size=4, max_new_tokens=4),
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("nano")
    prepare(tiny(work), TASKS, work)
    return work


@pytest.fixture
def work(prepared: Path, tmp_path: Path) -> Path:
    """A folder with prepared data and no checkpoint."""
    for name in ("recipe.json", "corpus.npz"):
        (tmp_path / name).write_bytes((prepared / name).read_bytes())
    (tmp_path / "tokenizer").symlink_to(prepared / "tokenizer")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(prepared / "tokenizer")


@pytest.fixture(scope="module")
def corpus(prepared: Path) -> Corpus:
    return Corpus.load(prepared / "corpus.npz")


def prompt_length(corpus: Corpus, row: int) -> int:
    """Tokens before the first answer."""
    return int((corpus.answer_lengths[corpus.starts[row] : corpus.starts[row + 1]] > 0).argmax())


def weights_of(work: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(work / "checkpoint.pt", weights_only=True)["model"]
    return state


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        " two  spaces ",
        "line\nline\n\n x\n",
        "\n",
        "日本 😀 \x00 é ẞ",
        "",
        "a\r\n\tb",
        "### Response:\n",
        "12345 3.14",
    ],
)
def test_tokenizer_returns_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_prompts_survive_the_tokenizer_and_their_frame_is_one_token_a_line(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for task in TASKS.values():
        example = task.test()[0]
        ids = tokenizer(task.prompt(example))["input_ids"]
        frame = frame_lines(task)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == task.prompt(example)
        assert all(len(tokenizer(line, add_special_tokens=False)["input_ids"]) == 1 for line in frame)
        bare = len(tokenizer(example.source + example.question, add_special_tokens=False)["input_ids"])
        assert len(ids) <= bare + len(frame) + 3


def test_a_word_is_the_same_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    word = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert len(word) == 1
    for text in ("in the", "in\nthe", "### Response:\nthe"):
        assert tokenizer(text)["input_ids"][-1:] == word


def test_numbers_are_read_digit_by_digit(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [tokenizer.decode(piece) for piece in tokenizer("1200 1999", add_special_tokens=False)["input_ids"]]
    assert all(sum(sign.isdigit() for sign in piece) <= 1 for piece in pieces)


def test_frame_lines_are_all_of_a_prompt_but_its_texts() -> None:
    assert frame_lines(TASKS["mini_qa"]) == [
        "### Instruction:\n",
        "Answer the question based on the given passage.\n\n",
        "### Passage:\n",
        "\n\n### Question:\n",
        "\n\n### Response:\n",
    ]


def test_tokenizer_is_the_same_each_time(prepared: Path, tmp_path: Path) -> None:
    prepare(tiny(tmp_path), TASKS, tmp_path)
    name = "tokenizer/tokenizer.json"
    assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes()


def test_vocabulary_limit_holds(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 400
    assert len(train_tokenizer(["a b"], ["### Input:\n"], 400)) < 400


def test_corpus_holds_prompts_and_closed_responses(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    task, example = TASKS["mini_ende"], training_examples(TASKS["mini_ende"], 60, 0)[0]
    row = corpus.ids[corpus.starts[0] : corpus.starts[1]].tolist()
    cut = prompt_length(corpus, 0)
    assert tokenizer.decode(row[1:cut]) == task.prompt(example)
    assert tokenizer.decode(row[cut:-1]) == example.references[0]
    assert row[-1] == tokenizer.eos_token_id
    assert corpus.sizes.tolist() == [60, 40]


def test_the_tokenizer_learns_from_scored_tasks_alone(tmp_path: Path, prepared: Path) -> None:
    config = tiny(tmp_path)
    config.tasks["recall"] = TaskConfig(task={}, count=50, scored=False)
    prepare(config, {**TASKS, "recall": Recall()}, tmp_path)
    name = "tokenizer/tokenizer.json"
    assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes()
    assert Corpus.load(tmp_path / "corpus.npz").sizes.tolist() == [60, 40, 50]


def test_further_questions_follow_the_first_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    task = GeneratedQA(more_questions=3)
    [example] = task.generate(1, seed=4)
    corpus = encode_corpus(tokenizer, [(task, [example])], 1000)
    wanted = [task.prompt(example) + example.references[0]]
    wanted += [f"\n\n### Question:\n{question}\n\n### Response:\n{answer}" for question, answer in example.more]
    assert len(wanted) > 2
    text = "".join(f"{turn}{tokenizer.eos_token}" for turn in wanted)
    assert tokenizer.decode(corpus.ids[1:], clean_up_tokenization_spaces=False) == text
    single = encode_corpus(tokenizer, [(task, [replace(example, more=())])], 1000)
    assert corpus.ids[: len(single.ids)].tolist() == single.ids.tolist()
    answers = [example.references[0], *(answer for _, answer in example.more)]
    lengths = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in answers]
    assert corpus.answer_lengths[corpus.answer_lengths > 0].tolist() == [n for n in lengths for _ in range(n)]
    cut = encode_corpus(tokenizer, [(task, [example])], len(corpus.ids) - 1)
    assert cut.ids.tolist() == corpus.ids[: len(cut.ids)].tolist() and cut.ids[-1] == tokenizer.eos_token_id


def test_long_examples_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    pool = TASKS["mini_ende"].train_pool()
    lengths = encode_corpus(tokenizer, [(TASKS["mini_ende"], pool)], 1000).lengths()
    limit = int(np.median(lengths))
    kept = encode_corpus(tokenizer, [(TASKS["mini_ende"], pool)], limit)
    assert kept.sizes[0] == (lengths <= limit).sum()
    with pytest.raises(ValueError, match=r"training\.max_length=3 leaves no example of GeneratedTranslation"):
        encode_corpus(tokenizer, [(TASKS["mini_ende"], pool)], 3)


def test_only_generated_tasks_take_a_count() -> None:
    with pytest.raises(ValueError, match=r"count=5 .* Squad"):
        training_examples(Squad.__new__(Squad), 5, 0)


# --------------------------------------------------------------------------------------------- batches


def test_batches_hold_each_row_once_and_keep_to_the_limit() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(1, 50, 200))
    batches = cut_by_tokens(np.arange(200), lengths, 100)
    assert np.concatenate(batches).tolist() == list(range(200))
    assert all(len(rows) * lengths[rows].max() <= 100 for rows in batches)
    fused = [np.concatenate(pair) for pair in itertools.pairwise(batches)]
    assert all((len(left) + 1) * lengths[both[len(left)]] > 100 for left, both in zip(batches, fused, strict=False))


def test_steps_mix_tasks_by_weight_and_come_back_the_same(corpus: Corpus) -> None:
    settings = tiny(Path(), window=30).training

    def draw(count: int) -> list[list[list[int]]]:
        steps = itertools.islice(plan_steps(corpus, [1.0, 2.0], settings, (0,)), count)
        return [[rows.tolist() for rows in batches] for batches in steps]

    steps = draw(40)
    assert steps[:7] == draw(7)
    assert all(len(batches) == settings.batches_per_step for batches in steps)
    rows = np.array([row for batches in steps for batch in batches for row in batch])
    assert set(rows.tolist()) == set(range(100))
    assert (rows >= 60).mean() == pytest.approx(2 / 3, abs=0.05)


def test_stages_follow_each_other_with_their_own_mixture(corpus: Corpus) -> None:
    config = tiny(Path(), steps=9)
    config.training.stages["reading"] = replace(config.training.stages["all"], steps=2, weights={"mini_qa": 1.0})
    stages, steps, batches = zip(*training.schedule(config, corpus), strict=True)
    assert stages == (config.training.stages["all"],) * 9 + (config.training.stages["reading"],) * 2
    assert steps == (*range(9), 0, 1)
    assert all((rows >= 60).all() for step in batches[9:] for rows in step)
    assert not all((rows >= 60).all() for step in batches[:9] for rows in step)


def test_a_stage_may_have_smaller_batches(corpus: Corpus) -> None:
    config = tiny(Path(), steps=4)
    config.training.stages["small"] = replace(config.training.stages["all"], tokens_per_batch=300)
    sizes = [
        [len(rows) * corpus.lengths()[rows].max() for rows in step] for _, _, step in training.schedule(config, corpus)
    ]
    assert max(max(step) for step in sizes[:4]) > 300 >= max(max(step) for step in sizes[4:])


def test_collate_weights_prompt_and_response(corpus: Corpus) -> None:
    rows = np.array([0, 99])
    ids, weights, response = collate(corpus, rows, prompt_weight=0.1)
    for i, row in enumerate(rows):
        length, prompt = int(corpus.lengths()[row]), prompt_length(corpus, int(row))
        assert ids[i, :length].tolist() == corpus.ids[corpus.starts[row] : corpus.starts[row + 1]].tolist()
        assert response[i].nonzero().flatten().tolist() == list(range(prompt, length))
        assert weights[i, 0] == 0
        assert weights[i, 1:prompt].sum() == pytest.approx(0.1 * (prompt - 1) * prompt**-0.5, rel=1e-5)
        assert weights[i, prompt:length].sum() == pytest.approx((length - prompt) ** 0.5, rel=1e-5)
        assert weights[i, length:].sum() == 0


# -------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24)])
def test_orthogonalized_keeps_directions_and_evens_out_singular_values(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = u.mT @ orthogonalized(matrices) @ vh.mT
    values = result.diagonal(dim1=-2, dim2=-1)
    clear = s > 0.1 * s.amax(-1, keepdim=True)
    assert ((values[clear] > 0.5) & (values[clear] < 1.3)).all()
    assert (result - torch.diag_embed(values)).abs().max() < 1e-3


def test_muon_finds_a_minimum() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))[0])
    target = torch.eye(6)[:, :4]
    optimizer = Muon([weight], lr=0.1, weight_decay=0.0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimizer.zero_grad()
        ((weight - target) ** 2).sum().backward()
        optimizer.step()
    assert ((weight - target) ** 2).sum() < 1e-2


def test_a_stage_of_fewer_layers_trains_these_and_the_others_join_as_the_identity(work: Path) -> None:
    config = tiny(work, steps=2)
    config.training.stages = {
        "shallow": replace(config.training.stages["all"], layers=1),
        "deep": config.training.stages["all"],
    }
    start = build_model(config.model, PreTrainedTokenizerFast.from_pretrained(work / "tokenizer"), 0).state_dict()
    shallow = replace(config, training=replace(config.training, stages=dict([*config.training.stages.items()][:1])))
    train(0, 1, shallow, work)
    after = weights_of(work)
    for name in start:
        changes = not torch.equal(start[name], after[name])
        assert changes == (not name.startswith("model.layers.1.")), name
    train(0, 1, config, work)
    assert all(not torch.equal(after[name], value) for name, value in weights_of(work).items() if name in start)


def test_learning_rate_warms_up_stays_and_falls() -> None:
    settings = tiny(Path(), steps=100, warmup_steps=10, decay_fraction=0.4).training.stages["all"]
    scales = [lr_scale(step, settings) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:61] == [1.0] * 52
    assert scales[80] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(1 / 40)


def test_loss_of_a_batch_is_the_sum_of_its_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(tiny(Path()).model, tokenizer, seed=1)
    rows = np.array([0, 60, 99])
    model.requires_grad_(False)
    together = weighted_loss(model, *collate(corpus, rows, 0.1))
    apart = [weighted_loss(model, *collate(corpus, rows[i : i + 1], 0.1)) for i in range(3)]
    for part in range(2):
        assert float(together[part]) == pytest.approx(sum(float(each[part]) for each in apart), rel=1e-4)
    row = torch.from_numpy(corpus.ids[: corpus.starts[1]])[None]
    labels = row.clone()
    labels[:, : prompt_length(corpus, 0)] = -100
    mean = float(model(input_ids=row, labels=labels).loss)
    responses = int(corpus.lengths()[0] - prompt_length(corpus, 0))
    assert float(apart[0][1]) == pytest.approx(mean * responses, rel=1e-4)


def test_training_learns(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(0, 1, tiny(work, steps=40, log_every=20), work)
    losses = [record.args[2] for record in caplog.records if isinstance(record.args, tuple) and len(record.args) > 4]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.5


def test_killed_run_goes_on_to_the_same_weights(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(work, steps=3)
    config.training.stages["reading"] = replace(config.training.stages["all"], weights={"mini_qa": 1.0})
    train(0, 1, config, work)
    straight = weights_of(work)
    (work / "checkpoint.pt").unlink()

    calls = itertools.count(1)
    clip = training.clip_grad_norm_

    def killed(*args: Any) -> Tensor:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(training, "clip_grad_norm_", killed)
    with pytest.raises(KeyboardInterrupt):
        train(0, 1, config, work)
    assert torch.load(work / "checkpoint.pt", weights_only=True)["progress"]["step"] == 2
    monkeypatch.undo()
    train(0, 1, config, work)
    resumed = weights_of(work)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_two_processes_give_the_weights_of_one(work: Path) -> None:
    train(0, 1, tiny(work, steps=3), work)
    one = weights_of(work)
    (work / "checkpoint.pt").unlink()
    train_in_processes(replace(tiny(work, steps=3), processes=2), work)
    two = weights_of(work)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_another_recipe_is_not_mixed_in(work: Path) -> None:
    prepare(tiny(work, log_every=3), TASKS, work)
    for other in (replace(tiny(work), seed=1), tiny(work, steps=9)):
        with pytest.raises(ValueError, match="holds a run of another recipe"):
            prepare(other, TASKS, work)


# --------------------------------------------------------------------------------------------- results


def test_finished_model_is_complete(work: Path) -> None:
    config = tiny(work)
    with pytest.raises(ValueError, match="0 of 6 steps"):
        finish(config, TASKS, work)
    train(0, 1, config, work)
    finish(config, TASKS, work)

    out = Path(config.output_dir)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.padding_side == "left"
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    record = json.loads((out / "nano.json").read_text())
    scores = record["held_out_scores"]
    assert scores["mini_qa"]["all"]["em"]["n"] == 6
    assert scores["mini_ende"]["all"]["bleu"]["value"] >= 0
    levels = [entry for name, entry in scores["mini_qa"].items() if name != "all"]
    assert sum(level["em"]["n"] for level in levels) == 6
    assert record["recipe"]["seed"] == 0
    assert record["training_tokens"] > 0


def test_greedy_responses_do_not_depend_on_the_batch(work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train(0, 1, tiny(work), work)
    model = build_model(tiny(work).model, tokenizer, seed=0)
    model.load_state_dict(weights_of(work))
    prompts = [TASKS["mini_qa"].prompt(e) for e in TASKS["mini_qa"].test()[:5]]
    alone = greedy_responses(model, tokenizer, prompts, EvaluationConfig(examples=0, batch_size=1, max_new_tokens=5))
    whole = greedy_responses(model, tokenizer, prompts, EvaluationConfig(examples=0, batch_size=5, max_new_tokens=5))
    assert alone == whole
