"""Korean particles: which form follows a word depends on whether its last syllable ends in a consonant."""

# How letters and digits are read aloud decides for words such as "GPU" or "bf16".
CONSONANT_FINAL = set("LMNRlmnrt013678")


def josa(word, after_consonant, after_vowel):
    """The particle that fits after `word`."""
    last = [c for c in word if c.isalnum()][-1]
    if "가" <= last <= "힣":
        closed = (ord(last) - ord("가")) % 28 != 0
    else:
        closed = last in CONSONANT_FINAL
    return after_consonant if closed else after_vowel
