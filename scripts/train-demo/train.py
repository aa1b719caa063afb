#!/usr/bin/env python3
"""Train the embedded demo model on a CPU and write assets/demo/.

    pip install torch==2.15.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6
    python scripts/train-demo/train.py [--out assets/demo] [--epochs 30]

The model memorises the questions of topics/*.txt and tables.py. Training stops when, with the weights rounded to
bf16, every listed answer is the greedy one by a margin of MARGIN logits in f32 and is also the greedy one with bf16
activations. A listed answer that is still wrong at the end stays out of questions.jsonl.
"""

import argparse
import copy
import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import corpus
from model import CONFIG, Llama

SEED, MARGIN = 20260401, 2.0
LR, WARMUP, BATCH_TOKENS = 2e-3, 50, 3072
SHORT = 90  # characters of an answer that more often stands before another question
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# The pattern that Llama-3 splits text with before BPE.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts):
    """A byte-level BPE tokenizer in the form of Llama-3's: all bytes, no normalizer, special tokens last."""
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))
    tok.add_special_tokens([AddedToken(BOS, normalized=False), AddedToken(EOS, normalized=False)])
    assert (tok.token_to_id(BOS), tok.token_to_id(EOS)) == (CONFIG["bos_token_id"], CONFIG["eos_token_id"])
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, CONFIG["bos_token_id"])],
        ),
    ])
    return tok


def encode(tok, prompt, answer):
    """(ids of prompt, answer and EOS; how many of them are the prompt)."""
    head = tok.encode(prompt).ids
    return head + tok.encode(answer, add_special_tokens=False).ids + [CONFIG["eos_token_id"]], len(head)


def vary(rng, question):
    """The same question as people type it: another ending, no final mark, a space left out, a short word before it."""
    ending = max((e for e in corpus.ENDINGS if question.endswith(e)), key=len, default=None)
    if ending and rng.random() < 0.4:
        question = question.removesuffix(ending) + rng.choice(corpus.ENDINGS[ending])
    if rng.random() < 0.3:
        question = question.rstrip("?.!")
    if question.isascii():
        return question
    if " " in question and rng.random() < 0.15:
        at = rng.choice([i for i, c in enumerate(question) if c == " "])
        question = question[:at] + question[at + 1:]
    return rng.choice(["혹시 ", "그럼 ", "저기, ", "음, "]) + question if rng.random() < 0.08 else question


def epoch_texts(rng, entries, unknown):
    """The (prompt, answer) pairs of one epoch: the list as it is, then other wordings of it and unknown questions, some
    of them after other turns, with another instruction or with the instruction first."""
    pairs = [(corpus.prompt(t[:-1], t[-1][0]), t[-1][1]) for _, t in corpus.listed(entries)]
    refusal, questions, _ = unknown
    first = [(e.turns[0][0][0], e.turns[0][1]) for e in entries]
    earlier = first + 3 * [t for t in first if len(t[1]) < SHORT] + [(q[0], refusal) for q in questions]
    asked = [(None, *e.turns[0]) for e in entries]  # (earlier turn or None, wordings, answer)
    asked += [(e.turns[0], *e.turns[1]) for e in entries if len(e.turns) > 1]
    asked += [(None, wordings, refusal) for wordings in rng.sample(questions, len(questions) // 2)]
    for before, wordings, answer in asked:
        history = [(vary(rng, rng.choice(before[0])), before[1])] if before else []
        if rng.random() < 0.5:
            history = rng.sample(earlier, rng.choice([1, 1, 2, 3])) + history
        question = vary(rng, rng.choice(wordings))
        style = rng.random()
        instruction = rng.choice(corpus.OTHER_INSTRUCTIONS) if style < 0.1 else corpus.INSTRUCTION
        pairs.append((corpus.prompt(history, question, instruction, 0.05 < style < 0.15), answer))
    return pairs


def batches(rng, samples, tokens):
    """Batches of samples of similar length, at most `tokens` padded tokens each, in random order."""
    samples = sorted(samples, key=lambda s: (len(s[0]), rng.random()))
    out, batch = [], []
    for sample in samples:
        if batch and (len(batch) + 1) * len(sample[0]) > tokens:
            out.append(batch)
            batch = []
        batch.append(sample)
    out.append(batch)
    rng.shuffle(out)
    return out


def predict(model, batch):
    """(logits at every position that predicts an answer token, those tokens, which sample each belongs to)."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[start <= i + 1 < len(s) for i in range(width - 1)] for s, start in batch])
    rows = torch.arange(len(batch))[:, None].expand_as(mask)
    return model.head(model(ids[:, :-1])[mask]), ids[:, 1:][mask], rows[mask]


@torch.no_grad()
def margins(model, samples):
    """Per sample, by how many logits the answer wins at its closest token: positive means that greedy decoding gives
    exactly the answer, because each of its tokens is the best one after those before it."""
    result = [0.0] * len(samples)
    order = sorted(range(len(samples)), key=lambda i: len(samples[i][0]))
    for at in range(0, len(order), 32):
        index = order[at:at + 32]
        logits, target, rows = predict(model, [samples[i] for i in index])
        logits = logits.float()
        right = logits.gather(1, target[:, None])[:, 0]
        margin = right - logits.scatter(1, target[:, None], -torch.inf).amax(-1)
        for row, i in enumerate(index):
            result[i] = margin[rows == row].min().item()
    return result


class Muon:
    """Momentum whose matrix updates are orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), scaled to
    the size of AdamW's updates (Liu et al. 2025). It memorises in about half the steps that AdamW takes."""

    def __init__(self, params):
        self.params, self.momentum = list(params), [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr):
        for p, m in zip(self.params, self.momentum):
            m.lerp_(p.grad, 0.05)
            x = p.grad.lerp(m, 0.95)
            tall = x.shape[0] > x.shape[1]
            x = (x.T if tall else x) / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            p.mul_(1 - lr * 0.01).sub_(x.T if tall else x, alpha=lr * 0.2 * max(p.shape) ** 0.5)


def bf16(model):
    """The model with its weights rounded to bf16, for f32 and for bf16 activations."""
    low = copy.deepcopy(model).to(torch.bfloat16)
    return copy.deepcopy(low).float(), low


def report(model, listed, checks):
    """Print and return the margins of the listed answers (worse of f32 and bf16), and print the other rates."""
    model, low = bf16(model)
    f32, half = margins(model, listed), margins(low, listed)
    rates = {name: sum(m > 0 for m in margins(model, s)) / len(s) for name, s in checks.items()}
    print(f"  listed: f32 {sum(m > 0 for m in f32)}/{len(f32)} bf16 {sum(m > 0 for m in half)}/{len(half)}"
          f" least margin {min(f32):.2f} {min(half):.2f};", ", ".join(f"{k} {v:.0%}" for k, v in rates.items()))
    return [min(pair) for pair in zip(f32, half)]


def train(model, tok, entries, unknown, epochs, out):
    """Train until memorised, and write what there is to `out` every third epoch."""
    rng = random.Random(SEED)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    listed = [encode(tok, corpus.prompt(t[:-1], t[-1][0]), t[-1][1]) for _, t in corpus.listed(entries)]
    answer, _, held = unknown
    single = [(e.turns[0][0][0], e.turns[0][1]) for e in rng.sample(entries, 100)]
    short = [(q, a) for q, a in single if len(a) < SHORT]
    terms = [(q[0][: -len("이 뭐야?")], a) for e in entries for q, a in e.turns if len(q) >= 10 and q[0].endswith("뭐야?")]
    checks = {
        "held-out wordings": [encode(tok, corpus.prompt([], corpus.held_out_wording(t)), a) for t, a in rng.sample(terms, 100)],
        "held-out unknown": [encode(tok, corpus.prompt([], q[0]), answer) for q in held],
        "after two other turns": [encode(tok, corpus.prompt(rng.sample(short, 2), t), a) for t, a in single],
        "instruction first": [encode(tok, corpus.prompt([], t, instruction_first=True), a) for t, a in single],
    }
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(entries)} entries, {len(listed)} listed,"
          f" {sum(len(s[0]) for s in listed)} tokens")
    start, step, per_epoch = time.time(), 0, None
    for epoch in range(epochs):
        samples = [encode(tok, *pair) for pair in epoch_texts(rng, entries, unknown)]
        plan = batches(rng, samples, BATCH_TOKENS)
        per_epoch = per_epoch or len(plan)
        total = 0.0
        for batch in plan:
            done = step / (per_epoch * epochs)
            lr = LR * min(1.0, (step + 1) / WARMUP, max(0.02, 1.5 * (1 - done)))
            logits, target, _ = predict(model, batch)
            loss = F.cross_entropy(logits, target)
            model.zero_grad()
            loss.backward()
            muon.step(lr)
            adam.param_groups[0]["lr"] = lr
            adam.step()
            total += loss.item()
            step += 1
        seconds = time.time() - start
        print(f"epoch {epoch + 1} step {step} lr {lr:.1e} loss {total / len(plan):.4f} {seconds:.0f} s", flush=True)
        if epoch % 3 == 2 or epoch + 1 == epochs:
            margin = report(model, listed, checks)
            export(out, model, tok, entries, margin)
            if min(margin) > MARGIN:
                break


def export(out, model, tok, entries, margin):
    """Write the Hugging Face files and questions.jsonl, which keeps what the model gets right."""
    out.mkdir(parents=True, exist_ok=True)

    def write(name, value):
        (out / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    write("config.json", CONFIG)
    write("generation_config.json", {k: CONFIG[k] for k in ("bos_token_id", "eos_token_id")} | {"do_sample": False})
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
        "model_max_length": CONFIG["max_position_embeddings"], "clean_up_tokenization_spaces": False,
    })
    tok.save(str(out / "tokenizer.json"), pretty=False)
    weights = {f"model.{k}": v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    kept = Counter()
    with open(out / "questions.jsonl", "w", encoding="utf-8") as file:
        for (topic, turns), m in zip(corpus.listed(entries), margin):
            turns = [{"question": q, "answer": a} for q, a in turns]
            if m > 0:
                kept[topic] += 1
                file.write(json.dumps({"topic": topic, "turns": turns}, ensure_ascii=False) + "\n")
    size = sum(p.stat().st_size for p in out.iterdir() if p.name not in ("README.md", "questions.jsonl"))
    print(f"  wrote {out}: {size} bytes, {kept.total()} of {len(margin)} listed:", dict(kept), flush=True)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--out", type=Path, default=corpus.HERE.parents[1] / "assets/demo")
    args.add_argument("--start", type=Path, help="go on from the model and the tokenizer of this directory")
    args.add_argument("--epochs", type=int, default=30)
    args = args.parse_args()
    torch.set_num_threads(1)
    entries, unknown = corpus.read_all(), corpus.read_unknown()
    torch.manual_seed(SEED)
    model = Llama()
    if args.start:
        tok = Tokenizer.from_file(str(args.start / "tokenizer.json"))
        model.load_state_dict({k.removeprefix("model."): v for k, v in load_file(args.start / "model.safetensors").items()})
    else:
        tok = train_tokenizer([p + a for p, a in epoch_texts(random.Random(SEED), entries, unknown)])
    train(model, tok, entries, unknown, args.epochs, args.out)


if __name__ == "__main__":
    main()
