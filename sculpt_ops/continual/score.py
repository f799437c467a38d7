"""How good an answer is: exact match, and the metrics of generation tasks; figures of a whole classification task."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

__all__ = ["METRICS", "check_metric", "macro_f1", "majority_rate", "score"]

WORDS = re.compile(r"\w+")
LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT(?::(.*?))?>", re.DOTALL)
LONGEST_NGRAM = 4


def score(metric: str, prompt: str, prediction: str, answer: str) -> float:
    """The score, in [0, 1], of one answer by one of `METRICS`; 0 for an empty answer.

    exact: the same text. choice: the same first character, what follows is the reasoning (ScienceQA in TRACE).
    rouge-l: F-measure of the longest common subsequence of words (Lin 2004), words of any script in lower case.
    edit: 1 - indel distance over the total length, of Python code with its placeholders for literals resolved (Py150 in
    CodeXGLUE and TRACE). sari: of a simplification of `prompt` (Xu et al. 2016, TACL 4:401), one reference, by the
    formula of the datasets package that TRACE calls, of words in lower case without punctuation.
    """
    if not prediction.strip():
        return 0.0
    return METRICS[metric](prompt, prediction, answer)


def check_metric(metric: object) -> None:
    """ValueError for a metric that there is not, ImportError for one whose package is not installed."""
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, wanted one of {', '.join(METRICS)}")
    METRICS[metric]("", "a", "a")


def _rouge_l(prompt: str, prediction: str, answer: str) -> float:
    return float(_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    # The package's own words are ASCII letters and digits: of Straße and für it leaves pieces, of Chinese nothing.
    class Words:
        def tokenize(self, text: str) -> list[str]:
            return WORDS.findall(text.lower())

    return _optional("rouge_score.rouge_scorer", "rouge-l").RougeScorer(["rougeL"], tokenizer=Words())


def _edit(prompt: str, prediction: str, answer: str) -> float:
    ratio = _optional("rapidfuzz.fuzz", "edit").ratio
    return float(ratio(_resolved(prediction), _resolved(answer))) / 100


def _resolved(code: str) -> str:
    code = code.replace("<NUM_LIT>", "0")
    return LITERAL.sub(lambda found: found[1] or "", code)


def _sari(prompt: str, prediction: str, answer: str) -> float:
    source, written, wanted = (WORDS.findall(text.lower()) for text in (prompt, prediction, answer))
    totals = [0.0, 0.0, 0.0]
    for size in range(1, LONGEST_NGRAM + 1):
        before, after, goal = (Counter(_ngrams(words, size)) for words in (source, written, wanted))
        kept, may_keep = before & after, before & goal
        added, may_add = set(after) - set(before), set(goal) - set(before)
        right, deleted = kept & goal, before - after
        # Precision is a mean over distinct n-grams, recall a share of all of them: so in the published script.
        keep = _f1(_share(right, kept), _ratio(right.total(), may_keep.total()))
        add = _f1(_ratio(len(added & may_add), len(added)), _ratio(len(added & may_add), len(may_add)))
        # Of deletions the precision alone: what was left in costs where it was kept. Deleted wrongly is what the
        # reference has, as often as it has it, even if one of several copies is left.
        delete = _share(deleted - goal, deleted)
        totals = [total + part for total, part in zip(totals, (keep, add, delete), strict=True)]
    return sum(totals) / (3 * LONGEST_NGRAM)


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _share(right: Counter[tuple[str, ...]], of: Counter[tuple[str, ...]]) -> float:
    """Mean over the distinct n-grams of `of` of the share that is right."""
    return _ratio(sum(right[gram] / count for gram, count in of.items()), len(of))


def _ratio(part: float, whole: int) -> float:
    # Nothing to do and nothing done is done right.
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _optional(module: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"metric: {metric} needs {module}; pip install 'sculpt-ops[trace]'") from error


METRICS: dict[str, Callable[[str, str, str], float]] = {
    "exact": lambda prompt, prediction, answer: float(prediction == answer),
    "choice": lambda prompt, prediction, answer: float(prediction.strip()[0] == answer.strip()[0]),
    "rouge-l": _rouge_l,
    "edit": _edit,
    "sari": _sari,
}


def macro_f1(answers: Sequence[str], predictions: Sequence[str | None]) -> float:
    """Mean over the answers that occur of the harmonic mean of precision and recall.

    A prediction that is no answer at all counts against recall only. ValueError unless there are as many of both.
    """
    right = Counter(answer for answer, given in zip(answers, predictions, strict=True) if answer == given)
    there, given = Counter(answers), Counter(predictions)
    return sum(2 * right[answer] / (there[answer] + given[answer]) for answer in there) / len(there)


def majority_rate(train: Iterable[str], test: Sequence[str]) -> float:
    """The accuracy of always giving the answer that is the most frequent in training (the first of equals)."""
    return test.count(Counter(train).most_common(1)[0][0]) / len(test)
