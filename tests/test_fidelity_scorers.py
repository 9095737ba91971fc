"""The scorers that retraining judges."""

import pytest
import torch

from support.fidelity import scorers
from support.fidelity.retraining import Recipe, Retraining
from tests.made_up import reviews


@pytest.fixture(scope="module")
def retraining():
    return Retraining(reviews(24), Recipe(epochs=2, learning_rate=1e-3, batch_size=8))


@pytest.fixture
def question(retraining):
    path = retraining.path(torch.arange(24), seed=0, shares=(0.5, 1.0))
    return scorers.Question(path, retraining.reviews, reviews(5, seed=1))


def test_every_similarity_has_a_row_per_query_and_a_column_per_review(question):
    for scorer in scorers.SIMILARITIES.values():
        scores = scorer(question)
        assert scores.shape == (5, 24)
        assert scores.isfinite().all()


def test_label_signs_are_positive_where_labels_agree(question):
    agree = question.queries.labels[:, None] == question.train.labels[None]
    assert torch.equal(scorers.same_label(question) > 0, agree)
    signed = scorers.with_label_sign(lambda _: torch.ones(5, 24))(question)
    assert torch.equal(signed, scorers.same_label(question))


@pytest.mark.parametrize("scorer", [scorers.tf_idf, scorers.bm25], ids=["TF-IDF", "BM25"])
def test_texts_are_nearest_to_themselves(question, scorer):
    mirror = scorers.Question(question.path, question.train, question.train)
    scores = scorer(mirror)
    assert (scores.diagonal() >= scores.amax(dim=1) - 1e-6).all()


def test_ekfac_scores_at_the_end_are_the_engine_s(question):
    engine = scorers.EkfacInfluence(question.trained(), hessian_regularization=0.01)
    train, queries = question.train, question.queries
    engine.fit(scorers.batches(train))
    ((_, found),) = scorers.ekfac_at(question.path[-1], question, (0.01,))
    for name, scores in found.all().items():
        expected = engine.score(scorers.batches(queries), scorers.batches(train), name)
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)


def test_unit_residual_scores_forget_how_wrong_the_model_is_about_a_review(question):
    ((_, found),) = scorers.ekfac_at(question.path[-1], question, (0.01,))
    with torch.no_grad():
        p = question.trained()(question.train.vectors).softmax(dim=1)
    wrong = (p - torch.nn.functional.one_hot(question.train.labels, 2)).norm(dim=1)
    torch.testing.assert_close(found.all()["unit residual"] * wrong, found.influences)


@pytest.mark.parametrize("joint", [True, False])
def test_exact_scores_approach_gradient_products_as_damping_grows(question, joint):
    ((_, found),) = scorers.exact_at(question.path[-1], question, (1e9,), joint=joint)
    products = scorers.gradient_products(question.path[-1], question)["gradient dot product"]
    torch.testing.assert_close(found.influences * 1e9, products, rtol=1e-4, atol=1e-9)
