"""The loop, as the paper's algorithm reads: train on the seed; then sample, judge, build pairs, train, evaluate.

Each expensive call is a stage of the store, so resuming is running the same command again, and ``plan`` is the
same walk with a store that runs nothing. This file decides what depends on what; it imports no model code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_loop.config import LABELLED, Config, Step, files_of, pairs_name, roles_of, steps
from align_loop.errors import UserError
from align_loop.evaluators.drift import implausible_share
from align_loop.evaluators.pairs import measure_pairs
from align_loop.evaluators.policy import read_evaluation
from align_loop.evaluators.reward import read_reward_evaluation
from align_loop.parts import code_of, node_of, plain
from align_loop.store import Artifact, Stage, Store, read_manifest
from align_loop.templates import template_text

ENGINES = ("align_loop.engines.vllm:start", "align_loop.engines.hf:start")


@dataclass
class Policy:
    """A policy of the run: its checkpoint, and where its evaluation and its round's tables are."""

    name: str
    iteration: int
    model: Artifact
    adapter: Artifact | None = None
    answers: Artifact | None = None
    gold: Artifact | None = None
    evaluation: Artifact | None = None
    round: dict[str, Artifact] = field(default_factory=dict)  # sample, annotate, gold, pairs, train
    stages: list[Artifact] = field(default_factory=list)  # everything that was made for it
    row: dict[str, Any] | None = None  # its line of metrics


@dataclass
class RewardModel:
    """A reward model of the run, and how it did on held-out labels."""

    name: str
    model: Artifact
    evaluation: Artifact
    round: dict[str, Artifact]
    stages: list[Artifact]
    row: dict[str, Any] | None = None


class StopHere(Exception):
    """The stage of ``loop.until`` is done."""


class Run:
    """One walk through a configuration's schedule.

    ``policies`` grows as the walk goes on; ``on_policy_done(run)`` is called after each evaluation. With a store that
    runs nothing (``store.dry_run``) the walk only plans.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        engine: str,
        on_policy_done: Callable[[Run], None] | None = None,
        on_reward_model_done: Callable[[RewardModel], None] | None = None,
    ):
        self.config, self.store, self.engine = config, store, engine
        self.on_policy_done, self.on_reward_model_done = on_policy_done, on_reward_model_done
        self.policies: list[Policy] = []
        self.reward_models: list[RewardModel] = []
        self.initial: Policy | None = None
        self.data: Artifact | None = None
        self.iterations = config.loop.iterations
        self.drift: str | None = None
        self._made: list[Artifact] = []

    def walk(self) -> None:
        """Run (or plan) everything; returns early at ``loop.until``, and at a drift with ``loop.stop_on_drift``."""
        try:
            self._walk()
        except StopHere:
            return

    def _walk(self) -> None:
        self.data = self._source("data", self.config.setting.data_stage(self.iterations, self.config.seed))
        policy = Policy("start", 0, self._start())
        if not self.config.trains_sft:
            policy.name = "initial"
            self.initial = policy
            self._evaluate(policy)
        for step in steps(self.config):
            if step.role == "reward_model":
                self._train_reward_model(step, policy)
                continue
            policy = self._train(step, policy)
            if "demonstrations" in step.data:
                self.initial = policy
            self._evaluate(policy)
            if self.drift and self.config.loop.stop_on_drift:
                return

    @property
    def final(self) -> Policy | None:
        """The last policy before the drift guard tripped (the last one if it did not)."""
        good = [p for p in self.policies if p.row is None or p.row["good"]]
        return good[-1] if good else None

    @property
    def unfinished(self) -> dict[str, Artifact]:
        """What the round under way has made so far: ``sample``, ``annotate``, ...; empty between rounds."""
        return {artifact.name.rpartition("/")[2]: artifact for artifact in self._made}

    # --- one step: train a policy -----------------------------------------------------------------------------

    def _train(self, step: Step, policy: Policy) -> Policy:
        """The policy that ``step`` makes: from ``policy``, or from the initial one."""
        if "demonstrations" in step.data:
            return self._train_sft(step, policy)
        tables = self._tables(step, policy)
        start = self.initial if self.config.updater.start == "initial" else policy
        noise = self.config.noise if step.noise and self.config.noise.action != "none" else None
        reference = self.initial.model if self.config.updater.reference == "initial" else start.model
        inputs = {"policy": start.model, "reference": reference, **_pairs_of(tables)}
        if self.config.lora:
            inputs["base"] = self.initial.model
            if start.adapter is not None:
                inputs["adapter"] = start.adapter
        objective = step.objective or self.config.objective
        config = self._training(step) | {
            "objective": node_of(objective),
            "noise": node_of(noise) if noise else None,
            "iteration": step.iteration,
        }
        parts = [*code_of(objective), *(code_of(noise) if noise else [])]
        trained = self._stage(f"{step.name}/train", "align_loop.trainers.stage:pairs", config, inputs, parts=parts)
        adapter = self.store.part(trained, "adapter") if self.config.lora else None
        model = self.store.part(trained, "model")
        return Policy(step.name, step.iteration, model, adapter, round={**tables, "train": trained})

    def _train_reward_model(self, step: Step, policy: Policy) -> None:
        """Train a reward model and measure it on the held-out labels."""
        tables = self._tables(step, policy)
        settings = self.config.reward_model
        previous = self.reward_models[-1].model if self.reward_models and settings.start == "previous" else None
        inputs = {"model": previous or self.initial.model, **_pairs_of(tables)}
        config = self._training(step) | {"reward_model": node_of(settings)}
        run, parts = "align_loop.trainers.stage:reward", code_of(settings)
        trained = self._stage(f"{step.name}/train", run, config, inputs, parts=parts)
        inputs = {"reward_model": trained, "heldout": self._table("heldout")}
        config = {"dtype": self.config.setting.dtype}
        name = f"{step.name}/evaluate"
        evaluation = self._stage(name, "align_loop.evaluators.reward:evaluate_reward", config, inputs, last=True)
        made = RewardModel(step.name, trained, evaluation, {**tables, "train": trained}, self._made)
        self._made = []
        self.reward_models.append(made)
        if not self.store.dry_run:
            made.row = self._reward_row(made)
            if self.on_reward_model_done is not None:
                self.on_reward_model_done(made)
        if self.config.loop.until == name:
            raise StopHere

    def _tables(self, step: Step, policy: Policy) -> dict[str, Artifact]:
        """The tables of pairs that ``step`` trains on (``pairs``, ``pairs-seed``, ...), and what they were made of."""
        tables = self._own_pairs(step, policy) if "on_policy" in step.data else {}
        for data in step.data:
            if data in LABELLED:
                inputs = {"preferences": self._table(TABLES[data]), "tokenizer": policy.model}
                tables[pairs_name(step, data)] = self._pairs_stage(step, policy, pairs_name(step, data), None, inputs)
        return tables

    def _train_sft(self, step: Step, start: Policy) -> Policy:
        config = self._training(step) | {"max_length": self.config.setting.max_length}
        if not self.config.setting.pretrained:
            config["lora"] = None  # an adapter on random weights would learn nothing
        inputs = {"model": start.model, "demonstrations": self._table("demonstrations")}
        trained = self._stage(f"{step.name}/train", "align_loop.trainers.stage:sft", config, inputs)
        return Policy(step.name, 0, self.store.part(trained, "model"), round={"train": trained})

    def _own_pairs(self, step: Step, policy: Policy) -> dict[str, Artifact]:
        """Training pairs that the policy makes itself: sampled, judged and paired on this iteration's prompts.

        Steps of one iteration that sample from the same policy share its answers: the store has them by content.
        """
        prompts = self._table(f"prompts-{step.iteration}")
        answers = self._sample(f"{step.name}/sample", policy.model, prompts, step.iteration, {})
        annotator = self.config.annotator_of(step)
        models = {name: self._role(role, policy) for name, role in roles_of(annotator).items()}
        files = {name: self.store.source(path) for name, path in files_of(annotator).items()}
        config = {"annotator": node_of(annotator), "dtype": self.config.setting.dtype, "seed": self.config.seed}
        gold = {}
        if self.config.setting.has_gold:
            gold["gold"] = self._gold(f"{step.name}/gold", answers, prompts)
        scores = self._stage(
            f"{step.name}/annotate",
            "align_loop.annotators.stage:annotate",
            config,
            {
                "answers": answers,
                "prompts": prompts,
                **models,
                **files,
                **(gold if getattr(annotator, "needs_gold", False) else {}),
            },
            parts=code_of(annotator),
        )
        inputs = {"prompts": prompts, "answers": answers, "scores": scores, "tokenizer": policy.model, **gold}
        pairs = self._pairs_stage(step, policy, "pairs", step.builder or self.config.builder, inputs)
        return {"sample": answers, "annotate": scores, "pairs": pairs, **gold}

    def _pairs_stage(
        self, step: Step, policy: Policy, name: str, builder: Any, inputs: dict[str, Artifact]
    ) -> Artifact:
        """Pairs from scored answers (with a builder) or from people's labels (without one), through the shapers."""
        shapers = self.config.shapers_of(step)
        if builder is None:  # people's labels have no scores: what works on scores must not make them stale
            shapers = {name: shaper for name, shaper in shapers.items() if not getattr(shaper, "needs_scores", False)}
        models = {
            f"{shaper}.{key}": self._role(role, policy)
            for shaper, part in shapers.items()
            for key, role in roles_of(part).items()
        }
        config = {
            **({} if builder is None else {"builder": node_of(builder)}),
            "shapers": {key: node_of(shaper) for key, shaper in shapers.items()},
            "dtype": self.config.setting.dtype,
            "seed": self.config.seed,
        }
        run = f"align_loop.builders.stage:{'labelled' if builder is None else 'on_policy'}"
        parts = [*(code_of(builder) if builder else []), *(c for shaper in shapers.values() for c in code_of(shaper))]
        return self._stage(f"{step.name}/{name}", run, config, {**inputs, **models}, parts=parts)

    # --- evaluation -------------------------------------------------------------------------------------------

    def _evaluate(self, policy: Policy) -> None:
        """Answers to the held-out prompts, their gold where it is known, and the metrics of ``policy``."""
        setting, prompts = self.config.setting, self._table("eval_prompts")
        temperature = self.config.evaluator.temperature
        change = {"n": 1} | ({} if temperature is None else {"temperature": temperature})
        # The same request seeds for every policy: they are compared on the same draws.
        policy.answers = self._sample(f"{policy.name}/answers", policy.model, prompts, 0, change)
        inputs = {
            "policy": policy.model,
            "initial": self.initial.model,
            "answers": policy.answers,
            "heldout": self._table("heldout"),
        }
        if setting.has_gold:
            policy.gold = inputs["gold"] = self._gold(f"{policy.name}/answers-gold", policy.answers, prompts)
            if self.policies:
                inputs |= {"gold_initial": self.initial.gold, "gold_previous": self.policies[-1].gold}
        config = {"evaluator": node_of(self.config.evaluator), "dtype": setting.dtype}
        parts = [config["evaluator"]["_target_"]]
        name = f"{policy.name}/evaluate"
        policy.evaluation = self._stage(
            name, "align_loop.evaluators.policy:evaluate", config, inputs, parts=parts, last=True
        )
        policy.stages, self._made = self._made, []
        self.policies.append(policy)
        if not self.store.dry_run:
            policy.row = self._row(policy)
            if self.on_policy_done is not None:
                self.on_policy_done(self)
        if self.config.loop.until == name:
            raise StopHere

    def _row(self, policy: Policy) -> dict[str, Any]:
        """The policy's line of ``metrics.jsonl``."""
        measured = read_evaluation(policy.evaluation.path)
        initial = read_evaluation(self.initial.evaluation.path)
        measured["implausible_share"] = implausible_share(initial["initial_logps"], measured["initial_logps"])
        if policy.round.get("sample"):
            measured |= measure_pairs(policy.round["pairs"].path, policy.round["train"].path)
            self.drift = self.drift or self.config.guard.check(self._baseline(measured), measured)
        if self.reward_models:
            measured |= {key: value for key, value in self.reward_models[-1].row.items() if key in METRICS}
        manifests = [read_manifest(stage.path) for stage in policy.stages]
        row = {"policy": policy.name, "iteration": policy.iteration}
        row |= {key: measured.get(key) for key in METRICS}
        row |= {"tokens": sum(m["tokens"] for m in manifests), "drift": self.drift, "good": self.drift is None}
        return row | {"seconds": round(sum(m["seconds"] for m in manifests), 3)}

    def _reward_row(self, made: RewardModel) -> dict[str, Any]:
        """The reward model's line of ``reward_models.jsonl``."""
        measured = read_reward_evaluation(made.evaluation.path)
        row = {"reward_model": made.name} | {f"reward_model_{key}": measured.get(key) for key in REWARD_METRICS}
        manifests = [read_manifest(stage.path) for stage in made.stages]
        row |= {"pairs": sum(read_manifest(t.path)["rows"]["pairs"]["out"] for t in _pairs_of(made.round).values())}
        return row | {"seconds": round(sum(m["seconds"] for m in manifests), 3)}

    def _baseline(self, measured: dict[str, Any]) -> dict[str, Any]:
        """What the drift guard compares with: the policy that the loop began with."""
        before = [p for p in self.policies if p.iteration == 0 and p is not self.policies[-1]]
        return read_evaluation(before[-1].evaluation.path) if before else measured

    # --- stages -----------------------------------------------------------------------------------------------

    def _stage(
        self,
        name: str,
        run: str,
        config: dict[str, Any],
        inputs: dict[str, Artifact],
        parts: list[str] | None = None,
        last: bool = False,
    ) -> Artifact:
        made = self.store.run(Stage(name, run, config, inputs, parts or []))
        self._made.append(made)
        if self.config.loop.until == name and not last:
            raise StopHere
        return made

    def _source(self, name: str, source: Any) -> Artifact:
        """A stage of the setting's: its files are inputs by content."""
        files = {key: self.store.source(path) for key, path in source.files.items()}
        return self._stage(name, source.run, source.config, files)

    def _start(self) -> Artifact:
        """The model that the run starts from."""
        start = self.config.setting.start(self.config.seed, planning=self.store.dry_run)
        if start is None:
            model = Artifact(None, None, "the download of setting.model")
        elif isinstance(start, str):
            model = self.store.source(start)
        else:
            model = self.store.part(self._source("start", start), "model")
        if self.config.setting.chat_template is None:
            return model
        config = {"template": template_text(self.config.setting.chat_template)}
        adopted = self._stage("template", "align_loop.templates:adopt", config, {"model": model})
        return self.store.part(adopted, "model")

    def _sample(
        self, name: str, model: Artifact, prompts: Artifact, iteration: int, change: dict[str, Any]
    ) -> Artifact:
        sampler = node_of(self.config.sampler) | {"engine": self.engine} | change
        setting = self.config.setting
        run = {
            "seed": self.config.seed,
            "iteration": iteration,
            "dtype": setting.dtype,
            "max_length": setting.max_length,
        }
        parts = [sampler["_target_"], ENGINES[self.engine == "hf"]]
        config, inputs = {"sampler": sampler, "run": run}, {"prompts": prompts, "policy": model}
        return self._stage(name, "align_loop.samplers.policy:sample", config, inputs, parts=parts)

    def _gold(self, name: str, answers: Artifact, prompts: Artifact) -> Artifact:
        config = {"world": self.config.setting.world}
        inputs = {"answers": answers, "prompts": prompts}
        parts = [f"{self.config.setting.world}:gold_rewards"]
        return self._stage(name, "align_loop.annotators.stage:gold", config, inputs, parts=parts)

    def _table(self, name: str) -> Artifact:
        return self.store.part(self.data, f"{name}.parquet")

    def _role(self, role: str, policy: Policy) -> Artifact:
        """The checkpoint that a role's name is bound to; any other name is a model folder."""
        if role == "policy":
            return policy.model
        if role == "reward_model":
            return self.reward_models[-1].model
        if role == "initial":
            return self.initial.model
        if role == "previous":
            index = next(i for i, p in enumerate(self.policies) if p is policy)
            return self.policies[max(index - 1, 0)].model
        if not Path(role).is_dir():
            raise UserError(f"annotator.reference={role}: neither a role nor a model folder")
        return self.store.source(role)

    def _training(self, step: Step) -> dict[str, Any]:
        return {
            "training": plain(self.config.setting.training[step.training]),
            "lora": plain(self.config.lora) if self.config.lora else None,
            "dtype": self.config.setting.dtype,
            "seed": self.config.seed,
        }


def _pairs_of(tables: dict[str, Artifact]) -> dict[str, Artifact]:
    return {name: table for name, table in tables.items() if name.startswith("pairs")}


TABLES = {"seed": "seed", "all_labels": "all_labels"}  # which of the setting's tables a step's data is

METRICS = (
    "gold_reward",
    "gold_reward_ci95",
    "win_rate_vs_sft",
    "win_rate_vs_previous",
    "judge_accuracy",
    "judge_accuracy_ci95",
    "label_accuracy",
    "flag_share",
    "flag_precision",
    "flag_recall",
    "filter_precision",
    "filter_dropped",
    "pairs",
    "mean_answer_tokens",
    "truncated_share",
    "distinct_2",
    "implausible_share",
    "kl_from_initial",
    "logp_chosen",
    "logp_rejected",
    "reward_model_accuracy",
    "reward_model_accuracy_ci95",
    "reward_model_ece",
)
REWARD_METRICS = ("accuracy", "accuracy_ci95", "ece")
