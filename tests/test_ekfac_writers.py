"""Models that write: which of their layers are looked at, what may be asked of them, and in what batches."""

import itertools
import re
from types import SimpleNamespace

import peft
import pytest
import torch

from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.batches import IGNORED
from support.ekfac.errors import BatchNotSupported, LayerNotSupported
from support.ekfac.fit import CovarianceSums, EigenvalueSums
from support.ekfac.layers import uncovered
from support.language import inputs_and_labels, loader, one_token_each, padded
from support.model import require_gradients_only, with_adapter
from support.transformer import left_out
from tests.tiny_writers import VOCABULARY, assert_same, fitted, gpt2, gradients, llama, loss, ready, texts

BATCH, QUERIES = texts(5, 3, 6, 2), texts(4, 5, seed=1)


def each(batch):
    """The examples of a batch as sequences of their own."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [
        {name: part[row : row + 1, :length] for name, part in batch.items()}
        for row, length in enumerate(lengths)
    ]


# Layers


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_head_is_left_out_and_named(build):
    model, batch = ready(build), texts(4, 4)
    without = uncovered(model, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    tied = model.config.tie_word_embeddings
    assert without == {"lm_head": "that share a weight with another" if tied else "as wide as the vocabulary"}
    assert "lm_head" not in require_gradients_only(model, (), without)
    assert left_out(without, ()).endswith("; the first is 'lm_head'.")


def test_a_tied_head_that_is_asked_for_is_refused_with_the_cure():
    model = llama(tie_word_embeddings=True)[0].eval()
    require_gradients_only(model, ("mlp", "lm_head"))
    words = "'model.embed_tokens' and 'lm_head' share a parameter, as a head does that is tied to the words"
    with pytest.raises(LayerNotSupported, match=words) as refused:
        EkfacInfluence(model)
    cure = re.search("Freeze them: (.*)", str(refused.value)).group(1)
    exec(cure, {"model": model})
    assert len(EkfacInfluence(model).layers) == 6


def test_embeddings_that_require_gradients_are_refused_by_name():
    model = ready(llama)
    model.get_submodule("model.embed_tokens").requires_grad_(True)
    with pytest.raises(LayerNotSupported, match=r"'model.embed_tokens' \(Embedding\) requires gradients"):
        EkfacInfluence(model)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_lora_s_two_layers_have_autograd_s_gradients(build):
    model, _ = build()
    names = ["down_proj"] if build is llama else ["c_proj"]
    config = peft.LoraConfig(r=2, target_modules=names, fan_in_fan_out=build is gpt2)
    adapted = with_adapter(model, config).double().eval()
    for parameter in adapted.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    require_gradients_only(adapted, ("lora_A", "lora_B"))
    engine = fitted(adapted, [BATCH], hessian_regularization=1e9)
    assert {name.split(".")[-2] for name in engine.layers} == {"lora_A", "lora_B"}
    found = engine.influence_factors(*inputs_and_labels(BATCH))
    for row, by_layer in enumerate(gradients(adapted, BATCH)):
        for name, gradient in by_layer.items():
            assert_same(1e9 * found[name][row], gradient)


def test_weights_in_bfloat16_give_what_float32_gives_to_two_digits():
    asked = (*inputs_and_labels(QUERIES), *inputs_and_labels(BATCH))
    expected = fitted(ready(llama).float(), [BATCH], hessian_regularization=10).influences(*asked)
    found = fitted(ready(llama).bfloat16(), [BATCH], hessian_regularization=10).influences(*asked)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


# Queries


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_contrast_is_a_difference_and_so_is_a_margin(build):
    """The gradient of z_a − z_b at a place is that of loss(b) − loss(a): what normalises both cancels."""
    model = ready(build)
    engine = fitted(model, [BATCH], hessian_regularization=1e9)
    a, b = ({name: part.clone() for name, part in texts(4).items()} for _ in range(2))
    for batch, token in ((a, 2), (b, 5)):
        batch["labels"][:] = IGNORED
        batch["labels"][0, 3] = batch["input_ids"][0, 3] = token
    scores = [engine.influences(*inputs_and_labels(query), *inputs_and_labels(BATCH)) for query in (b, a)]
    model.zero_grad()
    ids = a["input_ids"]
    logits = model(input_ids=ids).logits[0, 2]
    (logits[2] - logits[5]).backward()
    margin = by_weight(model)
    expected = []
    for row in range(4):
        model.zero_grad()
        loss(model, BATCH, row).backward()
        expected.append(sum((margin[name] * own).sum() for name, own in by_weight(model).items()))
    assert_same(1e9 * (scores[0] - scores[1])[0], torch.stack(expected), 1e-5)


def by_weight(model):
    """What autograd has left, by parameter."""
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def test_the_tokens_of_both_sides_add_up():
    engine = fitted(ready(llama), [BATCH])
    query = each(QUERIES)[1]
    query["labels"][:, :2] = IGNORED  # a prompt of two tokens
    by_token = engine.token_influences(*inputs_and_labels(one_token_each(query)), *inputs_and_labels(BATCH))
    assert by_token.shape == (3, 4, 6)
    expected = engine.influences(*inputs_and_labels(query), *inputs_and_labels(BATCH))
    assert_same(by_token.sum(dim=(0, 2)), expected[0])


def test_a_prompt_is_not_asked_but_read():
    engine, query = fitted(ready(llama), [BATCH]), each(QUERIES)[1]
    query["labels"][:, :2] = IGNORED
    asked = inputs_and_labels(query)
    other = {name: part.clone() for name, part in asked[0].items()}
    other["input_ids"][0, 0] = (other["input_ids"][0, 0] + 1) % VOCABULARY
    one, two = (engine.influences(x, asked[1], *inputs_and_labels(BATCH)) for x in (asked[0], other))
    assert (one - two).norm() > 1e-3 * one.norm()


# The Fisher


class Enumerated(NextToken):
    """All texts of labels by their probability, instead of some that are drawn."""

    def fisher_directions(self, outputs, draws, labels=None):
        log_p = outputs.log_softmax(dim=2)
        targets = [(labels[row, 1:] != IGNORED).nonzero()[:, 0] for row in range(len(labels))]
        most = max(map(len, targets))
        for text in itertools.product(range(VOCABULARY), repeat=most):
            direction = torch.zeros_like(outputs)
            for row, places in enumerate(targets):
                if any(text[len(places) :]):
                    continue  # a shorter text, and counted once
                own = torch.tensor(text[: len(places)])
                unit = torch.nn.functional.one_hot(own, VOCABULARY)
                root = (log_p[row, places, own].sum() / 2).exp()
                direction[row, places] = root * (log_p[row, places].exp() - unit)
            yield direction


class PlaceByPlace(NextToken):
    """√p (p − e) of every token at every target by itself."""

    def fisher_directions(self, outputs, draws, labels=None):
        p = outputs.softmax(dim=2)
        asked = (labels[:, 1:] != IGNORED).to(outputs)
        for place in range(asked.shape[1]):
            for token in range(VOCABULARY):
                direction = torch.zeros_like(outputs)
                direction[:, place] = p[:, place]
                direction[:, place, token] -= 1
                direction[:, place] *= (asked[:, place] * p[:, place, token].sqrt())[:, None]
                yield direction


def squares(model, batch, likelihood, seed=0):
    """Λ and the covariance of output gradients of every layer, summed over the examples."""
    engine = EkfacInfluence(model, likelihood=likelihood, seed=seed)
    bases = fitted(model, [BATCH]).curvature
    found = EigenvalueSums(engine, {name: layer.basis for name, layer in bases.items()})
    covariances = CovarianceSums(engine)
    blocks = list(engine._in_blocks([inputs_and_labels(batch)], [], ""))
    found.add(blocks)
    covariances.add(blocks)
    of_gradients = {
        name: part for name, part in covariances.tensors.items() if name.endswith("output gradients")
    }
    return found.tensors | of_gradients


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_fisher_of_all_texts_is_that_of_each_place_and_the_mean_of_those_drawn(build):
    model, batch = ready(build), texts(2, 3)
    exact = squares(model, batch, Enumerated())
    assert_same(squares(model, batch, PlaceByPlace()), exact)
    drawn = squares(model, batch, NextToken(samples=200))
    for name, expected in exact.items():
        assert (drawn[name] - expected).norm() < 0.3 * expected.norm()


class Unmixed(torch.nn.Module):
    """Says after each token what a frozen table has, and one thing more, the same everywhere, by `head`."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY).requires_grad_(False)
        self.head = torch.nn.Linear(3, VOCABULARY)
        self.register_buffer("feature", torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, input_ids, attention_mask=None):
        logits = self.table(input_ids) + self.head(self.feature.expand(*input_ids.shape, 3))
        return SimpleNamespace(logits=logits)


def test_where_a_layer_s_input_is_the_same_everywhere_ekfac_is_the_dense_solve():
    """Then F = E[Σ_t (diag(p_t) − p_t p_tᵀ)] ⊗ a aᵀ, from which an eigenbasis and Λ lose nothing."""
    torch.manual_seed(0)
    model, damping = Unmixed().double().eval(), 1e-2
    a = torch.cat([model.feature, torch.ones(1)])
    fisher = torch.zeros(4 * VOCABULARY, 4 * VOCABULARY).double()
    for row in range(4):
        asked = BATCH["labels"][row, 1:] != IGNORED
        for p in model(BATCH["input_ids"][row]).logits[:-1][asked].softmax(dim=1).detach():
            fisher += torch.kron(p.diag() - p.outer(p), a.outer(a)) / 4
    train, test = (
        torch.stack([one["head"].flatten() for one in gradients(model, batch)]) for batch in (BATCH, QUERIES)
    )
    expected = test @ torch.linalg.solve(fisher + damping * torch.eye(len(fisher)).double(), train.T)
    engine = EkfacInfluence(model, likelihood=PlaceByPlace(), hessian_regularization=damping).fit([BATCH])
    assert_same(engine.score([QUERIES], [BATCH]), expected, 1e-9)


# Batches


def test_the_size_of_batches_changes_no_bit_and_their_order_only_rounding():
    sequences = each(texts(5, 3, 6, 2, 4, 6))
    asked = (*inputs_and_labels(QUERIES), *inputs_and_labels(BATCH))
    whole = fitted(ready(llama), loader(sequences, 6)).influences(*asked)
    for size in (1, 2, 4):
        assert torch.equal(fitted(ready(llama), loader(sequences, size)).influences(*asked), whole)
    turned = fitted(ready(llama), loader(sequences[::-1], 2)).influences(*asked)
    assert_same(turned, whole)


def test_a_token_that_the_model_does_not_know_is_told():
    batch = BATCH | {"input_ids": BATCH["input_ids"] + 3}
    with pytest.raises(BatchNotSupported, match=r"index out of range.*the largest is 9.*its own tokenizer"):
        fitted(ready(llama), [batch])
    long = padded(each(texts(20)))
    with pytest.raises(BatchNotSupported, match=r"the shape \(1, 20\).*longer than it reads"):
        fitted(ready(gpt2), [long])
