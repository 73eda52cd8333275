"""The settings: which model and data a run is made of, their sizes, and the learning rates that suit them.

A setting answers four questions: where the data comes from (``data_stage``), which model it starts from
(``start``), which prompt sets the iterations take, and how each kind of training is tuned (``training``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from align_loop.errors import UserError
from align_loop.prompts.splits import prompt_sets
from align_loop.prompts.wordlevel import ModelSize
from align_loop.templates import template_text
from align_loop.trainers.config import TrainingConfig


@dataclass
class Source:
    """What a stage needs: its function, its configuration (keyed) and the user's files that it reads."""

    run: str
    config: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Setting:
    """What all settings have.

    ``training``: for each kind of step its optimiser settings. ``prompt_sets``: for a number of iterations, the sizes
    of their disjoint prompt sets (null: equal parts). ``max_length``: most tokens of prompt and answer together.
    ``flip_rate``: share of the training labels (not of the held-out ones) to turn round, for studies of noise.
    """

    name: str
    training: dict[str, TrainingConfig]
    max_length: int
    eval_prompts: int
    heldout_share: float
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat_template: str | None = None
    prompt_sets: dict[int, list[int]] | None = None
    flip_rate: float = 0.0

    has_gold: ClassVar[bool] = False  # whether answers have a true quality
    world: ClassVar[str | None] = None  # the module that knows it
    pretrained: ClassVar[bool] = True  # whether the start is more than random weights

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"setting.max_length={self.max_length} must be at least 2")
        if self.eval_prompts < 0:
            raise ValueError(f"setting.eval_prompts={self.eval_prompts} must be 0 or more")
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"setting.heldout_share={self.heldout_share} must be in [0, 1)")
        if not 0 <= self.flip_rate <= 1:
            raise ValueError(f"setting.flip_rate={self.flip_rate} must be in [0, 1]")
        if self.chat_template is not None:
            template_text(self.chat_template)

    def check_iterations(self, iterations: int) -> None:
        """Raise ``UserError`` where there are fewer prompt sets than iterations."""
        if self.prompt_sets is not None:
            prompt_sets(self.prompt_sets, iterations)

    def splits(self, iterations: int, seed: int) -> dict[str, Any]:
        """The configuration that every data stage shares."""
        sets = {str(k): v for k, v in self.prompt_sets.items()} if self.prompt_sets else None
        return {
            "seed": seed,
            "iterations": iterations,
            "prompt_sets": sets,
            "eval_prompts": self.eval_prompts,
            "heldout_share": self.heldout_share,
            "flip_rate": self.flip_rate,
        }


@dataclass(kw_only=True)
class EmbeddedSetting(Setting):
    """The small language with a known truth (``prompts/world.py``); needs no network and no files.

    ``demonstrations``: how many, each honouring a demand with probability ``honour``. ``pairs``: all comparisons, of
    which ``labelled`` are the seed (a ``heldout_share`` of those is kept out). ``sharpness`` of the Bradley-Terry coin.
    """

    demonstrations: int
    pairs: int
    labelled: int
    honour: float
    sharpness: float
    model: ModelSize

    has_gold: ClassVar[bool] = True
    world: ClassVar[str | None] = "align_loop.prompts.embedded"
    pretrained: ClassVar[bool] = False
    has_demonstrations: ClassVar[bool] = True
    has_preferences: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.labelled <= self.pairs:
            raise ValueError(f"setting.labelled={self.labelled} must be from 1 to setting.pairs={self.pairs}")
        if round(self.labelled * self.heldout_share) == self.labelled:
            raise ValueError(f"setting.heldout_share={self.heldout_share} of setting.labelled={self.labelled} is all")
        if self.demonstrations < 1:
            raise ValueError(f"setting.demonstrations={self.demonstrations} must be at least 1")
        if not 0 <= self.honour <= 1:
            raise ValueError(f"setting.honour={self.honour} must be in [0, 1]")
        if self.model.hidden % self.model.heads:
            raise ValueError(f"setting.model.heads={self.model.heads} must divide setting.model.hidden")
        if self.max_length > self.model.max_positions:
            limit = f"setting.model.max_positions={self.model.max_positions}"
            raise ValueError(f"setting.max_length={self.max_length} is more than {limit}")

    def check_iterations(self, iterations: int) -> None:
        """As ``Setting``'s; the sets must also fit in the unlabelled pairs."""
        sizes = prompt_sets(self.prompt_sets or {}, iterations)
        if sum(sizes) > self.pairs - self.labelled:
            found = f"setting.pairs={self.pairs} less setting.labelled={self.labelled}"
            raise UserError(f"{found} is too few for setting.prompt_sets of {sizes} prompts: raise setting.pairs")

    def data_stage(self, iterations: int, seed: int) -> Source:
        """The stage that writes the run's tables."""
        own = {k: getattr(self, k) for k in ("demonstrations", "pairs", "labelled", "honour", "sharpness")}
        return Source("align_loop.prompts.embedded:prepare", {**own, **self.splits(iterations, seed)})

    def start(self, seed: int, planning: bool = False) -> Source | str | None:
        """The stage that writes the untrained model."""
        return Source("align_loop.prompts.embedded:base_model", {**asdict(self.model), "seed": seed})


@dataclass(kw_only=True)
class LocalSetting(Setting):
    """A user's own model folder and files (JSONL, JSONL.gz, Parquet); formats are recognised or named.

    Without ``prompts`` only ``seed_fraction`` of the preferences keep their labels; the prompts of the others are
    used without them.
    """

    model: str
    preferences: str | None = None
    prompts: str | None = None
    demos: str | None = None
    seed_fraction: float | None = None
    format: str = "auto"
    prompts_format: str = "auto"
    demos_format: str = "auto"
    bad_rows: Literal["stop", "drop"] = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preferences is None and self.prompts is None:
            raise ValueError("setting.preferences is missing: name a file of preferences (JSONL, JSONL.gz or Parquet)")
        for key in ("model", "preferences", "prompts", "demos"):
            path = getattr(self, key)
            if path is not None and not Path(path).expanduser().exists():
                raise ValueError(f"setting.{key}={path}: no such file or folder; check the path")

    @property
    def has_demonstrations(self) -> bool:
        return self.demos is not None

    @property
    def has_preferences(self) -> bool:
        return self.preferences is not None

    def data_stage(self, iterations: int, seed: int) -> Source:
        """The stage that reads the user's files and splits them."""
        formats = {k: getattr(self, k) for k in ("format", "prompts_format", "demos_format", "bad_rows")}
        fraction = self.seed_fraction
        if fraction is None:  # with a file of prompts every label is used; without one a tenth, and the rest as prompts
            fraction = 1.0 if self.prompts is not None or iterations == 0 else 0.1
        config = {**formats, **self.splits(iterations, seed), "seed_fraction": fraction}
        named = {"preferences": self.preferences, "prompts": self.prompts, "demos": self.demos}
        files = {name: path for name, path in named.items() if path is not None}
        return Source("align_loop.prompts.local:prepare", config, files)

    def start(self, seed: int, planning: bool = False) -> Source | str | None:
        """The user's model folder."""
        return self.model


@dataclass(kw_only=True)
class HubSetting(Setting):
    """A hub model and hub data sets at pinned revisions (``prompts/hub.py`` says how they are named)."""

    model: str
    revision: str
    preferences: dict[str, Any]
    prompts: dict[str, Any] | None = None
    demos: dict[str, Any] | None = None
    seed_fraction: float = 1.0
    format: str = "auto"
    prompts_format: str = "auto"
    demos_format: str = "auto"
    bad_rows: Literal["stop", "drop"] = "drop"

    has_preferences: ClassVar[bool] = True

    @property
    def has_demonstrations(self) -> bool:
        return self.demos is not None

    def data_stage(self, iterations: int, seed: int) -> Source:
        """The stage that loads the data sets and splits them."""
        own = ("preferences", "prompts", "demos", "format", "prompts_format", "demos_format", "bad_rows")
        config = {k: getattr(self, k) for k in (*own, "seed_fraction")}
        return Source("align_loop.prompts.hub:prepare", {**config, **self.splits(iterations, seed)})

    def start(self, seed: int, planning: bool = False) -> Source | str | None:
        """The folder of the model's snapshot in the hub cache; None where a plan would have to download it."""
        if Path(self.model).is_dir():
            return self.model
        from huggingface_hub import snapshot_download  # only where a hub model is named

        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        try:
            return snapshot_download(
                self.model, revision=self.revision, allow_patterns=patterns, local_files_only=planning
            )
        except (OSError, ValueError) as error:
            if planning:
                return None
            raise UserError(
                f"setting.model={self.model} at setting.revision={self.revision} can't be had "
                f"({str(error).splitlines()[0]}); "
                "download it once where there is a network, or set setting.model to a folder"
            ) from None
