"""Settings of a training: ranges, and the division of the global batch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from align_loop.trainers.config import LoraConfig, TrainingConfig, micro_batches


@pytest.mark.parametrize(
    ("batch", "micro", "devices", "expected"),
    [(32, 8, 1, (8, 4)), (32, 4, 8, (4, 1)), (32, None, 1, (32, 1)), (48, None, 1, (24, 2)), (7, None, 1, (7, 1))],
)
def test_the_division_multiplies_back_to_the_global_batch(batch, micro, devices, expected) -> None:
    found = micro_batches(batch, {"micro_batch_size": micro}, devices)
    assert found == expected and found[0] * found[1] * devices == batch


@pytest.mark.parametrize(("batch", "micro", "devices"), [(32, 5, 1), (32, 8, 3), (4, 8, 1), (2, None, 4)])
def test_a_batch_that_cannot_be_divided_is_refused(batch, micro, devices) -> None:
    with pytest.raises(ValueError, match=f"batch_size {batch} can't be divided"):
        micro_batches(batch, {"micro_batch_size": micro}, devices)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"epochs": 0},
        {"batch_size": 0},
        {"warmup_ratio": 1.0},
        {"schedule": "cosin"},
        {"weight_decay": -1},
        {"max_grad_norm": -1},
        {"logging_steps": 0},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"TrainingConfig.{next(iter(wrong))} must be"):
        TrainingConfig(**{"learning_rate": 1e-4, **wrong})


@pytest.mark.parametrize("wrong", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_lora_values_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"LoraConfig.{next(iter(wrong))} must be"):
        LoraConfig(**wrong)


def test_settings_and_objectives_load_without_torch() -> None:
    code = (
        "import sys; import align_loop.trainers.config, align_loop.objectives.noise, align_loop.objectives.objective\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
