"""How answers are judged, each in [0, 1].

F1, ROUGE-L, classification, retrieval and count are LongBench's (THUDM/LongBench,
metrics.py) for its English tasks; `found` is RULER's string match.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import UserError

Metric = Callable[[str, Sequence[str]], float]  # (answer, right answers) -> score


def normal_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def f1(answer: str, gold: Sequence[str]) -> float:
    """Word overlap with the closest right answer."""
    return max((word_f1(normal_words(answer), normal_words(text)) for text in gold), default=0.0)


def word_f1(given: Sequence[str], right: Sequence[str]) -> float:
    same = (Counter(given) & Counter(right)).total()
    return 2 * same / (len(given) + len(right)) if same else 0.0


def rouge_l(answer: str, gold: Sequence[str]) -> float:
    """F-measure of the longest common subsequence, by the package rouge-score, without stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("ROUGE needs the package rouge-score; pip install 'ds-offload[eval]'") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return max((float(scorer.score(text, answer)["rougeL"].fmeasure) for text in gold), default=0.0)


def classification(answer: str, gold: Sequence[str]) -> float:
    """Whether the first line names the class."""
    line = answer.lstrip("\n").split("\n")[0].lower()
    return float(any(text.lower() in line for text in gold))


def retrieval(answer: str, gold: Sequence[str]) -> float:
    """Part of the numbers in the answer that are the right paragraph's: "Paragraph 7"."""
    return share_of_numbers(answer, {re.findall(r"\d+", text)[0] for text in gold if re.search(r"\d", text)})


def count(answer: str, gold: Sequence[str]) -> float:
    """Part of the numbers in the answer that are the right one."""
    return share_of_numbers(answer, set(gold))


def share_of_numbers(answer: str, right: set[str]) -> float:
    numbers = re.findall(r"\d+", answer)
    return sum(number in right for number in numbers) / len(numbers) if numbers else 0.0


def first_word(answer: str, gold: Sequence[str]) -> float:
    """Whether the first word is right, as in " 48213."."""
    words = answer.split()
    return float(bool(words) and words[0].rstrip(".") in gold)


def line_number(answer: str, gold: Sequence[str]) -> float:
    """LongEval's: the number in the answer, the one in <> if there is one, else the last."""
    marked = re.findall(r"<(\d+)>", answer)
    numbers = marked[:1] or re.findall(r"\d+", answer)[-1:]
    return float(numbers == list(gold))


def contains(answer: str, gold: Sequence[str]) -> float:
    """Whether a right answer occurs in it."""
    return float(any(text.lower() in answer.lower() for text in gold))


def found(answer: str, gold: Sequence[str]) -> float:
    """Part of the right strings that occur in it."""
    return sum(text.lower() in answer.lower() for text in gold) / len(gold)
