"""Which kind of model a job is about, and that model made ready to be asked."""

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from support.assets import AssetDamaged, AssetMissing
from support.job.classifier import Classifier
from support.job.errors import BadSetting, ModelNotUsable, cause, refuse_all
from support.job.language_model import LanguageModel
from support.job.models import Task, adapter_config, base_of, configuration, refuse_other_tokenizer
from support.job.settings import CHOICES, PACKAGED, Subject, option
from support.transformer import choose_layers, not_covered, positions

ADAPTED = {"SEQ_CLS": Classifier, "CAUSAL_LM": LanguageModel}
"""Kinds of models by what peft calls the task of an adapter."""

KINDS = dict(zip(CHOICES["task"], (Classifier, LanguageModel), strict=True))


def load_task(subject: Subject, device: torch.device) -> Task:
    """The model in evaluation mode, gradients for the chosen layers only.

    Raises `BadSetting`, `ModelNotUsable`, and for packaged ones `AssetDamaged` and `AssetMissing`.
    """
    name, kind = subject.model, KINDS.get(subject.task)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what goes wrong is told here
    try:
        kind = kind or _kind_of(subject)
        _refuse_settings_of_others(kind, subject)
        model, tokenizer = kind.load(subject)
        refuse_other_tokenizer(model, tokenizer, name)
        model = model.eval().to(device)
        without = not_covered(model, tokenizer)
    except (BadSetting, ModelNotUsable, AssetDamaged, AssetMissing):
        raise
    except Exception as error:  # the loaders', the hub's and the models' errors share no narrower class
        raise ModelNotUsable(
            f"--model {name} can't be loaded as a {kind.called if kind else 'model'} with its tokenizer, or "
            f"can't read texts ({cause(error)}). Name a folder that holds config.json, model.safetensors and "
            f"the tokenizer's files, a name on the hub, or {PACKAGED!r}."
        ) from error
    parts = [part.strip() for part in subject.layers.split(",") if part.strip()] or subject.layers.split()
    refused, told = [], []
    try:
        told.append(choose_layers(model, parts, without))
    except ValueError as error:
        refused.append(ModelNotUsable(f"--layers {subject.layers}: {error}"))
    longest = min(subject.max_tokens, tokenizer.model_max_length, positions(model))
    if longest < (least := (own := tokenizer.num_special_tokens_to_add()) + kind.least):
        short = f"--max-tokens {longest}: {own} are the tokenizer's own. Use {least} or more."
        refused.append(ModelNotUsable(short))
    refuse_all(refused)
    if longest < subject.max_tokens != Subject.max_tokens:
        told.append(f"Texts are cut at {longest} tokens: the model reads no more, whatever --max-tokens.")
    shaped, config = kind.shaped(model, tokenizer), configuration(model, subject)
    return kind(subject, shaped, tokenizer, config, longest, "\n".join(filter(None, told)))


def _refuse_settings_of_others(kind: type[Task], subject: Subject) -> None:
    """Raise `BadSetting`, once for all of them, for one that only another kind of model knows."""
    names = [name for other in KINDS.values() if other is not kind for name in other.own_settings]
    given = [name for name in names if getattr(subject, name) != getattr(Subject, name)]
    told = f"means nothing to a {kind.called}. Leave it out, or see --task."
    refuse_all(BadSetting(f"{option(name)} {told}") for name in given)


def _kind_of(subject: Subject) -> type[Task]:
    """The kind that the model's class is of. Raises `ModelNotUsable`."""
    name, adapter = base_of(subject), adapter_config(subject) or {}
    if adapter.get("task_type") in ADAPTED:
        return ADAPTED[adapter["task_type"]]
    if name == PACKAGED:
        return LanguageModel if adapter else Classifier
    architectures = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or [
        "model of none"
    ]
    for kind in KINDS.values():
        if architectures[0].endswith(kind.architectures):
            return kind
    raise ModelNotUsable(
        f"--model {subject.model} is a {architectures[0]}: no classifier of texts, whose class ends in "
        "ForSequenceClassification, and no model that writes, whose class ends in ForCausalLM. Name such a "
        "model, or, if its config.json names another class or none, say with --task which it is."
    )
