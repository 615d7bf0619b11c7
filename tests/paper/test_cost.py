"""The estimate against arithmetic by hand."""

from dataclasses import replace

import pytest

pytest.importorskip("openai", reason="the extra 'paper' is not installed")

from benchmarks.paper.cost import CostRow, cost_table, estimate_cost, training_steps
from benchmarks.paper.experiment import read_experiment
from benchmarks.paper.judging import RUBRICS
from benchmarks.paper.shapes import shape_of
from benchmarks.paper.specs import ClassifierJudgeSpec
from peft_sae.errors import ConfigError
from tests.paper.conftest import EXPERIMENTS, estimate_of

# Gemma-2-2B: per block q 2304 x 2048, k and v 2304 x 1024, o 2048 x 2304, three of 2304 x 9216; the head is the
# embedding, 256000 x 2304; four norms per block and one at the end.
BLOCK = 2304 * 2048 * 2 + 2304 * 1024 * 2 + 3 * 2304 * 9216
MULTIPLIED = 26 * BLOCK + 256000 * 2304
PARAMETERS = MULTIPLIED + (26 * 4 + 1) * 2304


@pytest.fixture(scope="module")
def gemma():
    return read_experiment(EXPERIMENTS[0])


@pytest.fixture(scope="module")
def rows():
    return {f"{row.stage} {row.what}": row for row in estimate_of(EXPERIMENTS[0])}


def test_the_shape_is_gemmas(gemma):
    found = shape_of(gemma.job)
    assert (found.parameters, found.multiplied, found.bytes_each) == (PARAMETERS, MULTIPLIED, 2)
    assert PARAMETERS == 2_614_341_888


def test_training(gemma, rows):
    assert training_steps(gemma, "lora") == 160_800 // (4 * 8) == 5025
    tokens = 160_800 * 200
    lora, full = rows["train lora: 5,025 steps"], rows["train full: 5,025 steps"]
    assert lora.tokens == full.tokens == tokens
    # Forward twice (checkpointing), back to the activations, and to the weights where they are trained.
    assert lora.gpu_hours == pytest.approx((2 + 2 + 2) * MULTIPLIED * tokens / 1.9e14 / 3600)
    assert full.gpu_hours == pytest.approx((2 + 2 + 2 + 2) * MULTIPLIED * tokens / 1.9e14 / 3600)
    assert lora.price == pytest.approx(3 * lora.gpu_hours)
    per_block = 32 * (2304 + 2048) + 32 * (2304 + 1024)  # q and v
    assert lora.disk == 26 * per_block * 4 * 3 * 2  # float32: weights and two moments in each of two checkpoints
    assert full.disk == PARAMETERS * 4 * 3 * 2
    assert rows["train sae-subspace: 5,025 steps"].disk == lora.disk
    assert full.memory == 16 * PARAMETERS  # float32: weights, gradients, two moments
    assert rows["train Subspace of sae-requests-frozen: 80 requests read"].tokens == 80 * 40
    assert lora.memory == rows["train sae-subspace: 5,025 steps"].memory
    both = rows["train Subspace: both answers read"]
    assert (both.tokens, both.gpu_hours) == (2 * tokens, pytest.approx(2 * tokens / 19000 / 3600))


def test_answers_and_judge(rows):
    answers = 8 * (1000 + 300 + 250)
    made = rows["generate 12,400 answers"]
    assert made.tokens == answers * (40 + 120)
    assert made.gpu_hours == pytest.approx((2 * MULTIPLIED * answers * 40 / 1.9e14 + answers * 120 / 2000) / 3600)
    judged = rows["judge hex-phi: 2,400 answers"]
    read, written = 2400 * (len(RUBRICS["harmful"]) / 4 + 40 + 120), 2400 * 40
    assert judged.tokens == read + written
    assert judged.price == pytest.approx((read * 0.4 + written * 1.6) / 1e6)
    assert judged.gpu_hours == 0


def test_attack_and_capability(rows):
    length = 40 + 20 + 8
    found = rows["attack GCG: 400 suffixes"]
    assert found.tokens == 400 * 250 * 256 * length
    flops = 2 * MULTIPLIED * found.tokens + 4 * MULTIPLIED * 400 * 250 * length
    assert found.gpu_hours == pytest.approx(flops / 1.9e14 / 3600)
    assert rows["attack attacked: 400 answers"].price > 0
    assert rows["capability 5 tasks"].gpu_hours == pytest.approx(2 * MULTIPLIED * 8 * 9e6 / 1.9e14 / 3600)


def test_the_table_adds_up(gemma, rows):
    text = cost_table(gemma, [CostRow("a", "b", 1e6, 2.0, 3.0, 4e9, 5e9), CostRow("c", "d", 1e6, 1.0, 1.5, 1e9)])
    assert "| total |  | 2.00 | 3.00 | 4.50 | 5.00 | 5.0 |" in text
    assert "nothing was loaded or fetched" in cost_table(gemma, list(rows.values()))


def test_max_steps_epochs_and_a_size_that_nobody_knows(gemma):
    lora = gemma.methods["lora"]
    for training, steps in (({"max_steps": 7}, 7), ({"num_train_epochs": 0.5}, 2513)):
        changed = replace(gemma, methods={"lora": replace(lora, training=training)})
        assert training_steps(changed, "lora") == steps
    with pytest.raises(ConfigError, match=r"'hex-phi' has no count, and estimate\.set_sizes"):
        estimate_cost(replace(gemma, methods={}, estimate=replace(gemma.estimate, set_sizes={"xstest": 250})))


def test_a_classifier_costs_no_tokens(gemma):
    judge = ClassifierJudgeSpec(model="some/one", labels={"a": 1})
    found = estimate_cost(replace(gemma, methods={"base": gemma.methods["base"]}, judge=judge))
    assert {row.price for row in found if row.stage == "judge"} == {0.0}


@pytest.mark.parametrize("path", EXPERIMENTS[1:], ids=lambda path: path.stem)
def test_the_other_shapes(path):
    found = shape_of(read_experiment(path).job)
    assert found.parameters == {"gemma-2-9b": 9_241_705_984, "llama-3.1-8b": 8_030_261_248}[path.stem]
