# %% [markdown]
# # aoji from Python
# `pip install ./python`, then this file cell by cell in an editor or notebook, or `python examples/python/tour.py`.

# %% A model: "demo" is inside the module; a directory, a GGUF file, or OWNER/NAME after `aoji pull OWNER/NAME`.
import aoji
import numpy as np

engine = aoji.Engine("demo")
print(engine)

# %% An answer, piece by piece.
for piece in engine.chat("넌 누구니?"):
    print(piece, end="", flush=True)
print()

# %% A conversation: the session keeps what it has computed.
session = engine.session(system="짧게 답해.")
for question in ("피보나치 수열이 뭐야?", "고마워"):
    answer = session.chat(question, max_tokens=60)
    print(f"> {question}\n{answer.read().strip()}")
    if times := answer.timings:
        print(f"[{times['tokens_per_second']:.0f} tokens a second, {times['reused_tokens']} tokens reused]")

# %% The next token's probabilities.
session = engine.session(64)
session.sync("하늘은")
logits = session.logits()
probabilities = np.exp(logits - logits.max())
probabilities /= probabilities.sum()
for token in np.argsort(probabilities)[::-1][:3]:
    print(f"{probabilities[token]:.3f} {engine.detokenize([int(token)])!r}")

# %% Which of some answers is likelier?
answers = [" 파리입니다.", " 런던입니다."]
for text, score in zip(answers, engine.score("프랑스의 수도는", answers)):
    print(f"{score.logprob:8.3f} {text}")

# %% Several prompts at once: the weights are read once a step for all of them, and each gets what it would get alone.
for each in engine.batch([engine.prompt(q) for q in ("넌 누구니?", "고마워")], max_tokens=30):
    print(each.text.strip(), f"[{each.finish_reason}]")
