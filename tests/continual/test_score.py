"""Metrics of answers, against values worked out by hand and against other packages."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops.continual.score import METRICS, check_metric, macro_f1, majority_rate, score


def test_exact_match_and_choice() -> None:
    assert score("exact", "", "green", "green") == 1
    assert score("exact", "", "Green", "green") == 0
    assert score("choice", "", "B\nBecause of this.", "B\nBecause of that.") == 1
    assert score("choice", "", "A\nBecause of that.", "B\nBecause of that.") == 0


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_answer_scores_nothing(metric: str) -> None:
    assert score(metric, "a question", " \n", "an answer") == 0


def test_rouge_l_by_hand() -> None:
    pytest.importorskip("rouge_score", reason="needs pip install sculpt-ops[trace]")
    # "the cat on mat": 4 of 5 words written, 4 of 6 wanted.
    value = score("rouge-l", "", "The cat lay on mat.", "the cat sat on the mat")
    assert value == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    # Words of other scripts are words.
    assert score("rouge-l", "", "für die Straße", "für die Straße") == 1
    assert score("rouge-l", "", "支持", "支持") == 1
    assert score("rouge-l", "", "支持", "反对") == 0


def test_edit_similarity_by_hand() -> None:
    pytest.importorskip("rapidfuzz", reason="needs pip install sculpt-ops[trace]")
    # One of 2 x 4 letters to delete and one to insert.
    assert score("edit", "", "abcd", "abce") == pytest.approx(1 - 2 / 8)
    code = "x = f ( <NUM_LIT:2> , <STR_LIT:ab> , <NUM_LIT> , <STR_LIT> )"
    assert score("edit", "", code, "x = f ( 2 , ab , 0 ,  )") == 1


def test_sari_by_hand() -> None:
    # One-word texts: nothing of two words and more to keep, add or delete, which is right.
    assert score("sari", "old", "new", "new") == 1
    # Words a b c, to be a d. Written a c d: of a, c one is rightly kept (F1 of 1/2 and 1), d rightly added (1), b
    # rightly deleted (1). Pairs a-b, b-c, to be a-d; written a-c, c-d: none kept nor to be kept (1), none of two
    # rightly added (0), both deleted and both to be (1). Triples: one to delete, deleted (1), one added, none to be
    # added (F1 of 0 and 1: 0), none to keep (1). Fours: nothing at all (1).
    ones, twos, threes, fours = (2 / 3 + 1 + 1) / 3, (1 + 0 + 1) / 3, (1 + 0 + 1) / 3, 1
    assert score("sari", "a b c", "a c d", "a d") == pytest.approx((ones + twos + threes + fours) / 4)
    # One copy of two deleted where the reference has the other: of words kept and added all is right (1 and 1), the
    # deletion is of what the reference has (0). The published script says 11/12.
    assert score("sari", "a a b", "a b", "a b") == pytest.approx((2 / 3 + 1 + 1 + 1) / 4)
    # Of the four words to be kept two are: precision 1, recall 2/4 whatever copies they are, F1 2/3; the two deleted
    # are wrong. Pairs: one kept of three, F1 1/2, deletions wrong. Longer ones: none kept of one or two, deletions
    # wrong.
    ones, twos, longer = (2 / 3 + 1 + 0) / 3, (1 / 2 + 1 + 0) / 3, (0 + 1 + 0) / 3
    assert score("sari", "a a a b", "a b", "a a a b") == pytest.approx((ones + twos + 2 * longer) / 4)
    # To copy the question is not to simplify it.
    assert score("sari", "a b c d e", "a b c d e", "a c e") < score("sari", "a b c d e", "a c e", "a c e") == 1


def test_an_unknown_metric_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="metric: got 'bleu', wanted one of exact, choice, rouge-l, edit, sari"):
        check_metric("bleu")

    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"edit needs rapidfuzz.fuzz; pip install 'sculpt-ops\[trace\]'"):
        check_metric("edit")


@given(
    pairs=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", "", "no"])), min_size=1, max_size=30
    )
)
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs pip install sculpt-ops[bench]")
    answers, predictions = zip(*pairs, strict=True)
    expected = metrics.f1_score(answers, predictions, labels=sorted(set(answers)), average="macro", zero_division=0.0)
    assert macro_f1(answers, predictions) == pytest.approx(expected)


def test_the_majority_is_that_of_training() -> None:
    assert majority_rate(["a", "b", "b"], ["a", "a", "a", "b"]) == 0.25
    assert majority_rate(["c"], ["a", "b"]) == 0
