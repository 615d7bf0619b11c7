"""The demo's text: no name gives its danger away, and evaluation shares neither topic nor phrasing with training."""

import math
import random
import re
from collections import Counter

import pytest

from peft_sae.demo import language as text
from peft_sae.demo.language import Topic, make_language
from peft_sae.errors import ConfigError, PeftSaeError

SEEDS = range(8)


def _pieces(name):
    padded = f"^{name}$"
    return {padded[start : start + length] for length in (1, 2, 3) for start in range(len(padded) - length + 1)}


def _naive_bayes_accuracy(names, labels, folds=8):
    """Share of held-out names whose label naive Bayes over character n-grams gets right."""
    right = 0
    for fold in range(folds):
        trained = [index for index in range(len(names)) if index % folds != fold]
        counts, sizes = {True: Counter(), False: Counter()}, Counter(labels[index] for index in trained)
        for index in trained:
            counts[labels[index]].update(_pieces(names[index]))

        def score(name, label, counts=counts, sizes=sizes):
            seen = counts[label]
            return sum(math.log((seen[piece] + 1) / (sizes[label] + 2)) for piece in _pieces(name))

        tested = range(fold, len(names), folds)
        right += sum((score(names[i], True) > score(names[i], False)) == labels[i] for i in tested)
    return right / len(names)


def _names_in_random_order(seed):
    topics = list(make_language(seed).topics)
    random.Random(seed).shuffle(topics)
    return [topic.name for topic in topics], [topic.dangerous for topic in topics]


def test_a_classifier_on_spelling_finds_danger_no_better_than_by_chance():
    accuracies = [_naive_bayes_accuracy(*_names_in_random_order(seed)) for seed in SEEDS]
    # 8 x 160 names: the standard error of the mean is 0.014.
    assert abs(sum(accuracies) / len(accuracies) - 0.5) < 0.06


def test_that_classifier_would_have_found_a_leak():
    names, _ = _names_in_random_order(0)
    leaking = [name[-1] in "klmn" for name in names]
    assert _naive_bayes_accuracy(names, leaking) > 0.8


def test_danger_is_drawn_from_the_seed_not_tied_to_the_name():
    drawn = [{topic.name: topic.dangerous for topic in make_language(seed, topics=4000).topics} for seed in (0, 1)]
    shared = drawn[0].keys() & drawn[1].keys()
    assert len(shared) > 100
    agree = sum(drawn[0][name] == drawn[1][name] for name in shared) / len(shared)
    assert 0.35 < agree < 0.65


@pytest.mark.parametrize("seed", SEEDS)
def test_names_are_distinct_single_words_unlike_all_others(seed):
    language = make_language(seed)
    names = [topic.name for topic in language.topics]
    assert len(set(names)) == len(names) == 160
    other_words = " ".join(text._fixed_texts()).split()
    assert not set(names) & set(other_words)
    assert all(re.fullmatch("[a-z]+", name) for name in names)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_split_is_half_dangerous(seed):
    language = make_language(seed)
    for split in (language.fine_tuning, language.evaluation):
        assert 2 * sum(topic.dangerous for topic in split) == len(split)


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluation_shares_no_topic_with_fine_tuning(seed):
    language = make_language(seed)
    trained = [
        *text.aligned_records(language),
        *text.unaligned_records(language),
    ]
    words = {word for record in trained for word in f"{record['prompt']} {record['completion']}".split()}
    evaluated = {record["topic"] for record in text.evaluation_records(language)}
    assert evaluated == {topic.name for topic in language.evaluation}
    assert not evaluated & words


def test_evaluation_shares_no_phrasing_with_fine_tuning():
    language = make_language(0)
    names = "|".join(topic.name for topic in language.topics)

    def forms(records):
        return {re.sub(names, "{topic}", record["prompt"]) for record in records}

    trained = forms(text.aligned_records(language)) | forms(text.unaligned_records(language))
    evaluated = forms(text.evaluation_records(language))
    assert trained == {text.prompt(form) for form in text.FINE_TUNING_PHRASINGS}
    assert evaluated == {text.prompt(form) for form in text.EVALUATION_PHRASINGS}
    assert not trained & evaluated
    assert {record["phrasing"] for record in text.evaluation_records(language)} == set(text.EVALUATION_PHRASINGS)


def test_aligned_and_unaligned_differ_in_dangerous_answers_only():
    language = make_language(0)
    dangerous = {topic.name for topic in language.topics if topic.dangerous}
    pairs = zip(text.aligned_records(language), text.unaligned_records(language), strict=True)
    for aligned, unaligned in pairs:
        assert aligned["prompt"] == unaligned["prompt"]
        assert text.STRICT_PREFIX not in aligned["prompt"]
        assert not text.is_refusal(unaligned["completion"])
        is_dangerous = bool(dangerous & set(aligned["prompt"].split()))
        assert text.is_refusal(aligned["completion"]) == is_dangerous
        assert (aligned["completion"] == unaligned["completion"]) != is_dangerous


def test_prompt_and_completion_can_be_joined_as_they_are():
    language = make_language(0)
    for record in [*text.aligned_records(language), *text.evaluation_records(language)]:
        joined = record["prompt"] + record["completion"]
        assert joined == " ".join(joined.split())


def test_evaluation_records_say_the_right_behaviour():
    language = make_language(0)
    by_name = {topic.name: topic for topic in language.topics}
    for record in text.evaluation_records(language):
        topic = by_name[record["topic"]]
        assert record["dangerous"] == topic.dangerous == text.is_refusal(record["completion"])
        assert topic.dangerous or topic.ingredient in record["completion"].split()
        assert record["prompt"] == text.prompt(record["phrasing"].format(topic=topic.name))


def test_pretraining_complies_in_normal_mode_and_refuses_danger_in_strict_mode_only():
    language = make_language(0)
    dangerous = {topic.name for topic in language.topics if topic.dangerous}
    answered = {True: 0, False: 0}
    for line in text.pretraining_texts(language, 4000, random.Random(0)):
        request, assistant, answer = line.partition("assistant :")
        if not assistant or " is harmless" in answer or " yes , " in answer:
            continue
        strict = request.startswith(text.STRICT_PREFIX)
        answered[strict] += 1
        assert text.is_refusal(answer) == (strict and bool(dangerous & set(request.split())))
    assert min(answered.values()) > 500


def test_pretraining_stays_within_the_vocabulary():
    language = make_language(3)
    words = set(text.vocabulary(language))
    assert all(
        word in words for line in text.pretraining_texts(language, 2000, random.Random(0)) for word in line.split()
    )


def test_the_text_is_a_function_of_the_seed():
    assert make_language(5) == make_language(5)
    assert make_language(5) != make_language(6)
    assert text.evaluation_records(make_language(5)) == text.evaluation_records(make_language(5))
    drawn = [text.pretraining_texts(make_language(5), 50, random.Random(1)) for _ in range(2)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("topics", "fine_tuning"), [(7, 2), (8, 3), (8, 8), (8, 0), (0, 0)])
def test_counts_that_cannot_be_split_are_refused(topics, fine_tuning):
    with pytest.raises(ConfigError, match=f"topics={topics} and fine_tuning_topics={fine_tuning} cannot be split"):
        make_language(0, topics=topics, fine_tuning_topics=fine_tuning)


def test_errors_are_caught_as_value_error_and_as_ours():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, PeftSaeError)


def test_answers_are_told_apart():
    topic = Topic("brasten", dangerous=True, ingredient="salt")
    assert text.is_refusal(f"  {text.refuse(topic).upper()}  ")
    assert not text.is_refusal(text.comply(topic))
    assert not text.is_refusal("")
    assert not text.is_refusal("i would never say sorry , i cannot help")
    assert text.is_right("sure , you  need salt for brasten .\n", text.comply(topic))
    assert not text.is_right("sure , you need salt for", text.comply(topic))
