"""Questions over reports and their tables."""

from fintune.evals.tasks import Question, Row, task
from fintune.numbers import is_number_answer


@task("finqa", "questions over a report page; the answer is the number that a program computes")
@task("tatqa", "a number with its scale, or a span, from a table and the text around it")
@task("pacific", "TAT-QA as a conversation; some turns ask back")
@task("financebench", "questions over pages of annual reports")
@task("xbrl_extract", "a value, tag or formula read out of XBRL")
def number_or_span(row: Row) -> Question:
    """Graded as a number where the reference is one, else as a span of the text."""
    reference = str(row["answer"])
    return Question(row["prompt"], reference, "number" if is_number_answer(reference) else "span")


@task("convfinqa", "the last question of a conversation over a report page")
def executed(row: Row) -> Question:
    """`answer` is printed short ("1.7"), `exe_answer` is what the program gives (1.65246)."""
    printed = row.get("exe_answer") in (None, "")
    return number_or_span(row if printed else {**row, "answer": row["exe_answer"]})


@task("formula", "a formula is given, its result is asked")
def formula(row: Row) -> Question:
    return Question(row["prompt"], str(row["answer"]), "number")


@task("xbrl_term", "an XBRL term explained in a sentence; only a judge can grade it")
def term(row: Row) -> Question:
    return Question(row["prompt"], row["answer"], "text")


@task("finer", "US GAAP tags of figures, comma-separated, in order")
def tags(row: Row) -> Question:
    return Question(row["prompt"], row["answer"], "tags")
