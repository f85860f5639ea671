"""examples/serve_updates.py: requests in threads while the weights change; no answer mixes two versions."""

import importlib.util
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sync_models import change, plain, tuned
from transformers import AutoTokenizer

from neuroada.sync import FolderTransport, ModelWeights, ReadWriteLock, Receiver, Sender, publish

PROMPTS = ["12 + 34 =", "the cat", "x"]
NEW = 6


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "serve_updates.py"
    spec = importlib.util.spec_from_file_location("serve_updates", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_answers(example: ModuleType, base_folder: Path, messages: list[bytearray]) -> dict:
    """(prompt, version) -> text, by a service that nothing disturbs."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    service = example.Service(plain(base_folder), tokenizer, FolderTransport(base_folder.parent / "none"))
    found = {(prompt, None): service.generate(prompt, NEW)["text"] for prompt in PROMPTS}
    for version, message in enumerate(messages):
        service.receiver.apply(message)
        found |= {(prompt, version): service.generate(prompt, NEW)["text"] for prompt in PROMPTS}
    return found


def test_requests_in_threads_see_one_version_each(example: ModuleType, base_folder: Path, tmp_path: Path) -> None:
    trainer = tuned(base_folder, k=8)
    sender, messages, versions = Sender(trainer), [], 12
    for version in range(versions):
        change(trainer, version)
        messages.append(sender.message())
    expected = expected_answers(example, base_folder, messages)
    assert len({expected["x", version] for version in range(versions)}) > 3  # versions can be told apart

    tokenizer, out = AutoTokenizer.from_pretrained(base_folder), FolderTransport(tmp_path, keep=100)
    service = example.Service(plain(base_folder), tokenizer, FolderTransport(tmp_path))
    answers: list[tuple[str, int | None, str]] = []
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            prompt = PROMPTS[number % len(PROMPTS)]
            said = service.generate(prompt, NEW)
            answers.append((prompt, said["version"], said["text"]))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for version, message in enumerate(messages):
        out.send(message)
        assert service.update() == version
        time.sleep(0.05)
    service.base()
    time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    for prompt, version, text in answers:
        assert text == expected[prompt, version], version
    assert len(Counter(version for _, version, _ in answers)) > 3


def test_the_lock_keeps_readers_and_writers_apart() -> None:
    lock, inside, wrong = ReadWriteLock(), Counter(), []

    def reader() -> None:
        for _ in range(200):
            with lock.reading():
                inside["readers"] += 1
                if inside["writers"]:
                    wrong.append("a reader beside a writer")
                inside["readers"] -= 1

    def writer() -> None:
        for _ in range(50):
            with lock.writing():
                inside["writers"] += 1
                if inside["writers"] > 1:
                    wrong.append("two writers")
                time.sleep(0.0001)
                inside["writers"] -= 1

    threads = [threading.Thread(target=target) for target in (reader, reader, reader, writer, writer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong


def test_over_http(example: ModuleType, base_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    service = example.Service(plain(base_folder), tokenizer, FolderTransport(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), example.handler(service))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"

    def ask(path: str, body: bytes | None = None) -> dict:
        with urllib.request.urlopen(url + path, body, timeout=60) as answer:
            return json.loads(answer.read())

    trainer = tuned(base_folder, k=8)
    change(trainer, 0)
    publish(Sender(trainer), FolderTransport(tmp_path))
    assert ask("/version") == {"version": None, "adapter": None}
    service.update()
    assert ask("/version") == {"version": 0, "adapter": "default"}
    request = json.dumps({"prompt": "x", "max_new_tokens": NEW}).encode()
    engine = plain(base_folder)
    Receiver(ModelWeights(engine)).apply(Sender(trainer).message())
    ids = tokenizer("x", return_tensors="pt")
    with torch.no_grad():
        made = engine.generate(**ids, max_new_tokens=NEW, do_sample=False)
    text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ask("/generate", request) == {"text": text, "version": 0}
    for bad in (b"{", b"[1]", b'{"prompt": "x", "max_new_tokens": "many"}'):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask("/generate", bad)
    assert ask("/base", b"") == {"version": None}
    publish(Sender(trainer), FolderTransport(tmp_path))  # started again
    assert service.update() == 0
    server.shutdown()
