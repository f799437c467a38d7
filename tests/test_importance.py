from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sculpt_ops.importance import layer_importance
from sculpt_ops.ranks import Importance
from sculpt_ops.subspaces import Subspaces
from sculpt_ops.targets import resolve_targets

from .test_targets import tiny


class Conv1D(nn.Module):
    """As GPT-2 has it: the weight is stored (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Small(nn.Module):
    """Linear maps of every orientation, dropout, and a matrix that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.square = nn.Linear(12, 12)
        self.wide = nn.Linear(12, 8, bias=False)
        self.conv = Conv1D(8, 12)
        self.dropout = nn.Dropout(0.5)
        self.tied = nn.Linear(12, 12)
        self.tied.weight = self.square.weight
        self.idle = nn.Linear(12, 12)

    def forward(self, input: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.dropout(self.embed(input))
        return self.tied(self.conv(self.wide(self.square(x))))


TARGETS = ["square.weight", "wide.weight", "conv.weight"]


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():  # or their cosines would be noise around 0
        for weight in (model.square.weight, model.wide.weight, model.conv.weight):
            weight.mul_(0.2).add_(torch.eye(*weight.shape))
    return model


def cosines(x: Tensor, y: Tensor) -> Tensor:
    size = min(x.shape[-1], y.shape[-1])
    return cosine_similarity(x[..., :size].double(), y[..., :size].double(), dim=-1)


@torch.no_grad()
def by_hand(model: Small, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {name: [] for name in TARGETS}
    for tokens, mask in batches:
        x = model.embed(tokens)
        y = model.square(x)
        z = model.wide(y)
        u = model.conv(z)
        found["square.weight"] += [cosines(x, x @ model.square.weight.T)[mask]]
        found["square.weight"] += [cosines(u, u @ model.square.weight.T)[mask]]
        found["wide.weight"] += [cosines(y, y @ model.wide.weight.T)[mask]]
        found["conv.weight"] += [cosines(z, z @ model.conv.weight)[mask]]
    means = {name: float(torch.cat(values).mean()) for name, values in found.items()}
    return {name: mean * len(means) / sum(means.values()) for name, mean in means.items()}


def test_it_is_the_mean_cosine_over_tokens_that_are_no_padding(model: Small) -> None:
    batches = [(torch.randint(20, (3, 7)), torch.rand(3, 7) < 0.7), (torch.randint(20, (2, 4)), torch.ones(2, 4) > 0)]
    given = [{"input": tokens, "attention_mask": mask.long()} for tokens, mask in batches]
    importance = layer_importance(model, resolve_targets(model, TARGETS), given)
    assert list(importance) == TARGETS
    assert importance == pytest.approx(by_hand(model, batches), rel=1e-5)
    assert sum(importance.values()) == pytest.approx(3)


def test_a_batch_may_be_a_tensor_and_batches_any_iterable(model: Small) -> None:
    tokens = torch.randint(20, (3, 7))
    importance = layer_importance(model, resolve_targets(model, TARGETS), iter([tokens]))
    assert importance == pytest.approx(by_hand(model, [(tokens, torch.ones(3, 7) > 0)]), rel=1e-5)


def test_ranks_follow_the_importance(model: Small) -> None:
    tokens = torch.randint(20, (3, 7))
    wanted = by_hand(model, [(tokens, torch.ones(3, 7) > 0)])
    subspaces = Subspaces.from_model(model, Importance(0.25, 0.5), targets=TARGETS, batches=[tokens])
    assert subspaces.importance == pytest.approx(wanted, rel=1e-5)
    for name, layer in subspaces.items():
        assert layer.rank == int((0.25 + wanted[name] * 0.25) * min(layer.shape))
    assert len({layer.rank for layer in subspaces.values()}) > 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model: Small, fails: bool) -> None:
    model.train()
    model.dropout.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    given: list[Any] = [torch.randint(20, (3, 7)), torch.full((1, 1), 20 if fails else 1)]
    if fails:
        with pytest.raises(IndexError):
            layer_importance(model, resolve_targets(model, TARGETS), given)
    else:
        layer_importance(model, resolve_targets(model, TARGETS), given)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compiled_model_is_measured_like_the_model(model: Small) -> None:
    tokens = torch.randint(20, (3, 7))
    wanted = layer_importance(model, resolve_targets(model, TARGETS), [tokens])
    compiled = torch.compile(model.eval(), backend="eager")
    with torch.no_grad():
        compiled(tokens)
    assert layer_importance(compiled, resolve_targets(compiled, TARGETS), [tokens]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "t5"])
def test_every_target_of_real_architectures_is_measured(kind: str) -> None:
    model = tiny(kind)
    targets = resolve_targets(model)
    with torch.no_grad():
        for weight in targets.values():
            weight.add_(torch.eye(*weight.shape))
    tokens, mask = torch.randint(3, 40, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": mask}
    if kind == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 40, (2, 4))
    importance = layer_importance(model, targets, [batch])
    assert list(importance) == list(targets)
    # Left-padded, the same rows count the same. (T5 is padded on the right, which its encoder hides as well.)
    pad = (torch.full((2, 3), 1), torch.zeros(2, 3, dtype=torch.long))
    order = slice(None, None, -1 if kind == "t5" else 1)
    batch |= {"input_ids": torch.cat([pad[0], tokens][order], 1), "attention_mask": torch.cat([pad[1], mask][order], 1)}
    if kind in ("llama", "gpt2"):
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert layer_importance(model, targets, [batch]) == pytest.approx(importance, rel=1e-4)


def negative(model: Small) -> None:
    with torch.no_grad():
        for weight in resolve_targets(model, TARGETS).values():
            weight.copy_(-torch.eye(*weight.shape))
        model.square.bias.zero_()


def test_where_the_mean_is_not_above_zero_opposite_outputs_count_as_none(model: Small) -> None:
    negative(model)
    with torch.no_grad():
        model.wide.weight.neg_()
    targets = resolve_targets(model, ["square.weight", "wide.weight"])
    with pytest.warns(UserWarning, match="negative ones count as 0"):
        importance = layer_importance(model, targets, [torch.arange(12).reshape(2, 6)])
    assert importance == pytest.approx({"square.weight": 0.0, "wide.weight": 2.0})


def poison(model: Small) -> None:
    with torch.no_grad():
        model.embed.weight.fill_(float("inf"))


@pytest.mark.parametrize(
    ("batches", "targets", "prepare", "error", "message"),
    [
        (None, TARGETS, None, ValueError, "batches: given None, wanted model inputs"),
        ([], TARGETS, None, ValueError, "batches: empty, wanted at least one model input"),
        ([0], ["idle.weight", *TARGETS], None, ValueError, "batches: none of them runs the layers of idle.weight;"),
        ({"input": 0}, TARGETS, None, TypeError, "batches: given dict, wanted an iterable of model inputs"),
        (["text"], TARGETS, None, TypeError, "batches: given str among them, wanted mappings or tensors"),
        ([0], ["embed.weight"], None, ValueError, r"targets: embed.weight \(20, 12\) is in a Embedding"),
        ([0], TARGETS, poison, ValueError, "batches: the inputs or outputs of square.weight, wide.weight, conv.weight"),
        ([0], TARGETS[1:2], negative, ValueError, "batches: none of the 1 matrices has an output that points along"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    batches: Any,
    targets: list[str],
    prepare: Callable[[Small], None] | None,
    error: type[Exception],
    message: str,
    model: Small,
) -> None:
    if prepare:
        prepare(model)
    if batches == [0]:
        batches = [torch.randint(20, (3, 7))]
    with pytest.raises(error, match=message):
        Subspaces.from_model(model, Importance(), targets=targets, batches=batches, others="freeze")
    assert all(parameter.requires_grad for parameter in model.parameters())
