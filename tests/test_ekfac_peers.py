"""The engine against two others: curvlinops, dense and in float64, and Kronfluence, at full size.

curvlinops shares no code with tests/dense.py, so that the truth the other tests use has an oracle.
For cross-entropy the generalised Gauss–Newton matrix is the Fisher.
"""

import copy
import logging
import shutil

import pytest
import torch
from curvlinops import EKFACLinearOperator, FisherType, GGNLinearOperator, KFACLinearOperator
from kronfluence import Analyzer, Task, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from torch import nn
from torch.utils.data import TensorDataset

from support import EkfacInfluence, ModelLogitsWrapper
from support.model import load_model, require_gradients_only
from tests import dense
from tests.dense import assert_same, labels, perceptron, sentences, token_classifier, vectors

pytestmark = [
    pytest.mark.peers,
    # Kronfluence's, which makes one and leaves it disabled.
    pytest.mark.filterwarnings("ignore:`torch.cuda.amp.GradScaler:FutureWarning"),
]

CASES = {
    "two classes": (perceptron(4, 3, 2), vectors(6, 4)),
    "no bias": (perceptron(4, 3, 2, bias=False), vectors(6, 4)),
    "three layers, five classes": (perceptron(5, 4, 3, 5), vectors(7, 5)),
    "tokens": (token_classifier(classes=3), sentences(5, 5, 5, 5)),
    "padded tokens": (token_classifier(classes=3), sentences(5, 2, 4, 3)),
}


def blocks_of(operator, model, x, loss=None, y=None, **settings):
    """A curvlinops operator's block for each layer, in the layout of `dense.fisher_blocks`."""
    loss, y = loss or nn.CrossEntropyLoss(), labels(len(x)) if y is None else y
    blocks = {}
    for name, layer in dense.linear_layers(model).items():
        linear = operator(model, loss, list(layer.parameters()), [(x, y)], **settings)
        block = linear @ torch.eye(linear.shape[1], dtype=torch.float64)
        order = bias_as_last_column(layer)
        blocks[name] = block[order][:, order]
    return blocks


def bias_as_last_column(layer):
    """Where the entries of (d_out, d_in + 1), row by row, stand in a weight followed by a bias."""
    weight = torch.arange(layer.weight.numel()).reshape(layer.weight.shape)
    if layer.bias is None:
        return weight.flatten()
    bias = weight.numel() + torch.arange(layer.out_features)
    return torch.cat([weight, bias[:, None]], dim=1).flatten()


@pytest.mark.parametrize(("model", "x"), CASES.values(), ids=CASES)
def test_dense_fisher_blocks_are_curvlinops_gauss_newton_blocks(model, x):
    expected = blocks_of(GGNLinearOperator, model, x)
    assert_same(dense.fisher_blocks(dense.label_gradients(model, x)), expected, tolerance=1e-12)
    outputs = model(x).shape[1]
    # Its MSELoss is the mean over the outputs of twice our loss.
    expected = blocks_of(GGNLinearOperator, model, x, nn.MSELoss(), vectors(len(x), outputs))
    found = dense.fisher_blocks(dense.output_gradient_matrices(model, x))
    assert_same({name: 2 / outputs * block for name, block in found.items()}, expected, tolerance=1e-12)


@pytest.mark.parametrize(
    ("operator", "update_diagonal"), [(EKFACLinearOperator, True), (KFACLinearOperator, False)]
)
@pytest.mark.parametrize("case", [name for name in CASES if "padded" not in name])
def test_approximate_blocks_are_those_of_curvlinops(case, operator, update_diagonal):
    model, x = CASES[case]
    engine = EkfacInfluence(model, update_diagonal=update_diagonal, covariance_positions="all").fit([(x,)])
    settings = {"fisher_type": FisherType.TYPE2, "separate_weight_and_bias": False}
    expected = blocks_of(operator, model, x, **settings)
    assert_same({n: dense.approximate_block(c) for n, c in engine.curvature.items()}, expected, 1e-8)


class Sentiment(Task):
    """What Kronfluence asks of the user: losses, mask and layers, the same as the engine's."""

    def __init__(self, layer_names):
        self.layer_names = layer_names

    def get_influence_tracked_modules(self):
        return self.layer_names

    def get_attention_mask(self, batch):
        return batch[0] != 0

    def compute_train_loss(self, batch, model, sample=False):
        if sample:
            return exact_fisher_loss(model(batch[0]))
        return self.compute_measurement(batch, model)

    def compute_measurement(self, batch, model):
        ids, y = batch
        return nn.functional.cross_entropy(model(ids), y, reduction="sum")


def exact_fisher_loss(logits):
    """√(p₀p₁)·(z₁ − z₀), whose gradients have the exact Fisher; Kronfluence would draw one label."""
    size = logits.detach().softmax(dim=1).prod(dim=1).sqrt()
    return (size * (logits[:, 1] - logits[:, 0])).sum()


class Kronfluence:
    """Its EK-FAC of a copy of the model, fitted on examples, asked for the scores of others."""

    settings = ScoreArguments(damping_factor=1e-5, compute_per_module_scores=True)

    def __init__(self, model, layer_names, examples, folder):
        task = Sentiment(layer_names)
        self.analyzer = Analyzer(
            analysis_name="reviews",
            model=prepare_model(copy.deepcopy(model), task),
            task=task,
            cpu=True,
            log_level=logging.WARNING,
            disable_tqdm=True,
            output_dir=str(folder),
        )
        self.analyzer.fit_all_factors(
            "ekfac",
            TensorDataset(*examples),
            per_device_batch_size=3,
            factor_args=FactorArguments(strategy="ekfac"),
        )

    def influences_by_layer(self, queries, examples):
        self.analyzer.compute_pairwise_scores(
            "pairwise",
            "ekfac",
            query_dataset=TensorDataset(*queries),
            train_dataset=TensorDataset(*examples),
            per_device_query_batch_size=len(queries[0]),
            per_device_train_batch_size=len(examples[0]),
            score_args=self.settings,
        )
        return self.analyzer.load_pairwise_scores("pairwise")

    def self_influences_by_layer(self, examples):
        self.analyzer.compute_self_scores(
            "self",
            "ekfac",
            train_dataset=TensorDataset(*examples),
            per_device_train_batch_size=len(examples[0]),
            score_args=self.settings,
        )
        return self.analyzer.load_self_scores("self")


@pytest.fixture(scope="module")
def reviews(imdb, tokenizer):
    """Beginnings of real reviews, of different lengths: (ids, labels) of six, and of three others."""
    chosen = imdb["train"].shuffle(seed=4).select(range(9))  # both labels on either side
    beginnings = [text[: 60 + 25 * n] for n, text in enumerate(chosen["text"])]
    ids = tokenizer(beginnings, padding=True, return_tensors="pt")["input_ids"]
    y = torch.tensor(chosen["label"])
    return (ids[3:], y[3:]), (ids[:3], y[:3])


@pytest.fixture(scope="module")
def engines(reviews, tmp_path_factory):
    """Ours and Kronfluence's, fitted on the same six reviews.

    Of the feed-forward layers those of the first block, where every token has a gradient, and of the
    last, where only [CLS] has one: eigenproblems, and so minutes, grow with the number of layers.
    """
    model = load_model()
    require_gradients_only(model)
    model.distilbert.transformer.layer[1:5].requires_grad_(False)
    model = ModelLogitsWrapper(model)
    ours = EkfacInfluence(model, hessian_regularization=1e-5, covariance_positions="all").fit([reviews[0]])
    folder = tmp_path_factory.mktemp("kronfluence")
    yield ours, Kronfluence(model, ours.layer_names, reviews[0], folder)
    shutil.rmtree(folder)  # its factors are large, and pytest would keep them


def assert_agree(found, expected):
    """Correlation ≥ 0.9999, relative difference ≤ 1e-2."""
    found, expected = found.flatten().double(), expected.flatten().double()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] >= 0.9999
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_influences_on_real_reviews_are_kronfluences(engines, reviews):
    ours, kronfluence = engines
    examples, queries = reviews
    found = ours.influences_by_layer(*queries, *examples)
    expected = kronfluence.influences_by_layer(queries, examples)
    assert found.keys() == expected.keys()
    assert_agree(sum(found.values()), sum(expected.values()))
    for name in found:
        assert_agree(found[name], expected[name])


def test_self_influences_on_real_reviews_are_kronfluences(engines, reviews):
    ours, kronfluence = engines
    examples, _ = reviews
    expected = sum(kronfluence.self_influences_by_layer(examples).values())
    # One by one: a review that surprises the model outweighs the others by orders of magnitude.
    torch.testing.assert_close(ours.self_influences(*examples), expected, rtol=1e-2, atol=0)
