import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from firstlab.config.build import model_path
from firstlab.data import prompts
from firstlab.data.encoding import (
    Row,
    collate_prompts,
    collate_training,
    encode,
    eos_id,
    fit_prompt,
    pad_id,
    prompt_ids,
    response_ids,
)
from firstlab.data.mini_qa import MiniQA
from firstlab.data.mini_summarization import MiniSummarization
from firstlab.data.mini_translation import MiniTranslation
from firstlab.data.prompts import qa_prompt, summarization_prompt, translation_prompt
from firstlab.data.task import Example
from support.texts import tiny_tokenizer

BOS, EOS = 0, 1
TOKENIZER = tiny_tokenizer()


class Translation(prompts.Translation):
    language_names = ("English", "German")
    train_pool = test = lambda self: []


TASK = Translation()
FRAME = len(prompt_ids(TOKENIZER, TASK.prompt(Example("e", "", ("r",)))))


def bare(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_prompts_have_what_generation_sees():
    assert prompt_ids(TOKENIZER, "the house") == [BOS, *bare("the house")] == TOKENIZER("the house")["input_ids"]
    assert prompt_ids(tiny_tokenizer(bos=False), "the house") == bare("the house")
    assert prompt_ids(tiny_tokenizer(closes=True), "the house") == [BOS, *bare("the house")]
    assert prompt_ids(tiny_tokenizer(bos=False, closes=True), "") == []


def word_tokenizer(split):
    """A vocabulary of whole words, which its special tokens are part of."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "the": 4}, unk_token="<unk>"))
    words.pre_tokenizer = split
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    "tokenizer",
    [
        AutoTokenizer.from_pretrained(model_path("bundled:nano")),
        tiny_tokenizer(pad=True),
        tiny_tokenizer(closes=True),
        word_tokenizer(pre_tokenizers.Whitespace()),
        word_tokenizer(pre_tokenizers.WhitespaceSplit()),
    ],
    ids=["nano", "bytes", "closes", "words", "words-at-spaces"],
)
def test_names_of_special_tokens_are_text(tokenizer):
    text = "</s> the </s> the <pad> <s> the </s>"
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    first, *prompt = prompt_ids(tokenizer, text)
    *response, last = response_ids(tokenizer, text)
    assert first == tokenizer.bos_token_id and last == tokenizer.eos_token_id
    assert prompt == response and not special & set(prompt)
    assert tokenizer.unk_token is not None or tokenizer.decode(prompt, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize(
    "task",
    [
        MiniTranslation("en-de", test_size=50),
        MiniTranslation("en-zh", test_size=50),
        MiniSummarization(test_size=50),
        MiniQA(test_size=50),
    ],
)
def test_other_texts_are_encoded_as_by_the_tokenizer(task):
    tokenizer = AutoTokenizer.from_pretrained(model_path("bundled:nano"))
    for example in task.test():
        prompt, (answer, *_) = task.prompt(example), example.references
        assert prompt_ids(tokenizer, prompt) == tokenizer(prompt)["input_ids"]
        assert response_ids(tokenizer, answer)[:-1] == tokenizer(answer, add_special_tokens=False)["input_ids"]


def test_markup_in_a_prompt_stands_for_special_tokens_where_the_task_says_so():
    class Chat(Translation):
        markup = True

        def prompt(self, example, source=None):
            return f"the</s>{example.source if source is None else source}</s>"

    example = Example("a", "house", ("a </s> b",))
    prompt, response = encode(Chat(), example, TOKENIZER, 64)
    assert prompt == [BOS, *bare("the"), EOS, *bare("house"), EOS] == prompt_ids(TOKENIZER, "the</s>house</s>", True)
    assert EOS not in response[:-1]
    assert EOS not in encode(Translation(), Example("a", "</s>", ("b",)), TOKENIZER, 64)[0]
    shortened = Example("a", "house " * 50, ("b",))
    assert encode(Chat(), shortened, TOKENIZER, 30)[0][-1] == EOS


def adds_bos(kind):
    """Tokenizers that put BOS in front: by their post-processor, or because `add_bos_token` says so."""
    if kind == "post-processor":
        return tiny_tokenizer()
    if kind == "both ends":
        return tiny_tokenizer(closes=True)
    vocabulary = TOKENIZER.get_vocab()
    merges = [tuple(pair) for pair in json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["merges"]]
    return GPT2Tokenizer(vocabulary, merges, bos_token="<s>", eos_token="</s>", add_bos_token=True)


@pytest.mark.parametrize("kind", ["post-processor", "both ends", "add_bos_token"])
def test_a_prompt_that_begins_with_bos_gets_no_second_one(kind):
    tokenizer = adds_bos(kind)
    once = [BOS, *bare("the house")]
    assert prompt_ids(tokenizer, "the house") == prompt_ids(tokenizer, "the house", markup=True) == once
    assert tokenizer("<s>the house")["input_ids"][:2] == [BOS, BOS]
    assert prompt_ids(tokenizer, "<s>the house", markup=True) == once

    class Chat(Translation):
        markup = True

        def prompt(self, example, source=None):
            return f"<s>{example.source if source is None else source}</s>answer:"

    prompt, _ = encode(Chat(), Example("a", "house " * 50, ("b",)), tokenizer, 30)
    assert prompt.count(BOS) == 1 and prompt[0] == BOS


def test_responses_end():
    assert response_ids(TOKENIZER, "das Haus") == [*bare("das Haus"), EOS]
    assert response_ids(tiny_tokenizer(closes=True), "das Haus") == [*bare("das Haus"), EOS]


def test_an_ordinary_token_to_pad_with_stays():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "e"
    assert tokenizer.decode(response_ids(tokenizer, "see")[:-1]) == "see"


def test_padding_without_a_pad_token_changes_no_tokenizer():
    tokenizer = tiny_tokenizer()
    assert pad_id(tokenizer) == EOS and tokenizer.pad_token is None
    assert pad_id(tiny_tokenizer(pad=True)) == 2


def test_a_tokenizer_without_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token, so responses could not end: set tokenizer.eos_token"):
        eos_id(tokenizer)


def units(text):
    return text.split() if " " in text else list(text)


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(
        st.lists(st.sampled_from(["the", "red", "Fluss", "naïve", "🏠", "x1-y2"]), min_size=1, max_size=40).map(
            lambda words: " ".join(["go", *words])
        ),
        st.text(st.sampled_from("红房子在老河边，小狗睡了。"), min_size=2, max_size=40),
    ),
    st.integers(4, 60),
)
def test_a_fitted_prompt_is_whole_and_maximal(text, room):
    example = Example("e", text, ("r",))
    limit = FRAME + room
    prompt = fit_prompt(TASK, example, TOKENIZER, limit)
    assert len(prompt_ids(TOKENIZER, prompt)) <= limit
    assert prompt.endswith("\n\n### Response:\n")
    kept = prompt.split("### Input:\n")[1].removesuffix("\n\n### Response:\n")
    assert kept and text.startswith(kept)
    if kept != text:
        separator = " " if " " in text else ""
        longer = separator.join(units(text)[: len(units(kept)) + 1]) if " " in text else text[: len(kept) + 1]
        assert text.startswith(longer) and longer != kept
        assert len(prompt_ids(TOKENIZER, TASK.prompt(example, longer))) > limit


def test_the_question_stays_behind_a_shortened_passage():
    task, example = MiniQA(), Example("e", "the red house " * 50, ("r",), question="who sleeps?")
    prompt = fit_prompt(task, example, TOKENIZER, 120)
    assert prompt.endswith("### Question:\nwho sleeps?\n\n### Response:\n") and len(prompt) < len(task.prompt(example))


def test_one_endless_word_is_cut_too():
    prompt = fit_prompt(TASK, Example("e", "x" * 4000, ("r",)), TOKENIZER, FRAME + 70)
    assert "\n" + "x" * 64 + "\n" in prompt


@pytest.mark.parametrize("before", ["", "  "])
def test_a_first_word_that_does_not_fit_is_cut_in_characters(before):
    family = "👨\u200d👩\u200d👧\u200d👦"  # 25 bytes, and none of them merged
    example = Example("e", before + family * 2000, ("r",))
    room = len(prompt_ids(TOKENIZER, TASK.prompt(example, before + family * 2)))
    assert fit_prompt(TASK, example, TOKENIZER, room + 1) == TASK.prompt(example, before + family * 2)
    assert fit_prompt(TASK, example, TOKENIZER, room - 1) == TASK.prompt(example, before + (family * 2)[:-1])
    with pytest.raises(ValueError, match="leaves"):
        fit_prompt(TASK, example, TOKENIZER, FRAME + len(before) + 2)
    encode(TASK, example, TOKENIZER, FRAME + 40)


def test_white_space_of_every_kind_separates_words():
    example = Example("e", "the\u2028red\nhouse\u00a0sleeps " * 9, ("r",))
    assert fit_prompt(TASK, example, TOKENIZER, FRAME + 3).split("Input:\n")[1].startswith("the\n\n###")


def test_a_frame_that_does_not_fit_names_the_option():
    example = Example("e7", "the red house", ("r",))
    message = rf"data.max_length_lora leaves 10 tokens for the prompt of example 'e7', which has {FRAME} tokens before"
    with pytest.raises(ValueError, match=message):
        fit_prompt(TASK, example, TOKENIZER, 10)
    with pytest.raises(ValueError, match="data.max_prompt_length leaves"):
        fit_prompt(TASK, example, TOKENIZER, FRAME, "data.max_prompt_length")


def test_prompt_and_response_share_the_length():
    short = Example("e", "the red house", ("das rote Haus",))
    prompt, response = encode(TASK, short, TOKENIZER, 500)
    assert prompt == TOKENIZER(TASK.prompt(short))["input_ids"] and response == [*bare("das rote Haus"), EOS]
    # A long source gives way to the response.
    long = Example("e", "the red house " * 100, ("das rote Haus",))
    prompt, response = encode(TASK, long, TOKENIZER, FRAME + 40)
    assert response == [*bare("das rote Haus"), EOS]
    assert FRAME + 30 < len(prompt) + len(response) <= FRAME + 40


def test_a_response_is_cut_only_above_half():
    limit = 2 * FRAME + 20
    both = Example("e", "the red house " * 100, ("das rote Haus " * 100,))
    prompt, response = encode(TASK, both, TOKENIZER, limit)
    assert len(response) == limit // 2 and EOS not in response and len(prompt) <= limit - limit // 2
    # A short prompt leaves the response more than half.
    prompt, response = encode(TASK, Example("e", "the", ("das rote Haus " * 100,)), TOKENIZER, limit)
    assert len(prompt) + len(response) == limit and EOS not in response


ROWS = [Row(4, [0, 5, 6], [7, 1]), Row(2, [0, 5, 6, 8], [9, 9, 9, 1])]


def test_training_batches_pad_right():
    batch = collate_training(ROWS, pad=1, loss_on="response")
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[0, 5, 6, 7, 1, 1, 1, 1], [0, 5, 6, 8, 9, 9, 9, 1]],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8],
        "labels": [[-100, -100, -100, 7, 1, -100, -100, -100], [-100, -100, -100, -100, 9, 9, 9, 1]],
        "prompt_mask": [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]],
        "index": [4, 2],
    }
    assert all(value.dtype == torch.long for value in batch.values())


def test_loss_on_all_takes_every_real_token():
    batch = collate_training(ROWS, pad=1, loss_on="all")
    assert batch["labels"].tolist() == [[0, 5, 6, 7, 1, -100, -100, -100], [0, 5, 6, 8, 9, 9, 9, 1]]


def test_prompts_pad_left():
    batch = collate_prompts([Row(4, [0, 5, 6], []), Row(2, [0, 5, 6, 8], [])], pad=1)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 0, 5, 6], [0, 5, 6, 8]],
        "attention_mask": [[0, 1, 1, 1], [1, 1, 1, 1]],
        "index": [4, 2],
    }


def test_translation_prompt_is_the_papers():
    assert translation_prompt("Hello.", "English", "German") == (
        "### Instruction:\nTranslate the following sentences from English to German.\n\n"
        "### Input:\nHello.\n\n### Response:\n"
    )


def test_summarization_prompt_is_the_papers():
    assert summarization_prompt("News.") == (
        "### Instruction:\nSummarize the news article in around 100-200 words.\n\n### Input:\nNews.\n\n### Response:\n"
    )


def test_qa_prompt_is_the_papers():
    assert qa_prompt("Tea is hot.", "What is hot?") == (
        "### Instruction:\nAnswer the question based on the given passage.\n\n"
        "### Passage:\nTea is hot.\n\n### Question:\nWhat is hot?\n\n### Response:\n"
    )
