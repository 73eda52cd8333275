"""The loop, as the paper's algorithm reads: train on the seed; then sample, judge, build pairs, train, evaluate.

Each expensive call is a stage of the store, so resuming is running the same command again, and ``plan`` is the
same walk with a store that runs nothing. This file decides what depends on what; it imports no model code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_loop.config import Config, Step, steps
from align_loop.errors import UserError
from align_loop.evaluators.drift import implausible_share
from align_loop.evaluators.pairs import measure_pairs
from align_loop.evaluators.policy import read_evaluation
from align_loop.parts import node_of, plain, targets
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


class StopHere(Exception):
    """The stage of ``loop.until`` is done."""


class Run:
    """One walk through a configuration's schedule.

    ``policies`` grows as the walk goes on; ``on_policy_done(run)`` is called after each evaluation. With a store that
    runs nothing (``store.dry_run``) the walk only plans.
    """

    def __init__(self, config: Config, store: Store, engine: str, on_policy_done: Callable[[Run], None] | None = None):
        self.config, self.store, self.engine = config, store, engine
        self.on_policy_done = on_policy_done
        self.policies: list[Policy] = []
        self.initial: Policy | None = None
        self.data: Artifact | None = None
        self.iterations = sum(step.data == "on_policy" for step in steps(config))
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
            policy = self._train(step, policy)
            if step.data == "demonstrations":
                self.initial = policy
            self._evaluate(policy)
            if self.drift and self.config.loop.stop_on_drift:
                return

    @property
    def final(self) -> Policy | None:
        """The last policy before the drift guard tripped (the last one if it did not)."""
        good = [p for p in self.policies if p.row is None or p.row["good"]]
        return good[-1] if good else None

    # --- one step: train a policy -----------------------------------------------------------------------------

    def _train(self, step: Step, start: Policy) -> Policy:
        """The policy that ``step`` makes from ``start``."""
        if step.data == "demonstrations":
            return self._train_sft(step, start)
        iteration = 1 + sum(p.iteration > 0 for p in self.policies) if step.data == "on_policy" else 0
        tables = self._own_pairs(step, start, iteration) if iteration else {"pairs": self._human_pairs(step, start)}
        noise = node_of(self.config.noise) if step.noise and self.config.noise.action != "none" else None
        reference = self.initial.model if self.config.updater.reference == "initial" else start.model
        inputs = {"policy": start.model, "reference": reference, "pairs": tables["pairs"]}
        if self.config.lora:
            inputs["base"] = self.initial.model
            if start.adapter is not None:
                inputs["adapter"] = start.adapter
        settings = {"objective": node_of(self.config.objective), "noise": noise, "iteration": iteration}
        parts = [*targets(settings["objective"]), *targets(noise)]
        config = self._training(step) | settings
        trained = self._stage(f"{step.name}/train", "align_loop.trainers.stage:pairs", config, inputs, parts=parts)
        adapter = self.store.part(trained, "adapter") if self.config.lora else None
        return self._policy(
            step.name, iteration, self.store.part(trained, "model"), adapter, {**tables, "train": trained}
        )

    def _train_sft(self, step: Step, start: Policy) -> Policy:
        config = self._training(step) | {"max_length": self.config.setting.max_length}
        if not self.config.setting.pretrained:
            config["lora"] = None  # an adapter on random weights would learn nothing
        inputs = {"model": start.model, "demonstrations": self._table("demonstrations")}
        trained = self._stage(f"{step.name}/train", "align_loop.trainers.stage:sft", config, inputs)
        return self._policy(step.name, 0, self.store.part(trained, "model"), None, {"train": trained})

    def _human_pairs(self, step: Step, start: Policy) -> Artifact:
        """Training pairs from people's labels."""
        table = {"seed": "seed", "all_labels": "all_labels"}[step.data]
        inputs = {"preferences": self._table(table), "tokenizer": start.model}
        return self._pairs_stage(step, "labelled", {}, inputs)

    def _own_pairs(self, step: Step, policy: Policy, iteration: int) -> dict[str, Artifact]:
        """Training pairs that the policy makes itself: sampled, judged and paired on this iteration's prompts."""
        prompts = self._table(f"prompts-{iteration}")
        answers = self._sample(f"{step.name}/sample", policy.model, prompts, iteration, {})
        annotator = self.config.annotator
        models = {name: self._role(role, policy) for name, role in annotator.roles().items()}
        config = {"annotator": node_of(annotator), "dtype": self.config.setting.dtype}
        scores = self._stage(
            f"{step.name}/annotate",
            "align_loop.annotators.stage:annotate",
            config,
            {"answers": answers, **models},
            parts=[config["annotator"]["_target_"]],
        )
        tables = {"sample": answers, "annotate": scores}
        inputs = {"prompts": prompts, "answers": answers, "scores": scores}
        if self.config.setting.has_gold:
            inputs["gold"] = tables["gold"] = self._gold(f"{step.name}/gold", answers, prompts)
        builder = node_of(self.config.builder)
        tables["pairs"] = self._pairs_stage(step, "on_policy", {"builder": builder}, inputs, [builder["_target_"]])
        return tables

    def _pairs_stage(
        self, step: Step, kind: str, config: dict[str, Any], inputs: dict[str, Artifact], parts: list[str] | None = None
    ) -> Artifact:
        shapers = {name: node_of(shaper) for name, shaper in self.config.shapers.items()}
        used = [*(parts or []), *(node["_target_"] for node in shapers.values())]
        config = {**config, "shapers": shapers}
        return self._stage(f"{step.name}/pairs", f"align_loop.builders.stage:{kind}", config, inputs, parts=used)

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
        manifests = [read_manifest(stage.path) for stage in policy.stages]
        row = {"policy": policy.name, "iteration": policy.iteration}
        row |= {key: measured.get(key) for key in METRICS}
        row |= {"tokens": sum(m["tokens"] for m in manifests), "drift": self.drift, "good": self.drift is None}
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
        if role == "initial":
            return self.initial.model
        if role == "previous":
            index = next(i for i, p in enumerate(self.policies) if p is policy)
            return self.policies[max(index - 1, 0)].model
        if not Path(role).is_dir():
            raise UserError(f"annotator.reference={role}: neither a role (initial, previous) nor a model folder")
        return self.store.source(role)

    def _training(self, step: Step) -> dict[str, Any]:
        return {
            "training": plain(self.config.setting.training[step.training]),
            "lora": plain(self.config.lora) if self.config.lora else None,
            "dtype": self.config.setting.dtype,
            "seed": self.config.seed,
        }

    def _policy(
        self, name: str, iteration: int, model: Artifact, adapter: Artifact | None, tables: dict[str, Artifact]
    ) -> Policy:
        return Policy(name, iteration, model, adapter, round=tables)


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
)
