"""The configuration of every annotator: all its fields are there, it is accepted, and it asks for what it reads."""

import dataclasses
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from planned import planned

from align_loop.compose import conf_dir, load
from align_loop.engines.endpoint import Endpoint
from align_loop.errors import UserError
from align_loop.parts import find

SELFIE = "+experiment=selfie_iter4"
ANNOTATORS = sorted(file.stem for file in (conf_dir() / "annotator").glob("*.yaml"))
REQUIRED = {
    "api": ["annotator.endpoint.url=http://h/v1", "annotator.endpoint.model=m"],
    "construct": ["annotator.scores={better: 1, plain: 0}"],
    "people": [f"annotator.file={__file__}"],
    "verifier": ["annotator.function=own_checks:check"],
}
READS = {  # the inputs of the stage, beside answers and prompts
    "api": set(),
    "construct": set(),
    "density_ratio": {"strong", "weak"},
    "ensemble": {f"members.{m}" for m in ("implicit_reward.policy", "implicit_reward.reference")}
    | {f"members.density_ratio.{side}" for side in ("strong", "weak")},
    "followup_likelihood": {"judge"},
    "gold": {"gold"},
    "implicit_reward": {"policy", "reference"},
    "judge_logit": {"judge"},
    "reward_model": {"reward_model"},
    "people": {"labels", "base.policy", "base.reference"},
    "verifier": set(),
    "yes_prob": {"judge"},
}


@pytest.fixture
def checks(tmp_path, monkeypatch):
    (tmp_path / "own_checks.py").write_text("def check(messages, text, meta):\n    return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_checks", None)


@pytest.mark.parametrize("name", ANNOTATORS)
def test_every_annotator_lists_its_fields_and_asks_for_what_it_reads(name, checks, tmp_path):
    node = OmegaConf.load(conf_dir() / "annotator" / f"{name}.yaml")
    cls = find(node["_target_"], name)
    assert set(node) - {"_target_"} == {f.name for f in dataclasses.fields(cls)}
    (tmp_path / "model").mkdir()  # the reward model of another run
    more = {"reward_model": [f"annotator.reward_model={tmp_path / 'model'}"]} | REQUIRED
    config = load([SELFIE, f"annotator={name}", *more.get(name, [])])[0]
    assert type(config.annotator) is cls
    stage = {s.name: s for s in planned(config, tmp_path)}["iteration-2/annotate"]
    assert set(stage.inputs) == {"answers", "prompts"} | READS[name]
    if name == "verifier":
        assert "own_checks:check" in stage.parts
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    for field, value in defaults.items():  # the file says what the class says
        if not dataclasses.is_dataclass(value) and field in node and "base" not in (field, name):
            shown = OmegaConf.to_container(node, resolve=False)[field]
            assert shown in (value, "???") or "${" in str(shown), field


def test_the_fields_of_an_endpoint_are_listed():
    node = OmegaConf.load(conf_dir() / "annotator" / "api.yaml").endpoint
    shown = OmegaConf.to_container(node, throw_on_missing=False)
    fields = {f.name: f.default for f in dataclasses.fields(Endpoint)}
    assert set(shown) == set(fields)
    assert {k: v for k, v in shown.items() if v != "???" and k != "extra"} == {
        k: v for k, v in fields.items() if v is not dataclasses.MISSING and k not in ("extra", "url", "model")
    }


def test_a_role_or_a_reference_inside_another_annotator_is_checked_by_its_key():
    for more, said in (
        (["annotator=judge_logit", "annotator.judge=polic"], "annotator.judge=polic: no model folder.*mean policy"),
        (["annotator=ensemble", "annotator.members.implicit_reward.reference=policy"],
         "annotator.members.implicit_reward.reference=policy: the judge held against itself"),
        (["annotator=people", *REQUIRED["people"], "schedule.before=[]", "sft=skip", "setting=local", "setting.model=.",
          "setting.preferences=."], "annotator.base.reference=initial: without a step on labelled data"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            load([SELFIE, *more])


def test_configuring_an_annotator_imports_no_torch():
    names = [OmegaConf.load(conf_dir() / "annotator" / f"{n}.yaml")["_target_"].rpartition(".")[0] for n in ANNOTATORS]
    code = f"import sys, {', '.join(names)}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=conf_dir().parent)
