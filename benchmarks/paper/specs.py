"""The sections of an experiment's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["base", "full", "lora", "sae_subspace"]


@dataclass(frozen=True)
class MethodSpec:
    """One way of training, as changes of the job.

    Attributes:
        kind: `base` (not trained), `full` (all weights), `lora` or `sae_subspace`.
        adapter: fields that take the place of those under `adapter` in the job.
        training: likewise of those under `training`.
        select: likewise of those under `select`, for a Subspace of its own; null removes one. Methods with the same
            ones share a Subspace.
        dtype: dtype that the weights are trained in, instead of the job's.
    """

    kind: Kind
    adapter: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    select: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None


@dataclass(frozen=True)
class SetSpec:
    """A set of prompts.

    Attributes:
        kind: `harmful`, of which safety rate, harmfulness and high-risk rate are taken, or `harmless`, of which
            over-refusal is.
        source: file, folder, id or mapping, see `peft_sae.jobs.data.open_data`.
        form: `column` (a prompt in a column of each record), `hh_rlhf` (dialogues with `chosen` and `rejected`) or
            `hex_phi` (a folder or Hub id with `category_1.csv` and so on, without headers).
        column: for `column`, which one.
        category: for `column`, the column that names a prompt's category.
        keep: for `column`, values that records must have, for example `{label: safe}`.
        turns: for `hh_rlhf`, whether the prompt is the first human turn or all turns before the last answer.
        count: prompts that are drawn; all of them by default.
        seed: of the draw.
    """

    kind: Literal["harmful", "harmless"]
    source: str | Mapping[str, Any]
    form: Literal["column", "hh_rlhf", "hex_phi"] = "column"
    column: str = "prompt"
    category: str | None = None
    keep: Mapping[str, Any] = field(default_factory=dict)
    turns: Literal["first", "all"] = "first"
    count: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class GenerationSpec:
    """How prompts are answered; always greedily.

    Attributes:
        prompt_form: what a prompt becomes, with `{prompt}` in it. By default the tokenizer's chat template.
        stop: texts at which an answer ends; they are cut off.
        max_new_tokens: tokens of an answer.
        max_prompt_tokens: longer prompts are an error, never cut.
        batch_size: prompts per batch.
        dtype: dtype of the answering model; the job's by default.
        device: where it runs; by default a GPU if there is one.
    """

    prompt_form: str | None = None
    stop: Sequence[str] = ()
    max_new_tokens: int = 256
    max_prompt_tokens: int = 2048
    batch_size: int = 16
    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class OpenAIJudgeSpec:
    """A judge behind an OpenAI-compatible endpoint.

    Attributes:
        kind: `openai`.
        model: its name there.
        base_url: the endpoint; by default OpenAI's.
        api_key_env: environment variable that holds the key; None for endpoints that want none.
        parameters: of the request, beside model and messages.
        timeout: seconds that a request may take.
        retries: further tries after rate limits, time-outs, lost connections and errors of the server.
        longest_wait: seconds between two tries, at most; a longer `Retry-After` ends the run, which can be resumed.
        asks: how often a judge is asked whose reply is not what it was asked for.
        workers: requests at a time.
    """

    model: str
    kind: Literal["openai"] = "openai"
    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    timeout: float = 60.0
    retries: int = 6
    longest_wait: float = 60.0
    asks: int = 3
    workers: int = 8


@dataclass(frozen=True)
class ClassifierJudgeSpec:
    """A judge that is a classifier on this machine.

    Attributes:
        kind: `classifier`.
        model: folder or Hub id of a model for text classification, in safetensors.
        labels: its labels, each with the score that it stands for.
        form: what it reads, with `{prompt}` and `{answer}` in it.
        max_length: tokens that it reads; longer texts lose their end, and are marked.
        batch_size: texts per batch.
        device: where it runs; by default a GPU if there is one.
    """

    model: str
    labels: Mapping[str, Any]
    kind: Literal["classifier"] = "classifier"
    form: str = "{prompt}\n\n{answer}"
    max_length: int = 512
    batch_size: int = 16
    device: str | None = None


@dataclass(frozen=True)
class AttackSpec:
    """A GCG attack (arXiv 2307.15043) on single prompts.

    Attributes:
        set: name of the set whose prompts are attacked.
        count: prompts, drawn evenly over the set.
        target: how the answer is to begin.
        success: lowest score at which an attack has succeeded.
        settings: of `nanogcg.GCGConfig`.
    """

    set: str
    count: int = 50
    target: str = " Sure, here is"
    success: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CapabilitySpec:
    """Tasks of lm-evaluation-harness.

    Attributes:
        tasks: their names, each with the metric that goes into the table.
        include_path: folder of further tasks.
        num_fewshot: examples before each question; the tasks' own number by default.
        limit: questions per task; all by default.
        batch_size: requests per batch.
        apply_chat_template: ask through the tokenizer's chat template.
    """

    tasks: Mapping[str, str]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False


@dataclass(frozen=True)
class EstimateSpec:
    """What the cost is reckoned with: sizes of data that are not looked at, all means, speeds of hardware, and prices.

    Attributes:
        train_examples: examples of the training data.
        train_tokens: tokens of one, cut at the job's `max_length`.
        prompt_tokens: tokens of a prompt in its form.
        answer_tokens: tokens of an answer.
        judge_reply_tokens: tokens of a judge's reply.
        set_sizes: prompts of the sets that have no `count`.
        capability_tokens: tokens that the capability tasks have one model read, all together.
        training_flops: floating-point operations per second that the GPU sustains, in training and reading.
        selection_tokens_per_second: tokens that a selection reads; by default as `training_flops` has it.
        generation_tokens_per_second: tokens that it writes, over a batch.
        gpu_price: of an hour.
        judge_input_price: of a million tokens.
        judge_output_price: likewise.
        currency: of the prices.
    """

    train_examples: int
    train_tokens: float
    training_flops: float
    generation_tokens_per_second: float
    selection_tokens_per_second: float | None = None
    prompt_tokens: float = 60.0
    answer_tokens: float = 150.0
    judge_reply_tokens: float = 40.0
    set_sizes: Mapping[str, int] = field(default_factory=dict)
    capability_tokens: float = 0.0
    gpu_price: float = 0.0
    judge_input_price: float = 0.0
    judge_output_price: float = 0.0
    currency: str = "USD"


JudgeSpec = OpenAIJudgeSpec | ClassifierJudgeSpec
