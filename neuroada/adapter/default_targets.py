"""What an adapter trains of each architecture where its configuration does not say: every projection of every block.

tests/adapter/test_architectures.py runs each of these, and writes docs/models.md.
"""

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = DECODER[:4]
ENCODER = ["query", "key", "value", "dense"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3",
            "smollm3", "granite", "cohere", "cohere2", "stablelm")  # fmt: skip

TARGET_MODULES: dict[str, list[str]] = {
    **dict.fromkeys(DECODERS, DECODER),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss", "olmoe"), ATTENTION),
    **dict.fromkeys(("qwen2_moe", "glm4_moe"), DECODER),  # of shared experts and dense layers
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *DECODER[3:]],
    "glm4": [*ATTENTION, "gate_up_proj", "down_proj"],
    "starcoder2": [*ATTENTION, "c_fc", "c_proj"],
    "phi": [*ATTENTION[:3], "dense", "fc1", "fc2"],
    "opt": [*ATTENTION[:3], "out_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    **dict.fromkeys(("gpt_neox", "falcon", "bloom"), NEOX),
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    **dict.fromkeys(("bert", "roberta", "electra"), ENCODER),
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "modernbert": ["Wqkv", "Wo", "Wi"],
    "vit": [*ATTENTION, "fc1", "fc2"],
    "whisper": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
"""model_type -> names of Linear modules."""

TARGET_PARAMETERS: dict[str, list[str]] = dict.fromkeys(
    ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "olmoe"), EXPERTS
)
"""model_type -> names of experts' parameters; routers stay frozen."""
