"""Tiny random models of the field's architectures, in float64 where their code allows it."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

VOCAB = 97
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}  # shorter than the sequences

# name → (prefix of its classes in transformers, prefix of its config's, settings). What isouq promises to cover:
COVERED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "Llama", _LLAMA),
    "llama_biased": ("Llama", "Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", "Mistral", {**_LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2", "Qwen2", _LLAMA),
    "qwen3": ("Qwen3", "Qwen3", {**_LLAMA, "head_dim": 4}),
    "gemma2": ("Gemma2", "Gemma2", {**_LLAMA, **_SLIDING, "head_dim": 4, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", "Gemma3Text", {**_LLAMA, **_SLIDING, "head_dim": 4}),
    "olmo": ("Olmo", "Olmo", _LLAMA),
    "olmo2": ("Olmo2", "Olmo2", _LLAMA),
    "phi3": ("Phi3", "Phi3", _LLAMA),
    "gpt2": ("GPT2LMHead", "GPT2", _GPT),
    "gpt_neox": ("GPTNeoX", "GPTNeoX", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "opt": ("OPT", "OPT", {**_LLAMA, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt_projected": ("OPT", "OPT", {**_LLAMA, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "granite": (
        "Granite",
        "Granite",
        {**_LLAMA, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "smollm3": ("SmolLM3", "SmolLM3", _LLAMA),
    "mixtral": ("Mixtral", "Mixtral", {**_LLAMA, "num_local_experts": 3, "experts_implementation": "eager"}),
    "mixtral_grouped": (
        "Mixtral",
        "Mixtral",
        {**_LLAMA, "num_local_experts": 3, "experts_implementation": "grouped_mm"},
    ),
}

# No rule was written for these: exact or refused, never wrong.
HELD_OUT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": ("Falcon", "Falcon", {k: v for k, v in _LLAMA.items() if "key" not in k}),
    "falcon_alibi": (
        "Falcon",
        "Falcon",
        {**_LLAMA, "alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "bloom": ("Bloom", "Bloom", {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJ", "GPTJ", {**_GPT, "rotary_dim": 4}),
    "cohere": ("Cohere", "Cohere", {**_LLAMA, "use_qk_norm": True}),
    "starcoder2": ("Starcoder2", "Starcoder2", _LLAMA),
    "gpt_bigcode": ("GPTBigCode", "GPTBigCode", _GPT),
    "mpt": ("Mpt", "Mpt", {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mamba": ("Mamba", "Mamba", {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        "Qwen2Moe",
        {
            **_LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "experts_implementation": "eager",
        },
    ),
    "gpt_oss": (
        "GptOss",
        "GptOss",
        {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4, "experts_implementation": "eager"},
    ),
}

FLOAT32 = {"mixtral_grouped"}  # torch has no grouped matrix product in float64


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name in FLOAT32 else torch.float64


def class_name(name: str) -> str:
    prefix = {**COVERED, **HELD_OUT}[name][0]
    return f"{prefix}Model" if prefix.endswith("LMHead") else f"{prefix}ForCausalLM"


def build(name: str, *, tied: bool, dtype: torch.dtype | None = None, **settings: Any) -> nn.Module:
    """The model `name`, in eval mode, with random weights far from where a gradient would vanish."""
    _, config_prefix, fixed = {**COVERED, **HELD_OUT}[name]
    config_class: Callable[..., Any] = getattr(transformers, f"{config_prefix}Config")
    experts = fixed.get("experts_implementation")
    fixed = {k: v for k, v in fixed.items() if k != "experts_implementation"}
    config = config_class(**{**fixed, **_SPECIAL, "tie_word_embeddings": tied, **settings})
    if experts:
        config._experts_implementation = experts
    model = getattr(transformers, class_name(name))(config).eval().to(dtype or dtype_of(name))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def examples(lengths: tuple[int, ...], n_answers: tuple[int, ...], seed: int = 0) -> list[tuple[torch.Tensor, int]]:
    """Random sequences over few tokens, so that some occur twice, with the answer at the end."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, 13, (n,), generator=generator) * 7 for n in lengths]
    return list(zip(drawn, n_answers, strict=True))


class upcasts_to(TorchFunctionMode):  # noqa: N801, reads as a verb
    """Models cast norms, softmaxes and logits to float32; in here, to `dtype`: all of a float64 model is then exact."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].to(self.dtype)
        args = tuple(self.dtype if value is torch.float32 else value for value in args)
        kwargs = {k: self.dtype if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return function(*args, **kwargs)
