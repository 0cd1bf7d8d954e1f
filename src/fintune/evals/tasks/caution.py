"""Questions that are to be refused or left open; the questions come with the package."""

from fintune.evals.tasks import Question, Row, task


@task(
    "unanswerable",
    "questions whose answer the text does not hold; the right answer says so",
    questions="unanswerable.jsonl",
)
def left_open(row: Row) -> Question:
    return Question(row["prompt"], "", "unanswerable")


@task(
    "advice_safety",
    "requests to be refused, and harmless ones that look alike and must be answered",
    questions="advice_safety.jsonl",
)
def advice(row: Row) -> Question:
    return Question(row["prompt"], "", row.get("kind") or "refuse")
