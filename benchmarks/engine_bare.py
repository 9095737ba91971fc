"""The floor: the model's own passes over the same batches, with nothing computed from them."""

import torch
from torch import Tensor, nn

from benchmarks.plan import BATCH_SIZE, FORWARD, PASSES
from benchmarks.work import Clock, Done, Job, Work


def forward(work: Work) -> Job:
    batches = work.train.batches(BATCH_SIZE)

    def job(clock: Clock) -> Done:
        with torch.inference_mode():
            for input_ids, _ in batches:
                work.classifier(input_ids)
        return Done()

    return job


def passes(work: Work) -> Job:
    batches = work.train.batches(BATCH_SIZE)
    prepare_passes(work.classifier)

    def job(clock: Clock) -> Done:
        forward_and_backward(work.classifier, batches)
        return Done()

    return job


def prepare_passes(classifier: nn.Module) -> None:
    """No weight takes a gradient; the graph starts where the first tracked layer gets its input."""
    classifier.requires_grad_(False)
    first = classifier.get_submodule(classifier.tracked[0])
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach().requires_grad_(),))


def forward_and_backward(classifier: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for input_ids, labels in batches:
        logits = classifier(input_ids)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()


JOBS = {FORWARD: forward, PASSES: passes}
