"""What a sync costs at LLaMA-7B's shapes, beside a whole copy and a LoRA merge, and what decoding costs after it.

    OMP_NUM_THREADS=1 python benchmarks/sync.py

Bytes are exact for LLaMA-7B. Seconds are measured on `--layers` of its 32 blocks (generated weights, bf16, on CPU, 2.4
GB a block), the best of `--repeat` alternating rounds, and multiplied up; embedding and head, which a whole copy
would copy too, are left out of both. Everything ends in a receiver's own weights:

    sync        the sender's message, made, checked, and written into the receiver
    copy        every weight by `copy_`, from memory to memory: nothing that moves a model can cost less
    buffer      every weight into one buffer that is there already, and out of it: the least for a model that travels
    message     every weight as one message with its checksum, as the sync's: the same guarantees
    LoRA merge  W += B A of as many trained parameters, as PEFT's `merge` computes it

Decoding: tokens per second of greedy generation at batch 1, on SmolLM2-135M's shapes in fp32.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from neuroada import NeuroAdaConfig
from neuroada.sync import Header, ModelWeights, Receiver, Sender
from neuroada.sync.message import Message, decode, encode

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS, WHOLE_MODEL_BYTES = 32, 2 * 6_738_415_616  # LLaMA-7B
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 8}
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def blocks(layers: int) -> LlamaForCausalLM:
    """`layers` of LLaMA-7B's blocks in bf16; generated once, the same in each."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=layers)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    first = model.model.layers[0]
    for param in model.parameters():
        param.data.zero_()
    for param in first.parameters():
        param.data.copy_(torch.randn(param.shape[-1]) * 0.02 if param.dim() == 1 else _random(param.shape))
    for layer in list(model.model.layers)[1:]:
        layer.load_state_dict(first.state_dict())
    return model.requires_grad_(False)


def _random(shape: torch.Size) -> torch.Tensor:
    rows = torch.randn(256, shape[1]) * 0.02
    return torch.stack([rows[row % 256].roll(row) for row in range(shape[0])]).bfloat16()


def projections(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the adapted Linears by name, in a plain model and under an adapter alike."""
    found = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()
             if isinstance(module, nn.Linear)}  # fmt: skip
    return {name: module.weight.data for name, module in found.items() if name.rpartition(".")[2] in TARGETS}


def best(rounds: int, **measured: Callable[[], object]) -> dict[str, float]:
    """Seconds of each, the best of alternating rounds after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds + 1):
        for name, function in measured.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in seconds.items()}


class Sync:
    """A trainer with k connections a neuron, and a receiver of its values in a model of its own."""

    def __init__(self, layers: int, k: int) -> None:
        self.tuned = get_peft_model(blocks(layers), NeuroAdaConfig(k=k, target_modules=TARGETS))
        self.engine = blocks(layers)
        self.sender, self.receiver = Sender(self.tuned), Receiver(ModelWeights(self.engine))
        start = time.perf_counter()
        self.first = self.sender.message()
        self.receiver.apply(self.first)
        self.first_seconds = time.perf_counter() - start
        for name, param in self.tuned.named_parameters():
            if "neuroada_delta" in name:
                param.data = 0.01 * torch.randn(param.shape)

    def send(self) -> None:
        self.message = self.sender.message()

    def apply(self) -> None:
        self.receiver.apply(self.message)

    def check(self) -> None:
        """That the receiver holds what merging gives, and after restore the base, to the bit."""
        base = {name: weight.clone() for name, weight in projections(self.tuned.get_base_model()).items()}
        self.tuned.merge_adapter()
        merged = projections(self.tuned.get_base_model())
        assert all(weight.equal(merged[name]) for name, weight in projections(self.engine).items())
        self.receiver.restore()
        assert all(weight.equal(base[name]) for name, weight in projections(self.engine).items())


def competitors(source: dict[str, torch.Tensor], k: int) -> dict[str, Callable[[], object]]:
    """Other ways to bring `source`'s weights to another model's, or a change of as many parameters."""
    target = {name: weight.clone() for name, weight in source.items()}
    rank = round(k * sum(w.shape[0] for w in source.values()) / sum(sum(w.shape) for w in source.values()))
    lora = {
        name: (torch.zeros(w.shape[0], rank, dtype=w.dtype), torch.randn(rank, w.shape[1]).to(w.dtype))
        for name, w in source.items()
    }

    def copy_weights() -> None:
        for name, weight in target.items():
            weight.copy_(source[name])

    buffer = torch.empty(sum(weight.numel() for weight in source.values()), dtype=torch.bfloat16)
    places = dict(zip(source, buffer.split([weight.numel() for weight in source.values()]), strict=True))

    def through_a_buffer() -> None:
        for name, weight in source.items():
            places[name].view_as(weight).copy_(weight)
        for name, weight in target.items():
            weight.copy_(places[name].view_as(weight))

    def as_message() -> None:
        header = Header("values", "benchmark", 0, "whole", 0, 1, "none")
        message = decode(encode(Message(header, source, {}, {})), limit=1 << 40)
        for name, weight in target.items():
            weight.copy_(message.values[name])

    def merge() -> None:
        for name, weight in target.items():
            b, a = lora[name]
            weight += (b.float() @ a.float()).to(weight.dtype)  # PEFT's way on a CPU

    return {"copy": copy_weights, "buffer": through_a_buffer, "message": as_message, f"LoRA merge r={rank}": merge}


def measure_sync(layers: int, rounds: int) -> None:
    scale = LAYERS / layers
    print(f"LLaMA-7B, {layers} of {LAYERS} blocks measured, bf16, {torch.get_num_threads()} thread(s)")
    for k in (20, 1):
        sync = Sync(layers, k)
        others = competitors(projections(sync.engine), k)
        seconds = best(rounds, send=sync.send, apply=sync.apply, **others)
        total, size = seconds["send"] + seconds["apply"], len(sync.message) * scale
        print(f"\n{f'k = {k}':<16} {'MB':>9} {'bytes':>8} {'seconds':>8}   time, to the sync's")
        row("sync", size, total * scale, 1.0)
        for name in others:
            row(name, WHOLE_MODEL_BYTES if "LoRA" not in name else size, seconds[name] * scale, seconds[name] / total)
        print(
            f"of the sync, the message {seconds['send'] * scale:.3f} s, applying it {seconds['apply'] * scale:.3f} s;",
            end=" ",
        )
        print(f"the first message {len(sync.first) * scale / 1e6:.0f} MB, {sync.first_seconds * scale:.1f} s")
        sync.check()


def row(name: str, size: float, seconds: float, ratio: float) -> None:
    print(f"{name:<16} {size / 1e6:9.1f} {f'1/{WHOLE_MODEL_BYTES / size:.0f}':>8} {seconds:8.3f}   {ratio:.1f}")


def measure_decoding(rounds: int, tokens: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM2, bos_token_id=None, eos_token_id=None)
    base = LlamaForCausalLM(config).eval()
    engine, other = copy.deepcopy(base), copy.deepcopy(base)
    tuned = get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=20, target_modules=TARGETS))
    Receiver(ModelWeights(engine)).apply(Sender(tuned).message())
    lora = get_peft_model(other, LoraConfig(r=11, target_modules=TARGETS)).eval()
    models = {"base": base, "receiver": engine, "NeuroAda unmerged": tuned.eval(), "LoRA unmerged": lora}
    rates: dict[str, list[float]] = {name: [] for name in models}
    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
                rates[name].append(tokens / (time.perf_counter() - start))
    print(f"\ndecoding, SmolLM2-135M's shapes, fp32, {tokens} tokens; median of {rounds} ratios to the base")
    for name, found in rates.items():
        ratios = [one / other for one, other in zip(found[1:], rates["base"][1:], strict=True)]
        print(f"{name:<18} {max(found[1:]):6.1f} tokens/s   {statistics.median(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    measure_sync(arguments.layers, arguments.repeat)
    measure_decoding(arguments.repeat, arguments.tokens)


if __name__ == "__main__":
    main()
