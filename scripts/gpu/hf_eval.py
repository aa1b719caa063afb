"""Measures how fast lm-evaluation-harness's loop on Hugging Face transformers answers the requests that `aoji eval` answered.

The loop is that of HFLM._loglikelihood_tokens (0.4.13): requests by length, longest first; batches padded on the right; logits of
every position, their log-softmax in the model's own type, the sum over the continuation. GPU and checkpoint (bf16) are the same; the
documents are a sample of a file of `aoji eval --save-samples`. Encoding is timed, loading is not, and one batch warms up. The result
is requests per second beside aoji's, and how far apart the log-likelihoods are: those of the loop are sums of bf16 numbers.

Exit codes: 0 measured, 77 transformers is not installed.
"""
import argparse
import json
import pathlib
import sys
import time


def encode(tokenizer, context, continuation):
    """Ids of context and continuation, by the harness's rule; no BOS."""
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    before = ids(context.rstrip())
    return before, ids(context + continuation)[len(before):]


def answers(torch, model, pairs, batch, device):
    """Log-likelihood of each pair."""
    found = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        rows = [(pairs[i][0] + pairs[i][1])[:-1] for i in part]
        longest = max(map(len, rows))
        padded = torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=device)
        logprobs = torch.log_softmax(model(padded).logits, -1)
        for i, r, row in zip(part, rows, logprobs):
            continuation = torch.tensor(pairs[i][1], device=device)
            row = row[len(r) - len(continuation) : len(r)]
            found[i] = float(row.gather(1, continuation[:, None]).sum())
    return found


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True, help="directory of the checkpoint")
    ap.add_argument("--samples", required=True, type=pathlib.Path, help="what aoji eval --save-samples wrote")
    ap.add_argument("--report", required=True, type=pathlib.Path, help="what aoji eval --json printed")
    ap.add_argument("--requests", type=int, default=500, help="at least so many, of documents spread over the file")
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    ap.add_argument("--out", required=True, type=pathlib.Path)
    a = ap.parse_args()
    try:
        import torch
        import transformers
        from tokenizers import Tokenizer
    except ImportError as e:
        print(f"skipped: {e}")
        return 77
    if a.device == "cuda" and not torch.cuda.is_available():
        print("skipped: PyTorch sees no GPU")
        return 77
    documents = [json.loads(line) for line in a.samples.read_text().splitlines()[1:]]
    documents.sort(key=lambda d: (d["task"], d["doc_id"]))
    choices = sum(len(d["continuations"]) for d in documents)
    documents = documents[:: max(1, choices // a.requests)]
    requests = [(d["context"], c, x) for d in documents for c, x in zip(d["continuations"], d["logprobs"])]
    tokenizer = Tokenizer.from_file(str(pathlib.Path(a.model) / "tokenizer.json"))
    model = transformers.LlamaForCausalLM.from_pretrained(a.model, torch_dtype=torch.bfloat16).to(a.device).eval()
    with torch.inference_mode():
        warm = [encode(tokenizer, context, c) for context, c, _ in requests[: a.batch]]
        answers(torch, model, warm, a.batch, a.device)
        begin = time.perf_counter()
        pairs = [encode(tokenizer, context, c) for context, c, _ in requests]
        found = answers(torch, model, pairs, a.batch, a.device)  # ends with a read, so the GPU is done
        seconds = time.perf_counter() - begin
    apart = sorted(abs(x - y) / max(1.0, abs(y)) for x, (_, _, y) in zip(found, requests))
    ours = json.loads(a.report.read_text())["requests_per_second"]
    rate = len(requests) / seconds
    result = {
        "torch": torch.__version__, "transformers": transformers.__version__, "batch": a.batch, "requests": len(requests),
        "tokens": sum(len(x) + len(y) for x, y in pairs), "seconds": seconds, "requests_per_second": rate,
        "aoji_requests_per_second": ours, "times_as_fast": ours / rate if ours else None,
        "mean_difference": sum(apart) / len(apart), "p99_difference": apart[len(apart) * 99 // 100],
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


sys.exit(main())
