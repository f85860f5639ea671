"""A small tokenizer with the special tokens of the model families whose templates are tested."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = ["smollm2", "llama3", "qwen2_5", "qwen3", "mistral", "gemma", "phi3"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>",
           "<|end|>"]  # fmt: skip
TEXT = ["What is the sum of twelve and thirty-four? It is forty-six.\n\nAnd then? Nothing more.\n\n\n"] * 3
EOS = {"smollm2": "<|im_end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>"}


def build_tokenizer(family=None, bos=False, eos=False, vocab_size=400):
    """Byte-level BPE; `family`: with that template and EOS; `bos`, `eos`: plain text gets them, as Llama's does."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=EOS.get(family, "</s>"))
    if family:
        tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    return tokenizer
