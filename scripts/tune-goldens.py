#!/usr/bin/env python3
"""Makes goldens (expected values) of training with torch and PEFT, without aoji. scripts/peft-check loads what aoji trained in PEFT.

    python3 -m venv target/tune-venv
    target/tune-venv/bin/pip install torch==2.8.0 transformers==4.57.1 peft==0.18.0 numpy
    scripts/tune-goldens.py tiny tests/train/golden              a random Llama, an adapter to begin with, runs of 3 steps: in the tree
    scripts/tune-goldens.py smollm2 MODEL tests/train/golden     the same on SmolLM2-135M: losses, norms and sums, in the tree

Everything is in float32. A document goes through the model alone; packing must give the same. Instead of nn.Dropout, the masks are those
that aoji documents (Philox4x32-10 by seed, micro-batch, matrix and element).
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def philox(counter, key):
    """Salmon et al. 2011; counter [4, n] and key [2] of uint32."""
    c, k = [x.astype(np.uint64) for x in counter], [np.uint64(x) for x in key]
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & mask, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return np.stack(c)


def words(n, at, seed):
    """Word i % 4 of the draw of counter [i / 4, *at], for i below n."""
    i = np.arange((n + 3) // 4, dtype=np.uint32)
    counter = [i] + [np.full_like(i, x) for x in at]
    return philox(counter, [seed & 0xFFFFFFFF, seed >> 32]).T.reshape(-1)[:n]


class Mask(torch.nn.Module):
    """Dropout of one matrix's input, told by `place` in which micro-batch and at which row the document is."""

    def __init__(self, p, seed, site, place):
        super().__init__()
        self.p, self.seed, self.site, self.place = p, seed, site, place

    def forward(self, x):
        rows, cols = x.shape[-2:]
        first = self.place["row"]
        drawn = words((first + rows) * cols, [0, self.place["micro"], self.site], self.seed)[first * cols:]
        kept = torch.from_numpy((drawn >= int(self.p * 2**32)).astype(np.float32).reshape(x.shape))
        return x * kept * np.float32(1.0 / (np.float32(1) - np.float32(self.p)))


def sites(model):
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            layer, target = int(name.split("layers.")[1].split(".")[0]), name.rsplit(".", 1)[1]
            yield layer * 7 + TARGETS.index(target), module


def run(model, batches, run, place):
    """Steps of micro-batches of documents (ids, labels); a line for each step."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=run["learning_rate"], weight_decay=run["weight_decay"], eps=1e-8)
    schedule = get_scheduler(run["lr_scheduler"], optimizer, num_warmup_steps=run["warmup_steps"], num_training_steps=len(batches))
    model.train()
    micro = 0
    for step, group in enumerate(batches):
        count = [sum(label != -100 for _, labels in batch for label in labels[1:]) for batch in group]
        total = 0.0
        for batch, n in zip(group, count):
            weight = 1 / sum(count) if run["loss_mean"] == "global" else 1 / n / run["gradient_accumulation_steps"]
            place.update(micro=micro, row=0)
            for ids, labels in batch:
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
                target = torch.tensor(labels[1:])
                loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum") * weight
                loss.backward()
                total += loss.item()
                place["row"] += len(ids)
            micro += 1
        norm = torch.nn.utils.clip_grad_norm_(params, run["max_grad_norm"] or 1e30).item()
        line = {"loss": total, "grad_norm": norm, "learning_rate": schedule.get_last_lr()[0]}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield line


def documents(rng, vocab, lengths):
    for n in lengths:
        ids = rng.integers(3, vocab, n).tolist()
        prompt = int(rng.integers(1, n))
        yield {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def grouped(rows, batches, accumulation):
    """Steps of micro-batches of rows, by their numbers."""
    pairs = [[(rows[i]["input_ids"], rows[i]["labels"]) for i in batch] for batch in batches]
    return [pairs[i:i + accumulation] for i in range(0, len(pairs), accumulation)]


def tiny(out):
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1000.0,
                         initializer_range=0.2, bos_token_id=1, eos_token_id=2, dtype="float32")
    base = LlamaForCausalLM(config)
    for name, p in base.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    base.save_pretrained(out / "tiny")
    (out / "tiny/generation_config.json").unlink(missing_ok=True)
    begin = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for _, m in sites(begin):
        torch.nn.init.normal_(m.lora_B["default"].weight, std=0.1)
    begin.save_pretrained(out / "begin")
    (out / "begin/README.md").unlink(missing_ok=True)

    rng = np.random.default_rng(5)
    rows = list(documents(rng, 64, [9, 2, 17, 5, 30, 3, 12, 7, 4, 21, 6, 13]))
    (out / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plain = {"learning_rate": 0.01, "lr_scheduler": "cosine", "warmup_steps": 1, "weight_decay": 0.0, "max_grad_norm": 1.0,
             "loss_mean": "global", "gradient_accumulation_steps": 2, "micro_batch_size": 2, "lora_dropout": 0.0}
    runs = {
        "global, clipped": plain | {"max_grad_norm": 0.05},
        "micro, decay": plain | {"loss_mean": "micro", "weight_decay": 0.1, "max_grad_norm": 0.0, "lr_scheduler": "linear"},
        "dropout": plain | {"lora_dropout": 0.3},
    }
    goldens = {}
    for name, r in runs.items():
        batches = grouped(rows, [[i, i + 1] for i in range(0, 12, 2)], 2)
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(out / "tiny"), out / "begin", is_trainable=True)
        place = {}
        if r["lora_dropout"]:
            for site, m in sites(model):
                m.lora_dropout["default"] = Mask(r["lora_dropout"], 42, site, place)
        lines = list(run(model, batches, r, place))
        goldens[name] = {"config": r, "steps": lines, "adapter": {
            f"{half}{site}": getattr(m, f"lora_{half}")["default"].weight.detach().flatten().tolist()
            for site, m in sites(model) for half in "AB"}}
    text = json.dumps(goldens, separators=(",", ":"))
    (out / "tiny.json").write_text(text + "\n")


def smollm2(path, out):
    rng = np.random.default_rng(6)
    rows = list(documents(rng, 49152, [40, 25, 70, 33, 12, 51]))
    r = {"learning_rate": 0.001, "lr_scheduler": "cosine", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
         "loss_mean": "global", "gradient_accumulation_steps": 1, "micro_batch_size": 2, "lora_dropout": 0.05}
    base = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    place = {}
    for site, m in sites(model):
        a = m.lora_A["default"].weight
        drawn = (words(a.numel(), [1, 0, site], 42) >> np.uint64(8)).astype(np.float32) / np.float32(8388608) - np.float32(1)
        bound = np.float32(1) / np.sqrt(np.float32(a.shape[1]))
        a.data = torch.from_numpy((drawn * bound).reshape(a.shape))
        m.lora_dropout["default"] = Mask(r["lora_dropout"], 42, site, place)
    lines = list(run(model, grouped(rows, [[0, 1], [2, 3], [4, 5]], 1), r, place))
    norms = {f"{half}{site}": getattr(m, f"lora_{half}")["default"].weight.norm().item() for site, m in sites(model) for half in "AB"}
    (out / "smollm2.json").write_text(json.dumps({"config": r, "rows": rows, "steps": lines, "norms": norms}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tiny", out]:
            tiny(Path(out))
        case ["smollm2", path, out]:
            smollm2(Path(path), Path(out))
        case _:
            sys.exit(__doc__)
