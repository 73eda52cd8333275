"""What a user can get wrong is one line, before anything is written; what is right becomes the stages it names."""

import json
import sys

import pytest
from planned import changed, planned

from align_loop import __main__ as command
from align_loop import runner
from align_loop.compose import compose_node, conf_dir, load
from align_loop.config import from_node, stage_names
from align_loop.errors import UserError
from align_loop.parts import node_of

SELFIE = "+experiment=selfie_iter4"
LOCAL = f"{SELFIE} setting=local setting.model=. setting.preferences=."  # anything that exists
EXPERIMENTS = sorted(file.stem for file in (conf_dir() / "experiment").glob("*.yaml"))
SETTINGS = sorted(file.stem for file in (conf_dir() / "setting").glob("*.yaml"))

# A command line, and what its error has to say: the key, the value, and what would be right.
WRONG = [
    # names of configurations
    ("+experiment=selfie_iter5", "experiment=selfie_iter5", "selfie_iter4"),
    ("experiment=selfie_iter4", "experiment=selfie_iter4", "+experiment=selfie_iter4"),
    ("setting=embedded", "no recipe", "+experiment=NAME"),
    (f"{SELFIE} setting=embeded", "setting=embeded", "did you mean embedded"),
    (f"{SELFIE} hardware=autoo", "hardware=autoo", "did you mean auto?"),
    (f"{SELFIE} sampler=vllm", "sampler=vllm", "known: policy"),
    (f"{SELFIE} noise=selfy", "noise=selfy", "did you mean selfie?"),
    (f"{SELFIE} +lorra", "lorra=default", "did you mean lora?"),
    (f"{SELFIE} +lora=defaut", "lora=defaut", "did you mean default?"),
    (f"{SELFIE} lora=default", "lora=default", "+lora=default"),
    # forms
    ("plann", "plann", "plan,"),
    (f"{SELFIE} seed", "seed", "key=value"),
    (f"{SELFIE} =3", "=3", "key=value"),
    (f"{SELFIE} [", "[", "key=value"),
    (f"{SELFIE} seed=[1", "seed=[1"),
    (f"{SELFIE} +experiment=sft", "experiment"),
    # unknown keys
    (f"{SELFIE} sed=1", "sed=1", "did you mean seed"),
    (f"{SELFIE} seting=embedded", "seting=embedded", "did you mean setting"),
    (f"{SELFIE} samplr.n=2", "samplr.n=2", "did you mean sampler"),
    (f"{SELFIE} sampler.temprature=1", "sampler.temprature=1", "did you mean temperature"),
    (f"{SELFIE} +sampler.temprature=1", "sampler.temprature=1", "did you mean temperature"),
    (f"{SELFIE} temperature=1", "temperature=1", "sampler.temperature"),
    (f"{SELFIE} loop.iteration=3", "loop.iteration=3", "did you mean iterations"),
    (f"{SELFIE} setting.training.iteration.learning_rat=1", "learning_rat=1", "did you mean learning_rate"),
    (f"{SELFIE} shapers.least_confidant.share=0.1", "shapers.least_confidant.share=0.1", "shapers.least_confident"),
    (f"{SELFIE} annotator=verifier", "annotator.function is missing; add annotator.function=..."),
    (f"{SELFIE} schedule.iteration.0.nois=true", "schedule.iteration[0].nois=True", "did you mean noise"),
    (f"{SELFIE} +lora lora.targets=all", "lora.targets=all", "did you mean target_modules"),
    # types
    (f"{SELFIE} seed=one", "seed=one", "an integer"),
    (f"{SELFIE} seed=1.5", "seed=1.5", "an integer"),
    (f"{SELFIE} seed=true", "seed=True", "an integer"),
    (f"{SELFIE} store_dir=null", "store_dir=None", "text"),
    (f"{SELFIE} sampler.temperature=hot", "sampler.temperature=hot", "a number"),
    (f"{SELFIE} sampler.temperature=nan", "sampler.temperature=nan", "a number"),
    (f"{SELFIE} objective.beta=abc", "objective.beta=abc", "a number"),
    (f"{SELFIE} setting.max_length=abc", "setting.max_length=abc", "an integer"),
    (f"{SELFIE} loop.stop_on_drift=maybe", "loop.stop_on_drift=maybe", "true or false"),
    (f"{SELFIE} noise.decoupling=0.5", "noise.decoupling=0.5", "list"),
    (f"{SELFIE} annotator.reference=3", "annotator.reference=3", "text"),
    # choices
    (f"{SELFIE} sft=trian", "sft=trian", "did you mean train?"),
    (f"{SELFIE} sampler.engine=vlm", "sampler.engine=vlm", "did you mean vllm?"),
    (f"{SELFIE} sampler.truncated=drp", "sampler.truncated=drp", "did you mean drop?"),
    (f"{SELFIE} noise.action=smoothe", "noise.action=smoothe", "did you mean smooth?"),
    (f"{SELFIE} updater.reference=prevous", "updater.reference=prevous", "did you mean previous?"),
    (f"{SELFIE} annotator.reference=initail", "annotator.reference=initail", "did you mean initial?"),
    (f"{SELFIE} tracking.mode=of", "tracking.mode=of", "did you mean off?"),
    (f"{SELFIE} hardware.device=gpu", "hardware.device=gpu", "did you mean cpu?"),
    (f"{SELFIE} setting.dtype=float16", "setting.dtype=float16", "bfloat16"),
    (f"{SELFIE} setting.chat_template=zephir", "setting.chat_template=zephir", "zephyr"),
    (
        f"{SELFIE} schedule.iteration.0.data=[onpolicy]",
        "schedule.iteration[0].data[0]=onpolicy",
        "did you mean on_policy?",
    ),
    (f"{SELFIE} setting.training.seed.schedule=cos", "setting.training.seed.schedule", "'cos'", "cosine"),
    (f"{SELFIE} builder._target_=align_loop.builders.best_worst.BestWorse", "builder._target_", "mean BestWorst?"),
    (f"{SELFIE} builder._target_=my.own.Part", "builder._target_=my.own.Part", "no module 'my'"),
    (f"{SELFIE} builder._target_=BestWorst", "builder._target_='BestWorst'", "package.module.Class"),
    (f"{SELFIE} ~sampler", "sampler=", "_target_"),
    # ranges
    (f"{SELFIE} sampler.temperature=-1", "sampler.temperature=-1", "0 (greedy) or more"),
    (f"{SELFIE} sampler.top_p=0", "sampler.top_p=0", "(0, 1]"),
    (f"{SELFIE} sampler.n=0", "sampler.n=0", "at least 1"),
    (f"{SELFIE} objective.beta=-0.1", "objective.beta", "-0.1", "positive"),
    (f"{SELFIE} annotator.beta=0", "annotator.beta=0", "positive"),
    (f"{SELFIE} noise.alpha=2", "noise.alpha", "2", "[0, 1]"),
    (f"{SELFIE} loop.iterations=-1", "loop.iterations=-1", "0 or more"),
    (f"{SELFIE} hardware.threads=0", "hardware.threads=0", "at least 1"),
    (f"{SELFIE} hardware.vllm_memory=7", "hardware.vllm_memory=7", "(0, 1]"),
    (f"{SELFIE} hardware.vllm_kv_cache_gib=0", "hardware.vllm_kv_cache_gib=0", "positive"),
    (f"{SELFIE} setting.training.iteration.learning_rate=0", "setting.training.iteration.learning_rate", "positive"),
    (f"{SELFIE} +lora lora.r=0", "lora.r", "got 0", "at least 1"),
    (f"{SELFIE} shapers.least_confident.share=1", "shapers.least_confident", "share=1", "[0, 1)"),
    (f"{SELFIE} evaluator.temperature=-1", "evaluator.temperature=-1", "0 (greedy) or more"),
    (f"{SELFIE} setting.heldout_share=2", "setting.heldout_share=2", "[0, 1)"),
    (f"{SELFIE} setting.eval_prompts=-1", "setting.eval_prompts=-1", "0 or more"),
    (f"{SELFIE} setting.honour=2", "setting.honour=2", "[0, 1]"),
    (f"{SELFIE} setting.demonstrations=0", "setting.demonstrations=0", "at least 1"),
    # contradictions between keys
    (f"{SELFIE} loop.iterations=5", "loop.iterations=5", "prompt_sets", "at most 4"),
    (f"{SELFIE} noise.decoupling=[0.5]", "noise.decoupling=[0.5]", "loop.iterations=4"),
    ("+experiment=dpo_seed loop.iterations=2", "loop.iterations=2", "set it to 0"),
    (f"{SELFIE} loop.until=iteration-1/anotate", "loop.until=iteration-1/anotate", "did you mean iteration-1/annotate"),
    (f"{SELFIE} loop.until=iteration-5/pairs", "loop.until=iteration-5/pairs", "iteration-4/pairs"),
    (f"{LOCAL} loop.until=iteration-1/gold", "loop.until=iteration-1/gold", "no such stage"),
    (f"{SELFIE} schedule.before=[{{name:sft,data:[demonstrations],training:sft}}]", "annotator.reference=initial", "0"),
    (f"{SELFIE} annotator.reference=policy", "annotator.reference=policy", "initial"),
    (f"{SELFIE} sampler.temperature=0", "sampler.temperature=0", "sampler.n=2"),
    (f"{SELFIE} sampler.max_new_tokens=128", "sampler.max_new_tokens=128", "setting.max_length=128"),
    (f"{SELFIE} hardware.micro_batch_size=3", "hardware.micro_batch_size=3", "batch_size=8"),
    (f"{SELFIE} schedule.iteration.0.training=iterations", "training=iterations", "did you mean iteration?"),
    (f"{SELFIE} setting.labelled=10000", "setting.labelled=10000", "setting.pairs=9000"),
    (f"{SELFIE} setting.labelled=8000", "setting.labelled=8000", "setting.pairs=9000", "raise setting.pairs"),
    (f"{SELFIE} setting.labelled=1 setting.heldout_share=0.9", "setting.heldout_share=0.9", "setting.labelled=1"),
    (f"{SELFIE} setting.max_length=512", "setting.max_length=512", "setting.model.max_positions=256"),
    (f"{SELFIE} setting.model.heads=3", "setting.model.heads=3", "setting.model.hidden"),
    ("+experiment=sft sft=skip", "sft=skip", "nothing to train"),
    (f"{SELFIE} sft=train schedule.before=[{{name:seed,data:[seed],training:seed}}]", "sft=train", "demonstrations"),
    (f"{SELFIE} schedule.iteration.0.data=[demonstrations]", "step iteration", "demonstrations", "first step"),
    # a user's own model and files
    (f"{SELFIE} setting=local", "setting.model", "missing"),
    (f"{SELFIE} setting=local setting.preferences=.", "setting.model", "missing"),
    (f"{SELFIE} setting=local setting.model=.", "setting.preferences", "missing"),
    (f"{SELFIE} setting=local setting.model=no setting.preferences=.", "setting.model=no", "no such"),
    (f"{SELFIE} setting=local setting.model=. setting.preferences=no", "setting.preferences=no", "no such"),
    (f"{LOCAL} sft=train", "sft=train", "setting.demos"),
    (f"{SELFIE} setting=local setting.model=. setting.prompts=.", "setting.preferences", "missing"),
    (f"{LOCAL} setting.bad_rows=skip", "setting.bad_rows=skip", "stop"),
    ("+experiment=sft setting=local setting.model=. setting.preferences=.", "setting=local", "no demonstrations"),
]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, and a run that fails at once where a wrong configuration is accepted."""

    def accepted(config, node):
        raise AssertionError("the configuration was accepted")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", accepted)
    return tmp_path


@pytest.mark.parametrize(("line", "needles"), [(line, needles) for line, *needles in WRONG], ids=lambda x: str(x)[:90])
def test_a_wrong_command_line_is_one_line_and_no_files(line, needles, elsewhere, capsys):
    assert command.main(line.split()) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("align_loop: ") and shown.err.count("\n") == 1, shown.err
    assert "Traceback" not in shown.err and len(shown.err) < 400
    for needle in needles:
        assert needle in shown.err
    assert list(elsewhere.iterdir()) == []


def test_a_right_command_line_reaches_the_run(elsewhere):
    with pytest.raises(AssertionError, match="accepted"):
        command.main([SELFIE])


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    for name in ("preferences", "demos"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"made": "for planning"}))
    return folder


def overrides_for(setting, folder, demos=False):
    if setting != "local":
        return [f"setting={setting}"]
    given = ["setting=local", f"setting.model={folder}/model", f"setting.preferences={folder}/preferences.jsonl"]
    return [*given, f"setting.demos={folder}/demos.jsonl"] if demos else given


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_recipe_runs_in_every_setting(experiment, setting, own_files, tmp_path):
    given = [f"+experiment={experiment}", *overrides_for(setting, own_files, demos=True)]
    if experiment == "sft" and setting not in ("embedded", "embedded_small", "local"):
        with pytest.raises(UserError, match="no demonstrations"):  # these models have had theirs
            load(given)
        return
    if experiment == "d2po" and not setting.startswith("embedded"):
        with pytest.raises(UserError, match="reads the true quality of answers"):  # its person is simulated
            load(given)
        return
    config, node = load(given)
    assert config.experiment == experiment and config.setting.name == setting
    assert node["run_dir"].endswith(f"{experiment}-{setting}-seed0")
    assert stage_names(config) == [stage.name for stage in planned(config, tmp_path)]


@pytest.mark.parametrize(
    "more",
    [
        ["+lora"],
        ["sft=skip"],
        ["setting=embedded_small", "loop.iterations=2"],
        ["setting.chat_template=zephyr"],
        ["schedule.before=[{name:all,data:[all_labels],training:full}]", "sft=skip"],
    ],
    ids=str,
)
def test_until_may_name_the_stages_that_the_run_has_and_no_others(more, tmp_path):
    config = load([SELFIE, *more])[0]
    assert stage_names(config) == [stage.name for stage in planned(config, tmp_path)]


def test_until_ends_the_walk_at_that_stage(tmp_path):
    node = compose_node([SELFIE, "loop.iterations=1"])
    names = stage_names(from_node(node))
    for name in names:
        stages = planned(from_node(changed(node, "loop.until", name)), tmp_path)
        assert [s.name for s in stages] == names[: names.index(name) + 1]


def test_lora_without_a_value_is_its_default():
    config, node = load([SELFIE, "+lora"])
    assert config.lora.r == 16 and node["run_dir"].endswith("selfie_iter4-embedded-lora-seed0")
    assert load([SELFIE])[0].lora is None


def test_a_field_that_no_file_lists_can_be_set():
    config = load([SELFIE, "setting.dtype=bfloat16", "setting.training.iteration.warmup_ratio=0.3"])[0]
    assert config.setting.dtype == "bfloat16" and config.setting.training["iteration"].warmup_ratio == 0.3
    longer = load([SELFIE, "setting.prompt_sets.5=[1,2,3,4,5]", "loop.iterations=5", "noise.action=none"])[0]
    assert longer.setting.prompt_sets[5] == [1, 2, 3, 4, 5]


def test_a_setting_sizes_the_parts_and_the_command_line_wins():
    assert load([SELFIE])[0].sampler.max_new_tokens == 64
    assert load([SELFIE, "sampler.max_new_tokens=32"])[0].sampler.max_new_tokens == 32
    config = load([SELFIE, "objective.beta=0.3", "setting.max_length=100"])[0]
    assert config.annotator.beta == 0.3 and config.shapers["too_long"].max_length == 100


def test_the_paper_is_what_the_recipe_says():
    four, three = load([SELFIE])[0], load(["+experiment=selfie_paper", "setting=zephyr_ultrafeedback"])[0]
    assert four.noise.decoupling == [1 / 2, 1 / 4, 1 / 8, 1 / 16] and four.noise.alpha == 0.1
    assert (four.noise.share, four.noise.warmup, four.noise.action) == (0.1, 0.2, "smooth")
    assert (four.annotator.reference, four.updater.reference) == ("initial", "previous")
    assert three.setting.prompt_sets[three.loop.iterations] == [8000, 20000, 30000]
    assert three.noise.decoupling == [1 / 2, 1 / 4, 1 / 8]
    assert (three.sampler.n, three.sampler.temperature, three.sampler.max_new_tokens) == (2, 0.7, 300)
    assert three.setting.training["iteration"].learning_rate == 5e-7
    assert (three.setting.training["seed"].epochs, three.objective.beta) == (3, 0.1)
    assert load(["+experiment=selfie_filter"])[0].noise.action == "drop"


OWN_PARTS = '''
from dataclasses import dataclass

@dataclass
class Coin:
    """Judges by chance, from no model."""
    sharpness: float = 1.0
    def annotate(self, job):
        return None

@dataclass
class Writer:
    """Answers without a model."""
    n: int = 2
    engine: str = "none"
    def sample(self, prompts, policy, run, context):
        return []
'''


def test_a_users_own_part_in_a_users_own_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    own = ["~annotator", "+annotator._target_=own_parts.Coin", "~sampler", "+sampler._target_=own_parts.Writer"]
    own = [*LOCAL.split(), *own]
    config = load([*own, "+annotator.sharpness=3"])[0]
    assert node_of(config.annotator) == {"_target_": "own_parts.Coin", "sharpness": 3.0}
    stages = {s.name: s for s in planned(config, tmp_path)}
    assert "own_parts.Coin" in stages["iteration-1/annotate"].parts
    assert set(stages["iteration-1/annotate"].inputs) == {"answers", "prompts"}
    assert command.main([*own, "+annotator.sharpnes=3"]) == 2
    assert "annotator.sharpnes=3: unknown key; did you mean sharpness?" in capsys.readouterr().err
    sys.modules.pop("own_parts")


def test_held_out_answers_are_drawn_once_and_as_the_evaluator_says(tmp_path):
    for more, temperature in ([], 0.9), (["evaluator.temperature=0"], 0.0):
        config = load([SELFIE, "sampler.temperature=0.9", *more])[0]
        stages = {s.name: s for s in planned(config, tmp_path)}
        held_out, own = (stages[name].config["sampler"] for name in ("seed/answers", "iteration-1/sample"))
        assert (held_out["n"], held_out["temperature"]) == (1, temperature)
        assert (own["n"], own["temperature"]) == (2, 0.9)
