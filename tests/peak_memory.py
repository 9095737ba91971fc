"""`python tests/peak_memory.py plan|work`: bytes that a plan foretells, or that the work takes, for a tiny
Llama with a large vocabulary. A process of its own, as the most that one has held is never taken back."""

import sys

import torch
import transformers

from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.memory import most_held
from support.language import inputs_and_labels
from support.model import require_gradients_only

VOCABULARY, TOKENS = 20_000, 64
CPU = torch.device("cpu")


def llama() -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()


def texts(number: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (number, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


if __name__ == "__main__":
    torch.manual_seed(0)
    model, training, queries = llama(), [texts(16)], [texts(2)]
    require_gradients_only(model, ("mlp",))
    engine, before = EkfacInfluence(model, likelihood=NextToken()), most_held(CPU)
    if sys.argv[1] == "plan":
        print(engine.plan(training, queries).peak_bytes - before)
    else:
        engine.fit(training).score(queries, training)
        engine.self_influences(*inputs_and_labels(training[0]))
        print(most_held(CPU) - before)
