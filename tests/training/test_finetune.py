"""Fine-tuning: learns under the mask, reproducible to the bit, leaves everything else as it was."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import swap_prune
from swap_prune import FineTune, finetune, masks_of
from swap_prune.losses.distillation import SelfDistillation
from swap_prune.losses.values import BinaryCrossEntropy
from swap_prune.training.settings import parse_finetune
from swap_prune.training.teaching import Teacher

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(130, 6, generator=GENERATOR)
DATA = TensorDataset(INPUTS, INPUTS[:, :3].argmax(1))


def pruned_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    swap_prune.prune(model, DATA, 0.5, "magnitude", progress=False)
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_loss_falls_and_the_masks_hold(optimizer: str) -> None:
    model = pruned_network()
    masks, bias = masks_of(model), model[4].bias.detach().clone()
    report = finetune(model, DATA, FineTune(epochs=4, optimizer=optimizer, lr=0.03, batch_size=20, weight_decay=0.01))
    assert report.epochs == len(report.losses) == 4 and report.steps == 4 * 7 and report.seconds > 0
    assert report.losses[-1] < 0.9 * report.losses[0]
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, masks[name])
    assert not torch.equal(model[4].bias, bias), "all parameters are trained"


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_random_state() -> None:
    models = [pruned_network() for _ in range(3)]
    torch.manual_seed(11)
    for model, seed in zip(models, (7, 7, 8), strict=True):
        state = torch.get_rng_state()
        finetune(model, DATA, FineTune(batch_size=16), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)  # the next one starts from another global state
    assert same(models[0], models[1]) and not same(models[0], models[2])


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_what_is_set_around_changes_nothing(around: Callable[[], Any]) -> None:
    inside, outside = pruned_network(), pruned_network()
    settings = FineTune(epochs=2, batch_size=16)
    with around():
        finetune(inside, DATA, settings)
    finetune(outside, DATA, settings)
    assert all(map(torch.equal, inside.state_dict().values(), outside.state_dict().values()))


def test_what_data_draws_from_the_global_state_is_reproducible() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Any:
            return DATA[index][0] + torch.randn(6), DATA[index][1]

    for data in (Noisy(), DataLoader(DATA, batch_size=16, shuffle=True)):
        first, second = pruned_network(), pruned_network()
        finetune(first, data)
        torch.rand(5)
        finetune(second, data)
        assert same(first, second)


def test_modes_and_gradients_come_back() -> None:
    model = pruned_network()
    model.eval()
    model[3].train()
    model[0].bias.grad = torch.ones(16)
    statistics = model[1].running_mean.clone()
    finetune(model, DATA)
    assert [module.training for module in model] == [False, False, False, True, False]
    assert torch.equal(model[0].bias.grad, torch.ones(16)) and model[0].weight.grad is None
    assert not torch.equal(model[1].running_mean, statistics), "BatchNorm was in training mode meanwhile"


def test_frozen_parameters_stay() -> None:
    model = pruned_network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    finetune(model, DATA)
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        finetune(model, DATA)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_follows_the_schedule(schedule: str) -> None:
    """The loss is the sum of the weights, so that each step moves a weight by the learning rate."""
    model = nn.Linear(2, 1, bias=False)
    seen: list[float] = []

    def loss_fn(net: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        seen.append(net.weight[0, 0].item())
        return net.weight.sum() * torch.ones(len(batch[0]))

    settings = FineTune(epochs=2, lr=0.5, momentum=0, weight_decay=0, schedule=schedule, batch_size=4)
    masks = {"weight": torch.tensor([[True, False]])}

    def rates(data: Any) -> list[float]:
        seen.clear()
        model.weight.data.fill_(1)
        finetune(model, data, settings, loss_fn=loss_fn, masks=masks)
        positions = [*seen[1:], model.weight[0, 0].item()]  # the first call checks the loss
        return [2 * (before - after) for before, after in pairwise(positions)]

    factors: dict[str, Callable[[float], float]] = {
        "constant": lambda done: 1,
        "linear": lambda done: 1 - done,
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    }
    factor = factors[schedule]
    smooth, stepwise = [factor(t / 8) for t in range(8)], [factor(t) for t in (0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5)]
    assert rates(TensorDataset(torch.zeros(16, 2))) == pytest.approx(smooth, abs=1e-6)
    assert rates([(torch.zeros(8, 2),)] * 2) == pytest.approx(smooth, abs=1e-6), "batches are split"
    assert rates(batch for batch in [(torch.zeros(4, 2),)] * 4) == pytest.approx(stepwise, abs=1e-6), (
        "the length is not known"
    )


def test_an_epoch_has_the_steps_that_it_is_said_to_have() -> None:
    """Data that do not end go on where they stopped; the learning rate falls from step to step."""
    model = nn.Linear(1, 1, bias=False)
    masks = {"weight": torch.tensor([[True]])}
    seen: list[float] = []

    def loss_fn(net: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        seen.append(batch[0][0, 0].item())
        return net.weight.sum() * torch.ones(len(batch[0]))

    def steps(data: Any, **settings: Any) -> tuple[int, list[float], float]:
        seen.clear()
        model.weight.data.fill_(1)
        own = FineTune(lr=0.5, momentum=0, weight_decay=0, schedule="linear", batch_size=4, **settings)
        report = finetune(model, data, own, loss_fn=loss_fn, masks=masks)
        return report.steps, seen[1:], 2 * (1 - model.weight.item())  # the first call checks the loss

    endless = ((torch.full((4, 1), float(number)),) for number in itertools.count())
    assert steps(endless, epochs=2, steps_per_epoch=3) == (6, [0, 1, 2, 3, 4, 5], pytest.approx(21 / 6))
    short = [(torch.full((4, 1), float(number)),) for number in range(4)]
    assert steps(short, epochs=2, steps_per_epoch=3)[1] == [0, 1, 2, 3, 0, 1]
    assert steps(short, epochs=2, steps_per_epoch=9)[:2] == (8, [0, 1, 2, 3, 0, 1, 2, 3])
    assert steps(short, epochs=2, steps_per_epoch=9)[2] == pytest.approx(sum(1 - t / 8 for t in range(8)))
    assert steps(TensorDataset(torch.zeros(40, 1)), epochs=3, steps_per_epoch=2)[0] == 6
    large = [(torch.arange(20.0).repeat_interleave(4).reshape(-1, 1),)]
    assert steps(large, epochs=4, steps_per_epoch=3)[1] == list(range(12)), "the rest of a batch that was split"


def test_lone_samples_are_passed_over_where_batchnorm_needs_two() -> None:
    assert finetune(pruned_network(), TensorDataset(*DATA[:33]), FineTune(epochs=1, batch_size=16)).steps == 2
    with pytest.raises(ValueError, match="raise batch_size"):
        finetune(pruned_network(), DATA, FineTune(batch_size=1))


def test_kept_weights_that_training_makes_zero_are_not_lost() -> None:
    model = nn.Linear(3, 1, bias=False).bfloat16()
    model.weight.data = torch.tensor([[0.25, 1.0, 0.0]], dtype=torch.bfloat16)
    masks = {"weight": torch.tensor([[True, True, False]])}
    settings = FineTune(epochs=1, lr=0.25, momentum=0, weight_decay=0, schedule="constant")
    finetune(model, [torch.zeros(2)], settings, loss_fn=lambda net, b: net.weight.sum() * torch.ones(2), masks=masks)
    assert model.weight[0, 1] == 0.75 and model.weight[0, 2] == 0
    assert 0 < model.weight[0, 0] < 1e-30, "0.25 - 0.25"


def failing(calls: int) -> Callable[[nn.Module, Any], torch.Tensor]:
    seen = 0

    def loss_fn(net: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")
        return loss * float("nan") if seen > calls else loss

    return loss_fn


def interrupted(net: nn.Module, batch: Any) -> torch.Tensor:
    if net.training and net[1].num_batches_tracked > 2:
        raise KeyboardInterrupt
    return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "diverges": ({"settings": FineTune(lr=1e30)}, r"diverged: .*lower lr \(now 1e\+30\)"),
    "not finite later": ({"loss_fn": failing(5)}, "the loss is nan in step 5 of epoch 1"),
    "not finite at once": ({"loss_fn": failing(0)}, "not finite"),
    "scalar loss": ({"loss_fn": lambda net, b: net(b[0]).mean()}, "one loss a sample"),
    "empty": ({"data": []}, "empty"),
    "tensor": ({"data": torch.zeros(3)}, "data must be"),
    "labels": ({"data": [(torch.zeros(2, 6), torch.tensor([0, 3]))]}, "labels out of range"),
    "settings": ({"settings": {"epochs": 1}}, "must be a swap_prune.FineTune"),
    "seed": ({"seed": -1}, "seed"),
    "masks": ({"masks": {"0.weight": torch.ones(2).bool()}}, "must be boolean of shape"),
    "targets": ({"targets": ["Conv2d"]}, "Conv2d"),
    "no teacher": (
        {"settings": FineTune(distillation=0.5)},
        "distillation=0.5 needs the dense network .* pass teacher=",
    ),
    "no module": ({"teacher": "dense"}, "teacher must be a torch.nn.Module or None, got a str"),
    "loss without outputs": (
        {"settings": FineTune(distillation=1), "teacher": nn.Linear(6, 3), "loss_fn": failing(99)},
        "needs a loss that compares outputs .* use distillation=0",
    ),
    "teacher of another kind": ({"teacher": nn.Linear(5, 3)}, "failed on a batch given to the dense network"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_value_error_and_changes_nothing(case: str) -> None:
    changes, message = BAD[case]
    model = pruned_network()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        finetune(model, **{"data": DATA, "settings": FineTune(batch_size=16)} | changes)
    assert same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupted_training_changes_nothing() -> None:
    model = pruned_network()
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, DATA, FineTune(batch_size=8), loss_fn=interrupted)
    assert same(model, before)


def test_a_step_descends_the_mean_of_the_loss_and_the_divergence_from_the_teacher() -> None:
    """The formula of Hinton et al. (2015), section 2: the soft targets' gradients are multiplied by T squared."""
    torch.manual_seed(3)
    model, teacher = nn.Linear(6, 3, bias=False), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        model.weight[~mask] = 0
    share, t = 0.3, 2.5
    weight = model.weight.detach().clone().requires_grad_()
    ours, theirs = INPUTS @ weight.T, teacher[1](INPUTS).detach()
    hard = nn.functional.cross_entropy(ours, DATA.tensors[1])
    soft = nn.functional.kl_div(
        (ours / t).log_softmax(1), (theirs / t).log_softmax(1), log_target=True, reduction="batchmean"
    )
    loss = (1 - share) * hard + share * t**2 * soft
    loss.backward()
    settings = FineTune(
        epochs=1,
        lr=0.5,
        momentum=0,
        weight_decay=0,
        schedule="constant",
        batch_size=130,
        distillation=share,
        temperature=t,
    )
    report = finetune(model, DATA, settings, teacher=teacher, masks={"weight": mask})
    assert report.losses == pytest.approx([loss.item()], rel=1e-5)
    expected = (weight - 0.5 * weight.grad).masked_fill(~mask, 0)
    torch.testing.assert_close(model.weight, expected.detach(), rtol=1e-5, atol=1e-6)
    assert teacher.training, "its dropout was off meanwhile"


def test_without_a_share_the_teacher_is_not_asked() -> None:
    class Silent(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise AssertionError("asked")

    def custom(net: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    alone, none, other = (pruned_network() for _ in range(3))
    finetune(alone, DATA)
    finetune(none, DATA, FineTune(distillation=0), teacher=Silent(6, 3))
    finetune(other, DATA, loss_fn=custom, teacher=Silent(6, 3))
    assert same(alone, none)
    torch.testing.assert_close(alone.state_dict(), other.state_dict())
    given = SelfDistillation()
    assert FineTune().share_of_teacher(given, known=True) == 0, "such a loss is the distance from the dense network"
    assert FineTune(distillation=0.5).share_of_teacher(given, known=True) == 0.5


@pytest.mark.long
@pytest.mark.parametrize("method", ["magnitude", "lr"])
def test_gradual_pruning_learns_from_the_network_before_it(method: str) -> None:
    """With labels that are all wrong, only the dense network can say what it did."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    finetune(dense, DATA, FineTune(epochs=20, lr=0.1, batch_size=26), masks={})
    predicted = dense.eval()(INPUTS).argmax(1)
    mislabelled = TensorDataset(INPUTS, (predicted + 1) % 3)

    def agreement(distillation: Any) -> float:
        model = copy.deepcopy(dense)
        training = FineTune(epochs=8, lr=0.05, batch_size=26, distillation=distillation)
        swap_prune.prune(
            model, mislabelled, 0.7, method, samples=64, stages=2, finetune=training, defence=None, progress=False
        )
        return float((model.eval()(INPUTS).argmax(1) == predicted).double().mean())

    taught, alone, auto = agreement(1.0), agreement(0), agreement("auto")
    assert taught > 0.9 and auto > 0.9 and alone < 0.2
    assert auto == agreement(0.9)


class Looking(nn.Module):
    """Looks its first input up, in a table whose row of padding is zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.table((inputs[:, 0].abs() * 8).long().clamp(0, 19)))


def test_zeros_of_embeddings_are_not_lost_in_silence() -> None:
    """Rows that are zero throughout, as that of padding, are not taken for pruned."""
    model = Looking()
    with torch.no_grad():
        model.head.weight[0, :4] = 0
        model.table.weight[10:] = 0
    finetune(model, DATA)
    assert int((model.head.weight == 0).sum()) == 4
    model = Looking()
    both = ["Linear", "Embedding"]
    swap_prune.prune(model, DATA, 0.5, "magnitude", targets=both, min_keep={"Linear": 0.3}, progress=False)
    zeros = int((model.table.weight == 0).sum())
    with pytest.raises(ValueError, match=r"table.weight hold zeros too, and targets does not name them"):
        finetune(model, DATA)
    finetune(model, DATA, targets=both)
    report = swap_prune.prune(model, DATA, 0.7, "magnitude", finetune=FineTune(epochs=1, lr=0.1), progress=False)
    assert int((model.table.weight == 0).sum()) == zeros > 60
    assert any(note.startswith("zeros of table.weight, which were not selected, stayed") for note in report.notes)


def test_zeros_of_other_layers_are_not_lost_in_silence() -> None:
    """A network that was pruned with targets of its own, and is trained without naming them again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Own(8), nn.Linear(8, 3))
    swap_prune.prune(model, DATA, 0.7, "magnitude", targets=["Linear", "Own"], progress=False)
    zeros = int((model[1].table == 0).sum())
    assert zeros > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for refused in (lambda: finetune(model, DATA), lambda: swap_prune.keep_masks(model, optimizer)):
        with pytest.raises(ValueError, match=r"1.table hold zeros too, and targets does not .* pass the targets="):
            refused()
    finetune(model, DATA, targets=["Linear", "Own"])
    assert int((model[1].table == 0).sum()) == zeros
    finetune(model, DATA, ignore=["Own"])
    assert int((model[1].table == 0).sum()) < zeros


class Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(width) + 0.1 * torch.randn(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table


def test_a_dense_network_has_no_mask() -> None:
    with pytest.raises(ValueError, match="no mask to keep"):
        finetune(nn.Linear(6, 3), DATA)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"epochs": 0}, "epochs"),
    "epochs fraction": ({"epochs": 1.5}, "epochs"),
    "epochs bool": ({"epochs": True}, "epochs"),
    "batch_size": ({"batch_size": 0}, "batch_size"),
    "lr": ({"lr": 0}, "lr of fine-tuning must be a finite number above 0, got 0"),
    "lr nan": ({"lr": math.nan}, "lr"),
    "lr inf": ({"lr": math.inf}, "lr"),
    "lr text": ({"lr": "0.1"}, "lr"),
    "momentum": ({"momentum": 1}, "momentum"),
    "weight_decay": ({"weight_decay": -1e-4}, "weight_decay"),
    "optimizer": ({"optimizer": "lion"}, "optimizer of fine-tuning must be one of sgd, adam, adamw, got 'lion'"),
    "optimizers": ({"optimizer": ["sgd"]}, "optimizer of fine-tuning must be one of sgd, .*, got \\['sgd'\\]"),
    "schedules": ({"schedule": ["x"]}, "schedule of fine-tuning must be one of cosine, .*, got \\['x'\\]"),
    "schedule": ({"schedule": "steps"}, "schedule"),
    "distillation": ({"distillation": 1.1}, r"must be 'auto' or a finite number in \[0, 1\], got 1.1"),
    "distillation text": ({"distillation": "some"}, "distillation of fine-tuning must be 'auto' or"),
    "steps_per_epoch": ({"steps_per_epoch": 0}, "steps_per_epoch of fine-tuning must be a whole number of at least 1"),
    "temperature": ({"temperature": 0}, "temperature of fine-tuning must be a finite number above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_checked(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        FineTune(**changes)


def test_settings_as_text_and_as_a_table() -> None:
    expected = FineTune(epochs=3, lr=0.5, optimizer="adamw")
    assert parse_finetune("epochs=3, lr=5e-1,optimizer=adamw") == expected
    assert parse_finetune({"epochs": 3, "lr": 0.5, "optimizer": "adamw"}) == expected
    assert parse_finetune("distillation=0.5,temperature=2") == FineTune(distillation=0.5, temperature=2)
    assert parse_finetune("distillation=auto") == FineTune()
    assert parse_finetune("steps_per_epoch=5") == parse_finetune({"steps_per_epoch": 5}) == FineTune(steps_per_epoch=5)
    assert type(FineTune(epochs=np.int64(3)).settings()["epochs"]) is int
    assert FineTune(lr=1) == FineTune(lr=1.0) and repr(FineTune(lr=1)) == repr(FineTune(lr=1.0))
    for text, message in {
        "epochs": "name=value",
        "": "name=value",
        "epochs=2,": "name=value",
        "epochs=two": "epochs of fine-tuning must be a whole number, got 'two'",
        "lr=fast": "lr of fine-tuning must be a number",
        "epochs=1,epochs=2": "each setting once, got 'epochs' twice",
        "eras=2": "no setting 'eras'; it has epochs, optimizer, lr",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_finetune(text)


def test_the_teacher_stays_when_buffers_move_in_training() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten())
    model.append(nn.Linear(6, 3))
    teacher = Teacher(model, None, swap_prune.losses.CrossEntropy())
    batch = (INPUTS[:9], DATA.tensors[1][:9])
    before = teacher.outputs([batch])[0]
    model.train()(3 * INPUTS + 1)
    assert torch.equal(teacher.outputs([batch])[0], before)


def test_gradients_of_the_caller_come_back_whole() -> None:
    model = pruned_network()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    finetune(model, DATA)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


def test_steps_of_an_iterable_data_set_have_the_size_asked_for() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([DATA[i % 130] for i in range(300)])

    assert finetune(pruned_network(), Stream(), FineTune(epochs=1, batch_size=300)).steps == 1


def test_a_single_sample_left_over_is_passed_over_by_batchnorm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    swap_prune.prune(model, DATA, 0.5, "magnitude", progress=False)
    first = TensorDataset(*(tensor[:17] for tensor in DATA.tensors))
    assert finetune(model, first, FineTune(epochs=1, batch_size=16)).steps == 1


def test_a_message_on_a_batch_of_many_names_is_short() -> None:
    def broken(net: nn.Module, batch: Any) -> torch.Tensor:
        raise RuntimeError("no such file")

    for count, words in (
        (100, r"a calibration batch .*\(str, str, .*\.\.\. 100 in all\)\)"),
        (2, r"a calibration batch .*"),
    ):
        batch = [INPUTS[:count], [f"{i}.png" for i in range(count)]]
        with pytest.raises(ValueError, match=rf"failed on {words}: RuntimeError: no such file"):
            finetune(pruned_network(), [batch], loss_fn=broken)
    batch = [INPUTS[:2], *(INPUTS[:2] for _ in range(99))]
    with pytest.raises(ValueError, match=r"float32, \.\.\. 100 in all\): RuntimeError: no such file") as caught:
        finetune(pruned_network(), [batch], loss_fn=broken)
    assert len(str(caught.value)) < 400


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(6, 3)
    for call in (swap_prune.prune, finetune):
        with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
            call(model, DATA, progress=False)


def test_the_seed_decides_what_dropout_drops() -> None:
    """Of one batch the order of the samples is always the same."""

    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        with torch.no_grad():
            model[0].weight[0] = 0
        finetune(model, [DATA[:20]], FineTune(epochs=1), seed=seed, progress=False)
        return model[2].weight.detach()

    assert torch.equal(trained(0), trained(0)) and not torch.equal(trained(0), trained(1))


def test_targets_of_every_batch_are_checked() -> None:
    """By a loss that can: they may be wrong in a later batch alone."""
    targets = torch.zeros(len(INPUTS), 3)
    targets[-1] = 2
    model = nn.Sequential(nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[0] = 0
    before = copy.deepcopy(model.state_dict())
    settings = FineTune(epochs=1, batch_size=8)
    pairs = [(INPUTS[start : start + 8], targets[start : start + 8]) for start in range(0, len(INPUTS), 8)]
    with pytest.raises(ValueError, match=r"BinaryCrossEntropy needs targets in \[0, 1\], got 0 to 2"):
        finetune(model, pairs, settings, loss_fn=BinaryCrossEntropy())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    targets[-1] = 1
    finetune(model, pairs, settings, loss_fn=BinaryCrossEntropy())
