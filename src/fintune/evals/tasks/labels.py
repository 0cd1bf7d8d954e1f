"""Classification: the answer is one of the labels offered."""

from fintune.evals.tasks import Question, Row, task

SENTIMENTS = ("negative", "neutral", "positive")
STRENGTHS = ("strong", "moderately", "mildly")
SEVEN = (
    *(f"{strength} negative" for strength in STRENGTHS),
    "neutral",
    *(f"{strength} positive" for strength in reversed(STRENGTHS)),
)
QUERY = {"prompt": "query"}


@task("fpb", "sentiment of a sentence of financial news (Financial PhraseBank)", columns=QUERY)
@task("fiqa_sa", "sentiment of a financial post or headline", columns=QUERY)
@task("tfns", "sentiment of a financial tweet")
def sentiment(row: Row) -> Question:
    return _label(row, SENTIMENTS)


@task("nwgi", "sentiment of financial news in seven levels")
def seven_levels(row: Row) -> Question:
    return _label(row, SEVEN)


@task("headline", "whether a gold headline says a thing, yes or no", columns=QUERY)
def headline(row: Row) -> Question:
    return _label(row, ("Yes", "No"))


@task("ner", "the type of a named entity of a loan agreement")
def entity(row: Row) -> Question:
    return _label(row, ("location", "organization", "person"))


@task("banking77", "the intent of a bank customer's message, out of 77 that the prompt lists")
def intent(row: Row) -> Question:
    return _label(row, ())


def _label(row: Row, choices: tuple[str, ...]) -> Question:
    return Question(row["prompt"], row["answer"], "label", tuple(row.get("choices") or choices))
