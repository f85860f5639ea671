"""A server of a plain transformers model whose weights follow a trainer, between requests and never within one.

    python examples/serve_updates.py --model models/smollm2-135m --folder /shared/messages --port 8000
    curl -s localhost:8000/generate -d '{"prompt": "12 + 34 =", "max_new_tokens": 8}'
    curl -s localhost:8000/version

A trainer anywhere that sees the folder calls `publish(sender, FolderTransport(folder))` after its steps. Requests run
side by side and hold a lock for reading; an update waits for those in flight, takes it for writing, and lasts
milliseconds. Every answer says which version of the weights made it. `POST /base` puts the base model back.
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from neuroada.errors import UserError
from neuroada.sync import FolderTransport, ModelWeights, ReadWriteLock, Receiver, SyncError, Transport, follow

MAX_BODY = 1 << 20


class Service:
    """A model, the receiver that changes its weights, and the lock between requests and changes."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, transport: Transport) -> None:
        self.model, self.tokenizer, self.transport = model.eval(), tokenizer, transport
        self.receiver = Receiver(ModelWeights(model))
        self.lock = ReadWriteLock()

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int) -> dict[str, Any]:
        """Greedy; the text and the version whose weights made every token of it."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        with self.lock.reading():
            version = self.receiver.version
            made = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text = self.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {"text": text, "version": version}

    def update(self) -> int | None:
        """Apply what has come since the last call. -> the version that is served; None for the base."""
        with self.lock.writing():
            try:
                return follow(self.receiver, self.transport)
            except SyncError:  # a trainer that was started again: begin with its next state message
                self.receiver.restore()
                return follow(self.receiver, self.transport)

    def base(self) -> None:
        with self.lock.writing():
            self.receiver.restore()

    def watch(self, stop: threading.Event, seconds: float) -> None:
        while not stop.wait(seconds):
            self.update()


def handler(service: Service) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/version":
                self.answer(200, {"version": service.receiver.version, "adapter": service.receiver.adapter})
            else:
                self.answer(404, {"error": f"no such path: {self.path}"})

        def do_POST(self) -> None:
            if self.path == "/base":
                service.base()
                self.answer(200, {"version": None})
                return
            try:
                length = int(self.headers.get("Content-Length", 0))
                if self.path != "/generate" or length > MAX_BODY:
                    raise ValueError("POST /generate takes a JSON object of at most 1 MiB")
                body = json.loads(self.rfile.read(length))
                prompt, new = str(body["prompt"]), int(body.get("max_new_tokens", 32))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.answer(400, {"error": f'bad request ({error}): send {{"prompt": text, "max_new_tokens": n}}'})
                return
            self.answer(200, service.generate(prompt, new))

        def answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--folder", required=True, type=Path, help="where the trainer's messages arrive")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="the trainer's")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between looks into the folder")
    arguments = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    service, stop = Service(model, tokenizer, FolderTransport(arguments.folder)), threading.Event()
    failed: list[UserError] = []

    def watch() -> None:
        try:
            service.watch(stop, arguments.every)
        except UserError as error:  # a wrong base: what is served would never change again
            failed.append(error)
            server.shutdown()

    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), handler(service))
    threading.Thread(target=watch, daemon=True).start()
    print(f"serving {arguments.model} on port {arguments.port}, following {arguments.folder}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        stop.set()
    if failed:
        raise SystemExit(f"error: {failed[0]}")


if __name__ == "__main__":
    main()
