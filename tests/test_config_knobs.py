"""No dead knob: every key of a configuration is part of some stage's key, or something else is named that reads it."""

import pytest
from planned import changed, keyed

from align_loop import runner
from align_loop.compose import compose_node, load
from align_loop.config import from_node
from align_loop.engines.base import EngineChoice

SELFIE = "+experiment=selfie_iter4"

# Not part of any key, and who reads them instead.
NOT_KEYED = {
    "run_dir": "runner.run: where outputs go",
    "store_dir": "runner.run: where stages are kept",
    "experiment": "runner: run_dir and summary.json",
    "setting.name": "runner: run_dir and summary.json",
    "loop.until": "loop: where the walk ends",
    "loop.stop_on_drift": "loop: whether a drift ends the walk",
}
NOT_KEYED_GROUPS = {
    "reward_model": "steps with role: reward_model, of another recipe",
    "hardware": "runner.resolve_hardware, for the launcher",
    "tracking": "tracking.wandb.Tracking",
    "guard": "loop: judges what the evaluations measured",
}

# Another right value, where adding to the present one would be wrong.
OTHER = {
    "sft": "skip",
    "lora": {"r": 4},
    "run_dir": "elsewhere",
    "store_dir": "elsewhere",
    "annotator.reference": "previous",
    "updater.reference": "initial",
    "sampler.engine": None,  # decided by runner.resolve_engine and handed to the loop
    "sampler.top_p": 0.8,
    "sampler.variants": {"styled": "be brief"},
    "sampler.truncated": "drop",
    "noise.action": "drop",
    "noise.rule": "paper_code",
    "evaluator.temperature": 0.5,
    "loop.iterations": 3,
    "setting.honour": 0.7,
    "setting.heldout_share": 0.3,
    "setting.prompt_sets.3": None,  # of another number of iterations
    "setting.model.hidden": 256,
    "setting.model.heads": 2,
    "setting.training.full.learning_rate": None,  # of another recipe
    "setting.training.full.epochs": None,
    "setting.training.full.batch_size": None,
    "updater.start": "initial",
    "schedule.before": [{"name": "seed", "data": ["seed"], "training": "seed"}],
    "schedule.iteration": [{"name": "round", "data": ["on_policy"], "training": "iteration", "noise": True}],
    "setting.training.reward.learning_rate": None,  # of another recipe
    "setting.training.reward.epochs": None,
    "setting.training.reward.batch_size": None,
}


# The same for a recipe with a reward model.
REWARD_MODEL = {
    "reward_model.head": None,  # goes with dim
    "reward_model.dim": None,
    "reward_model.member_data": None,  # goes with members
    "reward_model.start": "previous",
    "annotator.reward_model": None,
    "setting.training.reward.batch_size": 16,
}


def leaves(node, path=""):
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield from leaves(value, name)
        else:
            yield name, value


def another(name, value, others):
    if name in others:
        return others[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [value[0] / 2, *value[1:]] if isinstance(value[0], float) else [value[0] + 1, *value[1:]]
    assert isinstance(value, (int, float)), f"say in OTHER what else {name}={value!r} may be"
    return value + 1 if isinstance(value, int) else value * 0.5 if value else 0.25


def test_every_knob_turns_something(tmp_path):
    node = compose_node([SELFIE])
    del node["lora"]
    assert dead_knobs(node, [*leaves(node), ("lora", None)], tmp_path) == []


def test_every_knob_of_the_reward_model_turns_something(tmp_path):
    node = compose_node(["+experiment=selfie_rm"])
    mine = [
        (k, v) for k, v in leaves(node) if k.startswith(("reward_model.", "setting.training.reward.", "annotator."))
    ]
    assert len(mine) > 10 and dead_knobs(node, mine, tmp_path, REWARD_MODEL) == []


def dead_knobs(node, knobs, tmp_path, others=OTHER):
    before = keyed(from_node(node), tmp_path)
    dead = []
    for name, value in knobs:
        group = name.partition(".")[0]
        if name in NOT_KEYED or (others is OTHER and group in NOT_KEYED_GROUPS) or name.endswith("_target_"):
            continue
        other = another(name, value, others)
        if other is not None and keyed(from_node(changed(node, name, other)), tmp_path) == before:
            dead.append(name)
    return dead


@pytest.mark.parametrize("own", ["annotator", "builder", "shapers", "objective"])
def test_a_steps_own_parts_act_in_that_step_alone(own, tmp_path):
    other = {
        "annotator": {"_target_": "align_loop.annotators.gold.Gold"},
        "builder": {"_target_": "align_loop.builders.best.BestRandom"},
        "shapers": {"length": {"_target_": "align_loop.shapers.filters.LengthRules", "max_ratio": 2.0}},
        "objective": {"_target_": "align_loop.objectives.objective.Objective", "beta": 0.7},
    }
    node = compose_node([SELFIE])
    changed_step = [{**node["schedule"]["iteration"][0], own: other[own]}]
    one, two = (keyed(from_node(n), tmp_path) for n in (node, changed(node, "schedule.iteration", changed_step)))
    differ = {a[0] for a, b in zip(one, two, strict=True) if a != b}
    stage = {"annotator": "annotate", "builder": "pairs", "shapers": "pairs", "objective": "train"}[own]
    assert differ == {f"iteration-{i}/{stage}" for i in (1, 2, 3, 4)}


def test_what_is_not_keyed_changes_no_key(tmp_path):
    node = compose_node([SELFIE])
    before = keyed(from_node(node), tmp_path)
    other = {"device": "cpu", "launcher": "inline", "gradient_checkpointing": True, "vllm_memory": 0.5}
    for name, value in leaves({"hardware": node["hardware"]}):
        new = other.get(name.partition(".")[2], 4)
        assert new != value and keyed(from_node(changed(node, name, new)), tmp_path) == before
    for name in ("tracking.project", "experiment", "setting.name"):
        assert keyed(from_node(changed(node, name, "other")), tmp_path) == before
    assert keyed(from_node(changed(node, "tracking.mode", "off")), tmp_path) == before


def test_the_knobs_of_another_recipe_and_of_the_engine_act_there(tmp_path):
    given = ["+experiment=dpo_full_labels"]
    before = keyed(load(given)[0], tmp_path)
    for knob in ("learning_rate=1e-3", "epochs=3", "batch_size=64"):
        assert keyed(load([*given, f"setting.training.full.{knob}"])[0], tmp_path) != before
    three = [SELFIE, "loop.iterations=3"]
    changed_sets = load([*three, "setting.prompt_sets.3=[10,20,30]"])[0]
    assert keyed(load(three)[0], tmp_path) != keyed(changed_sets, tmp_path)
    config = load([SELFIE, "sampler.engine=hf"])[0]
    assert runner.resolve_engine(config, "cpu", tmp_path, remember=False) == EngineChoice("hf", "").name
