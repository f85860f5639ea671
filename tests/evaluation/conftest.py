"""A random 2-layer Llama with a byte-level tokenizer, and small test sets, all made here."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["Tom has 3 apples and buys 4 more.", "the correct answer is true", "### Instruction:\n### Response:\n"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens; no BOS, and no pad token (as Llama-3)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """Weights far from zero, so that a greedy step depends on the whole prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=768,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def questions(n: int) -> list[dict[str, str]]:
    """LLM-Adapters' rows, of clearly different lengths."""
    return [
        {
            "instruction": f"Tom has {i} apples and buys {i % 7} more." + " How many?" * (i * 5 % 7),
            "input": "",
            "output": f"{i + i % 7}",
            "answer": f"{i + i % 7}",
        }
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AddSub with 24 questions, 6 of them in math_10k; boolq with 30, whose training set is absent."""
    folder = tmp_path_factory.mktemp("data")
    boolq = [
        {
            "instruction": f"Please answer the following question with true or false, question: is {i} odd?",
            "input": "",
            "output": f"the correct answer is {'true' if i % 3 else 'false'}",
            "answer": "true" if i % 3 else "false",
        }
        for i in range(30)
    ]
    for name, split, rows in (
        ("AddSub", "test", questions(24)),
        ("math_10k", "train", questions(40)[18:]),
        ("boolq", "test", boolq),
    ):
        (folder / name).mkdir()
        (folder / name / f"{split}.json").write_text(json.dumps(rows))
    return folder
