"""What a model that writes is asked: all of a text, a completion, an answer; long texts to their end."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset

from support.job.errors import DatasetNotUsable
from support.job.settings import Question, Subject
from support.job.tasks import load_task
from support.language import IGNORED
from tests.tiny_language import make_model

CPU = torch.device("cpu")
MESSAGES = [
    {"role": "system", "content": "the plot"},
    {"role": "user", "content": "film of"},
    {"role": "assistant", "content": "dull"},
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "great laughs"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def read(model, tmp_path):
    """Rows as a task reads them; `asked` are queries."""

    def examples(rows, asked=False, model=model, **settings):
        task = load_task(Subject(model=str(model), **settings), CPU)
        texts = task.texts(Dataset.from_list(rows), "mine", asked)
        question = Question(new_tokens=3) if asked else None
        return task.examples(texts, np.arange(len(rows)), tmp_path / "tokens", question)

    return examples


def targets(examples, number=0):
    """The words that an example asks about."""
    _, labels = examples.batch([number], CPU)
    words = [examples.tokenizer.decode([one]) for row in labels for one in row[1:].tolist() if one != IGNORED]
    return " ".join(words)


def test_all_of_a_text_is_asked_but_its_first_word(read):
    assert targets(read([{"text": "the film who laughs"}])) == "film who laughs"


def test_of_a_prompt_with_its_completion_the_completion_alone_is_asked(read):
    rows = [{"prompt": "the film", "completion": "who laughs"}]
    for asked in (False, True):
        examples = read(rows, asked, prompt_column="prompt")
        assert targets(examples) == "who laughs"
        assert examples.described([0]) == {"prompt": ["the film"], "text": ["who laughs"]}


def test_of_a_conversation_what_the_assistant_says_is_asked(read):
    expected = "dull <|end|> great laughs <|end|>"
    assert targets(read([{"talk": MESSAGES}], conversation_column="talk")) == expected
    assert targets(read([{"messages": MESSAGES}], asked=True)) == expected


def test_a_conversation_without_an_answer_is_answered_by_the_model(read):
    asked = read([{"messages": MESSAGES[:4]}, {"messages": MESSAGES}], asked=True)
    ids = asked.tokens[0]["input_ids"]
    before = ids[: asked.tokens[0]["asked"].index(True)]
    assert asked.tokenizer.decode(before).endswith("<|user|> who <|end|> <|assistant|>")
    assert 1 <= len(ids) - len(before) <= 3


def test_a_prompt_may_be_a_conversation(read):
    rows = [{"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}]
    assert targets(read(rows, asked=True)) == "great laughs <|end|>"


def test_padding_is_no_token_though_it_is_the_end_token(read):
    inputs, labels = read([{"text": "the film <|end|>"}, {"text": "the film who laughs dull"}]).batch(
        [0, 1], CPU
    )
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert labels[0].tolist()[2:] == [0, IGNORED, IGNORED]


@pytest.mark.parametrize("length", [1, 2, 5, 6, 9, 10])
def test_in_pieces_each_word_but_the_first_is_asked_once(read, length):
    words = list(itertools.islice(itertools.cycle(["the", "film", "who", "laughs", "dull"]), length))
    rows = [{"text": " ".join(words)}, {"text": "plot"}]
    pieces = read(rows, pieces=True, max_tokens=4)
    assert targets(pieces) == " ".join(words[1:])
    assert pieces.batch([0], CPU)[0]["input_ids"].shape[1] <= 4
    cut = read(rows, max_tokens=4)
    assert targets(cut) == " ".join(words[1:4])


def test_what_is_known_of_pieces_adds_up_by_example(read):
    examples = read(
        [{"text": "the film who laughs"}, {"text": "plot"}, {"text": "a b c d e"}], pieces=True, max_tokens=3
    )
    pieces = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    assert examples.added_up(pieces, [0, 1, 2]).tolist() == [[3, 4, 24]]
    assert examples.added_up(pieces[:, :3], [1, 2]).tolist() == [[1, 6]]


def test_pieces_that_are_all_prompt_are_left_out(read):
    rows = [{"prompt": "the film who laughs dull", "completion": "great"}]
    inputs, _ = read(rows, prompt_column="prompt", pieces=True, max_tokens=3).batch([0], CPU)
    assert len(inputs["input_ids"]) == 1


def test_training_examples_that_ask_nothing_are_counted_and_told(read):
    rows = [{"prompt": "", "completion": ""}, {"prompt": "the film who", "completion": "dull"}]
    told = read(rows, prompt_column="prompt", max_tokens=3).told
    assert told.startswith("Of 2 training examples 2 ask about no token, being empty or all prompt")
    assert read([{"text": "the film"}]).told == ""


def refused(read, rows, told, **settings):
    with pytest.raises(DatasetNotUsable, match=told):
        read(rows, **settings)


@pytest.mark.parametrize(
    "rows", [[{"prompt": "the film who laughs", "completion": "dull"}], [{"prompt": "a b c d"}]]
)
def test_a_query_whose_prompt_is_longer_than_is_read_is_refused_by_its_row(read, rows):
    told = r"^Row 0 asks after a prompt of 4 tokens, and 4 are read at most\. Shorten it, or, .* --max-tokens"
    refused(read, rows, told, asked=True, max_tokens=4)


def test_a_query_that_asks_nothing_is_refused(read):
    refused(read, [{"text": "film"}], "^Row 0 asks about no token", asked=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "'mine' has no column 'text'. There are: said, answer. Say which with --text-column, --pro"),
        ({"prompt_column": "said"}, "no column 'completion'"),
        ({"conversation_column": "talk"}, "no column 'talk'"),
    ],
)
def test_a_column_that_is_missing_is_refused_with_those_that_are_there(read, settings, told):
    refused(read, [{"said": "a", "answer": "b"}], told, **settings)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": None}, "has None for text, which is to be text. Leave it out, or see --text-column"),
        ({"prompt": "a", "completion": None}, "has None for completion, .* see --completion-column"),
        ({"messages": []}, r"has \[\] for messages, which is to be a list of turns with role and content"),
        ({"messages": [{"role": "user"}]}, "has .* for messages, .* see --conversation-column"),
    ],
)
def test_a_row_that_is_of_no_use_is_named_with_what_would_do(read, row, told):
    columns = {"prompt_column": "prompt"} if "prompt" in row else {}
    columns |= {"conversation_column": "messages"} if "messages" in row else {}
    whole = {"text": "a", "prompt": "a", "completion": "b", "messages": MESSAGES}
    refused(read, [{name: whole[name] for name in row}, row], f"^Row 1 {told}", **columns)


def test_a_conversation_without_a_chat_template_is_refused(read, tmp_path):
    told = r"^Row 0 is a conversation, and the tokenizer of --model .* has no chat template\. Name a model"
    refused(read, [{"messages": MESSAGES}], told, asked=True, model=make_model(tmp_path, template=None))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ messages|length }}", "is a conversation of which the chat template writes the beginning anew"),
        ("{{ raise_exception('no system here') }}", "no system here"),
    ],
)
def test_a_conversation_that_the_template_does_not_take_is_refused(read, tmp_path, template, told):
    model = make_model(tmp_path, template=template)
    for row in ({"messages": MESSAGES}, {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}):
        refused(read, [row], f"^Row 0 .*{told}", asked=True, model=model)
