"""The small language: its gold can't be cheated, its vocabulary is closed, and its tables are disjoint."""

import dataclasses
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_loop.prompts import embedded, world
from align_loop.prompts.wordlevel import ModelSize, build_tokenizer, write_base_model
from align_loop.record import prompt_id, read_rows
from align_loop.stage import StageContext

DEMANDS = st.builds(world.Demands, **{name: st.sampled_from(values) for name, values in world.CHOICES.items()})
SEED = st.integers(0, 2**20)


@given(DEMANDS, SEED)
def test_what_honours_all_demands_earns_one(demands, seed):
    answer = world.compose(demands)
    assert world.gold_reward(demands, answer) == 1
    assert world.write_answer(demands, 1.0, random.Random(seed)).endswith(f"with {demands.ending} .")
    assert world.gold_reward(demands, world.write_answer(demands, 1.0, random.Random(seed))) == 1
    assert world.gold_reward(demands, world.write_answer(demands, 0.0, random.Random(seed))) == 0


@given(DEMANDS, st.sampled_from(world.DEMANDS), SEED)
def test_each_demand_is_worth_a_sixth_whatever_the_others(demands, name, pick):
    others = [value for value in world.CHOICES[name] if value != getattr(demands, name)]
    other = dataclasses.replace(demands, **{name: others[pick % len(others)]})
    answer = world.compose(other)
    assert world.gold_reward(demands, answer) == pytest.approx(5 / 6)
    assert [key for key, value in world.honoured(demands, answer).items() if not value] == [name]


@given(DEMANDS)
def test_saying_everything_earns_nothing(demands):
    everything = " ".join(word for choices in world.CHOICES.values() for word in choices)
    assert world.gold_reward(demands, everything) == 0
    assert world.gold_reward(demands, f"{everything} . {everything} . {everything} .") == 0
    assert world.gold_reward(demands, "") == 0 and world.gold_reward(demands, " . . .") == 0
    answer = world.compose(demands)
    other_topic = next(t for t in world.TOPICS if t != demands.topic)
    head, rest = answer.split(" . ", 1)
    for spoilt in (
        f"{head} . i remember the {other_topic} . {rest}",  # one more topic
        f"{head} and {demands.kind} . {rest}",  # a head that goes on
        f"{answer[:-1]}and {demands.ending} .",  # an ending that goes on
        answer.removesuffix(" ."),  # cut in mid-sentence
    ):
        assert world.gold_reward(demands, spoilt) == pytest.approx(5 / 6), spoilt


def test_a_cut_answer_never_earns_more_than_what_it_has_said():
    rng = random.Random(0)
    for _ in range(50):
        demands = world.draw_demands(rng)
        words = world.compose(demands).split()
        earned = [world.gold_reward(demands, " ".join(words[:n])) for n in range(len(words) + 1)]
        assert earned[0] == 0 and earned[-1] == 1 and max(earned[:-1]) < 1


def test_every_word_is_in_the_vocabulary_and_survives_the_tokenizer():
    rng, tokenizer = random.Random(0), build_tokenizer()
    vocabulary = world.vocabulary()
    assert vocabulary == sorted(set(vocabulary))
    used = set()
    for _ in range(800):
        demands = world.draw_demands(rng)
        for text in (world.prompt_text(demands, rng), world.write_answer(demands, 0.6, rng)):
            used |= set(text.split())
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert used <= set(vocabulary)
    assert {w for choices in world.CHOICES.values() for w in choices} <= used
    assert set(world.OTHER_WORDS) <= set(vocabulary) - used


def test_a_prompt_names_each_of_its_demands():
    rng = random.Random(0)
    for _ in range(100):
        demands = world.draw_demands(rng)
        assert set(dataclasses.astuple(demands)) <= set(world.prompt_text(demands, rng).split())
    places = [world.prompt_text(demands, rng).find("about") for _ in range(40)]
    assert len(set(places)) > 2  # clauses in random order, so that no position gives a demand away


def test_the_coin_follows_bradley_and_terry():
    rng = random.Random(0)
    for difference in (-2, 0, 1, 3):
        wins = sum(world.prefers_first(difference / 6, 0.0, 1.4, rng) for _ in range(4000)) / 4000
        assert wins == pytest.approx(1 / (1 + 2.718281828 ** (-1.4 * difference)), abs=0.03)


def test_writers_honour_a_demand_with_the_given_probability():
    rng = random.Random(0)
    drawn = [world.draw_demands(rng) for _ in range(1500)]
    golds = [world.gold_reward(d, world.write_answer(d, 0.6, rng)) for d in drawn]
    assert sum(golds) / 1500 == pytest.approx(0.6, abs=0.02)


# --- the stages -------------------------------------------------------------------------------------------------

CONFIG = {
    "seed": 0,
    "demonstrations": 150,
    "pairs": 400,
    "labelled": 50,
    "honour": 0.6,
    "sharpness": 1.4,
    "flip_rate": 0.0,
    "eval_prompts": 30,
    "heldout_share": 0.2,
    "iterations": 3,
    "prompt_sets": {"3": [20, 40, 60], "4": [15, 30, 45, 50]},
}


def prepare(folder, **change):
    folder.mkdir()
    context = StageContext("data", folder, quiet=True)
    embedded.prepare(CONFIG | change, {}, context)
    return {file.stem: read_rows(file) for file in folder.glob("*.parquet")}, context.report


def ids(rows):
    return {row["prompt_id"] for row in rows}


def test_the_tables_have_their_sizes_and_share_no_prompt(tmp_path):
    tables, report = prepare(tmp_path / "a")
    assert {name: len(rows) for name, rows in tables.items()} == {
        "demonstrations": 150,
        "heldout": 10,
        "seed": 40,
        "all_labels": 390,
        "eval_prompts": 30,
        "prompts-1": 20,
        "prompts-2": 40,
        "prompts-3": 60,
    }
    apart = [name for name in tables if name != "all_labels"]
    assert sum(len(ids(tables[name])) for name in apart) == len(set().union(*(ids(tables[name]) for name in apart)))
    assert not ids(tables["all_labels"]) & ids(tables["heldout"] + tables["eval_prompts"] + tables["demonstrations"])
    assert ids(tables["seed"]) <= ids(tables["all_labels"])
    assert ids(tables["prompts-1"] + tables["prompts-2"] + tables["prompts-3"]) <= ids(tables["all_labels"])
    assert report["rows"]["prompts"] == {"in": 350, "out": 120, "dropped": {"not used by these iterations": 230}}


def test_rows_are_what_they_say(tmp_path):
    tables, report = prepare(tmp_path / "a")
    for rows in tables.values():
        assert all(row["prompt_id"] == prompt_id(row["messages"]) for row in rows)
    decided = []
    for row in tables["all_labels"] + tables["heldout"]:
        demands = embedded.demands_of(row)
        assert row["gold_chosen"] == world.gold_reward(demands, row["chosen"])
        assert row["gold_rejected"] == world.gold_reward(demands, row["rejected"])
        if row["gold_chosen"] != row["gold_rejected"]:
            decided.append(row["gold_chosen"] > row["gold_rejected"])
    assert report["facts"]["coin agrees with gold"] == round(sum(decided) / len(decided), 4)
    assert 0.8 < report["facts"]["coin agrees with gold"] < 0.97  # noisy, as people are
    assert len({row["example_id"] for row in tables["all_labels"]}) == 390


def test_the_seed_decides_everything(tmp_path):
    prepare(tmp_path / "a")
    prepare(tmp_path / "b")
    prepare(tmp_path / "c", seed=1)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert file.read_bytes() != (tmp_path / "c" / file.name).read_bytes()


def test_the_number_of_iterations_changes_no_other_table(tmp_path):
    for count in (0, 1, 3, 4):
        prepare(tmp_path / str(count), iterations=count)
    assert not list((tmp_path / "0").glob("prompts-*"))
    for name in ("demonstrations", "seed", "heldout", "all_labels", "eval_prompts"):
        assert len({(tmp_path / str(c) / f"{name}.parquet").read_bytes() for c in (0, 1, 3, 4)}) == 1, name
    one, three = (tmp_path / c / "prompts-1.parquet" for c in "13")
    assert one.read_bytes() == three.read_bytes()  # a shorter run is the beginning of a longer one


def test_fewer_labels_are_part_of_more(tmp_path):
    few, _ = prepare(tmp_path / "a", labelled=25, heldout_share=0.0)
    more, _ = prepare(tmp_path / "b", heldout_share=0.0)
    assert more["seed"][:25] == few["seed"] and few["heldout"] == []
    assert few["demonstrations"] == more["demonstrations"]


def test_gold_of_answers_comes_from_the_prompts_demands(tmp_path):
    tables, _ = prepare(tmp_path / "a")
    prompts = tables["eval_prompts"]
    answers = [
        {
            "sample_id": str(i),
            "prompt_id": p["prompt_id"],
            "text": world.compose(embedded.demands_of(p)),
        }
        for i, p in enumerate(prompts)
    ]
    assert {row["gold"] for row in embedded.gold_rewards(prompts[::-1], answers)} == {1.0}
    with pytest.raises(KeyError):
        embedded.gold_rewards(prompts[1:], answers)


def test_the_untrained_model_is_the_seeds(tmp_path):
    size = {"hidden": 16, "layers": 1, "heads": 1, "intermediate": 32, "max_positions": 64}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        context = StageContext("start", tmp_path / name, quiet=True)
        embedded.base_model({**size, "seed": seed}, {}, context)
    weights = {name: (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    config = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    tokenizer = build_tokenizer()
    assert config["vocab_size"] == len(tokenizer) and config["max_position_embeddings"] == 64
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    generation = json.loads((tmp_path / "a" / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id  # or no engine would know where answers end


def test_making_the_model_leaves_the_callers_chance_alone(tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_base_model(tmp_path / "m", ModelSize(16, 1, 1, 32, 64), seed=9)
    assert torch.equal(torch.rand(3), expected)


@given(SEED)
@settings(max_examples=20)
def test_prompts_are_never_drawn_twice(seed):
    rng, seen = random.Random(seed), set()
    drawn = [embedded._prompt(rng, seen)["prompt_id"] for _ in range(50)]
    assert len(set(drawn)) == 50 and set(drawn) == seen
    again = embedded._prompt(random.Random(seed), seen)["prompt_id"]  # the same draws as the first prompt's
    assert again not in drawn


def test_a_flip_rate_turns_training_labels_round_and_no_others(tmp_path):
    clean, noisy = prepare(tmp_path / "a")[0], prepare(tmp_path / "b", flip_rate=0.3)[0]
    for name in ("heldout", "eval_prompts", "demonstrations"):
        assert clean[name] == noisy[name]
    turned = [c["chosen"] == n["rejected"] for c, n in zip(clean["all_labels"], noisy["all_labels"], strict=True)]
    assert 0.22 < sum(turned) / len(turned) < 0.38
    assert noisy["seed"] == noisy["all_labels"][: len(noisy["seed"])] != clean["seed"]
