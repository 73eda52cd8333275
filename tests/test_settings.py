"""Settings: what a run is made of, handed on as stages that name everything that they depend on."""

import importlib
import json

import pytest

from align_loop.compose import load
from align_loop.errors import UserError
from align_loop.prompts import tables
from align_loop.prompts.settings import EmbeddedSetting, HubSetting, LocalSetting
from align_loop.prompts.wordlevel import ModelSize
from align_loop.trainers.config import TrainingConfig

COMMON = {"name": "s", "training": {"seed": TrainingConfig(1e-4)}, "max_length": 64, "eval_prompts": 8}
COMMON |= {"heldout_share": 0.2}
EMBEDDED = {"demonstrations": 10, "pairs": 100, "labelled": 20, "honour": 0.6, "sharpness": 1.4, "model": ModelSize()}
HUB = {"model": "someone/model", "revision": "abc", "preferences": {"name": "someone/data", "revision": "def"}}


def embedded(**change):
    return EmbeddedSetting(**{**COMMON, **EMBEDDED, "prompt_sets": {2: [10, 20], 3: [10, 20, 30]}, **change})


@pytest.fixture
def files(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("preferences", "prompts", "demos"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("preferences", "prompts", "demos")}


def local(files, *names, **change):
    folder = files["preferences"].rpartition("/")[0]
    return LocalSetting(**{**COMMON, "model": f"{folder}/model", **{name: files[name] for name in names}, **change})


def test_a_stage_of_a_setting_exists_and_its_config_is_json(files):
    for setting in (embedded(), local(files, "preferences", "demos"), HubSetting(**COMMON, **HUB)):
        source = setting.data_stage(iterations=2, seed=7)
        module, _, function = source.run.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert json.loads(json.dumps(source.config)) == source.config
        assert source.config["seed"] == 7 and source.config["iterations"] == 2
        assert (source.config["eval_prompts"], source.config["heldout_share"]) == (8, 0.2)


def test_embedded_has_all_and_needs_no_files():
    setting = embedded()
    assert (setting.has_gold, setting.has_demonstrations, setting.has_preferences) == (True, True, True)
    assert not setting.pretrained and callable(importlib.import_module(setting.world).gold_rewards)
    source = setting.data_stage(2, 0)
    assert source.files == {} and source.config["prompt_sets"] == {"2": [10, 20], "3": [10, 20, 30]}
    assert {k: source.config[k] for k in EMBEDDED if k != "model"} == {k: EMBEDDED[k] for k in EMBEDDED if k != "model"}
    start = setting.start(5)
    assert start.config["seed"] == 5 and start.config["hidden"] == 128 and "pairs" not in start.config


def test_iterations_need_prompt_sets_that_fit():
    for enough in (1, 2, 3):
        embedded().check_iterations(enough)
    with pytest.raises(UserError, match="loop.iterations=4.*at most 3"):
        embedded().check_iterations(4)
    embedded(labelled=40).check_iterations(3)  # 60 prompts, 60 unlabelled pairs
    with pytest.raises(UserError, match="setting.pairs=100 less setting.labelled=41 .*too few"):
        embedded(labelled=41).check_iterations(3)
    embedded(labelled=41).check_iterations(2)
    with pytest.raises(UserError, match="at most 0"):
        embedded(prompt_sets=None).check_iterations(1)


def test_local_files_are_inputs_by_content_and_not_by_name(files):
    setting = local(files, "preferences", "prompts")
    source = setting.data_stage(2, 0)
    assert source.files == {name: files[name] for name in ("preferences", "prompts")}
    assert not any(path in json.dumps(source.config) for path in files.values())
    assert setting.start(0) == setting.model and setting.has_preferences and not setting.has_demonstrations
    assert local(files, "preferences", "demos").has_demonstrations
    assert not local(files, "prompts").has_preferences
    setting.check_iterations(50)  # equal parts of whatever prompts there are
    known = tables.DEFAULTS.keys() | {"format", "prompts_format", "demos_format"}
    assert source.config.keys() <= known


@pytest.mark.parametrize(
    ("names", "iterations", "given", "fraction"),
    [
        (("preferences",), 3, None, 0.1),  # the others serve as prompts
        (("preferences",), 0, None, 1.0),  # nobody needs prompts
        (("preferences", "prompts"), 3, None, 1.0),
        (("preferences",), 3, 0.5, 0.5),
        (("preferences", "prompts"), 3, 0.5, 0.5),
    ],
)
def test_how_many_labels_are_used(names, iterations, given, fraction, files):
    source = local(files, *names, seed_fraction=given).data_stage(iterations, 0)
    assert source.config["seed_fraction"] == fraction


@pytest.mark.parametrize("key", ["model", "preferences", "prompts", "demos"])
def test_a_missing_file_is_named_by_its_key(key, files):
    with pytest.raises(ValueError, match=f"setting.{key}=/no/where"):
        local(files, "preferences", **{key: "/no/where"})


def test_local_needs_preferences_or_prompts(files):
    local(files, "prompts")
    with pytest.raises(ValueError, match="setting.preferences is missing"):
        local(files)


def test_hub_keys_the_data_by_revision(tmp_path):
    setting = HubSetting(**COMMON, **HUB)
    config = setting.data_stage(0, 0).config
    assert config["preferences"] == HUB["preferences"] and config["bad_rows"] == "drop" and config["prompts"] is None
    assert setting.has_preferences and not setting.has_demonstrations and not setting.has_gold
    assert HubSetting(**COMMON, **{**HUB, "model": str(tmp_path)}).start(0) == str(tmp_path)


def test_a_hub_model_that_is_not_there(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    setting = HubSetting(**COMMON, **HUB)
    assert setting.start(0, planning=True) is None
    with pytest.raises(UserError, match="setting.model=someone/model at setting.revision=abc") as error:
        setting.start(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_length": 1}, "setting.max_length=1"),
        ({"eval_prompts": -1}, "setting.eval_prompts=-1"),
        ({"heldout_share": 1.0}, "setting.heldout_share=1.0"),
        ({"labelled": 0}, "setting.labelled=0"),
        ({"labelled": 101}, "setting.labelled=101"),
        ({"honour": -0.1}, "setting.honour=-0.1"),
        ({"max_length": 257}, "setting.max_length=257"),
        ({"model": ModelSize(hidden=128, heads=3)}, "setting.model.heads=3"),
        ({"labelled": 1, "heldout_share": 0.6}, "setting.heldout_share=0.6"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_out_of_range(change, said):
    with pytest.raises(ValueError, match=said):
        embedded(**change)


def test_an_unknown_template_is_found_before_anything_runs():
    with pytest.raises(UserError, match="setting.chat_template=zefyr"):
        embedded(chat_template="zefyr")
    assert embedded(chat_template="chatml").chat_template == "chatml"


def test_the_label_budget_of_the_embedded_setting_is_the_papers():
    setting = load(["+experiment=selfie_iter4"])[0].setting
    assert setting.labelled / setting.pairs == pytest.approx(0.033, abs=0.001)
