"""Check the engines on a graphics card: exactness against the reference and the CPU, speed against a forward pass.

    .venv/bin/python scripts/gpu_check.py            # models with random weights, no download
    .venv/bin/python scripts/gpu_check.py MODEL ...  # also an asset, a Hub id or a folder, and `isouq score` with it

Prints a line for each check and exits with 1 if one fails. Without a card it runs on the CPU.
"""

import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from torch.utils import benchmark
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import isouq
from isouq import cli

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_EXAMPLES, N_TOKENS, N_ANSWER, N_WORDS = 8, 64, 6, 1000
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 512, "vocab_size": N_WORDS}


def random_models():
    """Three families: a plain decoder, one with tied weights and windows, a mixture of experts."""
    torch.manual_seed(0)
    yield "Llama", LlamaForCausalLM(LlamaConfig(**SMALL))
    yield "Gemma 3", Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=64, sliding_window=32))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    yield "Qwen2 MoE", Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **experts, shared_expert_intermediate_size=256))
    wide = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    yield "Llama of 135M", LlamaForCausalLM(LlamaConfig(**wide, intermediate_size=1536, vocab_size=49152))


def examples(n_words):
    """Token ids (example, token) and the mask of their last tokens, of several lengths."""
    ids = torch.randint(5, n_words, (N_EXAMPLES, N_TOKENS), generator=torch.Generator().manual_seed(1))
    present, answer = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row in range(N_EXAMPLES):
        end = N_TOKENS - 3 * row
        present[row, end:], answer[row, end - N_ANSWER : end] = 0, True
    return ids, answer, present


def worst(a, b):
    """The largest difference of log U_E, and of log p relative to its size."""
    return (a.log_epistemic - b.log_epistemic).abs().max().item(), (a.log_prob / b.log_prob - 1).abs().max().item()


def seconds(work):
    """The mean of five runs after two that warm up."""
    return benchmark.Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).timeit(5).mean


def check(name, model):
    """Compare engines, devices and types; return whether all agree."""
    model, (ids, answer, present) = model.eval(), examples(min(N_WORDS, model.config.get_text_config().vocab_size))
    reference = isouq.score_tokens(model, ids, answer, present, engine="ghost")
    model, passed = model.to(DEVICE), True
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
        model = model.to(dtype)
        for aggregation in ("sequence", "token_mean"):
            options = {"aggregation": aggregation}
            fast = isouq.score_tokens(model, ids, answer, present, engine="ghost", **options)
            slow = isouq.score_tokens(model, ids, answer, present, engine="autograd", **options)
            alone = isouq.score_tokens(model, ids, answer, present, engine="ghost", batch_size=1, **options)
            errors = {"reference": worst(fast, slow)[0], "alone": worst(fast, alone)[0]}
            if aggregation == "sequence":
                errors["CPU, float32"] = worst(fast, reference)[0]
            fits = all(error <= limit for error in errors.values())
            passed &= fits
            text = ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
            print(f"{'ok  ' if fits else 'FAIL'} {name}, {dtype}, {aggregation}, {fast.engine}: log U_E off by {text}")
        timing(name, model, dtype)
    return passed


def timing(name, model, dtype):
    """Print seconds of the estimate as a multiple of a forward pass, and the peak of memory above the weights."""
    ids, answer = torch.randint(5, 900, (N_EXAMPLES, N_TOKENS)), torch.zeros(N_EXAMPLES, N_TOKENS, dtype=torch.bool)
    answer[:, -N_ANSWER:] = True

    def forward():
        with torch.no_grad():
            model(input_ids=ids[:, :-1].to(DEVICE), use_cache=False)

    def score():
        return isouq.score_tokens(model, ids, answer, batch_size=N_EXAMPLES, engine="ghost")

    plain, whole = seconds(forward), seconds(score)
    peak = ""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score()
        peak = f", peak {(torch.cuda.max_memory_allocated() - before) / 1e6:.0f} MB above the weights"
    print(f"     {name}, {dtype}: {1e3 * whole:.1f} ms, {whole / plain:.2f} forward passes{peak}")


def command(name):
    """Compare `isouq score` on device and type "auto" with the CPU in float32; return whether they agree."""
    with tempfile.TemporaryDirectory() as folder:
        source, tables = Path(folder, "in.csv"), {}
        words = [f" {'very ' * n}good" for n in range(N_EXAMPLES)]
        pd.DataFrame({"prompt": "The weather today is", "answer": words}).to_csv(source, index=False)
        for device in ("cpu", "auto"):
            target = Path(folder, f"{device}.parquet")
            arguments = ["--model", name, "--input", str(source), "--output", str(target), "--device", device]
            started = time.perf_counter()
            if cli.main(["score", *arguments, "--aggregation", "all"]):
                return False
            print(f"     {name}: isouq score --device {device} in {time.perf_counter() - started:.1f} s")
            tables[device] = pd.read_parquet(target)
    error = (tables["auto"].log_epistemic - tables["cpu"].log_epistemic).abs().max()
    limit = 1e-3 if DEVICE == "cpu" else 0.5  # a checkpoint's own type on a card may have 16 bits
    print(f"{'ok  ' if error <= limit else 'FAIL'} {name}, isouq score: log U_E off by CPU, float32 {error:.1e}")
    return error <= limit


def main(names):
    """Run every check."""
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "no card"
    print(f"{card}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    results = [check(*pair) for pair in random_models()]
    results += [check(name, isouq.load_causal_lm(name, device="cpu", dtype="float32")[0]) for name in names]
    results += [command(name) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
