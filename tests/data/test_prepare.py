"""From recipes' `data:` to stores: length, cache, validation, bad rows, streams."""

import json
import multiprocessing
import os
import warnings

import numpy as np
import pytest
from chat_tokenizers import build_tokenizer
from pydantic import ValidationError

from neuroada.config.data import Data
from neuroada.data import encode_rows, prepare
from neuroada.errors import UserError


def chats(n, start=0):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": "Nothing. " * (i % 7 + 1)},
            ]
        }
        for i in range(start, start + n)
    ]


def pairs(n):
    return [{"prompt": f"What is {i}? ", "chosen": "Forty-six. " * (i % 3 + 1), "rejected": "No."} for i in range(n)]


def run(tmp_path, tokenizer, *paths, max_length=256, seed=0, needed=None, fill=False, **fields):
    datasets = [path if isinstance(path, dict) else {"path": path} for path in paths]
    data = Data.model_validate({"datasets": datasets, **fields})
    return prepare(data, tokenizer, max_length, seed, tmp_path / "cache", fill, needed)


def texts(data, tokenizer, items=None):
    items = range(len(data)) if items is None else items
    return [tokenizer.decode(one.ids) for item in items for one in data.sequences(int(item))]


def test_tokenised_once_and_mapped(tmp_path, tokenizer, write, monkeypatch):
    path = write(chats(50))
    first = run(tmp_path, tokenizer, path)
    monkeypatch.setattr("neuroada.data.encode_source.Encoder.encode", lambda *_: pytest.fail("tokenised again"))
    again = run(tmp_path, tokenizer, path)
    assert isinstance(again.stores[0].tokens, np.memmap)
    assert again.fingerprint == first.fingerprint
    assert texts(first.train, tokenizer) == texts(again.train, tokenizer)
    assert first.train.lengths.tolist() == [len(first.train.sequences(i)[0]) for i in range(50)]
    assert first.train.num_answer_tokens.tolist() == [int(first.train.sequences(i)[0].learnt.sum()) for i in range(50)]


@pytest.mark.parametrize("file", ["tokens", "learnt", "offsets", "learnt_counts", "rows", "facts.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_store_is_encoded_again(tmp_path, tokenizer, write, file, damage):
    path = write(chats(5))
    expected = texts(run(tmp_path, tokenizer, path).train, tokenizer)
    (part,) = (tmp_path / "cache").glob(f"*/{file}")
    whole = part.read_bytes()
    part.unlink()  # not in place: the arrays of the first run are mapped
    if damage != "missing":
        part.write_bytes(whole[:-3] if damage == "cut" else whole.replace(whole[8:9], bytes([whole[8] ^ 1]), 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = run(tmp_path, tokenizer, path)
    assert texts(again.train, tokenizer) == expected and part.read_bytes() == whole
    assert (file, damage) == ("facts.json", "missing") or "encoded again" in str(caught[0].message)


def test_what_a_killed_writer_left_is_removed(tmp_path, tokenizer, write):
    path = write(chats(3))
    run(tmp_path, tokenizer, path)
    (store,) = (folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir())
    (store / "facts.json").unlink()
    (tmp_path / "cache" / f".{store.name}.{'0' * 32}").mkdir()
    run(tmp_path, tokenizer, path)
    assert [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()] == [store]


@pytest.mark.parametrize(
    "change",
    [{"train_on": "last_assistant"}, {"train_on_eos": "none"}, {"excess_length": "truncate"}, {"max_length": 199}],
)
def test_what_decides_the_tokens_decides_the_cache(tmp_path, tokenizer, write, change):
    path = write(chats(3))
    run(tmp_path, tokenizer, path)
    run(tmp_path, tokenizer, path, **change)
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 2


def test_a_changed_file_or_template_is_encoded_anew(tmp_path, tokenizer, write):
    prints = [
        run(tmp_path, tokenizer, write(chats(3))).fingerprint,
        run(tmp_path, tokenizer, write(chats(4))).fingerprint,
    ]
    tokenizer.chat_template = tokenizer.chat_template.replace("named SmolLM", "named Smol")
    prints.append(run(tmp_path, tokenizer, write(chats(4))).fingerprint)
    assert len(set(prints)) == 3


def _prepare(tmp_path, path, results):
    results.put(run(tmp_path, build_tokenizer("smollm2"), path).train.lengths.sum())


def test_several_processes_at_once(tmp_path, write):
    path, context = write(chats(500)), multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_prepare, args=(tmp_path, path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    totals = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len(set(totals)) == 1
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 1


# ---- length


def test_excess_length(tmp_path, tokenizer, write):
    path = write(chats(14))
    whole = run(tmp_path, tokenizer, path).train
    limit = int(np.sort(whole.lengths)[7])
    longer = int((whole.lengths > limit).sum())
    dropped = run(tmp_path, tokenizer, path, max_length=limit)
    assert (len(dropped.train), dropped.stores[0].facts.dropped) == (
        14 - longer,
        {"longer than train.max_length": longer},
    )
    cut = run(tmp_path, tokenizer, path, max_length=limit, excess_length="truncate")
    assert (len(cut.train), cut.train.lengths.max(), cut.stores[0].facts.truncated) == (14, limit, longer)
    divided = run(tmp_path, tokenizer, path, max_length=limit, excess_length="split")
    assert divided.train.lengths.max() == limit and divided.stores[0].facts.split == longer
    assert divided.train.num_answer_tokens.sum() == whole.num_answer_tokens.sum()  # each token once
    with pytest.raises(UserError, match=r"row 4: \d+ tokens, more than train.max_length"):
        run(tmp_path, tokenizer, path, max_length=int(whole.lengths[3]) - 1, excess_length="error")


def test_nothing_fits(tmp_path, tokenizer, write):
    with pytest.raises(UserError, match=r"nothing is left to learn from .*3 longer than train.max_length"):
        run(tmp_path, tokenizer, write(chats(3)), max_length=8)
    with pytest.raises(UserError, match=r"3 nothing to learn within train.max_length"):
        run(tmp_path, tokenizer, write(chats(3)), max_length=8, excess_length="truncate")


def test_text_is_divided_into_full_windows_that_lose_nothing(tmp_path, write):
    tokenizer = build_tokenizer(bos=True)
    document = "What is the sum of twelve and thirty-four? It is forty-six.\n" * 40
    prepared = run(tmp_path, tokenizer, write([{"text": document}]), max_length=32)
    windows = [prepared.train.sequences(i)[0] for i in range(len(prepared.train))]
    whole = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    assert [len(window) for window in windows[:-1]] == [32] * (len(windows) - 1)
    joined = windows[0].ids.tolist() + [i for window in windows[1:] for i in window.ids[1:].tolist()]
    assert joined == whole
    assert prepared.train.num_answer_tokens.sum() == len(whole) - 1


# ---- several sources


def test_interleaved_by_weight(tmp_path, tokenizer, write):
    paths = [
        {"path": write(chats(40), "a.jsonl"), "weight": 3},
        {"path": write(chats(10, 100), "b.jsonl"), "weight": 1},
    ]
    train = run(tmp_path, tokenizer, *paths, mix="interleave").train
    batches = np.concatenate([train.batch(step, 16) for step in range(64)])
    assert (batches >= 40).sum() == 256  # exactly a quarter
    assert sorted(set(batches[batches >= 40])) == list(range(40, 50))
    assert "What is 100?" in texts(train, tokenizer, [40])[0]


def test_fill_packs_whole_examples(tmp_path, tokenizer, write):
    path = write(chats(60))
    single, filled = run(tmp_path, tokenizer, path).train, run(tmp_path, tokenizer, path, fill=True).train
    assert filled.lengths.max() <= 256 and filled.lengths.mean() > 0.9 * 256 * 0.9
    assert sorted(texts(single, tokenizer)) == sorted(texts(filled, tokenizer))
    assert filled.num_answer_tokens.sum() == single.num_answer_tokens.sum()


def test_preference_pairs(tmp_path, tokenizer, write):
    prepared = run(tmp_path, tokenizer, write(pairs(5)))
    assert prepared.pairs
    chosen, rejected = prepared.train.sequences(2)
    assert tokenizer.decode(chosen.ids[chosen.learnt]) == "Forty-six. " * 3 + "<|im_end|>"
    assert tokenizer.decode(rejected.ids[rejected.learnt]) == "No.<|im_end|>"
    assert prepared.train.lengths[2] == len(chosen) + len(rejected)


def test_unlike_formats_are_refused(tmp_path, tokenizer, write):
    with pytest.raises(UserError, match=r"b.jsonl holds preference pairs, .*a.jsonl is chat; train on them separately"):
        run(tmp_path, tokenizer, write(chats(3), "a.jsonl"), write(pairs(3), "b.jsonl"))
    with pytest.raises(UserError, match="cannot be divided"):
        run(tmp_path, tokenizer, write(pairs(3)), excess_length="split")
    with pytest.raises(UserError, match="answers are compared"):
        run(tmp_path, tokenizer, write(pairs(3)), train_on="all")


# ---- validation


def test_held_out_examples_are_not_trained_on(tmp_path, tokenizer, write):
    prepared = run(tmp_path, tokenizer, write(chats(40)), validation={"size": 8})
    train, held = texts(prepared.train, tokenizer), texts(prepared.validation, tokenizer)
    assert (len(train), len(held)) == (32, 8)
    assert not set(train) & set(held)
    other = run(tmp_path, tokenizer, write(chats(40)), validation={"size": 8}, seed=1)
    assert set(texts(other.validation, tokenizer)) != set(held)
    with pytest.raises(UserError, match="more than half of the 40 examples"):
        run(tmp_path, tokenizer, write(chats(40)), validation={"size": 21})


def test_validation_of_its_own(tmp_path, tokenizer, write):
    own = write(chats(9, 50), "own.jsonl")
    prepared = run(tmp_path, tokenizer, write(chats(5)), validation={"path": own})
    assert len(prepared.validation) == 9 and "What is 50?" in texts(prepared.validation, tokenizer)[0]
    prepared = run(tmp_path, tokenizer, write(chats(5)), validation={"path": own, "size": 4})
    assert len(prepared.validation) == 4


def test_several_processes_encode_the_same(tmp_path, tokenizer, write, monkeypatch):
    """To the byte, with what was left out; and of several wrong rows the first is told."""
    rows = chats(40)
    rows[20] = {"messages": [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "x"}]}
    for bad in (3, 22, 31):
        rows[bad] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}
    path = write(rows)
    monkeypatch.setattr(encode_rows, "CHUNK", 8)
    monkeypatch.setattr(encode_rows, "PART", 3)
    started, found = [], []
    way = encode_rows._in_processes
    monkeypatch.setattr(encode_rows, "_in_processes", lambda *asked: started.append(asked[2]) or way(*asked))
    for cpus in ({0}, {0, 1, 2}):
        monkeypatch.setattr(encode_rows.os, "sched_getaffinity", lambda _, cpus=cpus: cpus)
        prepared = run(tmp_path / str(len(cpus)), tokenizer, path, on_bad_row="skip")
        found.append(prepared.stores[0].facts)
    assert started == [3] and found[0] == found[1]
    assert (found[0].rows, found[0].skipped, sum(found[0].dropped.values())) == (40, 3, 1)
    rows[3] = rows[4]
    with pytest.raises(UserError, match=r"rows.jsonl, row 23: messages, turn 2: the assistant's turn is empty"):
        run(tmp_path / "again", tokenizer, write(rows))


def test_a_process_that_is_killed_is_told(tmp_path, tokenizer, write, monkeypatch):
    monkeypatch.setattr(encode_rows, "CHUNK", 8)
    monkeypatch.setattr(encode_rows.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(encode_rows, "_start", lambda encode: os._exit(1))
    with pytest.raises(UserError, match="a process that encodes rows was killed; see whether memory ran out"):
        run(tmp_path, tokenizer, write(chats(40)))


# ---- bad rows


def bad_file(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = [json.dumps(row) for row in chats(4)]
    empty = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]})
    path.write_text("\n".join([good[0], "{", empty, *good[1:], json.dumps({"messages": None})]))
    return str(path)


def test_a_bad_row_ends_the_run_by_file_row_and_key(tmp_path, tokenizer, write):
    with pytest.raises(UserError, match=r"bad.jsonl, row 2: not JSON at column"):
        run(tmp_path, tokenizer, bad_file(tmp_path))
    assert not [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]


def test_or_is_skipped_counted_and_listed(tmp_path, tokenizer):
    prepared = run(tmp_path, tokenizer, bad_file(tmp_path), on_bad_row="skip")
    facts = prepared.stores[0].facts
    assert (len(prepared.train), facts.rows, facts.skipped) == (4, 7, 3)
    assert [line.split("bad.jsonl, ")[1][:32] for line in facts.skipped_rows] == [
        "row 2: not JSON at column 2 (Exp",
        "row 3: messages, turn 2: the ass",
        "row 7: column 'messages' is miss",
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, None),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
                       {"role": "assistant", "content": "c"}]}, "row 2: the chat template fails: Conversation roles"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"},
                       {"role": "assistant", "content": "c"}]}, "row 2: the chat template fails: System role not"),
    ],
)  # fmt: skip
def test_a_template_that_fails(tmp_path, write, row, said):
    path = write([*chats(1), row])
    with pytest.raises(UserError, match=said or "row 2: the chat template fails"):
        run(tmp_path, build_tokenizer("gemma"), path)


def test_no_template_and_no_rows(tmp_path, tokenizer, write):
    with pytest.raises(UserError, match="row 1: turns need a chat template"):
        run(tmp_path, build_tokenizer(), write(chats(1)))
    with pytest.raises(UserError, match="no rows"):
        run(tmp_path, tokenizer, write([]))
    with pytest.raises(UserError, match=r"data.chat_template = mine.jinja: no such file"):
        run(tmp_path, tokenizer, write(chats(1)), chat_template="mine.jinja")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"datasets": []}, "at least 1"),
        ({"datasets": [{"path": "a", "weight": 1}]}, "no effect with mix: concat"),
        ({"datasets": [{"path": "a", "type": "chats"}]}, "'chat'"),
        ({"datasets": [{"path": "a"}], "train_on": "all", "train_on_eos": "last"}, "no effect with train_on: all"),
        ({"datasets": [{"path": "a"}], "streaming": True, "validation": {"size": 3}}, "held out of a stream"),
        ({"datasets": [{"path": "a", "roles": {"user": ["x"], "assistant": ["x"]}}]}, "under both user and assistant"),
        ({"datasets": [{"path": "a"}], "shuffle": True}, "Extra inputs"),
    ],
)
def test_fields_are_checked(fields, said):
    with pytest.raises(ValidationError, match=said):
        Data.model_validate(fields)


# ---- streams


def test_a_longer_stream_begins_with_the_same_steps(tmp_path, tokenizer, write, monkeypatch):
    monkeypatch.setattr("neuroada.data.preparation.STREAM_BLOCK", 16)
    path = write(chats(100))
    short = run(tmp_path, tokenizer, path, streaming=True, needed=24)
    longer = run(tmp_path, tokenizer, path, streaming=True, needed=90)
    assert (len(short.train), len(longer.train)) == (32, 96)
    assert short.fingerprint == longer.fingerprint
    for step in range(6):
        batches = [data.train.batch(step, 4) for data in (short, longer)]
        assert texts(short.train, tokenizer, batches[0]) == texts(longer.train, tokenizer, batches[1])
    with pytest.raises(UserError, match=r"set train.max_steps"):
        run(tmp_path, tokenizer, path, streaming=True)


def test_streams_one_after_the_other_and_interleaved(tmp_path, tokenizer, write, monkeypatch):
    monkeypatch.setattr("neuroada.data.preparation.STREAM_BLOCK", 16)
    paths = [write(chats(20), "a.jsonl"), write(chats(60, 100), "b.jsonl")]
    prepared = run(tmp_path, tokenizer, *paths, streaming=True, needed=30)
    assert [len(store) for store in prepared.stores] == [20, 16]
    prepared = run(tmp_path, tokenizer, *paths, streaming=True, needed=30, mix="interleave")
    assert [len(store) for store in prepared.stores] == [16, 16]
