import json
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
import torch
from datasets import concatenate_datasets
from safetensors.torch import load_file, save_file

from experiments import finetune, finetuning
from experiments.finetune import held_out_scores
from experiments.finetuning import CHECKPOINT, Finetuning, Recipe, train
from support.imdb import ImdbDataset
from support.model import adapter_sha256, merge_adapter
from tests.dense import assert_same
from tests.stand_in_hub import tiny_distilbert

RECIPE = Recipe(epochs=4, max_tokens=12, batch_size=4, snapshots={"a-quarter": 0.25, "a-half": 0.5})


@pytest.fixture(scope="module")
def reviews(imdb, tokenizer):
    """Twelve short reviews, six of each class."""
    rows = [imdb["train"].select(range(start, start + 6)) for start in (0, 12_000)]
    return ImdbDataset(concatenate_datasets(rows), tokenizer, RECIPE.max_tokens)


def new_run(reviews, recipe=RECIPE):
    return Finetuning(tiny_distilbert(seed=0), reviews, recipe)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def stop(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(reviews, tmp_path_factory):
    """A run that nothing interrupted, its output folder, and what `train` told of its snapshots."""
    output, run = tmp_path_factory.mktemp("whole"), new_run(reviews)
    return run, output, train(run, output)


@pytest.fixture
def interrupted(reviews, tmp_path, monkeypatch):
    """The output folder of a run that died after five steps; its last checkpoint is of step four."""
    run = new_run(reviews)
    step = run.step
    monkeypatch.setattr(run, "step", lambda: step() if run.steps_done < 5 else stop())
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path, checkpoint_every=2)
    return tmp_path


def test_a_resumed_run_ends_with_the_very_numbers_of_an_uninterrupted_one(reviews, whole, interrupted):
    expected, expected_folder, expected_snapshots = whole
    resumed = new_run(reviews)
    resumed.resume(interrupted / CHECKPOINT)
    assert resumed.steps_done == 4  # only the steps since the checkpoint are repeated
    resumed = new_run(reviews)
    assert train(resumed, interrupted) == expected_snapshots
    assert resumed.losses == expected.losses
    for name in ("a-half", "final"):
        assert_same(weights(interrupted / name), weights(expected_folder / name), 0)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_previous_one(reviews, interrupted, monkeypatch):
    def torn(tensors, path, metadata=None):
        if metadata is None:  # an adapter
            return save_file(tensors, path)
        path.write_bytes(b"half a check")
        return stop()

    monkeypatch.setattr(finetuning, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        train(new_run(reviews), interrupted, checkpoint_every=2)
    again = new_run(reviews)
    again.resume(interrupted / CHECKPOINT)
    assert again.steps_done == 4


def test_a_checkpoint_of_another_recipe_or_other_reviews_is_refused_by_what_differs(
    imdb, tokenizer, reviews, interrupted
):
    expected = (
        f"{interrupted / CHECKPOINT} belongs to another run: its learning_rate is 0.001, "
        "this run's is 0.01. Delete it, or use its settings."
    )
    with pytest.raises(finetuning.CheckpointMismatch, match=f"^{re.escape(expected)}$"):
        train(new_run(reviews, replace(RECIPE, learning_rate=0.01)), interrupted)
    others = ImdbDataset(imdb["train"].select(range(12)), tokenizer, RECIPE.max_tokens)
    with pytest.raises(finetuning.CheckpointMismatch, match="another run: its reviews_sha256 is "):
        train(new_run(others), interrupted)


@pytest.mark.parametrize("bytes_left", [0, 12, -2_000])
def test_a_damaged_checkpoint_is_an_error_that_says_to_delete_it(reviews, interrupted, bytes_left):
    checkpoint = interrupted / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:bytes_left])
    told = rf"^{re.escape(str(checkpoint))} cannot be read .*\. Delete it to train from the start\.$"
    with pytest.raises(finetuning.CheckpointDamaged, match=told):
        train(new_run(reviews), interrupted)


def test_snapshots_are_taken_at_their_shares_of_the_steps_and_the_last_adapter_is_what_was_trained(whole):
    run, output, snapshots = whole
    assert run.steps_done == 12
    assert {name: one["step"] for name, one in snapshots.items()} == {"a-quarter": 3, "a-half": 6}
    for one in snapshots.values():
        assert one["learning_rate_sum"] == pytest.approx(sum(run.learning_rates[: one["step"]]))
    names = ["a-quarter", "a-half", "final"]
    heads = [merge_adapter(tiny_distilbert(seed=0), output / name).classifier.weight for name in names]
    assert not any(torch.equal(*pair) for pair in pairwise(heads))
    added = re.compile(r"\.default|\.modules_to_save")
    trained = {added.sub("", name): parameter.half() for name, parameter in run.trained.items()}
    assert_same(weights(output / "final"), trained, 0)


def test_an_adapter_tells_nobody_in_which_folder_its_model_was(reviews, tmp_path):
    model = tiny_distilbert(seed=0)
    model.save_pretrained(tmp_path / "here")
    model.name_or_path = str(tmp_path / "here")
    Finetuning(model, reviews, RECIPE).save_adapter(tmp_path / "adapter")
    assert "here" not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_snapshots_that_would_coincide_are_refused(reviews, tmp_path):
    crowded = replace(RECIPE, snapshots={"half": 0.5, "just-over-half": 0.51})
    expected = "12 steps are too few to tell the snapshots ['half', 'just-over-half'] apart."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        train(new_run(reviews, crowded), tmp_path)


def batches_of(reviews, size, seed=0):
    return list(finetuning.batches_by_length(reviews.lengths(), size, torch.Generator().manual_seed(seed)))


def test_every_review_is_read_once_per_epoch_as_the_seed_says_with_no_more_padding_than_sorted(
    imdb, tokenizer, reviews
):
    varied = ImdbDataset(imdb["train"].select(range(40)), tokenizer)
    assert sorted(row for rows in batches_of(varied, 7) for row in rows) == list(range(40))
    assert sorted(map(len, batches_of(varied, 7))) == [5, 7, 7, 7, 7, 7]
    lengths = varied.lengths()
    longest = sorted(max(lengths[row] for row in rows) for rows in batches_of(varied, 8))
    assert longest == sorted(lengths)[7::8]
    read = [row for rows in new_run(reviews).batches for row in rows]
    assert [sorted(read[start : start + 12]) for start in range(0, 48, 12)] == 4 * [[*range(12)]]
    assert batches_of(reviews, 4) == batches_of(reviews, 4)
    assert {*map(frozenset, batches_of(reviews, 4))} != {*map(frozenset, batches_of(reviews, 4, seed=1))}


def test_scores_are_those_of_a_table_worked_out_by_hand():
    table = pd.DataFrame({"label": [0, 0, 1, 1, 1], "positive_probability": [0.1, 0.7, 0.6, 0.9, 0.2]})
    scores = {"reviews": 5, "accuracy": 0.6, "f1": pytest.approx(2 / 3), "confusion": [[1, 1], [1, 2]]}
    assert held_out_scores(table) == scores


def command(folder, *options):
    """Run the command for the packaged encoder and twelve reviews."""
    given = ["--output", str(folder), "--rows", "12", "--test-rows", "4", "--max-tokens", "12"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune", *given, *options])
        finetune.main()


@pytest.fixture(scope="module")
def command_output(tmp_path_factory):
    """Folder written by the command in place of an older one; the reviews are read 20 times."""
    folder = tmp_path_factory.mktemp("command") / "adapter"
    folder.mkdir()
    (folder / "of-an-older-training").touch()
    command(folder, "--epochs", "20")
    return folder


def test_a_kill_leaves_the_adapters_of_an_older_training_as_they_were(tmp_path, monkeypatch):
    output = tmp_path / "adapter"
    (output / "final").mkdir(parents=True)
    monkeypatch.setattr(finetune, "evaluate", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        command(output, "--epochs", "10")
    assert [path.name for path in output.iterdir()] == ["final"]
    assert not list((output / "final").iterdir())


def test_the_command_leaves_adapters_a_record_and_predictions_and_nothing_else(command_output):
    record = json.loads((command_output / "record.json").read_text())
    left = {*record["snapshots"], "final", "record.json", "held_out.csv"}
    assert {path.name for path in command_output.iterdir()} == left
    assert [path.name for path in command_output.parent.iterdir()] == ["adapter"]
    adapters = {name: adapter_sha256(command_output / name) for name in [*record["snapshots"], "final"]}
    assert record["adapters_sha256"] == adapters
    assert record["train_reviews"] == 12
    assert record["steps"] == len(record["loss"]) == 20
    assert sum(record["loss"][-3:]) < 0.5 * sum(record["loss"][:3])
    held_out = pd.read_csv(command_output / "held_out.csv")
    assert list(held_out.columns) == ["label", "tokens", "positive_probability"]
    assert record["held_out"] == held_out_scores(held_out)
    assert record["held_out"]["reviews"] == 4
