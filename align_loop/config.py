"""The typed configuration of a run, and the checks across keys.

``conf/`` says what is chosen; this file says what is possible. Everything that can be wrong with a
configuration is found here, before any stage runs, as a ``UserError`` of one line.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align_loop.errors import UserError
from align_loop.parts import PART, build, nearest
from align_loop.trainers.config import LoraConfig, TrainingConfig

ROLES = ("policy", "initial", "previous", "reward_model")  # what a part may read, beside model folders
LABELLED = ("seed", "all_labels")

Data = Literal["demonstrations", "seed", "all_labels", "on_policy"]


@dataclass
class Step:
    """One training of one role: on which data, with which of the setting's training blocks.

    ``data``: demonstrations (supervised), seed (the labelled preferences), all_labels (every preference), or on_policy
    (sampled, annotated and built in this iteration); several tables are trained on as one. ``role``: what is trained
    (``updater`` and ``reward_model`` say from where). ``noise``: whether noise handling acts here. ``annotator``,
    ``builder``, ``shapers``, ``objective``: this step's own, where it differs from the run's.
    """

    name: str
    data: list[Data]
    training: str
    role: Literal["policy", "reward_model"] = "policy"
    noise: bool = False
    annotator: Any = field(default=None, metadata=PART)
    builder: Any = field(default=None, metadata=PART)
    shapers: dict[str, Any] | None = field(default=None, metadata=PART)
    objective: Any = field(default=None, metadata=PART)
    iteration: int = field(default=0, init=False)  # set when the schedule is unrolled; 0: before the loop


@dataclass
class Schedule:
    """Steps that run once before the loop, and those of each iteration."""

    before: list[Step] = field(default_factory=list)
    iteration: list[Step] = field(default_factory=list)


@dataclass
class Loop:
    """How many iterations, where to stop early, and whether a trip of the drift guard ends the run."""

    iterations: int = 0
    until: str | None = None
    stop_on_drift: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"loop.iterations={self.iterations} must be 0 or more")


@dataclass
class Updater:
    """What training a policy starts from and is held against.

    ``start``: previous (the policy before) or initial (the SFT model anew in every step); ``reference``: previous (what
    the step starts from) or initial.
    """

    start: Literal["previous", "initial"] = "previous"
    reference: Literal["previous", "initial"] = "previous"


@dataclass
class Hardware:
    """Where stages run. Nothing here may change a result beyond the stated tolerance; none of it is in a key."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    launcher: Literal["auto", "inline", "process"] = "auto"
    threads: int | None = None
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    score_token_budget: int = 16384
    vllm_memory: float = 0.85
    vllm_kv_cache_gib: float = 2.0
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("threads", "micro_batch_size", "score_token_budget", "tensor_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"hardware.{name}={value} must be at least 1")
        if not 0 < self.vllm_memory <= 1:
            raise ValueError(f"hardware.vllm_memory={self.vllm_memory} must be in (0, 1], a share of the GPU's memory")
        if not self.vllm_kv_cache_gib > 0:
            raise ValueError(f"hardware.vllm_kv_cache_gib={self.vllm_kv_cache_gib} must be positive")


@dataclass
class Tracking:
    """Where W&B logs go. ``auto``: online with a key, else offline files under the run directory."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "align_loop"


@dataclass
class Config:
    """A whole run. See ``conf/config.yaml`` for the defaults and what each key means."""

    experiment: str
    run_dir: str
    store_dir: str
    seed: int
    sft: Literal["auto", "train", "skip"]
    setting: Any = field(metadata=PART)
    hardware: Hardware
    objective: Any = field(metadata=PART)  # before the annotator, whose beta is this one's
    reward_model: Any = field(metadata=PART)
    sampler: Any = field(metadata=PART)
    annotator: Any = field(metadata=PART)
    builder: Any = field(metadata=PART)
    shapers: dict[str, Any] = field(metadata=PART)
    noise: Any = field(metadata=PART)
    updater: Updater
    evaluator: Any = field(metadata=PART)
    guard: Any = field(metadata=PART)
    loop: Loop
    schedule: Schedule
    tracking: Tracking
    lora: LoraConfig | None = None

    @property
    def trains_sft(self) -> bool:
        """Whether the run starts with supervised fine-tuning."""
        wanted = self.sft == "train" or (self.sft == "auto" and self.setting.has_demonstrations)
        return wanted and any("demonstrations" in step.data for step in self.schedule.before)

    def annotator_of(self, step: Step) -> Any:
        """Who annotates for ``step``."""
        return step.annotator or self.annotator

    def shapers_of(self, step: Step) -> dict[str, Any]:
        """The shapers of ``step``, by name."""
        return self.shapers if step.shapers is None else step.shapers


def from_node(node: dict[str, Any]) -> Config:
    """The checked configuration. Raises ``UserError`` naming the key, the value and the nearest right ones."""
    config = build(Config, node, "")
    _check_schedule(config)
    _check_references(config)
    _check_lengths(config)
    return config


def roles_of(part: Any) -> dict[str, str]:
    """The models that an annotator or shaper reads: name -> role; a part without ``roles()`` reads none."""
    return part.roles() if hasattr(part, "roles") else {}


def files_of(part: Any) -> dict[str, str]:
    """The user's files that an annotator reads: name -> path; a part without ``files()`` reads none."""
    return part.files() if hasattr(part, "files") else {}


def stage_names(config: Config) -> list[str]:
    """Every stage of the run, in order: what ``loop.until`` may name."""
    gold = config.setting.has_gold
    measured = ["answers", *(["answers-gold"] if gold else []), "evaluate"]
    own = ["sample", *(["gold"] if gold else []), "annotate", "pairs"]
    names = ["data", *([] if config.setting.pretrained else ["start"])]
    names += [] if config.setting.chat_template is None else ["template"]
    names += [] if config.trains_sft else [f"initial/{part}" for part in measured]
    for step in steps(config):
        parts = list(own) if "on_policy" in step.data else []
        parts += [pairs_name(step, data) for data in step.data if data in LABELLED]
        after = measured if step.role == "policy" else ["evaluate"]
        names += [f"{step.name}/{part}" for part in (*parts, "train", *after)]
    return names


def pairs_name(step: Step, data: str) -> str:
    """The stage that makes the pairs of one of the step's tables: ``pairs``, or ``pairs-seed`` beside others."""
    return "pairs" if len(step.data) == 1 or data == "on_policy" else f"pairs-{data}"


def steps(config: Config) -> list[Step]:
    """The schedule unrolled: the steps before the loop, then ``iteration-1``, ``iteration-2``, ..."""
    unrolled = [s for s in config.schedule.before if "demonstrations" not in s.data or config.trains_sft]
    for i in range(1, config.loop.iterations + 1):
        for step in config.schedule.iteration:
            unrolled.append(copy.copy(step))
            unrolled[-1].name, unrolled[-1].iteration = f"{step.name}-{i}", i
    return unrolled


def _check_schedule(config: Config) -> None:
    if not config.schedule.before and not config.schedule.iteration:
        raise UserError("no recipe chosen: add +experiment=NAME; python -m align_loop recipes lists them")
    if config.loop.iterations and not config.schedule.iteration:
        raise UserError(f"loop.iterations={config.loop.iterations}, but {config.experiment} has no loop: set it to 0")
    every = [*config.schedule.before, *config.schedule.iteration]
    if doubled := [name for name, count in Counter(step.name for step in steps(config)).items() if count > 1]:
        raise UserError(f"schedule: two steps are called {doubled[0]}; give each a name of its own")
    for step in every:
        if step.training not in config.setting.training:
            known = nearest(step.training, config.setting.training)
            raise UserError(f"schedule: step {step.name}: training={step.training} is not in setting.training; {known}")
    _check_data(config)
    on_policy = [s for s in steps(config) if "on_policy" in s.data]
    if on_policy:
        config.setting.check_iterations(config.loop.iterations)
    noisy = len([s for s in on_policy if s.noise])
    if config.noise.action != "none" and noisy > len(config.noise.decoupling):
        raise UserError(
            f"noise.decoupling={config.noise.decoupling} has {len(config.noise.decoupling)} values for "
            f"loop.iterations={noisy}: give one lambda an iteration"
        )
    if not steps(config):
        why = "sft=skip" if config.sft == "skip" else f"setting={config.setting.name} has no demonstrations"
        raise UserError(f"{config.experiment}: nothing to train: {why}")
    if config.sft == "train" and not config.setting.has_demonstrations:
        raise UserError("sft=train, but this setting has no demonstrations: give setting.demos or use sft=skip")
    if config.sft == "train" and not config.trains_sft:
        raise UserError(f"sft=train, but {config.experiment} has no step with data=demonstrations in schedule.before")
    names = stage_names(config)
    if config.loop.until is not None and config.loop.until not in names:
        raise UserError(f"loop.until={config.loop.until}: no such stage; {nearest(config.loop.until, names)}")


def _check_data(config: Config) -> None:
    for number, step in enumerate([*config.schedule.before, *config.schedule.iteration]):
        if not step.data:
            raise UserError(f"schedule: step {step.name}: data=[] is nothing to train on")
        if "demonstrations" in step.data and (number or config.schedule.before == []):
            raise UserError(f"schedule: step {step.name}: data=demonstrations is possible in the first step alone")
        if "demonstrations" in step.data and (len(step.data) > 1 or step.role != "policy"):
            raise UserError(f"schedule: step {step.name}: data=demonstrations trains the policy, and on nothing else")
    if wrong := [step.name for step in config.schedule.before if "on_policy" in step.data]:
        raise UserError(f"schedule: step {wrong[0]}: data=on_policy is possible in the loop alone")


def _check_references(config: Config) -> None:
    unrolled = steps(config)
    trained_roles = {"policy"}
    for step in unrolled:
        _check_readers(config, step, trained_roles)
        trained_roles.add(step.role)
    trained = [s for s in unrolled if s.role == "policy" and set(s.data) & set(LABELLED)]
    on_policy = any("on_policy" in s.data for s in unrolled)
    for name, reference in roles_of(config.annotator).items():
        if not on_policy or name.rpartition(".")[2] != "reference":
            continue
        if reference == "policy":
            raise UserError(f"annotator.{name}=policy: the judge held against itself gives 0 for all; take initial")
        if not trained and reference in ("initial", "previous"):
            raise UserError(
                f"annotator.{name}={reference}: without a step on labelled data the first policy is "
                f"the reference itself and all rewards would be 0; name another model (annotator.{name}=FOLDER)"
            )
    if any("seed" in s.data for s in unrolled) and not config.setting.has_preferences:
        raise UserError("setting.preferences is missing: this recipe needs labelled preferences")


def _check_readers(config: Config, step: Step, trained_roles: set[str]) -> None:
    """That the models and the truth which a step's annotator and shapers read are there when it comes."""
    readers = {}
    if "on_policy" in step.data:
        readers["annotator"] = annotator = config.annotator_of(step)
        if getattr(annotator, "needs_gold", False) and not config.setting.has_gold:
            raise UserError(
                f"annotator._target_={type(annotator).__name__} reads the true quality of answers, which "
                f"setting={config.setting.name} does not know; take setting=embedded or another annotator"
            )
    if "demonstrations" not in step.data:
        readers |= {f"shapers.{name}": shaper for name, shaper in config.shapers_of(step).items()}
    for part, reader in readers.items():
        for name, role in roles_of(reader).items():
            if role not in ROLES and not Path(role).is_dir():
                raise UserError(f"{part}.{name}={role}: no model folder, and no role; {nearest(role, ROLES)}")
            if role == "reward_model" and role not in trained_roles:
                raise UserError(
                    f"{part}.{name}=reward_model: step {step.name} comes before any reward model is trained; "
                    "put a step with role=reward_model before it, or name a model folder"
                )


def _check_lengths(config: Config) -> None:
    new = getattr(config.sampler, "max_new_tokens", 0)  # a user's own sampler may have no such limit
    room = config.setting.max_length
    if new >= room:
        raise UserError(f"sampler.max_new_tokens={new} leaves no room for a prompt: setting.max_length={room}")
    for name, training in config.setting.training.items():
        micro = config.hardware.micro_batch_size
        if isinstance(training, TrainingConfig) and micro and training.batch_size % micro:
            raise UserError(
                f"hardware.micro_batch_size={micro} does not divide "
                f"setting.training.{name}.batch_size={training.batch_size}"
            )


def default_run_dir(node: dict[str, Any]) -> str:
    """``runs/<experiment>-<setting>-seed<seed>``, with ``-lora`` where an adapter is trained."""
    name = node.get("setting", {}).get("name", "setting")
    lora = "-lora" if node.get("lora") else ""
    return str(Path("runs") / f"{node.get('experiment') or 'none'}-{name}{lora}-seed{node.get('seed')}")
