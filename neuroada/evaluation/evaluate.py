"""Ask a model every test question of some tasks, score each answer twice, write predictions and results.json.

Any number of ranks: the batches are formed from the questions alone and dealt out whole, so the predictions are the
same bytes on one rank or many (given as many CPU threads for each rank). Ranks meet at barriers and in files alone.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm

from neuroada.errors import UserError
from neuroada.evaluation.generate import Batch, generate, log_likelihoods, plan_batches, plan_options, stop_tokens
from neuroada.evaluation.harness import HarnessTask, evaluate_harness
from neuroada.evaluation.parts import Parts
from neuroada.evaluation.questions import Backend, Questions, Scored, prepare
from neuroada.evaluation.ranks import joined, locked
from neuroada.evaluation.results import averages, check_smaller, kept_scores, make_header, summarize, to_json
from neuroada.files import read_json, write_text
from neuroada.tasks.data import contamination, load_examples, possible_files
from neuroada.tasks.table import OWN, TASKS, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 16384  # prompt and answer tokens in the cache at once: 8 GiB of it for LLaMA-7B in bf16


class TransformersBackend:
    """A Hugging Face causal LM in this process."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_tokens: int) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self.stop_ids = stop_tokens(model, tokenizer)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def describe(self) -> list[Any]:
        model = self.model
        return [transformers.__version__, self.batch_tokens, sorted(self.stop_ids), str(model.dtype), model.device.type]

    def plan(self, lengths: Sequence[int], max_new_tokens: int) -> list[Batch]:
        return plan_batches(lengths, max_new_tokens, self.batch_tokens)

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, rows: int, on_finished: Callable[[], Any], *stop: int
    ) -> list[list[int]]:
        return generate(self.model, prompts, max_new_tokens, {*self.stop_ids, *stop}, rows, on_finished)

    def plan_options(self, lengths: Sequence[Sequence[int]]) -> list[Batch]:
        return plan_options(lengths, self.batch_tokens)

    def log_likelihoods(self, sequences: Sequence[Scored], rows: int, on_finished: Callable[[], Any]) -> list[float]:
        return log_likelihoods(self.model, sequences, rows, on_finished)


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    data_dir: str | Path,
    out_dir: str | Path,
    *,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    names: Mapping[str, str | None] | None = None,
    trained_on: str | None = None,
    identity: Any = None,
) -> dict[str, Any]:
    """Score `model` (whole on every rank; an adapter may be on it, merged is faster) on `tasks`. Collective.

    See `evaluate_backend`. The model is in eval mode meanwhile.
    """
    was_training = model.training
    theirs = [task for task in tasks if isinstance(task, HarnessTask)]
    ours = [task for task in tasks if not isinstance(task, HarnessTask)]
    names = names or {"model": model.config.name_or_path, "adapter": None}
    results: dict[str, Any] = {}
    model.eval()
    try:
        if ours or not theirs:
            backend = TransformersBackend(model, tokenizer, batch_tokens)
            results = evaluate_backend(
                backend, tokenizer, ours, data_dir, out_dir,
                limit=limit, names=names, trained_on=trained_on, identity=identity,
            )  # fmt: skip
        if theirs:
            header = make_header(names, identity, limit)
            results = evaluate_harness(
                model, tokenizer, theirs, Path(out_dir), header, limit=limit, batch_tokens=batch_tokens
            )
    finally:
        model.train(was_training)
    return results


def evaluate_backend(
    backend: Backend,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    data_dir: str | Path,
    out_dir: str | Path,
    *,
    limit: int | None,
    names: Mapping[str, str | None],
    trained_on: str | None,
    identity: Any,
) -> dict[str, Any]:
    """Write `out_dir`/results.json and predictions/<task>.jsonl; return results.json's content on every rank.

    `limit`: the first so many examples of each task. `names`: {"model", "adapter"} as results.json tells them.
    `trained_on`: the task whose training set counts as seen; None: that of each task's suite. `identity`: anything JSON
    can hold that changes when the weights do: with it, a run that was cut off is resumed by the same call. UserError:
    limit < 1, no task, and what `load_examples` finds.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} leaves no examples; give at least 1")
    if not tasks:
        raise UserError("tasks: there is none to evaluate; name at least one")
    out = Path(out_dir)
    questions = {task.name: prepare(backend, tokenizer, task, data_dir, limit) for task in tasks}
    header = make_header(names, identity, limit)
    with joined() as ranks, locked(out, ranks.rank):
        kept = kept_scores(out, header, tasks)
        check_smaller(out, kept, {name: len(q.examples) for name, q in questions.items()})
        parts = Parts(
            out / "predictions" / ".parts", _fingerprint(backend, questions, identity), ranks.rank, ranks.barrier
        )
        mine = _deal(questions, parts, ranks.world_size)[ranks.rank]
        total = sum(questions[name].size(questions[name].batches[number]) for name, number in mine)
        units = "s or ".join(dict.fromkeys(q.unit for q in questions.values()))
        with tqdm(total=total, unit=units, desc="generating", disable=ranks.rank > 0 or not mine) as progress:
            for name, number in mine:
                of = questions[name]
                parts.write((name, number), of.ask(backend, of.batches[number], progress.update))
        ranks.barrier()
        if ranks.rank == 0:
            _conclude(questions, parts, data_dir, out, header, kept, trained_on)
        ranks.barrier()
        results: dict[str, Any] = read_json(out / "results.json")
    return results


def _fingerprint(backend: Backend, questions: Mapping[str, Questions], identity: Any) -> str | None:
    if identity is None:
        return None
    asked = [[q.task.name, q.asked(), [asdict(b) for b in q.batches]] for q in questions.values()]
    return hashlib.sha256(json.dumps([identity, torch.__version__, backend.describe(), asked]).encode()).hexdigest()


def _deal(questions: Mapping[str, Questions], parts: Parts, world_size: int) -> list[list[tuple[str, int]]]:
    """The batches still to do, for each rank: the costliest first, each to the rank with the least so far."""
    costs = {
        (name, number): q.cost(batch)
        for name, q in questions.items()
        for number, batch in enumerate(q.batches)
        if (name, number) not in parts.done
    }
    shares: list[list[tuple[str, int]]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for key in sorted(costs, key=lambda key: -costs[key]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(key)
        heapq.heappush(loads, (load + costs[key], rank))
    return shares


def _conclude(
    questions: Mapping[str, Questions],
    parts: Parts,
    data_dir: str | Path,
    out: Path,
    header: Mapping[str, Any],
    kept: Mapping[str, Any],
    trained_on: str | None,
) -> None:
    """Score all generations and write everything; the part files have then done their work."""
    done = parts.collect()
    training_sets: dict[str, list[Example] | None] = {}
    entries = dict(kept)
    for name, q in questions.items():
        trainer = OWN if q.task.suite == OWN else trained_on or q.task.suite  # an own prompt compares with no other
        if trainer not in training_sets:
            training_sets[trainer] = _training_set(trainer, data_dir)
        train = training_sets[trainer]
        seen = None if train is None else contamination(q.examples, train)
        generations = dict.fromkeys(q.too_long, "")
        for number, batch in enumerate(q.batches):
            generations.update(zip(batch.indices, done[name, number], strict=True))
        predictions = [_prediction(q, i, generations[i], seen) for i in range(len(q.examples))]
        lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
        write_text(out / "predictions" / f"{name}.jsonl", lines)
        entries[name] = summarize(q.task, predictions)
    known = TASKS | {name: q.task for name, q in questions.items() if q.task.suite != OWN}
    means = averages([known[name] for name in entries if name in known], entries)
    write_text(out / "results.json", to_json({**header, "tasks": entries, "averages": means}))
    parts.remove()


def _prediction(q: Questions, i: int, said: str, seen: set[int] | None) -> dict[str, Any]:
    gold = q.examples[i][q.task.answer_column]
    answer, more = q.read(i, said)
    return {
        "index": i,
        "prompt": q.prompts[i],
        "generation": answer,
        **more,
        "gold": gold,
        "published": asdict(q.task.published(answer, gold)),
        "sound": asdict(q.task.sound(answer, gold)),
        "seen_in_training": None if seen is None else i in seen,
        **({"note": q.excess(i)} if i in q.too_long else {}),
    }


def _training_set(name: str, data_dir: str | Path) -> list[Example] | None:
    """The training examples of task `name`; None if there is no such task or its file is not in `data_dir`."""
    task = TASKS.get(name)
    if task is None or not (task.generate or any(f.is_file() for f in possible_files(task, "train", data_dir))):
        return None
    return load_examples(task, "train", data_dir)
