"""The list of recipes: every one has a documented head, and what is said of its parts is what it composes to."""

import pytest

from align_loop import __main__ as command
from align_loop.compose import conf_dir
from align_loop.recipes import Recipe, all_recipes, explain, parts_of, read_recipe, table

NAMES = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("recipe", all_recipes(), ids=lambda r: r.name)
def test_every_recipe_explains_itself(recipe):
    assert recipe.summary.endswith(".") and len(recipe.summary) > 30
    assert recipe.command.startswith(f"python -m align_loop +experiment={recipe.name}")
    assert recipe.name == "sft" or any(year in recipe.fields["Paper"] for year in map(str, range(2015, 2027)))


def test_the_list_has_all_of_them(capsys):
    assert command.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(NAMES)]] == NAMES
    assert "Kim et al. 2024" in next(line for line in lines if line.startswith("selfie_iter4"))
    assert all(len(line) < 260 for line in lines)


def test_an_explanation_names_steps_and_parts(capsys):
    assert command.main(["recipes", "selfie_rm"]) == 0
    text = capsys.readouterr().out
    assert "reward_model: trains the reward model on seed" in text and "4 x iteration: trains the policy" in text
    assert "annotator: RewardModelScore (reward_model=reward_model" in text and "noise" not in parts_of_named(
        "selfie_rm"
    )
    assert "noise: NoiseHandling (action=smooth" in explain("selfie_iter4")
    assert "least_confident" in table() and "least_confident" not in explain("selfie_iter4")


def parts_of_named(name):
    from align_loop.recipes import compose

    return parts_of(compose(name))


def test_a_recipe_that_there_is_not(capsys):
    assert command.main(["recipes", "selfi_rm"]) == 2
    assert "did you mean selfie_rm" in capsys.readouterr().err


def test_paragraphs_of_a_head_comment(tmp_path):
    head = [
        "@package _global_",
        "It does",
        "this.",
        "Paper: A 2020.",
        "Seen: 0.5",
        "to 0.6.",
        "  python -m align_loop x",
    ]
    text = "".join(f"# {line}\n" for line in head) + "a: 1\n# b\n"
    (tmp_path / "one.yaml").write_text(text)
    expected = Recipe("one", "It does this.", {"Paper": "A 2020.", "Seen": "0.5 to 0.6."}, "python -m align_loop x")
    assert read_recipe(tmp_path / "one.yaml") == expected and expected.status == "measured"
