"""The questions and answers of the demo model, read from topics/*.txt and tables.py, and the prompt format.

Lines of a topic file: `? Q | Q2 | ...` opens an entry (Q2... are other wordings of Q), `= TERM | Q2` opens one
with the usual ways to ask what TERM is, `?? Q | ...` is the next turn of the same conversation, `# ` lines before
the first entry are comments, and everything else is the answer.
"""

from dataclasses import dataclass, field
from pathlib import Path

import tables
from korean import josa

HERE = Path(__file__).parent
INSTRUCTION = "친절한 챗봇으로서 상대방의 요청에 최대한 자세하고 친절하게 답하자."
OTHER_INSTRUCTIONS = [
    "친절하게 답해 주세요.",
    "질문에 자세히 답하세요.",
    "당신은 친절한 인공지능 비서입니다. 질문에 정확하게 답하세요.",
    "상대방의 질문에 친절하고 정확하게 답하자.",
]
# Endings that mean the same: a question that ends in the first is also asked with the others.
ENDINGS = {
    "뭐야?": ["뭐예요?", "뭔가요?", "무엇인가요?", "뭐지?", "뭐니?", "뭔데?", "무엇입니까?"],
    "무엇인가요?": ["뭐야?", "뭔가요?", "무엇이에요?", "무엇입니까?", "뭐예요?"],
    "어디야?": ["어디예요?", "어디인가요?", "어디지?", "어디에 있어?", "어디니?"],
    "누구야?": ["누구예요?", "누구인가요?", "누구지?", "누구야"],
    "얼마야?": ["얼마예요?", "얼마인가요?", "얼마지?"],
    "알려줘": ["알려 줘", "알려주세요", "알려 주세요", "알려줄래?", "가르쳐줘", "말해줘"],
    "설명해줘": ["설명해 줘", "설명해주세요", "설명해 주세요", "설명해줄래?", "설명 부탁해", "설명해봐"],
    "작성해줘": ["작성해 줘", "작성해주세요", "작성해 주세요", "짜줘", "만들어줘", "보여줘", "써줘"],
    "추천해줘": ["추천해 줘", "추천해주세요", "추천해 주세요", "추천 부탁해"],
    "어떻게 해?": ["어떻게 하나요?", "어떻게 해요?", "어떻게 하면 돼?", "어떻게 해야 해?"],
    "어떻게 만들어?": ["어떻게 만들어요?", "어떻게 만드나요?", "어떻게 만들지?"],
    "있어?": ["있나요?", "있어요?", "있니?"],
    "왜 바뀌어?": ["왜 바뀌나요?", "왜 바뀌는 거야?"],
    "어떻게 달라?": ["어떻게 다른가요?", "뭐가 달라?", "어떻게 달라요?"],
    "어떻게 구해?": ["어떻게 구하나요?", "어떻게 계산해?", "어떻게 구해요?"],
    "영어로 뭐라고 해?": ["영어로 뭐예요?", "영어로 무엇인가요?", "영어로 알려줘", "영어로는?"],
    "뜻이 뭐야?": ["뜻은 무엇인가요?", "뜻을 설명해줘", "의미가 뭐야?", "뜻이 뭐예요?", "뜻은?"],
}
# Topics whose every wording is listed in questions.jsonl, not only the first.
ALL_WORDINGS = {"about", "aoji", "fibonacci", "english"}


@dataclass
class Entry:
    """One conversation: per turn its wordings (the listed one first) and its answer."""

    topic: str
    turns: list = field(default_factory=list)  # [([wording, ...], answer), ...]


def wordings_of_term(term):
    """The usual ways to ask what a term is; the first one is listed."""
    return [
        f"{term}{josa(term, '이', '가')} 뭐야?",
        f"{term}에 대해 설명해줘",
        f"{term}{josa(term, '이란', '란')} 무엇인가요?",
        f"{term}에 대해 알려주세요",
        f"{term}{josa(term, '은', '는')} 무엇인가요?",
        f"{term}{josa(term, '을', '를')} 설명해 주세요",
        f"{term}{josa(term, '이', '가')} 뭔지 알려줘",
        f"{term} 설명해줘",
        f"{term}에 대해 알려줘",
        f"{term}{josa(term, '이', '가')} 뭐예요?",
    ]


def held_out_wording(term):
    """A wording that is never trained on, to measure how well a stranger's words work."""
    return f"{term}{josa(term, '이', '가')} 무엇인지 알려줘"


def read_topic(path):
    """The entries of one topic file."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        mark, _, rest = line.partition(" ")
        parts = rest.split(" | ")
        if mark == "?":
            entries.append(Entry(path.stem, [(parts, [])]))
        elif mark == "=":
            entries.append(Entry(path.stem, [(wordings_of_term(parts[0]) + parts[1:], [])]))
        elif mark == "??":
            entries[-1].turns.append((parts, []))
        elif entries:
            entries[-1].turns[-1][1].append(line)
    for entry in entries:
        entry.turns = [(questions, "\n".join(answer).strip()) for questions, answer in entry.turns]
    return entries


def read_unknown():
    """The answer to questions outside the list, questions to train it on, and held-out ones."""
    answer, train, held = None, [], []
    for line in (HERE / "topics/unknown.txt").read_text(encoding="utf-8").splitlines():
        target, line = (held, line[2:]) if line.startswith("! ") else (train, line)
        if line.startswith("> "):
            answer = line[2:]
        elif line.startswith("= "):
            target.extend(wordings_of_term(term) for term in line[2:].split(", "))
        elif not line.startswith("# "):
            target.append([line])
    return answer, train, held


def read_all():
    """All entries, with every question checked to have one answer."""
    entries = []
    for path in sorted((HERE / "topics").glob("*.txt")):
        if path.stem != "unknown":
            entries += read_topic(path)
    entries += [Entry(topic, [(questions, answer)]) for topic, questions, answer in tables.entries()]
    seen = {}
    for entry in entries:
        for question in entry.turns[0][0]:
            assert question not in seen, f"{question!r} is asked in {seen[question]} and in {entry.topic}"
            seen[question] = entry.topic
        assert all(answer for _, answer in entry.turns), f"no answer: {entry}"
    _, train, held = read_unknown()
    for questions in train + held:
        assert not seen.keys() & set(questions), f"{questions} are listed and unknown"
    return entries


def listed(entries):
    """The conversations of questions.jsonl: (topic, [(question, answer), ...]), each prefix of turns its own."""
    for entry in entries:
        before = []
        for questions, answer in entry.turns:
            for question in questions if entry.topic in ALL_WORDINGS else questions[:1]:
                yield entry.topic, before + [(question, answer)]
            before = before + [(questions[0], answer)]


def prompt(turns, question, instruction=INSTRUCTION, instruction_first=False):
    """The prompt after `<|begin_of_text|>`: earlier turns, then the question with its instruction."""
    name = "Input" if instruction_first else "Question"
    text = "".join(f"### {name}:\n{q}\n\n### Response:\n{a}\n\n" for q, a in turns)
    blocks = [f"### {name}:\n{question}\n\n", f"### Instruction:\n{instruction}\n\n"]
    return text + "".join(blocks[::-1] if instruction_first else blocks) + "### Response:\n"
