from firstlab.data.prompts import qa_prompt, summarization_prompt, translation_prompt


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
