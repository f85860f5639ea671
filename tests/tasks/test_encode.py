"""Encoding: the boundary, BOS and EOS, truncation, and the cache."""

import errno
import multiprocessing
import warnings

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from neuroada.errors import UserError
from neuroada.tasks.encode import encode, encode_prompts, tokenizer_fingerprint
from neuroada.tasks.table import get_task

ARITHMETIC = get_task("arithmetic")
TEXT = ["State the final answer to the following arithmetic problem: 12 + 34 = the correct answer is answer2"] * 3


def build(bos=False, eos=False, pad="<eos>", vocab_size=300):
    """A byte-level BPE whose pad token is its EOS, like SmolLM2's; with `bos` or `eos` it adds them, like Llama's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    if bos or eos:
        single = f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token=pad)


def problem(instruction, answer):
    return {"instruction": instruction, "input": "", "output": answer, "answer": answer}


PROBLEMS = [problem("1 + 2 =", "3"), problem("The sum 12 + 34 =", "46"), problem("5 - 9 =", "-4")]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_prompt_answer_and_one_eos(bos, eos):
    tokenizer = build(bos, eos)
    encoded = encode(PROBLEMS, ARITHMETIC, tokenizer, 512)
    assert len(encoded) == 3
    for i, example in enumerate(PROBLEMS):
        tokens, start = encoded.tokens(i), encoded.answer_start(i)
        prefix = "<bos>" if bos else ""
        assert tokenizer.decode(tokens[:start]) == prefix + ARITHMETIC.prompt(example)
        assert tokenizer.decode(tokens[start:]) == ARITHMETIC.target(example) + "<eos>"
        assert (tokens == tokenizer.eos_token_id).sum() == 1
        assert tokens[:start].tolist() == encode_prompts([ARITHMETIC.prompt(example)], tokenizer)[0]
    assert (encoded.truncated, encoded.dropped) == (0, 0)


def test_equals_tokenising_the_whole_text():
    tokenizer = build(bos=True)
    encoded = encode(PROBLEMS, ARITHMETIC, tokenizer, 512)
    for i, example in enumerate(PROBLEMS):
        whole = tokenizer(ARITHMETIC.prompt(example) + ARITHMETIC.target(example) + "<eos>")["input_ids"]
        assert encoded.tokens(i).tolist() == whole


def test_arrays():
    encoded = encode(PROBLEMS, ARITHMETIC, build(), 512)
    assert encoded.flat.dtype == np.int32
    assert encoded.lengths.tolist() == [len(encoded.tokens(i)) for i in range(3)]
    assert encoded.num_answer_tokens.tolist() == [len(encoded.tokens(i)) - encoded.answer_start(i) for i in range(3)]
    assert encoded.lengths.sum() == len(encoded.flat)
    assert encoded.rows.tolist() == [0, 1, 2]


def test_more_examples_than_one_batch_of_the_tokenizer():
    many = [problem(f"{i} + 1 =", str(i + 1)) for i in range(5000)]
    tokenizer = build()
    encoded = encode(many, ARITHMETIC, tokenizer, 512)
    assert encoded.rows.tolist() == list(range(5000))
    assert tokenizer.decode(encoded.tokens(4321)) == "4321 + 1 =\n4322<eos>"


def test_a_token_across_the_boundary_is_split():
    from dataclasses import replace

    tokenizer = build(bos=True)
    task = replace(ARITHMETIC, prompt=lambda example: "the cor", target=lambda example: "rect answer")
    whole = tokenizer("the correct answer")["input_ids"]
    prompt = tokenizer("the cor")["input_ids"]
    assert whole[: len(prompt)] != prompt  # or this test shows nothing
    encoded = encode(PROBLEMS[:1], task, tokenizer, 512)
    assert encoded.tokens(0)[: encoded.answer_start(0)].tolist() == prompt
    assert tokenizer.decode(encoded.tokens(0)) == "<bos>the correct answer<eos>"


def test_an_eos_in_the_target_is_not_doubled():
    tokenizer = build(eos=True)
    encoded = encode([problem("1 + 2 =", "3<eos>")], ARITHMETIC, tokenizer, 512)
    assert (encoded.tokens(0) == tokenizer.eos_token_id).sum() == 1


def test_truncation_is_counted_and_an_answer_wholly_cut_is_dropped():
    tokenizer = build()
    full = encode(PROBLEMS, ARITHMETIC, tokenizer, 512)
    longest = int(full.lengths.max())
    assert full.lengths.argmax() == 1
    cut = encode(PROBLEMS, ARITHMETIC, tokenizer, longest - 1)
    assert (cut.truncated, cut.dropped, len(cut)) == (1, 0, 3)
    assert cut.tokens(1).tolist() == full.tokens(1)[:-1].tolist()
    assert "1 answers cut" in str(cut)

    one_left = encode(PROBLEMS, ARITHMETIC, tokenizer, full.answer_start(1) + 1)
    assert (one_left.dropped, one_left.num_answer_tokens.min()) == (0, 1)
    dropped = encode(PROBLEMS, ARITHMETIC, tokenizer, full.answer_start(1))
    assert (dropped.dropped, dropped.rows.tolist()) == (1, [0, 2])
    assert dropped.tokens(1).tolist() == full.tokens(2).tolist()
    assert "1 examples dropped" in str(dropped)
    with pytest.raises(UserError, match="max_length: 2 leaves no room"):
        encode(PROBLEMS, ARITHMETIC, tokenizer, 2)


def test_no_eos():
    tokenizer = build(pad=None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        encode(PROBLEMS, ARITHMETIC, tokenizer, 512)


# ---- the cache


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, 0

    def __call__(self, text, **options):
        self.texts += len(text) if isinstance(text, list) else 0
        return self.tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def same(a, b):
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
        for name in ("flat", "offsets", "prompt_lengths", "rows")
    )
    return arrays and (a.truncated, a.dropped) == (b.truncated, b.dropped)


def test_cache_tokenises_once(tmp_path):
    tokenizer = Counting(build())
    fresh = encode(PROBLEMS, ARITHMETIC, tokenizer, 12, tmp_path / "cache")
    texts = tokenizer.texts
    again = encode(PROBLEMS, ARITHMETIC, tokenizer, 12, tmp_path / "cache")
    assert tokenizer.texts == texts > 0
    assert same(fresh, again)
    assert same(fresh, encode(PROBLEMS, ARITHMETIC, build(), 12))
    assert fresh.truncated + fresh.dropped > 0  # the counts travel too
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_cache_knows_what_decides(tmp_path):
    from dataclasses import replace

    variants = [
        (PROBLEMS, ARITHMETIC, build(), 512),
        (PROBLEMS[:2], ARITHMETIC, build(), 512),
        (PROBLEMS, get_task("math"), build(), 512),
        (PROBLEMS, replace(ARITHMETIC, prompt=lambda example: example["instruction"] + " "), build(), 512),
        (PROBLEMS, ARITHMETIC, build(bos=True), 512),
        (PROBLEMS, ARITHMETIC, build(vocab_size=280), 512),
        (PROBLEMS, ARITHMETIC, build(), 511),
    ]
    for number, variant in enumerate(variants, 1):
        encode(*variant, tmp_path)
        assert len(list(tmp_path.iterdir())) == number


def test_fingerprint_ignores_padding_and_truncation_in_use():
    tokenizer = build()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(TEXT, padding="max_length", truncation=True, max_length=7)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_fingerprint(tokenizer) == before


def test_padding_and_truncation_in_use_do_not_reach_the_encoding():
    tokenizer = build()
    expected = encode(PROBLEMS, ARITHMETIC, build(), 512)
    tokenizer(TEXT, padding="max_length", truncation=True, max_length=7)
    assert same(encode(PROBLEMS, ARITHMETIC, tokenizer, 512), expected)


def _encode_into(folder):
    encode(PROBLEMS, ARITHMETIC, build(), 512, folder)


def test_several_processes_at_once(tmp_path):
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_encode_into, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 1
    assert same(encode(PROBLEMS, ARITHMETIC, build(), 512, tmp_path), encode(PROBLEMS, ARITHMETIC, build(), 512))


@pytest.mark.parametrize("kind", ["a file", "no permission"])
def test_goes_on_without_a_cache_where_it_cannot_be_written(tmp_path, monkeypatch, kind):
    folder = tmp_path / "cache"
    if kind == "a file":
        folder.write_text("")
    else:  # root, as whom tests may run, is refused nothing

        def refuse(*arguments, **options):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("neuroada.files.atomic.os.open", refuse)
    with pytest.warns(UserWarning, match="going on without a token cache: .*"):
        encoded = encode(PROBLEMS, ARITHMETIC, build(), 512, folder)
    assert same(encoded, encode(PROBLEMS, ARITHMETIC, build(), 512))
    assert kind == "a file" or list(folder.iterdir()) == []


def test_a_damaged_cache_is_written_again(tmp_path):
    fresh = encode(PROBLEMS, ARITHMETIC, build(), 512)
    encode(PROBLEMS, ARITHMETIC, build(), 512, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of one token
    with pytest.warns(UserWarning, match="the token cache is written again"):
        assert same(encode(PROBLEMS, ARITHMETIC, build(), 512, tmp_path), fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(encode(PROBLEMS, ARITHMETIC, build(), 512, tmp_path), fresh)
