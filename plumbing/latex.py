"""What a reader may skip: whether two MATH answers in LaTeX have the same value (math-verify)."""
import logging
import re

from plumbing.files import InputError

# Spellings that math-verify reads as another value, or not at all, and what it reads.
SPELLINGS = [(re.compile(wrong), right) for wrong, right in (
    (r"\\(?:mathrm|mathit|operatorname|text\w*)\s*\{\s*([a-z])\s*\}", r" \1"),   # \mathrm{i}
    (r"(?<=\d)\s+(?=[ei]\b)", ""),                                               # 3 i
    (r"\\\\\s*\[[^]\d]*[\d.]+\s*[a-z]{2}\]", r"\\\\"),                           # \\[4pt]
    (r"(?<=\d)(?:\{,\}|,?\\!,?\s*)(?=\d{3}(?!\d))", ""),                         # 30{,}000
    (r"(?<![\d.,])(\d+)\s+(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),              # 4 1/2
    (r"\\(?:boldsymbol|bm)\b", ""),
    ("\u221a" r"\s*(\d+|[a-z])", r"\\sqrt{\1}"),                                 # a root sign
    (r"\.(\s*\}?)\s*$", r"\1"),                                                  # circle.
    (r"(?<=\d)\s*(?:in|ft|yd|cm|mm)\s*(?:\^\{?[23]\}?|" "[\u00b2\u00b3])$", ""))]    # 24 in^2
# Words that change a number; math-verify drops what stands in \text{}.
WORDS = re.compile(r"\d|\b(?:hundred|thousand|million|billion|trillion|dozen|half|halves)\b")
TEXT = re.compile(r"\\(?:mathrm|mathit|operatorname|text\w*|mbox)\s*\{([^{}]*)\}")


def math_verify():
    """The optional package that compares MATH answers; InputError where it is absent."""
    try:
        import math_verify
    except ImportError:
        raise InputError("MATH answers are compared by math-verify: pip install "
                         "'math-verify[antlr4_13_2]'") from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify


def same_value(answer: str, gold: str) -> bool:
    """Whether two MATH answers, as LaTeX without dollars, have the same value (math-verify).

    Its time limit is an alarm: call this in the main thread.
    """
    compare, texts = math_verify(), [gold, answer]
    words = [[WORDS.findall(inside) for inside in TEXT.findall(text)] for text in texts]
    if max(map(len, texts)) > 300 or [*filter(None, words[0])] != [*filter(None, words[1])]:
        return False                            # too long to compare in time; or 3 and 3 million
    for wrong, right in SPELLINGS:
        texts = [wrong.sub(right, text) for text in texts]
    values = [compare.parse(f"\\boxed{{{text}}}") for text in texts]
    return bool(all(values)) and bool(compare.verify(*values))
