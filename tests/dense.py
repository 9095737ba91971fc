"""Small models, and dense float64 truth about them, written as plainly as possible: loops over
examples, classes and layers, autograd on the parameters themselves, one matrix per Fisher block."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

PAD = 0
VOCABULARY = 11


class TokenClassifier(nn.Module):
    """Token ids (batch, tokens) → logits: every position sees the mean of the real positions."""

    def __init__(self, width: int = 3, hidden: int = 4, classes: int = 2, bias: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width).requires_grad_(False)
        self.inner = nn.Linear(width, hidden, bias=bias)
        self.outer = nn.Linear(hidden, width, bias=bias)
        self.classifier = nn.Linear(width, classes, bias=bias)

    def token_mask(self, input_ids: Tensor) -> Tensor:
        return input_ids != PAD

    def forward(self, input_ids: Tensor) -> Tensor:
        real = self.token_mask(input_ids).unsqueeze(-1).to(self.embedding.weight.dtype)
        embedded = self.embedding(input_ids)
        mean = (embedded * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        mixed = embedded + self.outer(torch.tanh(self.inner(embedded + mean)))
        return self.classifier((torch.tanh(mixed) * real).sum(1))


def token_classifier(seed: int = 0, **sizes) -> TokenClassifier:
    torch.manual_seed(seed)
    return TokenClassifier(**sizes).double().eval()


def perceptron(*widths: int, bias: bool = True, nonlinear: bool = True, seed: int = 0) -> nn.Module:
    """Linear layers of the given widths, tanh between them unless `nonlinear` is False."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), nn.Tanh() if nonlinear else nn.Identity()]
    return nn.Sequential(*layers[:-1]).double().eval()


class Composed(nn.Module):
    """Linear layers by name and widths, and what is done with them: `compute(model, inputs)`."""

    def __init__(self, compute: Callable, **widths: tuple[int, int]):
        super().__init__()
        self.compute = compute
        for name, (d_in, d_out) in widths.items():
            self.add_module(name, nn.Linear(d_in, d_out))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.compute(self, inputs)


def composed(compute: Callable, **widths: tuple[int, int]) -> Composed:
    torch.manual_seed(0)
    return Composed(compute, **widths).double().eval()


class Doubled(nn.Linear):
    """A layer that does more than a linear layer, as some subclasses do."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def assert_same(found, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def sentences(*lengths: int, seed: int = 0, padded_to: int | None = None) -> Tensor:
    """Random token ids, one row per length, padded to the longest or further."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), padded_to or max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
    return ids


def vectors(examples: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, width, generator=generator, dtype=torch.float64)


def labels(examples: int, classes: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(classes, (examples,), generator=torch.Generator().manual_seed(seed))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def gradient_matrices(model: nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    """The gradient of a scalar for every linear layer, (d_out, d_in), the bias as last column."""
    layers = linear_layers(model)
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    gradients = iter(torch.autograd.grad(scalar, parameters, retain_graph=True))
    result = {}
    for name, layer in layers.items():
        weight = next(gradients)
        result[name] = weight if layer.bias is None else torch.cat([weight, next(gradients)[:, None]], dim=1)
    return result


def loss_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """Per-example gradients of cross-entropy, one example and one backward pass at a time."""
    return [
        gradient_matrices(model, nn.functional.cross_entropy(model(row[None]), label[None]))
        for row, label in zip(x, y, strict=True)
    ]


def gaussian_loss_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """As `loss_gradients`, of half the squared residual."""
    return [
        gradient_matrices(model, (model(row[None])[0] - target).square().sum() / 2)
        for row, target in zip(x, y, strict=True)
    ]


def label_gradients(model: nn.Module, x: Tensor) -> list[list[tuple[float, dict[str, Tensor]]]]:
    """For each example, p_c and the gradient of −log p_c, for every class c."""
    result = []
    for row in x:
        log_probabilities = model(row[None])[0].log_softmax(dim=0)
        result.append([(value.exp().item(), gradient_matrices(model, -value)) for value in log_probabilities])
    return result


def output_gradient_matrices(model: nn.Module, x: Tensor) -> list[list[tuple[float, dict]]]:
    """For each example, the gradient of every output, with weight 1: a Gaussian's Fisher."""
    return [[(1.0, gradient_matrices(model, value)) for value in model(row[None])[0]] for row in x]


def fisher_blocks(weighted: list[list[tuple[float, dict[str, Tensor]]]]) -> dict[str, Tensor]:
    """Mean over examples of Σ_c p_c vec G_c vec G_cᵀ, one dense block per layer, rows flattened."""
    blocks: dict[str, Tensor] = {}
    for example in weighted:
        for weight, gradients in example:
            for name, gradient in gradients.items():
                vector = gradient.flatten()
                block = weight * torch.outer(vector, vector) / len(weighted)
                blocks[name] = blocks.get(name, 0) + block
    return blocks


def eigenbasis(curvature) -> Tensor:
    """The axes of an engine's curvature of a layer, as columns over row-flattened G."""
    basis = curvature.basis
    return torch.kron(basis.output_gradient.contiguous(), basis.activation.contiguous())


def approximate_block(curvature) -> Tensor:
    """An engine's approximation of a Fisher block, as a dense matrix over row-flattened G."""
    axes = eigenbasis(curvature)
    return axes @ torch.diag(curvature.eigenvalues.flatten()) @ axes.T


def plain_gradients(engine, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients that an engine takes: its factors when nothing is left of its curvature."""
    for layer in engine.curvature.values():
        layer.eigenvalues.zero_()
    engine.hessian_regularization = 1.0
    return engine.influence_factors(x, y)


def damped_influences(
    blocks: dict[str, Tensor], test: list[dict[str, Tensor]], train: list[dict[str, Tensor]], damping: float
) -> Tensor:
    """Σ over layers of vec(G_test)ᵀ (F + λ)⁻¹ vec(G_train), by a dense solve."""
    result = torch.zeros(len(test), len(train), dtype=torch.float64)
    for name, block in blocks.items():
        left = torch.stack([gradients[name].flatten() for gradients in test])
        right = torch.stack([gradients[name].flatten() for gradients in train])
        damped = block + damping * torch.eye(len(block), dtype=torch.float64)
        result += left @ torch.linalg.solve(damped, right.T)
    return result
