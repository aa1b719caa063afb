"""Compares aoji on a GPU with Hugging Face transformers on the same GPU, over the same checkpoint.

The oracle, which counts as right, is transformers in float32 (without TF32). The floor is transformers in bfloat16, which rounds as
aoji does. Prompts are random token ids; the oracle continues each greedily, and all three score that text (teacher forcing), so that
one early tie does not decide everything after it. Two things are measured at each position of the continuation: the error of the
log-probability of each of the oracle's five likeliest tokens (if it is among one's own five), and whether the likeliest token is the
same. aoji passes when its mean error is at most 1.5 times the floor's, and when it prefers another token only where the oracle's
margin is at most twice the 99th percentile of the floor's errors.

Exit codes: 0 passed, 3 failed, 77 transformers is not installed.
"""
import argparse
import gc
import json
import random
import subprocess
import sys


def score(aoji, model, device, ids):
    """Per place, [(token, log-probability)] of the five likeliest, from aoji; place i speaks of token i."""
    command = [aoji, "score", "--model", model, "--device", device, "--top", "5", "--json", "--tokens", ",".join(map(str, ids))]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}: {run.stderr}")
    return json.loads(run.stdout)["top"]


def greedy(aoji, model, device, ids, n):
    command = [aoji, "generate", "--model", model, "--device", device, "--max-tokens", str(n), "--ignore-eos", "--json",
               "--tokens", ",".join(map(str, ids))]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}: {run.stderr}")
    return json.loads(run.stdout)["token_ids"]


def load(model, dtype, device):
    import torch
    from transformers import LlamaForCausalLM

    try:
        loaded = LlamaForCausalLM.from_pretrained(model, dtype=dtype)
    except TypeError:  # transformers before 4.56
        loaded = LlamaForCausalLM.from_pretrained(model, torch_dtype=dtype)
    assert next(loaded.parameters()).dtype == dtype
    return loaded.to(device).eval()


def logprobs(model, ids, first, device):
    """Log-softmax in float64 of what predicts tokens first.., [len(ids) - first, vocab] on the CPU."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, first - 1 : len(ids) - 1]
        return torch.log_softmax(logits.double(), -1).cpu()


def top5(rows):
    values, ids = rows.topk(5, -1)
    return [list(zip(i.tolist(), v.tolist())) for i, v in zip(ids, values)]


def compare(theirs, oracle):
    """Errors and other choices of one, against the oracle's five at each place."""
    errors, others = [], []
    for mine, truth in zip(theirs, oracle):
        mine_of = dict(map(tuple, mine))
        errors += [abs(mine_of[t] - p) for t, p in truth if t in mine_of]
        if mine[0][0] != truth[0][0]:
            others.append(truth[0][1] - truth[1][1])
    errors.sort()
    return {"mean_error": sum(errors) / len(errors), "p99_error": errors[min(len(errors) - 1, len(errors) * 99 // 100)],
            "max_error": errors[-1], "other_top": len(others), "other_top_margins": sorted(others), "places": len(oracle)}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--aoji", required=True)
    ap.add_argument("--model", required=True)
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    ap.add_argument("--lengths", default="5,33,128,700", help="tokens of the prompts")
    ap.add_argument("--tokens", type=int, default=32, help="tokens of the continuations")
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    try:
        import torch
        import transformers
    except ImportError as e:
        print(f"skipped: {e}")
        return 77
    if a.device == "cuda" and not torch.cuda.is_available():
        print("skipped: PyTorch sees no GPU")
        return 77
    torch.backends.cuda.matmul.allow_tf32 = False
    rng = random.Random(1)
    result = {"torch": torch.__version__, "transformers": transformers.__version__, "model": a.model, "cases": []}

    def model_in(dtype):
        gc.collect()
        if a.device == "cuda":
            torch.cuda.empty_cache()
        return load(a.model, dtype, a.device)

    hf = model_in(torch.float32)
    vocab = hf.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(n)] for n in map(int, a.lengths.split(","))]
    texts, oracle = [], []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            out = hf(input_ids=torch.tensor([ids], device=a.device), use_cache=True)
            for _ in range(a.tokens):
                ids.append(int(out.logits[0, -1].argmax()))
                out = hf(input_ids=torch.tensor([ids[-1:]], device=a.device), past_key_values=out.past_key_values, use_cache=True)
        texts.append(ids)
        oracle.append(top5(logprobs(hf, ids, len(prompt), a.device)))
    del hf, out
    hf = model_in(torch.bfloat16)
    floor = [top5(logprobs(hf, ids, len(p), a.device)) for p, ids in zip(prompts, texts)]
    del hf
    gc.collect()
    if a.device == "cuda":
        torch.cuda.empty_cache()

    join = lambda parts: [place for part in parts for place in part]
    ours = [score(a.aoji, a.model, a.device, ids)[len(p) :] for p, ids in zip(prompts, texts)]
    for prompt, ids, truth in zip(prompts, texts, oracle):
        mine, theirs = greedy(a.aoji, a.model, a.device, prompt, a.tokens), ids[len(prompt) :]
        same = next((i for i, (x, y) in enumerate(zip(mine, theirs)) if x != y), len(theirs))
        margin = truth[same][0][1] - truth[same][1][1] if same < len(theirs) else None
        result["cases"].append({"prompt_tokens": len(prompt), "tokens": len(theirs), "same_tokens": same, "margin_there": margin})
    result["hf_bfloat16"] = compare(join(floor), join(oracle))
    result["aoji"] = compare(join(ours), join(oracle))
    allowed, tie = 1.5 * result["hf_bfloat16"]["mean_error"], 2 * result["hf_bfloat16"]["p99_error"]
    result["allowed_mean_error"], result["tie_margin"] = allowed, tie
    wrong = [m for m in result["aoji"]["other_top_margins"] if m > tie]
    result["passed"] = result["aoji"]["mean_error"] <= allowed and not wrong
    with open(a.out, "w") as f:
        json.dump(result, f, indent=1)
    print(json.dumps(result))
    return 0 if result["passed"] else 3


if __name__ == "__main__":
    sys.exit(main())
