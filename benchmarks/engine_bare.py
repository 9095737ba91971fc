"""The floor: the model's own passes over the blocks that our engine makes of the reviews, sorted by
length and with little padding, and nothing computed from them."""

import torch
from torch import Tensor, nn

from benchmarks.plan import FORWARD, PASSES
from benchmarks.work import Clock, Done, Job, Work
from support.ekfac.blocks import ON_CPU, ON_GPU, blocks_of


def forward(work: Work) -> Job:
    blocks = engine_blocks(work)

    def job(clock: Clock) -> Done:
        with torch.inference_mode():
            for input_ids, _ in blocks:
                work.classifier(input_ids)
        return Done()

    return job


def passes(work: Work) -> Job:
    blocks = engine_blocks(work)
    prepare_passes(work.classifier)

    def job(clock: Clock) -> Done:
        forward_and_backward(work.classifier, blocks)
        return Done()

    return job


def engine_blocks(work: Work) -> list[tuple[Tensor, Tensor]]:
    """Input ids and labels, block by block, on the device that the model goes to."""
    together = ON_CPU if work.device == "cpu" else ON_GPU
    work.classifier.to(work.device)
    blocks = blocks_of(*work.train.whole(), work.classifier.token_mask, together)
    return [(block.inputs.to(work.device), block.labels.to(work.device)) for block in blocks]


def prepare_passes(classifier: nn.Module) -> None:
    """No weight takes a gradient; the graph starts where the first tracked layer gets its input."""
    classifier.requires_grad_(False)
    first = classifier.get_submodule(classifier.tracked[0])
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach().requires_grad_(),))


def forward_and_backward(classifier: nn.Module, blocks: list[tuple[Tensor, Tensor]]) -> None:
    for input_ids, labels in blocks:
        logits = classifier(input_ids)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()


JOBS = {FORWARD: forward, PASSES: passes}
