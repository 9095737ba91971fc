"""What a model says in words and numbers, and how names and words are told."""

import pytest
import torch
from torch.testing import assert_close

from support.chapters.influences import words_in_common
from support.chapters.preparation import print_sentiment_preds, strip_layer_names
from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper, class_probabilities
from tests.stand_in_hub import tiny_distilbert


@pytest.fixture(scope="module")
def model():
    return ModelLogitsWrapper(tiny_distilbert(seed=0))


@pytest.fixture(scope="module")
def dataset(imdb, tokenizer):
    return ImdbDataset(imdb["train"].select(range(11)), tokenizer, max_tokens=200)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_each_row_is_what_the_model_says_about_that_review_alone(model, dataset, batch_size):
    found = class_probabilities(model, dataset, batch_size)
    alone = [model(input_ids[None]).softmax(dim=1) for input_ids, _, _ in dataset]
    assert_close(found, torch.cat(alone))
    assert_close(found.sum(dim=1), torch.ones(11))


@pytest.mark.parametrize("shape", [(-1,), (1, -1)], ids=["one review", "a batch of one"])
def test_predictions_in_words_are_the_models_probabilities_and_the_true_label(model, dataset, capsys, shape):
    negative, positive = class_probabilities(model, dataset)[0].tolist()
    print_sentiment_preds(model, dataset[0][0].reshape(shape), torch.tensor(1))
    expected = f"positive {positive:6.1%}   negative {negative:6.1%}   true label: positive\n"
    assert capsys.readouterr().out == expected


def test_words_in_common_leave_out_stop_words_markup_and_case():
    one = "The ACTING was good.<br />Music!"
    other = "good music and the worst acting<br />of all"
    assert words_in_common(one, other) == ["acting", "good", "music"]


def test_layer_names_lose_what_they_share():
    names = ["model.distilbert.transformer.layer.0.ffn.lin1", "model.pre_classifier", "classifier"]
    assert strip_layer_names(names) == ["layer.0.ffn.lin1", "pre_classifier", "classifier"]
