"""Texts that tokenizers stumble over, by what is hard in them."""

HARD_TEXTS = {
    "prose": "It was the best of times, it was the worst of times; it was 1859, after all. Don't you think?",
    "code": 'def f(x: int) -> str:\n    """D."""\n    if x >= 10_000:\n        return f"{x!r:>10}"\n    return "\\n"\n',
    "chinese": "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "japanese": "吾輩は猫である。名前はまだ無い。カタカナも、ひらがなも。",
    "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "emoji": "family \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 flag \U0001f1e9\U0001f1ea "
    "tone \U0001f44d\U0001f3fd keycap 1\ufe0f\u20e3",
    "composed": "café, Ångström, naïve, Việt Nam",
    "crlf": "first\r\nsecond\r\n\r\nthird\rfourth\n\rfifth",
    "tabs": "\tone\t\ttwo\t \tthree \t",
    "nul": "before\x00after \x00\x00 end",
    "controls": "bell\x07 escape\x1b[31m delete\x7f nbsp\xa0 zero\u200bwidth bom\ufeff line\u2028separator",
    "long word": "pneumono" * 400,
    "long digits": "31415926535897932384626433832795" * 20,
    "long spaces": "a" + " " * 300 + "b" + "\n" * 50 + "c",
    "leading space": " one",
    "leading spaces": "    four",
    "leading newline": "\n\n  x = 1",
    "trailing": "end   \n\n",
    "one": "x",
    "space": " ",
    "empty": "",
    "markup": "<div class='a'>&amp;</div> <|im_start|>user <|im_end|> </s> <s> [INST] <unk> <0x41> <think> <|mask|>",
    "astral": "\U00010348 \U0001d54f \U0002070e \U000e0001",
}

DECOMPOSED = "cafe\u0301 au lait, A\u030angstro\u0308m"
"""Combining marks in decomposed order: an NFC tokenizer spells other bytes than the text's."""
