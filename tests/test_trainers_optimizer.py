"""Master copies of bfloat16 weights: the optimiser by itself."""

from __future__ import annotations

import torch

from align_loop.trainers.optimizer import MasterAdamW

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def gradient(step: int) -> torch.Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(step)).bfloat16()


def take(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: range) -> None:
    for step in steps:
        parameter.grad = gradient(step).to(parameter.dtype)
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)  # as a schedule does
        optimizer.step()


def test_the_weights_are_the_rounded_weights_of_adamw_in_float32() -> None:
    start = torch.randn(16).bfloat16()
    ours, wide = start.clone().requires_grad_(), start.float().requires_grad_()
    take(MasterAdamW([ours], **SETTINGS), ours, range(20))
    take(torch.optim.AdamW([wide], **SETTINGS), wide, range(20))
    assert torch.equal(ours, wide.bfloat16()) and not torch.equal(ours, start)


def test_updates_below_the_resolution_add_up() -> None:
    ours, plain = (torch.ones(4, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    for parameter, cls in ((ours, MasterAdamW), (plain, torch.optim.AdamW)):
        optimizer = cls([parameter], lr=1e-4, weight_decay=0.0)
        for _ in range(100):  # in sum 0.01, each step far below the distance of 1 to its neighbour, 0.004
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.equal(plain, torch.ones(4, dtype=torch.bfloat16))
    assert torch.allclose(ours.float(), torch.full((4,), 0.99), atol=0.004)


def test_a_resumed_optimiser_goes_on_from_the_unrounded_weights() -> None:
    start = torch.randn(16).bfloat16()
    whole, half = start.clone().requires_grad_(), start.clone().requires_grad_()
    take(MasterAdamW([whole], **SETTINGS), whole, range(20))
    first = MasterAdamW([half], **SETTINGS)
    take(first, half, range(10))
    resumed = half.detach().clone().requires_grad_()
    second = MasterAdamW([resumed], **SETTINGS)
    second.load_state_dict(first.state_dict())
    take(second, resumed, range(10, 20))
    assert torch.equal(resumed, whole)
