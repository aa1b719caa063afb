#!/usr/bin/env python3
"""Makes tests/arch: a tiny random model of each architecture, and the logits of transformers in float32.

    pip install torch transformers
    scripts/arch-goldens.py tests/arch

Each directory has config.json and model.safetensors (bf16, so that the file is small; transformers computes with the same values in
float32) and golden.json: token ids and the logits of each position. Weights are larger than a fresh model's, so that attention is not
flat and a wrong bias, norm or window shows.
"""
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=40, max_position_embeddings=64, rope_theta=10000.0, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5)
MODELS = {
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(sliding_window=5, head_dim=12)),
    "mistral-full": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3-all": ("qwen3", dict(head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=6,
                                layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True)),
}
LENGTH = 24


def scale(name, shape):
    if name.endswith("norm.weight"):
        return 1.0, 0.3
    if name.endswith(".bias"):
        return 0.0, 0.5
    return 0.0, 1.6 / shape[-1] ** 0.5


def main():
    out = pathlib.Path(sys.argv[1])
    for seed, (name, (kind, own)) in enumerate(MODELS.items()):
        directory = out / name
        directory.mkdir(parents=True, exist_ok=True)
        config = AutoConfig.for_model(kind, **{**SIZES, **own})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        with torch.no_grad():
            for key, parameter in model.named_parameters():  # a tied head is not among them
                mean, std = scale(key, parameter.shape)
                values = (mean + std * torch.randn(parameter.shape, generator=generator)).bfloat16()
                parameter.copy_(values.float())
                tensors[key] = values
            ids = torch.randint(3, SIZES["vocab_size"], (1, LENGTH), generator=generator)
            logits = model(ids).logits[0]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        # what transformers itself writes, but for what says nothing of the model
        written = json.loads(model.config.to_json_string())
        written["architectures"] = [type(model).__name__]
        written = {k: v for k, v in written.items() if k not in ("transformers_version", "use_cache", "dtype", "torch_dtype")}
        written["torch_dtype"] = "bfloat16"
        (directory / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        golden = {
            "how": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32",
            "ids": ids[0].tolist(),
            "logits": [[round(float(x), 6) for x in row] for row in logits],
        }
        (directory / "golden.json").write_text(json.dumps(golden) + "\n")
        print(f"{name}: {sum(t.numel() for t in tensors.values())} parameters, logits up to {float(logits.abs().max()):.1f}")


main()
