"""Which examples go through the model together never changes a number, only the padding read."""

import pytest
import torch

from support.ekfac import EkfacInfluence, blocks, passes
from support.ekfac.blocks import AtATime, blocks_of, loader_blocks
from support.ekfac.errors import BlockHalved, LabelsMismatch
from tests.dense import PAD, assert_same, labels, sentences, token_classifier, vectors

X, Y = sentences(2, 5, 3, 1, 4, padded_to=7), labels(5)
MASK = token_classifier().token_mask


def fitted(model=None, batches=((X,),), **settings):
    engine = EkfacInfluence(model or token_classifier(), hessian_regularization=1e-3, **settings)
    return engine.fit(list(batches))


def answers(engine):
    """All that an engine can be asked, about the same examples."""
    return {
        "influences": engine.influences(X, Y),
        "self-influences": engine.self_influences(X, Y),
        "by token": engine.token_influences(X, Y, X, Y),
        "by label": engine.influences_by_label(X, Y, X),
        "scores": engine.score([(X[:2], Y[:2]), (X[2:], Y[2:])], [(X[:4, :5], Y[:4]), (X[4:], Y[4:])]),
        "relative": engine.score([(X, Y)], [(X, Y)], normalisation="relative"),
    }


@pytest.mark.parametrize(("tokens", "rows"), [(8, [[1], [4, 2], [0, 3]]), (3, [[1], [4], [2], [0], [3]])])
def test_blocks_hold_the_longest_first_as_many_as_fit_the_tokens_and_no_column_of_padding(tokens, rows):
    found = blocks_of(X, Y, MASK, AtATime(16, tokens))
    assert [block.rows for block in found] == rows
    for block in found:
        longest = MASK(X[block.rows]).sum(dim=1).max()
        assert_same(block.inputs, X[block.rows, :longest])
        assert (X[block.rows, longest:] == PAD).all()
        assert_same(block.labels, Y[block.rows])


def test_padding_on_the_left_or_in_the_middle_is_not_trimmed():
    left = torch.tensor([[PAD, PAD, 3, 4], [PAD, 5, PAD, 6]])
    (block,) = blocks_of(left, None, MASK)
    assert_same(block.inputs, left[block.rows])


def test_inputs_without_a_mask_keep_their_order():
    found = blocks_of(vectors(5, 4), None, lambda _: None, AtATime(2, 1))
    assert [block.rows for block in found] == [[0, 1], [2, 3], [4]]


def test_labels_are_counted_before_any_batch_is_merged():
    with pytest.raises(LabelsMismatch, match="2 examples come with 1 labels"):
        list(loader_blocks([(X[:2], Y[:1]), (X[2:], Y[1:])], MASK))


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_every_example_of_a_loader_is_in_one_block_under_its_own_number(monkeypatch, ahead):
    monkeypatch.setattr(blocks, "EXAMPLES_AHEAD", ahead)
    batches = [(X[:2, :6], Y[:2]), (X[2:3, :3], Y[2:3]), (X[3:], Y[3:])]
    seen = {}
    for block in loader_blocks(batches, MASK):
        for row, ids, label in zip(block.rows, block.inputs, block.labels, strict=True):
            seen[row] = (ids[ids != PAD].tolist(), label.item())
    expected = [(x[x != PAD].tolist(), y.item()) for x, y in zip(X, Y, strict=True)]
    assert [seen[row] for row in range(5)] == expected


def test_batches_of_different_widths_are_merged_with_the_padding_that_one_of_them_shows_if_any():
    whole, padded, wider = ((sentences(*lengths), None) for lengths in ((3, 3), (3, 2), (5,)))
    assert [block.rows for block in loader_blocks([whole, wider], MASK)] == [[0, 1], [2]]
    (block,) = loader_blocks([padded, wider], MASK)
    assert block.rows == [2, 0, 1]
    assert block.inputs.shape == (3, 5)


@pytest.mark.parametrize("update_diagonal", [True, False], ids=["ekfac", "kfac"])
@pytest.mark.parametrize("tokens", [1, 8, 1000])
def test_the_number_of_tokens_at_a_time_changes_nothing(monkeypatch, tokens, update_diagonal):
    expected = answers(fitted(update_diagonal=update_diagonal))
    monkeypatch.setattr(passes, "ON_CPU", AtATime(16, tokens))
    found = answers(fitted(batches=[(X[:3],), (X[3:],)], update_diagonal=update_diagonal))
    assert_same(found, expected)
    assert_same(found["scores"], expected["influences"])


def without_memory(where, error):
    """A classifier that has no memory for more than two examples: forward, or half way back."""
    model = token_classifier()

    def refuse(tensor):
        if len(tensor) > 2:
            raise error

    def watch(module, inputs, output):
        if where == "forward":
            refuse(output)
        elif output.requires_grad:
            output.register_hook(refuse)

    model.outer.register_forward_hook(watch)
    return model


NO_MEMORY = {
    "device": torch.OutOfMemoryError("out of memory"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_a_block_that_does_not_fit_into_memory_is_halved_and_gives_the_same_numbers(where, error):
    expected = answers(fitted())
    with pytest.warns(BlockHalved, match="examples at a time are too many"):
        found = answers(fitted(without_memory(where, error)))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("error", "calls"),
    [(NO_MEMORY["device"], 2), (RuntimeError("something else"), 1)],
    ids=["memory", "else"],
)
@pytest.mark.filterwarnings("ignore::support.ekfac.errors.BlockHalved")
def test_what_the_model_raises_is_raised_at_once_and_for_want_of_memory_when_one_example_is_left(
    error, calls
):
    model, seen = token_classifier(), []

    def fail(*_):
        seen.append(1)
        raise error

    model.outer.register_forward_hook(fail)
    with pytest.raises(type(error), match=str(error)):
        fitted(model)
    assert len(seen) == calls
