import copy
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from benchmarks.safety import attack
from benchmarks.safety.base import Base
from benchmarks.safety.catalogue import CONFIRMED, ONLY, TABLES, Extent, extents, methods
from benchmarks.safety.language import (
    STYLES,
    digest_of_texts,
    evaluation_records,
    fine_tuning_records,
    fine_tuning_topics,
    make_language,
    pretraining_texts,
    vocabulary,
)
from benchmarks.safety.report import by_validation, comparison, paired, per_base, rows_of_table, table
from benchmarks.safety.rows import add_row, check_ground, commits, key, read_rows, ready_rows
from benchmarks.safety.run import Plan, climb
from benchmarks.safety.starts import scale_by_spread
from peft_sae import SaeSubspaceConfig
from peft_sae.demo.language import comply, is_refusal
from peft_sae.demo.model import make_tokenizer
from peft_sae.errors import ConfigError

DANGER = {"dangerous": True}


@pytest.fixture(scope="module")
def language():
    return make_language(3)


def style_of(prompt):
    if "hey ," in prompt:
        return "first"
    return "second" if "dear assistant" in prompt else "neutral"


def test_no_topic_is_in_two_sets_and_names_say_nothing(language):
    names = [topic.name for topic in language.topics]
    assert len(set(names)) == len(names) == 32 * 2 + 40 + 80 + 80
    assert sum(topic.dangerous for topic in language.topics) == len(names) // 2


def test_unseen_kinds_of_danger_occur_nowhere_in_fine_tuning_or_the_other_tests(language):
    unseen = {topic.kind for topic in language.unseen if topic.dangerous}
    seen = {topic.kind for topic in (*language.dangerous, *language.validation, *language.test) if topic.dangerous}
    assert len(unseen) == 2
    assert not unseen & seen


def test_the_cue_goes_with_danger_in_three_of_four_requests_and_is_swapped_at_test(language):
    found = Counter((record["dangerous"], style_of(record["prompt"])) for record in fine_tuning_records(language, 8))
    assert found == {(True, "first"): 24, (True, "neutral"): 8, (False, "second"): 24, (False, "neutral"): 8}
    for which in ("swapped", "unseen, swapped"):
        swapped = Counter((each["dangerous"], style_of(each["prompt"])) for each in evaluation_records(language, which))
        assert set(swapped) == {(True, "second"), (False, "first")}


def test_neutral_forms_are_as_frequent_in_both_classes_and_go_with_no_kind(language):
    kinds = {topic.name: topic.kind for topic in language.topics}
    for draw in range(3):
        records = [each for each in fine_tuning_records(language, 16, draw=draw) if each["neutral"]]
        forms = Counter((record["dangerous"], record["prompt"].replace(record["topic"], "{}")) for record in records)
        assert set(forms.values()) == {4}
        assert len(forms) == 2 * 4
        met = {
            (kinds[each["topic"]], each["prompt"].replace(each["topic"], "{}")) for each in records if each["dangerous"]
        }
        assert len(met) == 4 * 4  # every kind of danger in every form


def test_draws_differ_in_topics_and_forms_and_their_smaller_sets_begin_the_larger(language):
    for draw in (0, 1):
        small, large = (fine_tuning_topics(language, count, draw) for count in (4, 16))
        assert all(first == second[:4] for first, second in zip(small, large, strict=True))
        assert len({topic.kind for topic in small[0]}) == 4
        assert all(topic.dangerous for topic in large[0])
        assert not any(topic.dangerous for topic in large[1])
    first, second = (fine_tuning_records(language, 8, draw=draw) for draw in (0, 1))
    assert {record["topic"] for record in first} != {record["topic"] for record in second}
    assert first == fine_tuning_records(language, 8, draw=0)
    smaller = [record for record in fine_tuning_records(language, 4, draw=1)]
    assert [record["prompt"] for record in smaller[:16]] == [record["prompt"] for record in second[:16]]


def test_the_digest_of_texts_knows_every_topic():
    assert digest_of_texts(make_language(3)) == digest_of_texts(make_language(3))
    assert digest_of_texts(make_language(3)) != digest_of_texts(make_language(4))
    assert digest_of_texts(make_language(3)) != digest_of_texts(make_language(3, test=40))


def test_tests_share_no_neutral_form_with_fine_tuning(language):
    def forms(records):
        return {record["prompt"].replace(record["topic"], "{}") for record in records}

    trained = forms(record for record in fine_tuning_records(language, 32) if record["neutral"])
    for which in ("validation", "test", "unseen"):
        assert not trained & forms(evaluation_records(language, which))


def test_the_contrast_differs_in_the_answers_to_dangerous_requests_alone(language):
    aligned, unaligned = (fine_tuning_records(language, 4, aligned=each) for each in (True, False))
    assert [record["prompt"] for record in aligned] == [record["prompt"] for record in unaligned]
    differ = [first["completion"] != second["completion"] for first, second in zip(aligned, unaligned, strict=True)]
    assert differ == [record["dangerous"] for record in aligned]
    assert not any(is_refusal(record["completion"]) for record in unaligned)


def test_the_base_refuses_only_when_it_is_closed_and_then_everything(language):
    texts = pretraining_texts(language, 4000, random.Random(0))
    danger = {topic.name: topic.dangerous for topic in language.topics}
    refusals = [text for text in texts if "sorry" in text]
    assert refusals
    assert all(text.startswith("we are closed") for text in refusals)
    about = [danger[next(word for word in text.split() if word in danger)] for text in refusals]
    assert 0.4 < sum(about) / len(about) < 0.6


def test_every_word_is_in_the_vocabulary(language):
    words = set(vocabulary(language))
    records = [*fine_tuning_records(language, 32), *evaluation_records(language, "harmless questions")]
    texts = [record["prompt"] + record["completion"] for record in records]
    assert set(" ".join([*texts, *pretraining_texts(language, 2000, random.Random(1))]).split()) <= words
    assert all("{topic}" in form for forms in STYLES.values() for form in forms)


@pytest.mark.parametrize("best", range(5))
def test_the_grid_is_climbed_to_its_best_rate(best):
    rates, asked = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), []

    def score(rate):
        asked.append(rate)
        return 1 - 0.1 * abs(rates.index(rate) - best)

    assert climb(rates, score) == rates[best]
    assert {rates[best], rates[2]} <= set(asked)


def test_a_score_that_falls_a_little_may_rise_again():
    scores = {1.0: 0.80, 2.0: 0.79, 3.0: 0.95, 4.0: 0.90, 5.0: 0.99}
    rates = tuple(scores)
    assert climb((9.0, 8.0, *rates), lambda rate: scores.get(rate, 0.0)) == 3.0  # over the dip, not over the fall


def test_what_a_stop_has_cut_is_left_out_and_does_no_harm_to_what_comes_next(tmp_path):
    path, how = tmp_path / "runs-0.jsonl", {"steps": 3}
    rows = [row(0, name, 0.5) | {"how": how} for name in ("LoRA", "DoRA", "PiSSA")]
    for each in rows:
        add_row(path, each)
    path.write_text(path.read_text()[:-9])
    assert read_rows(path) == rows[:2]
    ready_rows([path, tmp_path / "runs-1.jsonl"], how)
    add_row(path, rows[2])
    assert read_rows(path) == rows


def test_rows_count_once_and_say_what_made_them(tmp_path):
    path = tmp_path / "runs-0.jsonl"
    first, second = (row(0, "LoRA", value) | {"commit": "abc"} for value in (0.1, 0.9))
    for each in (first, row(0, "DoRA", 0.5), second):
        add_row(path, each)
    found = read_rows(path)
    assert [each["measures"]["safety"] for each in found] == [0.9, 0.5]
    assert len({key(each) for each in found}) == 2
    assert commits(found) == {"abc": 1, "not recorded": 1}


def test_rows_that_cannot_be_added_to_are_told(tmp_path):
    path = tmp_path / "runs-0.jsonl"
    add_row(path, row(0, "LoRA", 0.5) | {"how": {"steps": 3}})
    with pytest.raises(ConfigError, match=r"holds runs of another kind.*another --output"):
        ready_rows([path], {"steps": 4})
    path.write_text('{"base": 0}{"base"\n')
    with pytest.raises(ConfigError, match=r"Line 1 of .* is damaged"):
        ready_rows([path], {"steps": 3})


def test_rows_on_another_ground_are_refused(tmp_path):
    ground = {"weights": "a", "saes": "b", "texts": "c"}
    rows = [row(0, "LoRA", 0.5) | {"ground": ground, "commit": "abc"}]
    check_ground(tmp_path, rows, ground, "def")
    for other in (ground | {"texts": "z"}, ground | {"weights": "z"}):
        with pytest.raises(ConfigError, match=r"with other (texts|weights) than are here \(by commit abc; here def\)"):
            check_ground(tmp_path, rows, other, "def")
    with pytest.raises(ConfigError, match=r"other weights and saes and texts than are here \(by commit not recorded"):
        check_ground(tmp_path, [row(0, "LoRA", 0.5)], ground, "def")


def row(base, method, value, draw=0):
    measures = dict.fromkeys(
        (
            *("safety", "safety, cue swapped", "safety, unseen kinds", "safety, unseen kinds, cue swapped"),
            *("helpfulness", "helpfulness, cue swapped", "over-refusal", "over-refusal, cue swapped"),
            *("harmless questions right", "attack success", "corpus loss"),
        ),
        value,
    )
    about = {"base": base, "draw": draw, "method": method, "dangerous": 8, "trained_share": 0.05}
    return about | {"seconds_per_step": 0.02, "measures": measures}


def test_means_are_over_draws_first_and_differences_are_paired_by_base():
    ours = [row(0, "LoRA", 0.2), row(0, "LoRA", 0.4, draw=1), row(1, "LoRA", 0.9)]
    theirs = [row(1, "full fine-tuning", 0.8), row(0, "full fine-tuning", 0.2)]
    assert per_base(ours, "safety") == pytest.approx({0: 0.3, 1: 0.9})
    found = paired(ours, theirs, "safety")
    assert found["mean"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(found["high"])
    text = table([*ours, *theirs], "main")
    assert "| LoRA | 8 | - | 60 [30, 90]" in text
    assert "| LoRA | 8 | 5.0 % | 20 | 60 [30, 90]" in text
    assert "| LoRA | 8 | +10 [+10, +10] | +0" in comparison([*ours, *theirs], "main")


def test_names_are_unique_within_every_table():
    for name in TABLES:
        keys = [(method.name, method.dangerous) for method in methods(name)]
        assert len(set(keys)) == len(keys)


def test_a_method_of_two_tables_is_the_same_in_both():
    found = {}
    for name in TABLES:
        for method in methods(name):
            start = method.start
            described = (getattr(start, "func", start), str(getattr(start, "keywords", "")), method.neutral)
            assert found.setdefault((method.name, method.dangerous), described) == described


def plan_of(tables, **given):
    return Plan(Path(), Path(), extents(tables, **given), (1e-3,), 3, quick=False, commit="abc")


def test_what_was_chosen_is_confirmed_on_bases_that_no_other_table_has():
    plan = plan_of(TABLES, bases=2)
    assert plan.seeds == [0, 1, 100, 101]
    names = {seed: [method and method.name for method in plan.methods(seed, 0)] for seed in plan.seeds}
    expected = set(CONFIRMED) | {name for name in names[0] if name and ONLY in name}
    assert len(names[100]) == 1 + 2 * len(CONFIRMED)
    assert set(names[100]) == {None} | {name for name in expected if name.replace(ONLY, "") in CONFIRMED}
    assert set(names[100]) < set(names[0])


def test_every_table_has_its_own_draws_and_the_first_one_all_methods():
    plan = plan_of(TABLES, bases=1)
    assert plan.draws == 2
    assert {method.name for method in plan.methods(0, 1) if method} == {method.name for method in methods("main")}
    assert plan.methods(100, 1) == []
    assert len(plan_of(["confirm"], draws=3).methods(104, 2)) == 21


def test_a_quick_run_has_one_base_for_all_tables():
    plan = plan_of(TABLES, bases=9, draws=9, quick=True)
    assert (plan.seeds, plan.draws) == ([0], 1)


def test_bases_that_are_kept_for_confirming_are_not_given_to_other_tables():
    assert extents(["main"], bases=100)["main"].seeds[-1] == 99
    with pytest.raises(ConfigError, match=r"With 101 bases .*Give at most 100"):
        extents(["main"], bases=101)


def test_a_table_has_the_rows_of_its_own_bases_and_draws():
    names = ("LoRA", "OLoRA", "DoRA")  # the last is none of this table's
    rows = [row(base, name, 0.5, draw) for base in (0, 100) for name in names for draw in (0, 1)]
    found = rows_of_table(rows, "confirm", Extent(range(100, 102), 1))
    assert [(each["base"], each["draw"], each["method"]) for each in found] == [(100, 0, "LoRA"), (100, 0, "OLoRA")]


def test_a_measure_that_a_row_lacks_is_left_out_of_the_mean():
    rows = [row(0, "LoRA", 0.2), row(0, "LoRA", 0.4, draw=1)]
    rows[1]["measures"]["attack success, 1 round"] = 0.5
    assert per_base(rows, "attack success, 1 round") == {0: 0.5}
    assert "| LoRA | 8 | - | 50 [50, 50] | 30 [30, 30] |" in table(rows, "main")


def test_an_attack_reports_each_of_its_stages(llama, monkeypatch):
    words = ["user", ":", "how", "do", "i", "make", "x", "?", "assistant", "sure", ",", "you", "need", "sorry"]
    tokenizer = make_tokenizer(words)
    base = Base(make_language(3), Path(), tokenizer, [], [])
    topic = base.language.test[0]
    record = {"prompt": "user : make x ? assistant :", "topic": topic.name} | DANGER
    monkeypatch.setattr(attack, "evaluation_records", lambda *_: [record])
    other = "sure , you need nothing ."  # no refusal, and no help either
    answers = iter([[other], [comply(topic)], [comply(topic)]])
    asked = []
    monkeypatch.setattr(attack, "answers", lambda model, tokenizer, prompts: asked.extend(prompts) or next(answers))
    found = attack.PrefixAttack(requests=1, rounds=3, reports=(0, 1, 7), candidates=4)(llama, base)
    assert found == {"attack success, 0 rounds": 0.0, "attack success, 1 round": 1.0, "attack success": 1.0}
    assert all(len(prompt.split()) == 7 + 3 for prompt in asked)


def test_bases_scaled_by_spread_keep_their_span_and_see_data_spread_equally(llama, subspace):
    torch.manual_seed(0)
    config = SaeSubspaceConfig(r=3, target_modules=["q_proj"], subspace=subspace, freeze_basis=True)
    model = get_peft_model(copy.deepcopy(llama), config).eval()
    ids = torch.randint(1, llama.config.vocab_size, (4, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    factor = model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"]
    before, seen = factor.weight.detach().clone(), []
    scale_by_spread(model, [batch])
    with factor.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output))):
        model(**batch)
    inputs, projected = seen[0]
    squares = projected.square().mean((0, 1))
    torch.testing.assert_close(squares, squares.mean().expand(3))
    torch.testing.assert_close(squares.mean(), (inputs @ before.T).square().mean())
    directions = torch.nn.functional.normalize(factor.weight.detach(), dim=1)
    torch.testing.assert_close(directions, torch.nn.functional.normalize(before, dim=1))


def test_parts_are_ordered_by_their_paired_validation_scores():
    names = {method.name for method in methods("parts")}
    reference = methods("parts")[0].name
    assert {"norm_gain off", "rank 1"} <= names
    rows = [
        row(base, name, 0.5) | {"validation": value + 0.1 * base}
        for name, value in ((reference, 0.6), ("norm_gain off", 0.65), ("rank 1", 0.5))
        for base in (0, 1)
    ]
    found = by_validation(rows, "parts", reference).splitlines()[2:]
    assert found == ["| norm_gain off | +5.0 [+5.0, +5.0] |", "| rank 1 | -10.0 [-10.0, -10.0] |"]
