"""The stage that trains a reward model on pairs: from a checkpoint folder and a table of examples to new folders."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig
from trl.trainer.utils import disable_dropout_in_model

from align_loop.engines.reward_folder import is_reward_model, read_reward_folder, write_reward_folder
from align_loop.engines.reward_scoring import last_scores, load_classifier, score_head
from align_loop.errors import UserError
from align_loop.stage import StageContext
from align_loop.trainers import lora as adapters
from align_loop.trainers.common import EpochSampler, attach, set_threads, trainer_arguments
from align_loop.trainers.config import LoraConfig, TrainingConfig
from align_loop.trainers.models import dtype_of, load_tokenizer, position_limit
from align_loop.trainers.reward_config import RewardModel
from align_loop.trainers.reward_data import check_examples, member_examples, member_seed, reward_rows
from align_loop.trainers.reward_trainer import PairRewardTrainer

Example = dict[str, Any]
# Of the scores that a fresh head gives to hidden states with entries of about 1: far from 0, where a gpm head has no
# gradient, and small beside what is learnt.
FRESH_SD = 0.2


def train_reward(
    *,
    model_dir: Path,
    examples: list[Example],
    out: Path,
    reward_model: RewardModel,
    training: TrainingConfig,
    lora: LoraConfig | None,
    seed: int,
    hardware: dict[str, Any],
    context: StageContext,
) -> None:
    """Train a reward model on ``examples`` (rows of ``record.EXAMPLES`` of kind pair; their ``beta`` has no part here).

    ``model_dir``: a causal language model, whose body gets a fresh head drawn from the seed alone, or a reward model
    with the same head, which is trained on; every member of an ensemble starts from the member of its number, or from
    the only one. Writes ``out/model`` (``out/member-1`` and so on for an ensemble), each a plain Hugging Face
    sequence-classification folder with tokenizer and chat template, and ``out/reward_model.json``. With ``lora`` an
    adapter and the whole head are trained and merged.

    Raises ``UserError`` for examples that can't be trained on and for a start that doesn't fit.
    """
    check_examples(examples)
    set_threads(hardware)
    starts = _starts(model_dir, reward_model)
    names = ["model"] if reward_model.members == 1 else [f"member-{k + 1}" for k in range(reward_model.members)]
    facts: dict[str, list[Any]] = {"member_pairs": [], "merge_probe": []}
    tokens = steps = 0
    for member, (start, name) in enumerate(zip(starts, names, strict=True), 1):
        rows = member_examples(examples, reward_model, member)
        reporting = context if len(names) == 1 else MemberContext(**vars(context), member=member, first_step=steps)
        trainer = build_trainer(
            model_dir=start,
            examples=rows,
            out=out,
            reward_model=reward_model,
            training=training,
            lora=lora,
            seed=member_seed(seed, member),
            hardware=hardware,
        )
        with reporting.progress(int(len(rows) * training.epochs), "pairs") as progress:
            attach(trainer, reporting, progress, training.batch_size)
            trainer.train()
        if trainer.is_world_process_zero():
            if (probe := _save(trainer, rows, out / name, lora, hardware)) is not None:
                facts["merge_probe"].append(probe)
            shutil.rmtree(out / "trainer", ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        facts["member_pairs"].append(len(rows))
        tokens += int(training.epochs * sum(map(_tokens, rows)))
        steps += trainer.state.global_step
        if trainer.is_world_process_zero() and member == len(names):
            write_reward_folder(out, reward_model.head, reward_model.dim, names)
        del trainer
        if member < len(names):
            gc.collect()  # its cycles would hold this model beside the next one
    context.fact("start", "previous" if is_reward_model(model_dir) else "base")
    for fact, values in facts.items():
        if values:
            context.fact(fact, values)
    context.rows("pairs", into=len(examples), out=len(examples))
    context.tokens(tokens)


@dataclass
class MemberContext(StageContext):
    """The stage's context while one member of an ensemble trains: its log lines say which, and its steps count on."""

    member: int = 1
    first_step: int = 0

    def log(self, metrics: dict[str, Any]) -> None:
        super().log({**metrics, "member": self.member, "step": metrics["step"] + self.first_step})


def build_trainer(
    *,
    model_dir: Path,
    examples: list[Example],
    out: Path,
    reward_model: RewardModel,
    training: TrainingConfig,
    lora: LoraConfig | None,
    seed: int,
    hardware: dict[str, Any],
    **overrides: Any,
) -> PairRewardTrainer:
    """The trainer of one member, from one model folder; ``overrides`` are further fields of ``RewardConfig``."""
    tokenizer = load_tokenizer(model_dir)
    tokenizer.pad_token = pad_token(tokenizer)
    model = load_start(model_dir, reward_model.dim, seed, hardware)
    check_examples(examples, position_limit(model))
    disable_dropout_in_model(model)  # the model's own; an adapter's, which is asked for, stays
    if lora is not None:
        model = adapters.with_adapter(model, lora, adapter_dir=None, seed=seed, task="SEQ_CLS")
    settings = trainer_arguments(training, hardware, out, seed, len(examples))
    arguments = RewardConfig(**{**settings, "disable_dropout": False, **overrides})
    world = arguments.world_size
    sampler = EpochSampler(len(examples), seed, arguments.per_device_train_batch_size * world if world > 1 else 1)
    return PairRewardTrainer(
        model=model,
        args=arguments,
        train_dataset=reward_rows(examples, sampler.padding > 0),
        processing_class=tokenizer,
        config=reward_model,
        sampler=sampler,
        pad_id=tokenizer.pad_token_id,
    )


def load_start(directory: Path, dim: int, seed: int, hardware: dict[str, Any]) -> PreTrainedModel:
    """The model to train, in the hardware's dtype, on the CPU: a reward model as it is, another with a fresh head.

    A fresh head is drawn from ``seed`` alone: normal, with standard deviation 0.2 / sqrt(hidden size).
    """
    model, missing = load_classifier(directory, num_labels=dim, dtype=dtype_of(hardware))
    head = score_head(model)
    own = {name for name, module in model.named_modules() if module is head}
    fresh = {name for name in missing if name.rpartition(".")[0] in own}
    if missing - fresh:
        raise UserError(f"{directory}: its weights lack {', '.join(sorted(missing - fresh)[:3])}")
    # An embedding gives its padding id no gradient; where a config names the end-of-sequence id, that is a real token.
    model.get_input_embeddings().padding_idx = None
    if fresh:
        generator = torch.Generator().manual_seed(seed)
        sd = FRESH_SD / head.in_features**0.5
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * sd)
            if head.bias is not None:
                head.bias.zero_()
    return model


def pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """What fills up batches: never the end-of-sequence token.

    ``transformers`` reads a classifier's output at the last token that isn't the padding token, so with the two being
    one it would look before the end of every answer. Where the tokenizer has no padding token of its own, another
    special one is taken, which an answer doesn't end with either.
    """
    eos = tokenizer.eos_token_id
    special = [i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    for candidate in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *special):
        if candidate is not None and candidate != eos:
            return tokenizer.convert_ids_to_tokens(candidate)
    raise UserError(
        f"{tokenizer.name_or_path}: no special token beside the end-of-sequence token to pad a reward model's batches "
        f"with: give the tokenizer a padding token"
    )


def _starts(model_dir: Path, config: RewardModel) -> list[Path]:
    """The folder that each member starts from."""
    if not is_reward_model(model_dir):
        return [model_dir] * config.members
    found = read_reward_folder(model_dir)
    if (found.head, found.dim) != (config.head, config.dim):
        raise UserError(
            f"{model_dir}: a reward model with head={found.head}, dim={found.dim} can't go on as head={config.head}, "
            f"dim={config.dim}: keep its head, or start from the language model (start=base)"
        )
    if len(found.members) not in (1, config.members):
        raise UserError(f"{model_dir}: {len(found.members)} members can't go on as members={config.members}")
    return found.members if len(found.members) == config.members else found.members * config.members


def _save(
    trainer: PairRewardTrainer, examples: list[Example], directory: Path, lora: LoraConfig | None, hardware: dict
) -> float | None:
    """Write the model's folder; under LoRA the merged one, and returns how far its scores are from the adapted ones."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if lora is None:
        _save_folder(model, trainer.processing_class, directory)
        return None
    probes = adapters.probes_of(examples)
    adapted = probe_scores(model.eval(), probes)
    merged = model.merge_and_unload(safe_merge=True)
    _save_folder(merged, trainer.processing_class, directory)
    written, _ = load_classifier(directory, dtype=dtype_of(hardware))
    return prove_merge(adapted, probe_scores(written.to(merged.device).eval(), probes), dtype_of(hardware))


def _save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.config.eos_token_id is None:
        model.config.eos_token_id = tokenizer.eos_token_id
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def probe_scores(model: torch.nn.Module, probes: list[list[int]]) -> list[float]:
    """The head's numbers for each probe sequence, one after the other."""
    device = next(model.parameters()).device
    found = []
    for ids in probes:
        row = torch.tensor([ids], device=device)
        found += last_scores(model, row, torch.ones_like(row))[0].tolist()
    return found


def prove_merge(adapted: list[float], merged: list[float], dtype: torch.dtype) -> float:
    """The largest difference between two lists of probe scores.

    Raises ``RuntimeError`` where it exceeds 1e-3 (float32) or 0.1 (bfloat16), times the largest score where that is
    above 1: the merged copy, which scores in the loop, would be another reward model than the one that was trained.
    """
    difference = max(abs(a - b) for a, b in zip(adapted, merged, strict=True))
    allowed = adapters.TOLERANCE[dtype] * max(1.0, *map(abs, adapted))
    if not difference <= allowed:
        raise RuntimeError(
            f"the merged reward model's scores differ from the adapted one's by {difference:.3g} (allowed: "
            f"{allowed:.3g}): the merge is not exact for this model"
        )
    return difference


def _tokens(row: Example) -> int:
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
