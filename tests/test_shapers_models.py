"""Filters that read a model, against one answer at a time without padding; hidden states beside log-probs."""

import math
import random

import pytest
import torch
from planned import planned
from shape_fixtures import ids_of, pair, shaped, shuffled
from tiny import EOS_ID, PAD_ID, tiny_llama
from transformers import AutoModelForCausalLM

from align_loop.builders.stage import labelled
from align_loop.compose import load
from align_loop.engines.hidden import summed_hidden_states
from align_loop.record import PREFERENCES, read_rows, write_table
from align_loop.shapers.context import ShapeContext
from align_loop.shapers.model_filters import Ches, DropTopLoss, ReferenceGap
from align_loop.shapers.models import hidden_sums, logprobs
from align_loop.stage import StageContext

POINT = pair(90, 1.0, kind="point", rejected=None, rejected_ids=None, score_rejected=None, label=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_llama(folder / name, seed=i) for i, name in enumerate(("policy", "reference"))}


@pytest.fixture(scope="module")
def models(folders):
    return {n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for n, f in folders.items()}


def some_pairs(count=11):
    rng = random.Random(0)

    def words(low, high):
        return rng.choices(range(7, 64), k=rng.randint(low, high))

    return [
        pair(i, prompt_ids=[1, *words(1, 6), 5], chosen_ids=[*words(0, 9), EOS_ID], rejected_ids=words(1, 10))
        for i in range(count)
    ]


def context_in(folders, tmp_path, budget=16384, models=("reference", "policy", "model")):
    stage = StageContext("pairs", tmp_path, {"device": "cpu", "score_token_budget": budget}, quiet=True)
    known = folders | {"model": folders["reference"]}
    return ShapeContext(None, 0, models={name: known[name] for name in models}, stage=stage)


@torch.no_grad()
def logp(model, row, side):
    """The definition, one answer at a time."""
    prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
    logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))


@torch.no_grad()
def hidden(model, row, side):
    """Sum of the last hidden states at the last prompt token and all answer tokens but the last."""
    prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
    states = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[-1][0]
    return states[len(prompt) - 1 : len(prompt) + len(answer) - 1].sum(dim=0).double()


def lowest(rows, value, count):
    return {r["example_id"] for r in sorted(rows, key=value)[:count]}


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_hidden_sums_are_those_of_one_answer_at_a_time(models, budget):
    model, rows = models["policy"], some_pairs()
    model.train()
    sequences = [(row["prompt_ids"], row["chosen_ids"]) for row in rows] + [([5], [])]
    done = []
    got = summed_hidden_states(model, sequences, pad_id=PAD_ID, token_budget=budget, device="cpu", on_done=done.append)
    assert model.training and sum(done) == len(sequences) and not model.eval().training
    expected = torch.stack([*(hidden(model, row, "chosen") for row in rows), torch.zeros(64).double()])
    assert torch.allclose(got.double(), expected, atol=1e-3) and got.abs().max() > 1
    with pytest.raises(ValueError, match="empty prompt"):
        summed_hidden_states(model, [([], [7])], pad_id=PAD_ID, token_budget=9, device="cpu")


def test_the_states_are_what_the_output_layer_reads(models):
    model, row = models["policy"], some_pairs(1)[0]
    prompt, answer = row["prompt_ids"], row["rejected_ids"][:1]
    (state,) = summed_hidden_states(model, [(prompt, answer)], pad_id=PAD_ID, token_budget=99, device="cpu")
    with torch.no_grad():
        assert torch.allclose(model.lm_head(state), model(torch.tensor([prompt])).logits[0, -1], atol=1e-4)


def test_each_distinct_answer_is_scored_once(folders, tmp_path):
    rows = some_pairs(3)
    context = context_in(folders, tmp_path)
    known = logprobs(folders["policy"], [*rows, *rows], context)
    assert len(known) == 6
    lengths = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows]
    assert context.stage.report["tokens"] == sum(lengths)
    assert logprobs(folders["policy"], [], context) == {} == hidden_sums(folders["policy"], [], context)
    alone = ShapeContext(None, 0)  # without a stage around it
    assert logprobs(folders["policy"], rows, alone) == pytest.approx(known, abs=1e-4)


# --- the reference's gap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("which", "sign"), [("absolute", lambda d: -abs(d)), ("largest", lambda d: -d), ("smallest", lambda d: d)]
)
def test_the_pairs_that_the_reference_tells_apart_stay(folders, models, tmp_path, which, sign, per_token):
    rows = some_pairs()

    def value(row):
        sides = [
            logp(models["reference"], row, s) / (len(row[f"{s}_ids"]) if per_token else 1)
            for s in ("chosen", "rejected")
        ]
        return sign(sides[0] - sides[1])

    shaper = ReferenceGap(0.4, which, per_token)
    kept, gone = shaped(shaper, [*rows, POINT], context_in(folders, tmp_path, models=("reference",)))
    assert set(ids_of(kept)) == lowest(rows, value, 4) | {"e090"}
    assert set(gone.values()) == {"answers not clearly apart"}
    again, _ = shaped(shaper, shuffled([*rows, POINT]), context_in(folders, tmp_path, budget=30))
    assert set(ids_of(again)) == set(ids_of(kept))
    assert (
        shaper.roles() == {"reference": "initial"}
        and ReferenceGap(reference="previous").roles()["reference"] == "previous"
    )


# --- CHES -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_the_pairs_of_the_highest_ches_score_go(folders, models, tmp_path, normalised):
    rows = some_pairs()

    def ches(row, model=models["reference"]):
        won, lost = (
            hidden(model, row, s) / (len(row[f"{s}_ids"]) if normalised else 1) for s in ("chosen", "rejected")
        )
        return (won @ lost - won.norm() ** 2).item()

    context = context_in(folders, tmp_path, models=("model",))
    known = hidden_sums(folders["reference"], rows, context)
    shaper = Ches(0.3, normalised)
    assert [shaper.similarity(r, known) for r in rows] == pytest.approx([ches(r) for r in rows], rel=1e-3, abs=1e-2)
    kept, gone = shaped(shaper, [*rows, POINT], context)
    assert set(gone) == lowest(rows, lambda r: -ches(r), 3) and len(kept) == 9
    assert set(gone) != lowest(rows, ches, 3)
    assert set(shaped(shaper, shuffled(rows), context_in(folders, tmp_path, budget=30))[1]) == set(gone)
    assert shaped(Ches(0.0), rows, context)[1] == {}
    assert shaper.roles() == {"model": "initial"}


# --- ROPO's filter ----------------------------------------------------------------------------------------------


def loss(row, u):
    q = row.get("q", 1.0)
    u = u - row.get("m", 0.0)
    return q * math.log1p(math.exp(-u)) + (1 - q) * math.log1p(math.exp(u))


def test_the_pairs_of_the_highest_loss_go(folders, models, tmp_path):
    rows = some_pairs()
    rows[1] |= {"q": 0.0}
    rows[2] |= {"m": 5.0}
    rows[3] |= {"beta": 0.001}

    def value(row):
        ratios = [logp(models["policy"], row, s) - logp(models["reference"], row, s) for s in ("chosen", "rejected")]
        return -loss(row, row.get("beta", 0.05) * (ratios[0] - ratios[1]))

    context = context_in(folders, tmp_path, models=("policy", "reference"))
    for share, count in ((0.1, 1), (0.3, 3), (0.6, 7)):
        kept, gone = shaped(DropTopLoss(share, beta=0.05), [*rows, POINT], context)
        assert set(gone) == lowest(rows, value, count) and set(gone.values()) == {"highest loss"}
    assert DropTopLoss(reference="previous").roles() == {"policy": "policy", "reference": "previous"}


def test_the_loss_from_scores_reads_no_model():
    rows = [pair(0, 3.0), pair(1, -0.5), pair(2), pair(3, 1.0, m=4.0), pair(4, 2.0, q=0.1), POINT]
    shaper = DropTopLoss(0.5, by="scores")
    assert shaper.roles() == {} and set(shaped(shaper, rows)[1]) == {"e003", "e004"}
    assert shaped(DropTopLoss(0.5, by="scores"), [pair(0, -1e4), pair(1, 1e4)])[1] == {"e000": "highest loss"}


# --- in a run ---------------------------------------------------------------------------------------------------

NODES = {
    "apart": {"_target_": "align_loop.shapers.model_filters.ReferenceGap", "keep": 0.5},
    "alike": {"_target_": "align_loop.shapers.model_filters.Ches", "share": 0.5},
}


def test_the_stage_hands_each_shaper_its_own_model(folders, tmp_path):
    words = [f"w{7 + i} w{20 + i}" for i in range(4)]
    rows = [
        {"example_id": f"e{i}", "prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"w{50 + i}"}]}
        | {"chosen": text, "rejected": f"w{40 + i} w9"}
        for i, text in enumerate(words)
    ]
    write_table(tmp_path / "seed.parquet", rows, PREFERENCES)
    inputs = {"preferences": tmp_path / "seed.parquet", "tokenizer": folders["policy"]}
    inputs |= {"apart.reference": folders["reference"], "alike.model": folders["policy"]}
    context = StageContext("pairs", tmp_path, {"device": "cpu"}, quiet=True)
    labelled({"shapers": NODES, "dtype": "float32", "seed": 0}, inputs, context)
    reasons = ["answers not clearly apart", "answers too alike to the model"]
    assert context.report["rows"]["pairs"] == {"in": 4, "out": 1, "dropped": {reasons[0]: 2, reasons[1]: 1}}
    assert len(read_rows(tmp_path / "examples.parquet")) == 1 and context.report["tokens"] > 0


def test_a_run_binds_the_roles(tmp_path):
    shaper = f"+shapers.alike={{_target_: {NODES['alike']['_target_']}}}"
    config = load(["+experiment=selfie_iter4", shaper])[0]
    bound = {}
    for role in ("policy", "initial"):
        config.shapers["alike"].model = role
        stages = {stage.name: stage for stage in planned(config, tmp_path)}
        pairs, train = stages["iteration-2/pairs"], stages["iteration-2/train"]
        bound[role] = pairs.inputs["alike.model"].name
        assert NODES["alike"]["_target_"] in pairs.parts
    assert bound["policy"] == train.inputs["policy"].name != bound["initial"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReferenceGap(0.0), "ReferenceGap.keep=0.0"),
        (lambda: Ches(1.0), "Ches.share=1.0"),
        (lambda: DropTopLoss(-0.1), "DropTopLoss.share=-0.1"),
        (lambda: DropTopLoss(beta=0), "DropTopLoss.beta=0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
