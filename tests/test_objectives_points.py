"""Point, supervised and KL losses equal the papers' formulas; wrong formulas are told apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from algebra import Case, N, batch_of, check, numbers, sigmoid
from torch import Tensor

from align_loop.objectives.objective import Objective
from align_loop.objectives.terms import KlTerm, PairTerm, PointTerm, SftTerm
from align_loop.objectives.trackers import Baseline

B = 0.3
SIGNS = [1.0, -1.0, -1.0, 1.0, 1.0, -1.0]
GRADES = [0.4, -1.2, 2.0, 0.0, 0.9, -0.3]
VALUES = [0.1, -0.5, 0.7, 1.0, -1.0, 0.2]


def point(**fields: object) -> Objective:
    return Objective(B, {"point": PointTerm(**fields)})


def at(value: float, rule: str = "batch") -> dict[str, Baseline]:
    """A tracker that has settled on a baseline of ``value`` nats."""
    tracker = Baseline(rule, "log_ratio", None)
    tracker.value = value
    return {"point": tracker}


def log_ratio(x: SimpleNamespace) -> Tensor:
    return x.p - x.r


def kto(x: SimpleNamespace, z0: float, good: float = 1.0, bad: float = 1.0) -> Tensor:
    """Equations 7 and 8: the value function subtracted from lambda_y."""
    r = log_ratio(x)
    return torch.where(x.label > 0, good * (1 - sigmoid(B * (r - z0))), bad * (1 - sigmoid(B * (z0 - r))))


def pair_points(x: SimpleNamespace, good, bad) -> Tensor:
    return good(x.pw - x.rw) + bad(x.pl - x.rl)


def step_scaled(x: SimpleNamespace, tau: float) -> Tensor:
    """DRO-V: the value of the squared residual with the policy's gradient divided by tau."""
    residual = x.label - x.value - B * log_ratio(x)
    return -(residual.detach() * log_ratio(x)) * B / tau


LABELS, DRO = {"label": SIGNS}, {"label": GRADES, "value": VALUES}
POINTS = [
    Case(
        "KTO",
        point(loss="kto", baseline="batch"),
        lambda x: kto(x, 0.4),
        lambda x: kto(x, -0.4),
        LABELS,
        "point",
        at(0.4),
    ),
    Case(
        "KTO's lambdas",
        point(loss="kto", baseline="batch", positive_weight=1.3, negative_weight=0.5),
        lambda x: kto(x, 0.4, 1.3, 0.5),
        lambda x: kto(x, 0.4, 0.5, 1.3),
        LABELS,
        "point",
        at(0.4),
    ),
    Case(
        "APO-zero",
        point(loss="kto", baseline="none"),
        lambda x: pair_points(x, lambda s: 1 - sigmoid(B * s), lambda s: sigmoid(B * s)),
        lambda x: pair_points(x, lambda s: sigmoid(B * s), lambda s: 1 - sigmoid(B * s)),
    ),
    Case(
        "BCO",
        point(loss="bco"),
        lambda x: pair_points(
            x, lambda s: torch.log(1 + torch.exp(0.6 * B - B * s)), lambda s: torch.log(1 + torch.exp(B * s - 0.6 * B))
        ),
        lambda x: pair_points(x, lambda s: -torch.log(sigmoid(B * s)), lambda s: -torch.log(sigmoid(-B * s))),
        trackers=at(0.6),
    ),
    Case(
        "NCA",
        point(loss="nca"),
        lambda x: pair_points(
            x,
            lambda s: -torch.log(sigmoid(B * s)) - torch.log(sigmoid(-B * s)) / 2,
            lambda s: -torch.log(sigmoid(-B * s)) / 2,
        ),
        lambda x: pair_points(x, lambda s: -torch.log(sigmoid(B * s)), lambda s: -torch.log(sigmoid(-B * s))),
    ),
    Case(
        "NPO",
        point(loss="npo"),
        lambda x: 2 / B * torch.log(1 + torch.exp(log_ratio(x)) ** B),
        lambda x: 1 / B * torch.log(1 + torch.exp(log_ratio(x)) ** B),
        {"label": [-1.0] * N},
        "point",
    ),
    Case(
        "NPO on pairs",
        point(loss="npo"),
        lambda x: 2 / B * torch.log(1 + torch.exp(B * (x.pl - x.rl))),
        lambda x: 2 / B * torch.log(1 + torch.exp(B * (x.pw - x.rw))),
    ),
    Case(
        "SPPO, hard",
        point(loss="sppo"),
        lambda x: pair_points(x, lambda s: (s - 0.5 / B) ** 2, lambda s: (s + 0.5 / B) ** 2),
        lambda x: pair_points(x, lambda s: (s + 0.5 / B) ** 2, lambda s: (s - 0.5 / B) ** 2),
    ),
    Case(
        "SPPO, GPO: eta (P - 1/2)",
        point(loss="sppo", beta=0.5),
        lambda x: (log_ratio(x) - 2 * ((x.label + 1) / 2 - 0.5)) ** 2,
        lambda x: (log_ratio(x) - 2 * x.label) ** 2,
        {"label": GRADES},
        "point",
    ),
    Case(
        "DRO",
        point(loss="dro"),
        lambda x: (x.label - x.value - B * log_ratio(x)) ** 2 / 2,
        lambda x: (x.label + x.value - B * log_ratio(x)) ** 2 / 2,
        DRO,
        "point",
    ),
    Case(
        "DRO without a value",
        point(loss="dro", baseline="none"),
        lambda x: (x.label - B * log_ratio(x)) ** 2 / 2,
        lambda x: (x.label - log_ratio(x)) ** 2 / 2,
        {"label": GRADES},
        "point",
    ),
    Case(
        "DRO-V's policy step",
        point(loss="dro_v"),
        lambda x: step_scaled(x, B),
        lambda x: step_scaled(x, 1.0),
        DRO,
        "point",
        gradient_only=True,
    ),
    Case(
        "DRO-V's value",
        point(loss="dro_v"),
        lambda x: (x.label - x.value - B * log_ratio(x)) ** 2 / 2,
        lambda x: (x.label - B * log_ratio(x)) ** 2 / 2,
        DRO,
        "point",
        value_only=True,
    ),
    Case(
        "PMPO",
        point(loss="linear", score="log_prob", beta=1.0, positive_weight=0.7, negative_weight=0.3),
        lambda x: torch.where(x.label > 0, -0.7 * x.p, 0.3 * x.p),
        lambda x: torch.where(x.label > 0, -0.7 * x.p, -0.3 * x.p),
        LABELS,
        "point",
    ),
    Case(
        "SPAC's critic",
        point(loss="linear", beta=1.0),
        log_ratio,
        lambda x: -log_ratio(x),
        {"label": [-1.0] * N},
        "point",
    ),
    Case(
        "rationale term",
        point(loss="bco", baseline="none", kinds=["demo"], score="log_prob", beta=2.0),
        lambda x: -torch.log(sigmoid(2 * x.p)),
        lambda x: -x.p,
        kind="demo",
    ),
    Case(
        "soft labels",
        point(loss="bco", baseline="none"),
        lambda x: -x.q * torch.log(sigmoid(B * log_ratio(x))) - (1 - x.q) * torch.log(sigmoid(-B * log_ratio(x))),
        lambda x: -torch.log(sigmoid(B * log_ratio(x))),
        {"label": [1.0] * N, "q": [0.9, 0.8, 0.5, 0.2, 0.1, 1.0]},
        "point",
    ),
    Case(
        "APO-down (plus 1)",
        Objective(
            B,
            {
                "a": PointTerm(weight=-1.0, loss="kto", baseline="none", negative_weight=0.0),
                "b": PairTerm(links={"sigmoid": 1.0}),
            },
        ),
        lambda x: sigmoid(B * (x.pw - x.rw)) - sigmoid(B * (x.pw - x.rw - x.pl + x.rl)),
        lambda x: -sigmoid(B * (x.pw - x.rw)) - sigmoid(B * (x.pw - x.rw - x.pl + x.rl)),
    ),
    Case(
        "MPO",
        Objective(
            B,
            {
                "p": PairTerm(weight=0.8),
                "point": PointTerm(weight=0.2, loss="bco", kinds=["pair"]),
                "g": SftTerm(kinds=["pair"]),
            },
        ),
        lambda x: mpo(x, 0.8, 0.2),
        lambda x: mpo(x, 0.2, 0.8),
        trackers=at(-0.2),
    ),
    Case(
        "SFT, mean",
        Objective(B, {"s": SftTerm()}),
        lambda x: -torch.stack([t.mean() for t in x.token_p]),
        lambda x: -x.p,
        kind="demo",
    ),
    Case("SFT, sum", Objective(B, {"s": SftTerm(reduce="sum")}), lambda x: -x.p, lambda x: -x.p / x.n, kind="demo"),
    Case(
        "KL by tokens",
        Objective(B, {"k": KlTerm()}),
        lambda x: torch.stack([((p - r) ** 2).sum() / 2 for p, r in zip(x.token_p, x.token_r, strict=True)]),
        lambda x: log_ratio(x) ** 2 / 2,
        kind="demo",
    ),
    Case(
        "HyPO's KL gradient",
        Objective(B, {"k": KlTerm(level="sequence")}),
        lambda x: log_ratio(x).detach() * x.p,
        lambda x: x.p,
        kind="demo",
        gradient_only=True,
    ),
    Case(
        "KL on both sides of pairs",
        Objective(B, {"k": KlTerm(level="sequence")}),
        lambda x: pair_points(x, lambda s: s * s / 2, lambda s: s * s / 2),
        lambda x: pair_points(x, lambda s: s * s / 2, lambda s: 0 * s),
    ),
]


def mpo(x: SimpleNamespace, preference: float, quality: float) -> Tensor:
    sw, sl = B * (x.pw - x.rw), B * (x.pl - x.rl)
    bco = -torch.log(sigmoid(sw + 0.2 * B)) - torch.log(sigmoid(-sl - 0.2 * B))
    return -preference * torch.log(sigmoid(sw - sl)) + quality * bco - x.pw / x.nw


@pytest.mark.parametrize("case", POINTS, ids=repr)
def test_the_algebra_equals_the_formula(case: Case) -> None:
    assert all(check(case, case.right, seed) for seed in range(3))


@pytest.mark.parametrize("case", POINTS, ids=repr)
def test_a_wrong_formula_is_told_apart(case: Case) -> None:
    assert not any(check(case, case.wrong, seed) for seed in range(3))


@pytest.mark.parametrize("loss", ["dro", "dro_v"])
def test_the_value_head_gets_the_gradient_of_its_own_regression(loss: str) -> None:
    batch = batch_of("point", **DRO)
    x = numbers(batch)
    (found,) = torch.autograd.grad(point(loss=loss).losses(batch, {})["point"].sum(), batch.value)
    assert torch.allclose(found, -(x.label - x.value - B * log_ratio(x)))
