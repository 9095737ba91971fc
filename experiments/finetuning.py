"""LoRA fine-tuning that a kill does not end: of the classifier, and of the model that writes.

Checkpoints are kept on the way. A run that was killed goes on from the last one and ends with the same
numbers: the order of the examples and the dropout depend on the seed and the step, not on the process.
Batches hold examples of similar length. Products run in bfloat16 (autocast), weights and optimizer in
float32, and attention has no dropout, which lets its fused kernel run: the two save most of the time on a
CPU with bfloat16 instructions.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DistilBertForSequenceClassification, PreTrainedModel, get_linear_schedule_with_warmup

from support.ekfac.storage import replacing
from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper, adapter_sha256, with_adapter

CHECKPOINT = "checkpoint.safetensors"


class CheckpointMismatch(ValueError):
    """The checkpoint was written by a run with another recipe or other reviews."""


class CheckpointDamaged(ValueError):
    """The checkpoint cannot be read."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a training run, given the reviews and the encoder."""

    seed: int = 0
    epochs: int = 2
    max_tokens: int = 512
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_share: float = 0.06
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    attention_dropout: float = 0.0
    snapshots: dict[str, float] = field(
        default_factory=lambda: {f"{share}-percent": share / 100 for share in (10, 20, 35, 50, 75)}
    )


class Finetuning:
    """One training run: model, optimizer and schedule, advanced a step at a time."""

    def __init__(self, model: DistilBertForSequenceClassification, dataset: ImdbDataset, recipe: Recipe):
        for block in model.distilbert.transformer.layer:
            block.attention.dropout.p = recipe.attention_dropout
        layers = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
        head = ["pre_classifier", "classifier"]
        self.dataset = dataset
        self.begin(model, recipe, dataset.lengths(), target_modules=layers, modules_to_save=head)

    def begin(self, model: PreTrainedModel, recipe: Recipe, lengths: list[int], **lora: object) -> None:
        """Before the first step; `lora` says where LoRA goes, `lengths` how long the examples are."""
        settings = {
            "r": recipe.lora_rank,
            "lora_alpha": recipe.lora_alpha,
            "lora_dropout": recipe.lora_dropout,
        }
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.model: PeftModel = with_adapter(model, LoraConfig(**settings, **lora)).train()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.batches = [
            rows
            for epoch in range(recipe.epochs)
            for rows in batches_by_length(
                lengths, recipe.batch_size, torch.Generator().manual_seed(recipe.seed + epoch)
            )
        ]
        self.schedule = get_linear_schedule_with_warmup(
            self.optimizer, round(recipe.warmup_share * len(self.batches)), len(self.batches)
        )
        self.losses: list[float] = []
        self.learning_rates: list[float] = []

    @property
    def steps_done(self) -> int:
        return len(self.losses)

    def step(self) -> None:
        """One batch forward, backward, and into the weights."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.steps_done)
        loss = self.loss(self.batches[self.steps_done])
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.gradient_clip)
        self.learning_rates.append(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def loss(self, rows: list[int]) -> Float[Tensor, ""]:
        """What a step on these reviews makes smaller: their mean cross-entropy."""
        device = next(iter(self.trained.values())).device
        input_ids, labels, _ = self.dataset.batch(rows)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = ModelLogitsWrapper(self.model)(input_ids.to(device))
        return nn.functional.cross_entropy(logits.float(), labels.to(device))

    def identity(self) -> dict:
        """What two processes must agree on to share a checkpoint: the recipe and the reviews."""
        tokens = torch.cat([*self.dataset.input_ids, self.dataset.labels])
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        return {**asdict(self.recipe), "reviews": len(self.dataset), "reviews_sha256": digest}

    def save_checkpoint(self, path: Path) -> None:
        """Everything a later process needs to go on, written whole or not at all."""
        tensors = {f"trained/{name}": tensor.detach() for name, tensor in self.trained.items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            for name, tensor in moments.items():
                tensors[f"optimizer/{number}/{name}"] = tensor
        told = {
            "identity": self.identity(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses,
            "learning_rates": self.learning_rates,
        }
        with replacing(path) as fresh:
            save_file(tensors, fresh, {"told": json.dumps(told)})

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises `CheckpointMismatch` when it is of another recipe or of other reviews, and
        `CheckpointDamaged` when it cannot be read.
        """
        try:
            with safe_open(path, "pt") as file:
                told = json.loads((file.metadata() or {})["told"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise CheckpointDamaged(
                f"{path} cannot be read ({type(error).__name__}). Delete it to train from the start."
            ) from error
        for setting, value in self.identity().items():
            if told["identity"].get(setting) != value:
                raise CheckpointMismatch(
                    f"{path} belongs to another run: its {setting} is "
                    f"{told['identity'].get(setting)!r}, this run's is {value!r}. "
                    "Delete it, or use its settings."
                )
        state = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            kind, _, name = name.partition("/")
            if kind == "trained":
                self.trained[name].data.copy_(tensor)
            else:
                number, _, moment = name.partition("/")
                state["state"].setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict(state)
        self.schedule.load_state_dict(told["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.losses, self.learning_rates = told["losses"], told["learning_rates"]

    def save_adapter(self, folder: Path) -> None:
        """The adapter as it is now, float16, without the name of the folder that its model came from."""
        self.model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        config = folder / "adapter_config.json"
        told = json.loads(config.read_text()) | {"base_model_name_or_path": None}
        config.write_text(json.dumps(told, indent=2, sort_keys=True))
        weights = folder / "adapter_model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)


def train(run: Finetuning, output: Path, checkpoint_every: int = 50) -> dict[str, dict]:
    """Train to the end, resuming where `output` says; returns what is known of each snapshot.

    Raises `ValueError` when there are too few steps to tell the snapshots apart.
    """
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / CHECKPOINT
    if checkpoint.exists():
        run.resume(checkpoint)
    total = len(run.batches)
    snapshot_steps = {round(share * total): name for name, share in run.recipe.snapshots.items()}
    if 0 in snapshot_steps or len(snapshot_steps) < len(run.recipe.snapshots):
        raise ValueError(
            f"{total} steps are too few to tell the snapshots {list(run.recipe.snapshots)} apart. "
            "Train on more reviews or for more epochs."
        )
    with tqdm(total=total, initial=run.steps_done, unit="step", desc="fine-tuning") as bar:
        while run.steps_done < total:
            run.step()
            bar.update()
            bar.set_postfix(loss=f"{sum(run.losses[-50:]) / len(run.losses[-50:]):.3f}")
            if run.steps_done in snapshot_steps:
                run.save_adapter(output / snapshot_steps[run.steps_done])
            if run.steps_done % checkpoint_every == 0:
                run.save_checkpoint(checkpoint)
    run.save_checkpoint(checkpoint)
    run.save_adapter(output / "final")
    return {
        name: {"step": step, "learning_rate_sum": sum(run.learning_rates[:step])}
        for step, name in snapshot_steps.items()
    }


def record(
    run: Finetuning, snapshots: dict, about: dict, held_out: dict, unfinished: Path, output: Path
) -> None:
    """Write `record.json` beside the adapters of a finished run, put all in place, and tell the outcome."""
    kept = about | {
        "recipe": asdict(run.recipe),
        "optimizer": "AdamW, linear warm-up and decay",
        "steps": run.steps_done,
        "snapshots": snapshots,
        "learning_rate_sum": sum(run.learning_rates),
        "loss": [round(loss, 4) for loss in run.losses],
        "held_out": held_out,
        "versions": {"torch": torch.__version__},
        "adapters_sha256": {name: adapter_sha256(unfinished / name) for name in [*snapshots, "final"]},
    }
    (unfinished / "record.json").write_text(json.dumps(kept, indent=1) + "\n")
    put_in_place(unfinished, output)
    print(json.dumps(held_out, indent=1))


def put_in_place(finished: Path, output: Path) -> None:
    """`finished` as `output`, whole: adapters of two trainings never lie side by side."""
    (finished / CHECKPOINT).unlink(missing_ok=True)
    replaced = output.with_name(f"{output.name}.replaced")
    if output.exists():
        output.replace(replaced)
    finished.replace(output)
    shutil.rmtree(replaced, ignore_errors=True)


def batches_by_length(lengths: list[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Rows of one epoch, of these lengths, in batches of similar length, batches in random order."""
    # Shuffled before the stable sort: reviews of equal length meet in other batches every epoch.
    shuffled = torch.randperm(len(lengths), generator=generator)
    by_length = shuffled[torch.tensor(lengths)[shuffled].sort(stable=True).indices]
    batches = by_length.split(batch_size)
    for number in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[number].tolist()
