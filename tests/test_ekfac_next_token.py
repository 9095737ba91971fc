"""Models that write: each token from those before it, on tiny random models in float64."""

import itertools
from functools import partial

import pytest
import torch
import transformers

from support.ekfac import Categorical, EachToken, EkfacInfluence, NextToken
from support.ekfac.batches import IGNORED
from support.ekfac.draws import drawn
from support.ekfac.errors import LabelsMismatch, NothingAsked, OutputsNotSupported
from support.model import require_gradients_only
from tests.tiny_writers import (
    DAMPING,
    VOCABULARY,
    assert_same,
    fitted,
    gpt2,
    gradients,
    llama,
    loss,
    parts,
    ready,
    texts,
)


@pytest.fixture(params=[llama, gpt2], ids=lambda build: build.__name__)
def model(request):
    return ready(request.param)


BATCH = texts(5, 3, 6, 2)
QUERIES = texts(4, 5, seed=1)


def test_gradients_are_autograds_example_by_example(model):
    engine = fitted(model, [BATCH], hessian_regularization=1e9)
    found = engine.influence_factors(*parts(BATCH))
    for row, by_layer in enumerate(gradients(model, BATCH)):
        for name, gradient in by_layer.items():
            assert_same(1e9 * found[name][row], gradient, 1e-6)


def test_the_loss_is_the_models_own_summed_over_targets(model):
    logits = model(**parts(BATCH)[0]).logits
    expected = torch.stack([loss(model, BATCH, row) for row in range(4)])
    assert_same(NextToken().loss(logits, BATCH["labels"]), expected)
    targets = torch.tensor([4, 2, 5, 1])
    assert_same(NextToken(mean=True).loss(logits, BATCH["labels"]), expected / targets)


@pytest.mark.parametrize("other", [{"width": 9}, {"left": True}, {"left": True, "width": 8}])
def test_padding_on_either_side_changes_nothing(model, other):
    if other.get("left") and "GPT2" in type(model).__name__:
        pytest.skip("GPT-2 counts positions from the left, padding included")
    other = texts(5, 3, 6, 2, **other)
    one, two = fitted(model, [BATCH]), fitted(model, [other])
    assert_same(
        two.influences(*parts(QUERIES), *parts(other)), one.influences(*parts(QUERIES), *parts(BATCH))
    )


def rows(batch, chosen):
    return {name: part[chosen] for name, part in batch.items()}


def test_batches_and_order_change_nothing(model):
    whole = fitted(model, [BATCH])
    cut = fitted(model, [rows(BATCH, [2]), rows(BATCH, [3, 0]), rows(BATCH, [1])])
    asked = (*parts(QUERIES), *parts(BATCH))
    assert_same(cut.influences(*asked), whole.influences(*asked))
    scores = whole.score([QUERIES], [rows(BATCH, [0, 1]), rows(BATCH, [2, 3])])
    assert_same(scores, whole.influences(*asked))


@pytest.mark.filterwarnings("ignore::support.ekfac.errors.NothingAsked")
def test_tokens_add_up_to_texts_and_completions_of_one_token_to_the_whole(model):
    engine = fitted(model, [BATCH])
    asked = (*parts(QUERIES), *parts(BATCH))
    by_token = engine.token_influences(*asked)
    assert_same(by_token.sum(dim=2), engine.influences(*asked))
    assert by_token[:, BATCH["attention_mask"] == 0].count_nonzero() == 0
    total = 0
    for place in range(1, 5):
        one = torch.full_like(QUERIES["labels"], IGNORED)
        one[:, place] = QUERIES["labels"][:, place]
        total = total + engine.influences(parts(QUERIES)[0], one, *parts(BATCH))
    assert_same(total, engine.influences(*asked))


def test_the_mean_of_sampled_fishers_is_that_of_all_texts_of_labels():
    """By enumeration: every text of labels, by its probability, target for target the model's own."""
    torch.manual_seed(0)
    outputs, labels = torch.randn(1, 3, 3).double(), torch.tensor([[0, 1, 2]])
    p = outputs.softmax(dim=2)
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for text in itertools.product(range(3), repeat=2):
        direction = torch.zeros(3, 3, dtype=torch.float64)
        for place, token in enumerate(text):
            direction[place] = p[0, place] - torch.eye(3)[token]
        weight = p[0, 0, text[0]] * p[0, 1, text[1]]
        expected += weight * torch.outer(direction.flatten(), direction.flatten())
    found = torch.zeros_like(expected)
    for seed in range(4000):
        draws = partial(drawn, str(seed), labels, None)
        for direction in NextToken(samples=2).fisher_directions(outputs, draws, labels):
            found += torch.outer(direction.flatten(), direction.flatten()) / 4000
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_an_example_without_targets_has_no_say(model):
    batch = texts(5, 3, 6, 2)
    batch["labels"][1] = IGNORED
    told = r"^Examples without a target: 1, the first in row 1\. .* Leave them out"
    with pytest.warns(NothingAsked, match=told):
        engine = fitted(model, [batch])
    assert engine.examples == 4
    with pytest.warns(NothingAsked, match=told):
        found = engine.influences(*parts(QUERIES), *parts(batch))
    assert found[:, 1].count_nonzero() == 0
    assert found[:, 0].count_nonzero() == 2


def test_labels_and_outputs_that_do_not_fit_are_told(model):
    with pytest.raises(LabelsMismatch, match="at a fit too.*-100 at padding"):
        fitted(model, [parts(BATCH)[0]])
    unknown = BATCH | {"labels": BATCH["labels"].clone()}
    unknown["labels"][0, 1] = 9
    with pytest.raises(LabelsMismatch, match="Label 9 is neither -100 nor one of the 7 tokens"):
        fitted(model, [unknown])
    with pytest.raises(
        LabelsMismatch, match=r"int64 of shape \(4,\), expected whole numbers of shape \(4, 6\)"
    ):
        fitted(model, [BATCH | {"labels": torch.ones(4, dtype=torch.int64)}])
    with pytest.raises(OutputsNotSupported, match="use likelihood=NextToken"):
        EkfacInfluence(model, likelihood=Categorical()).fit([BATCH])


def test_saved_curvature_of_a_model_that_writes_is_loaded_and_known_again(model, tmp_path):
    engine = fitted(model, [BATCH])
    engine.save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(tmp_path / "curvature", model, likelihood=NextToken(), **DAMPING)
    asked = (*parts(QUERIES), *parts(BATCH))
    assert torch.equal(loaded.influences(*asked), engine.influences(*asked))


def test_a_class_for_each_token_is_asked_where_it_stands():
    """Gradients are autograd's of the summed cross-entropy; padding and −100 change nothing."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=4, intermediate_size=5, num_hidden_layers=2, num_labels=3,
        num_attention_heads=2, max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForTokenClassification(config).double().eval()
    require_gradients_only(model, ("intermediate", "classifier"))
    batch = texts(5, 3)
    batch["labels"] = torch.where(batch["labels"] == IGNORED, IGNORED, batch["labels"] % 3)
    batch["labels"][0, 2] = IGNORED
    engine = EkfacInfluence(model, likelihood=EachToken(), **DAMPING).fit([batch])
    for layer in engine.curvature.values():
        layer.eigenvalues.fill_(1 - DAMPING["hessian_regularization"])
    found, gradients = engine.influences(*parts(batch)), []
    for row, length in enumerate((5, 3)):
        inputs = {name: part[row : row + 1, :length] for name, part in parts(batch)[0].items()}
        labels = batch["labels"][row, :length]
        asked = torch.nn.functional.cross_entropy(model(**inputs).logits[0], labels, reduction="sum")
        tracked = [weight for weight in model.parameters() if weight.requires_grad]
        gradients.append(torch.cat([one.flatten() for one in torch.autograd.grad(asked, tracked)]))
    gradients = torch.stack(gradients)
    assert_same(found, gradients @ gradients.T)


def test_a_label_at_padding_is_refused_by_its_place(model):
    batch = BATCH | {"labels": BATCH["labels"].clone()}
    batch["labels"][1, 4] = 2
    with pytest.raises(LabelsMismatch, match="label 2 at position 4, which its attention_mask calls padding"):
        fitted(model, [batch])
