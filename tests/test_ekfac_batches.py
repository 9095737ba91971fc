"""What people really bring: batches of every form, labels of every kind, loaders in any order. Each is
right, or refused by name with a cure."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from support.ekfac import Categorical, EkfacInfluence, ExactInfluence, Gaussian, blocks, errors
from support.ekfac.batches import count_of, refuse_other_labels
from support.ekfac.blocks import blocks_of
from support.ekfac.storage import read
from tests.dense import PAD, assert_same, labels, perceptron, sentences, token_classifier, vectors

X, Y = sentences(5, 3, 4, 2, 5), labels(5)


def engine(model=None, x=X, **settings):
    return EkfacInfluence(model or token_classifier(), **settings).fit([(x,)])


# Mappings


class OfNames(nn.Module):
    """Takes what a collator gives, by name, and answers as a Hugging Face model does."""

    def __init__(self):
        super().__init__()
        self.inner = token_classifier()
        self.eval()

    def forward(self, input_ids, attention_mask=None):
        assert torch.equal(attention_mask.bool(), self.inner.token_mask(input_ids))
        return SimpleNamespace(logits=self.inner(input_ids))


class Looking(OfNames):
    """Looks at what its mask calls padding."""

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.inner(input_ids))


def as_mapping(x, y=None):
    batch = {"input_ids": x, "attention_mask": (x != PAD).long()}
    return batch if y is None else batch | {"labels": y}


def test_a_mapping_of_tensors_says_what_its_tensors_say():
    expected, asked = engine(), (X[:2], Y[:2], X, Y)
    found = EkfacInfluence(OfNames()).fit([as_mapping(X[:3]), as_mapping(X[3:], Y[3:])])
    inputs = as_mapping(X[:2]), Y[:2], as_mapping(X), Y
    assert_same(found.influences(*inputs), expected.influences(*asked))
    assert_same(found.token_influences(*inputs), expected.token_influences(*asked))
    assert_same(found.influences_by_label(*inputs[:3]), expected.influences_by_label(*asked[:3]))
    assert_same(found.self_influences(*inputs[2:]), expected.self_influences(X, Y))
    scores = found.score([as_mapping(X[:2], Y[:2])], [as_mapping(X[:4], Y[:4])], "relative")
    assert_same(scores, expected.score([(X[:2], Y[:2])], [(X[:4], Y[:4])], "relative"))
    assert found.plan([as_mapping(X, Y)], []).tokens == 19


def test_what_a_mapping_has_once_for_all_examples_is_left_whole():
    inputs = as_mapping(sentences(5, 3, 4, 2, 5, padded_to=7))
    inputs |= {"position_ids": torch.arange(7)[None], "features": vectors(5, 7)}
    (block,) = blocks_of(inputs, None, lambda batch: batch["attention_mask"].bool())
    assert block.inputs["input_ids"].shape == (5, 5)
    assert block.inputs["position_ids"].shape == (1, 7)
    assert_same(block.inputs["features"], vectors(5, 7)[block.rows])


def test_a_curvature_of_mappings_knows_its_model_too(tmp_path):
    fitted = EkfacInfluence(OfNames()).fit([as_mapping(X)])
    fitted.save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(tmp_path / "curvature", OfNames())
    loaded.save(tmp_path / "again")
    # The digest of all tensors, the probe's among them, is part of the metadata.
    assert read(tmp_path / "again").metadata == read(tmp_path / "curvature").metadata


@pytest.mark.parametrize("lengths", [(5, 3, 4), (3, 5, 4), (5, 5, 5)])
def test_a_mask_that_hides_tokens_which_the_model_looks_at_is_noticed(lengths):
    batch = as_mapping(sentences(*lengths))
    batch["attention_mask"][:, -1:] = 0
    batch["attention_mask"][:, 0] = 1
    with pytest.raises((errors.LayerNotSupported, errors.OutputsNotSupported), match="padding"):
        EkfacInfluence(Looking()).fit([batch])


def test_a_mask_of_numbers_is_a_mask():
    model = token_classifier()
    model.token_mask = lambda ids: (ids != PAD).long()
    assert torch.equal(EkfacInfluence(model).passes.token_mask(X), X != PAD)


# Inputs


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (X, "is a Tensor.*wants \\(inputs, labels"),
        ((X.numpy(),), "inputs are ndarray"),
        ((X.tolist(), Y), "inputs are list"),
        ({}, "inputs are nothing"),
        ({"input_ids": X.tolist()}, "inputs are list"),
        ((torch.tensor(3), Y), "inputs are Tensor"),
        ("text", "is a str"),
    ],
)
def test_other_batches_are_named(batch, words):
    with pytest.raises(errors.BatchNotSupported, match=words):
        EkfacInfluence(token_classifier()).fit([batch])


@pytest.mark.parametrize(("inputs", "words"), [(X.numpy(), "ndarray"), ({}, "nothing")])
def test_inputs_that_are_no_tensors_are_named_wherever_they_come(inputs, words):
    with pytest.raises(errors.BatchNotSupported, match=f"inputs are {words}"):
        count_of(inputs)


def test_an_example_of_nothing_but_padding_is_refused_by_its_row():
    with pytest.raises(errors.BatchNotSupported, match="Row 1 of a batch is all padding"):
        engine().influences(X, Y, torch.cat([X[:1], X[:1] * 0]), Y[:2])


@pytest.mark.parametrize("count", [0, 5])
def test_scores_have_an_entry_for_each_example_of_a_batch_an_empty_one_too(count):
    fitted, x, y = engine(), X[:count], Y[:count]
    assert fitted.influences(x, y, X, Y).shape == (count, 5)
    assert fitted.influences_by_label(X, Y, x).shape[:2] == (5, count)
    assert fitted.token_influences(X, Y, x, y).shape[:2] == (5, count)
    assert fitted.self_influences(x, y).shape == (count,)


# Labels


@pytest.mark.parametrize("wrong", [Y.tolist(), Y.numpy()], ids=["list", "numpy"])
def test_labels_that_are_no_tensor_are_named_with_the_cure(wrong):
    with pytest.raises(errors.BatchNotSupported, match=r"Labels are a .*torch.tensor\(labels\)"):
        refuse_other_labels(X, wrong)
    with pytest.raises(errors.BatchNotSupported, match=r"for labels.*torch.tensor\(labels\)"):
        engine().score([(X, wrong)], [(X, Y)])


def test_labels_that_are_missing_are_told():
    with pytest.raises(errors.BatchNotSupported, match="NoneType for labels"):
        engine().score([(X,)], [(X, Y)])
    with pytest.raises(errors.LabelsMismatch, match="There are no labels"):
        Categorical().loss_direction(torch.zeros(2, 2), None)


def test_one_example_without_its_batch_dimension_is_told():
    with pytest.raises(errors.LabelsMismatch, match="examples come with 1 labels"):
        engine().influences(X[0], Y[0], X, Y)


def test_labels_with_columns_are_not_cut_as_tokens_are():
    fitted = engine(token_classifier(classes=5), likelihood=Gaussian())
    short = sentences(2, 3, padded_to=5)
    assert fitted.influences(short, vectors(2, 5), X, vectors(5, 5)).shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.int32])
def test_labels_may_be_whole_numbers_of_any_size(dtype):
    fitted = engine()
    assert_same(fitted.influences(X, Y.to(dtype), X, Y.to(dtype)), fitted.influences(X, Y))
    wide = engine(perceptron(4, 200), vectors(5, 4))
    assert wide.self_influences(vectors(5, 4), (Y + 100).to(torch.int8)).shape == (5,)


# Loaders

DATA = TensorDataset(X, Y)
AT_RANDOM = {
    "shuffle": {"shuffle": True},
    "weighted": {"sampler": WeightedRandomSampler([0.2] * 5, 5)},
    "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(DATA), 2, drop_last=False)},
}


@pytest.mark.parametrize("order", AT_RANDOM.values(), ids=AT_RANDOM)
def test_a_loader_that_draws_at_random_is_refused_on_either_side(order):
    fitted, loader = engine(), DataLoader(DATA, **order)
    for sides in ((loader, [(X, Y)]), ([(X, Y)], loader)):
        with pytest.raises(errors.LoaderShuffles, match=r"RandomSampler.*shuffle=False"):
            fitted.score(*sides)


def test_the_exact_solve_refuses_a_loader_that_draws_at_random_too():
    exact, shuffled = ExactInfluence(token_classifier()), DataLoader(DATA, shuffle=True)
    with pytest.raises(errors.LoaderShuffles):
        exact.inner_products([(X, Y)], [(X, Y)], shuffled)


def test_a_fit_takes_examples_in_any_order():
    found = EkfacInfluence(token_classifier()).fit(DataLoader(DATA, batch_size=2, shuffle=True))
    assert_same(found.influences(X, Y), engine().influences(X, Y))


class OneAtATime:
    """As a DataLoader with persistent workers: to begin again is to break off, perhaps in another order."""

    def __init__(self, rolled=0):
        self.times, self.rolled, self.left = 0, rolled, iter(())

    def __iter__(self):
        self.times += 1
        x, y = (side.roll(self.rolled * self.times, 0) for side in (X, Y))
        self.left = iter([(x[:2], y[:2]), (x[2:], y[2:])])
        return self

    def __next__(self):
        return next(self.left)


def test_a_loader_may_be_both_sides_though_it_has_one_iterator(monkeypatch):
    monkeypatch.setattr(blocks, "EXAMPLES_AHEAD", 1)
    fitted, loader = engine(memory_budget=1), OneAtATime()
    assert_same(fitted.score(loader, loader), fitted.influences(X, Y))


def test_a_loader_that_changes_its_order_between_two_groups_of_queries_is_refused():
    with pytest.raises(errors.LoaderShuffles, match="another order, than the time before"):
        engine(memory_budget=1).score([(X, Y)], OneAtATime(rolled=1))
