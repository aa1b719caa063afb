"""The module as a user has it: `pip install ./python pytest && pytest python/tests`."""
import gc
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import aoji
import numpy as np
import pytest

QUESTION = "넌 누구니?"


@pytest.fixture(scope="module")
def engine():
    return aoji.Engine("demo", device="cpu")


@pytest.fixture(scope="module")
def answer(engine):
    return engine.chat(QUESTION).read()


def test_an_answer_comes_in_pieces(engine):
    generation = engine.chat(QUESTION)
    pieces = list(generation)
    assert len(pieces) > 5 and "데모 모델" in "".join(pieces)
    assert generation.text == "".join(pieces) and generation.finish_reason == "stop"
    timings = generation.timings
    assert timings["prompt_tokens"] == len(engine.prompt(QUESTION)) and timings["tokens"] == len(generation.tokens)
    assert list(generation) == [] and generation.read() == generation.text


def test_messages_system_and_prompt(engine, answer):
    assert engine.chat([{"role": "user", "content": QUESTION}]).read() == answer
    assert engine.generate(engine.prompt(QUESTION)).read() == answer
    system = engine.prompt(QUESTION, system="짧게 답해.")
    assert "짧게 답해." in engine.detokenize(system) and system != engine.prompt(QUESTION)
    assert engine.generate(system, max_tokens=5).read() == engine.chat(QUESTION, system="짧게 답해.", max_tokens=5).read()


def test_options(engine, answer):
    short = engine.chat(QUESTION, max_tokens=3)
    assert answer.startswith(short.read()) and short.finish_reason == "length" and len(short.tokens) == 3
    stop = answer[len(answer) // 2:][:4]
    assert engine.chat(QUESTION, stop=stop).read() == answer[:answer.index(stop)]
    assert engine.chat(QUESTION, stop=[stop], include_stop=True).read() == answer[:answer.index(stop)] + stop
    assert engine.chat(QUESTION, speculate=True).read() == answer
    with pytest.raises(aoji.InputError, match="no way to speculate"):
        engine.chat(QUESTION, speculate="often")
    with pytest.raises(aoji.InputError, match="a smaller model"):
        engine.chat(QUESTION, speculate="model")
    warm = [engine.chat(QUESTION, temperature=2.0, seed=seed, max_tokens=20).read() for seed in (1, 1, 2, 3, 4)]
    assert warm[0] == warm[1] and len(set(warm)) > 1
    first = short.tokens[0]
    assert engine.chat(QUESTION, logit_bias={first: -float("inf")}, max_tokens=1).tokens != [first]
    assert set(engine.recommended) <= {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


def test_a_cache_of_fp8(answer):
    assert aoji.Engine("demo", device="cpu", kv="fp8").chat(QUESTION).read() == answer


def test_a_session_keeps_a_conversation(engine, answer):
    session = engine.session()
    assert session.chat(QUESTION).read() == answer
    second = session.chat("고마워", max_tokens=4)
    said = second.read()
    assert second.timings["reused_tokens"] > 0
    roles = [(m["role"], m["content"]) for m in session.messages]
    assert roles == [("user", QUESTION), ("assistant", answer), ("user", "고마워"), ("assistant", said)]
    # An answer that somebody stops to read is in the conversation as far as it was read.
    left = session.chat("하늘은 왜 파래?")
    begun = next(left) + next(left)
    third = session.chat("왜?", max_tokens=1)
    assert [m["content"] for m in session.messages[4:]] == ["하늘은 왜 파래?", begun]
    assert list(left) == [] and left.text == begun and left.finish_reason is None
    del third
    gc.collect()


def test_logits_are_a_numpy_array(engine):
    session = engine.session(64)
    tokens = engine.tokenize("하늘은 파란색", bos=True)
    assert session.sync(tokens) == 0 and session.tokens == tokens and session.max_tokens == 64
    logits = session.logits()
    assert isinstance(logits, np.ndarray) and logits.shape == (engine.vocab,) and logits.dtype == np.float32
    logits[0] = 0  # it is the caller's own
    best = int(session.logits().argmax())
    assert engine.generate(tokens, max_tokens=1, ignore_eos=True).read() is not None
    session.step(best)
    assert session.tokens == tokens + [best]
    assert session.sync(tokens) == len(tokens) - 1


def test_scores(engine):
    good, bad = engine.score("피보나치 수열은", [" 수를 더한", " 하늘이"])
    assert good.logprob > bad.logprob and good.logprob == pytest.approx(sum(good.logprobs), abs=1e-4)
    prefix, (a, b) = engine.tokenize("피보나치 수열은", bos=True), (engine.tokenize(" 수를"), engine.tokenize(" 하늘이"))
    session = engine.session()
    assert [s.logprob for s in session.score(prefix, [a, b])] == [s.logprob for s in engine.score(prefix, [a, b])]
    logits = (session.sync(prefix), session.logits())[1].astype(np.float64)
    log_softmax = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert session.score(prefix, [a[:1]])[0].logprob == pytest.approx(log_softmax[a[0]], abs=1e-4)


def test_a_batch_gives_what_each_gets_alone(engine):
    prompts = [engine.prompt(q) for q in (QUESTION, "피보나치 수열이 뭐야?", "고마워")]
    together = engine.batch(prompts, sequences=2, max_tokens=24)
    alone = [engine.batch([p], sequences=1, max_tokens=24)[0] for p in prompts]
    assert [(a.text, a.tokens, a.finish_reason) for a in together] == [(a.text, a.tokens, a.finish_reason) for a in alone]
    assert all(len(a.tokens) <= 24 and a.timings["tokens"] == len(a.tokens) for a in together)


def test_tokens(engine):
    text = "안녕하세요 <|end_of_text|> 🫠"
    assert engine.detokenize(engine.tokenize(text)) == text
    assert engine.tokenize(text, bos=True)[0] == engine.bos
    assert len(engine.tokenize(text, special=True)) < len(engine.tokenize(text))
    assert engine.eos and engine.max_context > 0 and not engine.is_gpu and "aoji.Engine" in repr(engine)


def test_errors(engine):
    for kind, call in [
        (aoji.NoModelError, lambda: aoji.Engine("no/such-model")),
        (aoji.InputError, lambda: aoji.Engine("demo", device="tpu")),
        (aoji.InputError, lambda: aoji.Engine("demo", device="cpu", kv="int8")),
        (aoji.InputError, lambda: engine.chat(QUESTION, temperature=-1)),
        (aoji.InputError, lambda: engine.generate([])),
        (aoji.InputError, lambda: engine.generate([10**6])),
        (aoji.InputError, lambda: engine.batch([[1]], sequences=99)),
        (aoji.InputError, lambda: aoji.Engine("demo", device="cpu", sequences=2**63, cache_tokens=512)),
        (aoji.ContextError, lambda: engine.batch([[1] * 600], max_tokens=2**64 - 500)),
        (aoji.InputError, lambda: engine.chat([])),
        (aoji.ContextError, lambda: engine.generate([1] * 100_000)),
        (aoji.ContextError, lambda: engine.session(4).sync([1] * 5)),
        (TypeError, lambda: engine.chat(QUESTION, temprature=1)),
        (TypeError, lambda: engine.chat(QUESTION, stop=5)),
        (TypeError, lambda: engine.generate(5)),
        (TypeError, lambda: engine.chat([{"role": "user"}])),
        (OverflowError, lambda: engine.chat(QUESTION, max_tokens=-1)),
    ]:
        with pytest.raises(kind) as error:
            call()
        assert str(error.value), kind
    assert issubclass(aoji.ContextError, aoji.AojiError)
    with pytest.raises(aoji.NoModelError, match="aoji pull"):
        aoji.Engine("no/such-model")


@pytest.mark.skipif(sys.platform != "linux", reason="a limit that only Linux has in this form")
def test_without_threads():
    # with 128 TiB for the stack of a thread, none starts
    code = "import aoji\ntry: aoji.Engine('demo', device='cpu')\nexcept aoji.AojiError as e: print(e)"
    environment = os.environ | {"RUST_MIN_STACK": str(2**47)}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "no more threads" in said.stdout and "panicked" not in said.stderr


def test_other_threads_run_meanwhile(engine, answer):
    texts, turns = [None] * 4, 0

    def ask(i):
        texts[i] = engine.chat(QUESTION).read()

    threads = [threading.Thread(target=ask, args=[i]) for i in range(len(texts))]
    [t.start() for t in threads]
    while any(t.is_alive() for t in threads):
        turns += 1
        time.sleep(0.001)
    assert texts == [answer] * len(texts) and turns > 1


def test_leaving_early_ends_the_work(engine):
    session = engine.session()
    with session.generate("가나다", ignore_eos=True) as generation:
        next(generation)
    assert list(generation) == []
    # What was computed ahead of the reader stays few tokens.
    assert len(session.tokens) < len(engine.tokenize("가나다", bos=True)) + 64
    for _ in range(50):
        next(session.generate("가나다", ignore_eos=True))
    assert threading.active_count() < 5


@pytest.mark.parametrize("work", ["engine.chat('넌 누구니?', ignore_eos=True).read()", "engine.batch(['가'] * 200, ignore_eos=True, max_tokens=900)"])
def test_ctrl_c(work):
    # As at a terminal; a shell's background jobs ignore the signal.
    code = "import aoji, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"engine = aoji.Engine('demo', device='cpu', context=1000)\nprint('ready', flush=True)\nwhile True: {work}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (1, 130, -signal.SIGINT) and "KeyboardInterrupt" in errors


def test_the_command(answer):
    command = pathlib.Path(sys.executable).parent / "aoji"
    said = subprocess.run([command, "generate", "--device", "cpu", "--question", QUESTION], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == answer.strip()
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.split() == ["aoji", aoji.__version__]


def test_types():
    folder = pathlib.Path(aoji.__file__).parent
    assert (folder / "py.typed").exists() and os.path.getsize(folder / "_aoji.pyi")
    stubs = (folder / "_aoji.pyi").read_text()
    for kind in (aoji.Engine, aoji.Session, aoji.Generation, aoji.Answer, aoji.Score):
        for name in vars(kind):
            if not name.startswith("_"):
                assert f"def {name}(" in stubs, f"{kind.__name__}.{name} has no type"
