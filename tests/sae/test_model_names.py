import pytest

from peft_sae.sae.model_names import is_other_model


@pytest.mark.parametrize(
    ("trained_on", "model_type", "name"),
    [
        ("gpt2-small", "gpt2", "openai-community/gpt2"),
        ("pythia-70m-deduped", "gpt_neox", "EleutherAI/pythia-70m-deduped"),
        ("pythia-70m-deduped", "gpt_neox", "/runs/7/model"),
        ("gemma-2-2b", "gemma2", "google/gemma-2-2b-it"),
        ("google/gemma-2-2b", "gemma2", "/data/model"),
        ("google/gemma-3-1b-pt", "gemma3_text", "google/gemma-3-1b-it"),
        ("meta-llama/Llama-3.1-8B", "llama", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3.1-8B", "llama", "C:\\models\\llama-3-1-8b-4bit"),
        ("meta-llama/Llama-3.1-8B", "llama", ""),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama", "unsloth/DeepSeek-R1-Distill-Llama-8B"),
        ("mistral-7b", "mistral", "mistralai/Mistral-7B-v0.1"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2", "/data/model"),
        ("Qwen/Qwen3-30B-A3B-Base", "qwen3_moe", ""),
        ("microsoft/phi-4", "phi3", "microsoft/phi-4"),
        ("my-own-model", "llama", "other"),
    ],
)
def test_names_of_the_same_model_raise_no_alarm(trained_on, model_type, name):
    assert not is_other_model(trained_on, model_type=model_type, name=name)


@pytest.mark.parametrize(
    ("trained_on", "model_type", "name"),
    [
        ("gemma-2-2b", "gemma3_text", "google/gemma-3-1b-it"),
        ("gemma-2b", "gemma2", "google/gemma-2-2b"),
        ("gemma-2b-it", "llama", "my-it"),
        ("meta-llama/Llama-3.1-8B", "gemma2", "google/gemma-2-2b"),
        ("meta-llama/Llama-3.1-8B", "llama", "meta-llama/Meta-Llama-3-8B"),
        ("mistral-7b", "llama", "meta-llama/Llama-3.1-8B"),
        ("gpt2-small", "gpt_neox", "EleutherAI/pythia-160m"),
        ("pythia-160m", "gpt2", "gpt2"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2", "Qwen/Qwen2-7B-Instruct"),
        ("google/gemma-2-2b", "llama", ""),
    ],
)
def test_names_of_other_models_are_noticed(trained_on, model_type, name):
    assert is_other_model(trained_on, model_type=model_type, name=name)
