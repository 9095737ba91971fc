"""What people really bring: batches of every form, shuffled loaders, layers and models that behave in
their own way. Each is right, or refused by name with a cure."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from support.ekfac import Categorical, EkfacInfluence, ExactInfluence, Gaussian
from support.ekfac.blocks import blocks_of, count_of, refuse_other_labels
from support.ekfac.curvature import DEFAULT_REGULARIZATION, damped_inverse
from support.ekfac.errors import (
    BatchNotSupported,
    LabelsMismatch,
    LayerNotSupported,
    LoaderShuffles,
    ModelInTrainingMode,
    NotFinite,
    OutputsNotSupported,
    WrongModel,
)
from support.ekfac.storage import read
from tests.dense import PAD, labels, perceptron, sentences, token_classifier, vectors

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
DAMPING = 1e-2


def engine(model=None, x=X, **settings):
    return EkfacInfluence(model or token_classifier(), **settings).fit([(x,)])


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class OfNames(nn.Module):
    """Takes what a collator gives, by name, and answers as a Hugging Face model does."""

    def __init__(self):
        super().__init__()
        self.inner = token_classifier()
        self.eval()

    def forward(self, input_ids, attention_mask=None):
        assert torch.equal(attention_mask.bool(), self.inner.token_mask(input_ids))
        return type("Output", (), {"logits": self.inner(input_ids)})()


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
    assert found.plan([as_mapping(X) | {"labels": Y}], []).tokens == 19


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
    with pytest.raises(BatchNotSupported, match=words):
        EkfacInfluence(token_classifier()).fit([batch])


@pytest.mark.parametrize("wrong", [Y.tolist(), Y.numpy()], ids=["list", "numpy"])
def test_labels_that_are_no_tensor_are_named_with_the_cure(wrong):
    fitted = engine()
    with pytest.raises(BatchNotSupported, match=r"Labels are a .*torch.tensor\(labels\)"):
        refuse_other_labels(X, wrong)
    with pytest.raises(BatchNotSupported, match=r"torch.tensor\(labels\)"):
        fitted.score([(X, wrong)], [(X, Y)])
    with pytest.raises(BatchNotSupported, match="NoneType for labels"):
        fitted.score([(X,)], [(X, Y)])


def test_one_example_without_its_batch_dimension_is_told():
    with pytest.raises(LabelsMismatch, match="examples come with 1 labels"):
        engine().influences(X[0], Y[0], X, Y)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(X, Y), shuffle=True),
        DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([0.2] * 5, 5)),
    ],
    ids=["shuffle", "weighted"],
)
def test_a_loader_that_draws_at_random_is_refused_on_either_side(loader):
    fitted = engine()
    for sides in ((loader, [(X, Y)]), ([(X, Y)], loader)):
        with pytest.raises(LoaderShuffles, match=r"RandomSampler.*shuffle=False"):
            fitted.score(*sides)


def test_a_loader_that_changes_its_order_between_two_groups_of_queries_is_refused():
    class Changing:
        def __init__(self):
            self.times = 0

        def __iter__(self):
            self.times += 1
            return iter([(X.roll(self.times, 0), Y.roll(self.times, 0))])

    fitted = engine(memory_budget=1)
    with pytest.raises(LoaderShuffles, match="another order, than the time before"):
        fitted.score([(X, Y)], Changing())


def test_a_fit_takes_examples_in_any_order():
    loader = DataLoader(TensorDataset(X), batch_size=2, shuffle=True)
    found = EkfacInfluence(token_classifier()).fit(loader)
    assert_same(found.influences(X, Y), engine().influences(X, Y))


class Gated(nn.Module):
    """Makes a tensor of its own that requires gradients; what `a` says goes on without them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.double().eval()

    def forward(self, x):
        gate = torch.sigmoid(self.a(x)).detach()
        hidden = x.new_zeros(len(x), 5).requires_grad_() + gate
        return self.c(torch.tanh(self.b(hidden)))


def plain_gradients(model, x, y):
    """Influence factors with a curvature of ones are gradients."""
    fitted = EkfacInfluence(model, hessian_regularization=1.0).fit([(x,)])
    for layer in fitted.curvature.values():
        layer.eigenvalues.zero_()
    return fitted.influence_factors(x, y)


def test_gradients_are_not_lost_behind_a_tensor_that_the_model_makes():
    model, x, y = Gated(), vectors(5, 4), labels(5)
    found = plain_gradients(model, x[:1], y[:1])
    nn.functional.cross_entropy(model(x[:1]), y[:1]).backward()
    for name in "bc":
        assert_same(found[name][0, :, :-1], model.get_submodule(name).weight.grad)
    assert not found["a"].any()


@pytest.mark.parametrize("where", ["inputs", "embeddings"])
def test_inputs_that_require_gradients_change_nothing_and_get_none(where):
    if where == "inputs":
        model, x = perceptron(4, 3, 2), vectors(5, 4)
        expected = engine(model, x).influences(x, Y)
        x.requires_grad_()
    else:
        model, x = token_classifier(), X
        expected = engine(model, x).influences(x, Y)
        model.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
    assert_same(engine(model, x).influences(x, Y), expected)
    assert x.grad is None


class Layered(nn.Module):
    """One linear layer, called as `call` says."""

    def __init__(self, call, layer=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last, self.call = layer(4, 3), nn.Linear(3, 2), call
        self.double().eval()

    def forward(self, x):
        return self.last(torch.tanh(self.call(self.layer, x)))


def test_a_layer_called_by_keyword_is_called_all_the_same():
    x = vectors(5, 4)
    expected = engine(Layered(lambda layer, x: layer(x)), x).influences(x, Y)
    found = engine(Layered(lambda layer, x: layer(input=x)), x).influences(x, Y)
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_is_right_or_refused():
    x = vectors(5, 4)
    expected = engine(Layered(lambda layer, x: layer(x)), x).influences(x, Y)
    reentrant = Layered(lambda layer, x: checkpoint(layer, x, use_reentrant=True))
    with pytest.raises(LayerNotSupported, match=r"'layer' is called under torch.no_grad\(\)"):
        engine(reentrant, x)
    other = Layered(lambda layer, x: layer(checkpoint(torch.tanh, x, use_reentrant=False)))
    assert engine(other, x).influences(x, Y).shape == expected.shape


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_linear_that_does_more_is_refused_by_name():
    with pytest.raises(LayerNotSupported, match=r"'layer'.*5.0e-01.*subclass of Linear"):
        engine(Layered(lambda layer, x: layer(x), Doubled), vectors(5, 4))


def test_batch_and_positions_exchanged_are_refused_though_both_have_one_size():
    class Exchanging(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
            self.double().eval()

        def forward(self, x):  # (2, 2, 4)
            return self.last(torch.tanh(self.layer(x.transpose(0, 1))).mean(dim=0))

    with pytest.raises(LayerNotSupported, match="batch and positions exchanged"):
        engine(Exchanging(), vectors(4, 4).view(2, 2, 4))


def test_a_model_that_sees_padding_is_refused():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = token_classifier()
            self.eval()

        def token_mask(self, ids):
            return self.inner.token_mask(ids)

        def forward(self, ids):
            return self.inner(ids) / ids.shape[1]

    with pytest.raises(OutputsNotSupported, match="Does the model see padding"):
        engine(Mean())


def test_a_model_that_sees_its_neighbours_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=0), nn.Linear(3, 2)).double().eval()
    with pytest.raises(OutputsNotSupported, match="other examples"):
        engine(model, vectors(5, 4))


def test_layers_without_any_gradient_score_zero():
    x = vectors(5, 4)
    dead = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    dead[0].bias.data -= 100
    fresh_lora = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    fresh_lora[1].weight.data.zero_()
    for model in (dead, fresh_lora.eval()):
        fitted = engine(model, x)
        assert (fitted.influences_by_layer(x, Y)["0"] == 0).all()
        assert fitted.influences(x, Y).shape == (5, 5)
        assert fitted.token_influences(x, Y, x, Y).shape == (5, 5, 1)
        assert fitted.influences_by_label(x, Y, x).shape == (5, 5, 2)
    assert engine(dead, x).influences(x[:0], Y[:0], x, Y).shape == (0, 5)


@pytest.mark.parametrize("empty", [True, False], ids=["no example", "some"])
def test_an_empty_batch_has_no_scores(empty):
    fitted, (x, y) = engine(), (X[:0], Y[:0]) if empty else (X, Y)
    assert fitted.influences_by_label(X, Y, x).shape[:2] == (5, len(x))
    assert fitted.token_influences(X, Y, x, y).shape[:2] == (5, len(x))
    assert fitted.self_influences(x, y).shape == (len(x),)


def test_a_single_class_is_refused_at_fit():
    with pytest.raises(OutputsNotSupported, match="one output.*Gaussian"):
        engine(perceptron(4, 1), vectors(5, 4))


def test_by_default_damping_is_what_predicted_retraining_best():
    """Chapter 09's recommendation, on nine banks; without damping float32 gives rounding noise."""
    assert EkfacInfluence(token_classifier()).hessian_regularization == DEFAULT_REGULARIZATION
    x = vectors(40, 6).float()
    x[:, 2], x[:, 3] = 0, x[:, 4]
    y = labels(40, 3)
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    found = engine(model, x).influences(x, y)
    x, model = x.double(), model.double()
    expected = engine(model, x).influences(x, y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_without_damping_directions_of_rounding_size_are_left_out():
    eigenvalues = torch.tensor([[1.0, 1e-3], [1e-9, 0.0]])
    expected = torch.tensor([[1.0, 1e3], [0.0, 0.0]])
    torch.testing.assert_close(damped_inverse(eigenvalues, 0), expected)
    assert damped_inverse(eigenvalues, 1e-12)[1, 1] == pytest.approx(1e12)


@pytest.mark.parametrize("regularization", [1e-40, 1e-320])
def test_results_that_are_not_finite_are_refused_before_they_are_returned(regularization):
    x, model = vectors(5, 4).float(), perceptron(4, 3, 2).float()
    fitted = engine(model, x, hessian_regularization=regularization)
    for layer in fitted.curvature.values():
        layer.eigenvalues.zero_()
    asks = (
        lambda: fitted.influences(x, Y),
        lambda: fitted.self_influences(x, Y),
        lambda: fitted.score([(x, Y)], [(x, Y)], "relative"),
        lambda: fitted.token_influences(x, Y, x, Y),
        lambda: fitted.influences_by_label(x, Y, x),
    )
    for ask in asks:
        with pytest.raises(NotFinite, match="hessian_regularization=.*Use a larger one, 0.01"):
            ask()


def test_auto_damping_of_a_curvature_of_zeros_divides_by_nothing_small():
    assert (damped_inverse(torch.zeros(2, 3), "auto") == 1).all()


class Activated(nn.Module):
    """What is done with the weights is no part of them."""

    def __init__(self, activation):
        super().__init__()
        self.inner, self.activation = token_classifier(), activation
        self.eval()

    def token_mask(self, ids):
        return self.inner.token_mask(ids)

    def forward(self, ids):
        return self.activation(self.inner(ids))


def test_curvature_is_not_loaded_by_a_model_that_does_something_else_with_the_same_weights(tmp_path):
    fitted = engine(Activated(torch.tanh))
    fitted.save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(tmp_path / "curvature", Activated(torch.tanh))
    assert_same(loaded.influences(X, Y), fitted.influences(X, Y))
    with pytest.raises(WrongModel, match="does something else with them.*Fit this one"):
        EkfacInfluence.load(tmp_path / "curvature", Activated(torch.relu))


def test_a_curvature_of_mappings_knows_its_model_too(tmp_path):
    fitted = EkfacInfluence(OfNames()).fit([as_mapping(X)])
    fitted.save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(tmp_path / "curvature", OfNames())
    loaded.save(tmp_path / "again")
    # The digest of all tensors, the probe's among them, is part of the metadata.
    assert read(tmp_path / "again").metadata == read(tmp_path / "curvature").metadata


class OneAtATime:
    """As a DataLoader with persistent workers: to begin again is to break off."""

    def __init__(self):
        self.left = iter(())

    def __iter__(self):
        self.left = iter([(X[:2], Y[:2]), (X[2:], Y[2:])])
        return self

    def __next__(self):
        return next(self.left)


def test_a_loader_may_be_both_sides_though_it_has_one_iterator():
    fitted = engine(memory_budget=1)
    loader = OneAtATime()
    assert_same(fitted.score(loader, loader), fitted.influences(X, Y))


def test_a_batch_sampler_that_draws_at_random_is_refused_too():
    drawn = BatchSampler(RandomSampler(TensorDataset(X, Y)), 2, drop_last=False)
    with pytest.raises(LoaderShuffles, match="RandomSampler"):
        engine().score([(X, Y)], DataLoader(TensorDataset(X, Y), batch_sampler=drawn))


def test_an_example_of_nothing_but_padding_is_refused_by_its_row():
    with pytest.raises(BatchNotSupported, match="Row 1 of a batch is all padding"):
        engine().influences(X, Y, torch.cat([X[:1], X[:1] * 0]), Y[:2])


class Looking(OfNames):
    """Looks at what its mask calls padding."""

    def forward(self, input_ids, attention_mask=None):
        return type("Output", (), {"logits": self.inner(input_ids)})()


@pytest.mark.parametrize("lengths", [(5, 3, 4), (3, 5, 4), (5, 5, 5)])
def test_a_mask_that_hides_tokens_which_the_model_looks_at_is_noticed(lengths):
    batch = as_mapping(sentences(*lengths))
    batch["attention_mask"][:, -1:] = 0
    batch["attention_mask"][:, 0] = 1
    with pytest.raises((LayerNotSupported, OutputsNotSupported), match="padding"):
        EkfacInfluence(Looking()).fit([batch])


def test_a_curvature_is_loaded_by_a_model_in_eval_mode_only(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double().eval()
    model[1].requires_grad_(False)
    engine(model, vectors(5, 4)).save(tmp_path / "curvature")
    before = model[1].running_mean.clone()
    with pytest.raises(ModelInTrainingMode, match=r"model.eval\(\)"):
        EkfacInfluence.load(tmp_path / "curvature", model.train())
    assert_same(model[1].running_mean, before)


def test_a_fit_that_failed_leaves_what_was_known_of_the_model():
    fitted = engine()
    known = fitted.probe
    fitted.model.outer.bias.data.fill_(torch.nan)
    with pytest.raises(NotFinite):
        fitted.fit([(X,)])
    assert fitted.probe is known


def test_labels_with_columns_are_not_cut_as_tokens_are():
    model = token_classifier(classes=5)
    fitted = EkfacInfluence(model, likelihood=Gaussian()).fit([(X,)])
    short = sentences(2, 3, padded_to=5)
    assert fitted.influences(short, vectors(2, 5), X, vectors(5, 5)).shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.int32])
def test_labels_may_be_whole_numbers_of_any_size(dtype):
    fitted = engine()
    assert_same(fitted.influences(X, Y.to(dtype), X, Y.to(dtype)), fitted.influences(X, Y))
    wide = engine(perceptron(4, 200), vectors(5, 4))
    assert wide.self_influences(vectors(5, 4), (Y + 100).to(torch.int8)).shape == (5,)


def test_missing_labels_are_told():
    with pytest.raises(LabelsMismatch, match="There are no labels"):
        Categorical().loss_direction(torch.zeros(2, 2), None)


def test_inputs_that_are_no_tensors_are_named_wherever_they_come():
    with pytest.raises(BatchNotSupported, match="inputs are ndarray"):
        count_of(X.numpy())
    with pytest.raises(BatchNotSupported, match="inputs are nothing"):
        count_of({})


def test_a_mask_of_numbers_is_a_mask():
    model = token_classifier()
    model.token_mask = lambda ids: (ids != PAD).long()
    found = EkfacInfluence(model).passes.token_mask(X)
    assert torch.equal(found, X != PAD)


def test_what_a_mapping_has_once_for_all_examples_is_left_whole():
    inputs = as_mapping(X) | {"position_ids": torch.arange(5)[None], "features": vectors(5, 5)}
    (block,) = blocks_of(inputs, None, lambda batch: batch["attention_mask"].bool())
    assert block.inputs["position_ids"].shape == (1, 5)
    assert_same(block.inputs["features"], vectors(5, 5)[block.rows])


def test_a_budget_may_be_a_float():
    fitted = engine(memory_budget=1e9)
    assert_same(fitted.score([(X, Y)], [(X, Y)]), fitted.influences(X, Y))


def test_a_parametrised_layer_is_refused_with_a_cure_that_works():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)).eval()
    model[0].parametrizations.requires_grad_(False)
    with pytest.raises(LayerNotSupported, match=r"'0' has parameters bias.*get_submodule\('0'\)"):
        EkfacInfluence(model)
    model.get_submodule("0").requires_grad_(False)
    assert EkfacInfluence(model).layer_names == ["1"]


def test_the_exact_solve_looks_at_the_model_and_the_order_too():
    batch = (vectors(5, 4), Y)
    exact = ExactInfluence(Layered(lambda layer, x: layer(x), Doubled))
    with pytest.raises(LayerNotSupported, match="subclass of Linear"):
        exact.inner_products([batch], [batch], [batch])
    loader = DataLoader(TensorDataset(*batch), shuffle=True)
    with pytest.raises(LoaderShuffles):
        ExactInfluence(perceptron(4, 3, 2)).inner_products([batch], [batch], loader)
