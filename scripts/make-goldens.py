#!/usr/bin/env python3
"""Makes a goldens file for `aoji verify --golden` from any causal language model that Hugging Face transformers loads.

Example: scripts/make-goldens.py stories260K golden.json --tokens 40

Needs torch and transformers (target/lm-eval/bin/python has them after `scripts/lm-eval --hf`). For each prompt it stores the
greedy tokens with the five largest logits of each step, and for each text the log-probability of each token. Without --prompts
and --texts it uses some that are in this file.
"""
import argparse
import json
import pathlib

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time",
    "피보나치 수열은",
    "### Question:\n하늘은 왜 파란가요?\n\n### Response:\n",
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "피보나치 수열은 앞의 두 수를 더해 다음 수를 만드는 수열이다. 0과 1에서 시작하면 1, 2, 3, 5, 8이 이어진다.",
]


def lines(path, default):
    """One text per line, with \\n for a line end inside it."""
    if path is None:
        return default
    return [line.replace("\\n", "\n") for line in path.read_text(encoding="utf-8").splitlines() if line]


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids], device=model.device)).logits[0].float().cpu()


def case(model, tokenizer, prompt, tokens, ends):
    """Greedy tokens one by one, each computed from the whole sequence: without a cache, only the model decides."""
    ids = tokenizer(prompt).input_ids
    generated, steps = [], []
    while len(generated) < tokens and not (generated and generated[-1] in ends):
        row = logits(model, ids + generated)[-1]
        values, top = row.topk(5)
        steps.append({
            "top5": [[int(t), float(v)] for t, v in zip(top, values)],
            "logsumexp": float(row.logsumexp(0)),
            "margin": float(values[0] - values[1]),
        })
        generated.append(int(row.argmax()))
    text = tokenizer.decode(generated)
    return {"prompt": prompt, "prompt_ids": ids, "generated_ids": generated, "generated_text": text, "steps": steps}


def score(model, tokenizer, text):
    ids = tokenizer(text).input_ids
    rows = logits(model, ids).double().log_softmax(-1)
    found = [float(rows[i, t]) for i, t in enumerate(ids[1:])]
    return {"text": text, "ids": ids, "token_logprobs": found, "sum_logprob": sum(found)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="a directory or a name on the hub")
    p.add_argument("out", type=pathlib.Path)
    p.add_argument("--prompts", type=pathlib.Path, help="one a line, with \\n for an end of line")
    p.add_argument("--texts", type=pathlib.Path, help="one a line, with \\n for an end of line")
    p.add_argument("--tokens", type=int, default=64, help="greedy tokens of each prompt, at most")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, torch_dtype=dtype).to(args.device).eval()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    golden = {
        "model": pathlib.Path(args.model).name,
        "dtype": args.dtype,
        "how": f"transformers {transformers.__version__}, torch {torch.__version__}, {args.device}",
        "cases": [case(model, tokenizer, x, args.tokens, ends) for x in lines(args.prompts, PROMPTS)],
        "scores": [score(model, tokenizer, x) for x in lines(args.texts, TEXTS)],
    }
    args.out.write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")
    steps = sum(len(c["steps"]) for c in golden["cases"])
    print(f"{args.out}: {steps} greedy steps, {sum(len(s['token_logprobs']) for s in golden['scores'])} log-probabilities")


main()
