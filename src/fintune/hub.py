"""Errors of the Hugging Face hub, as what a user can act on."""

from huggingface_hub import errors

from fintune.errors import DataError, FintuneError, ModelError


def hub_error(
    error: Exception, name: str, *, setting: str, revision: str | None = None
) -> FintuneError:
    """One message for the hub's many errors; of the cause its class alone: no token, no URL.

    Args:
        name: hub id of a model or a data set.
        setting: the config key that takes a local path instead; `model.path` for a model.
    """
    model = setting == "model.path"
    what, kind = ("model", ModelError) if model else ("data set", DataError)
    page = f"https://huggingface.co/{'' if model else 'datasets/'}{name}"
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def is_a(*kinds: type[Exception]) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    if is_a(errors.GatedRepoError):
        what = f"{name} is gated: its licence must be accepted first"
        return kind(what, fix=f"accept it at {page} and set HF_TOKEN to a read token")
    if is_a(errors.RevisionNotFoundError):
        return kind(f"{name} has no revision {revision}", fix=f"see {page}")
    if is_a(errors.RepositoryNotFoundError, errors.HFValidationError):
        what = f"the hub knows no {what} {name}, and there is no such local path"
        return kind(what, fix=f"check the id and {setting}; a private or gated one needs HF_TOKEN")
    if type(error) is ValueError:  # of datasets: an unknown split or configuration
        return kind(f"{name}: {str(error)[:200]}", fix="check the source's split")
    what = f"{name} is not on this machine and the hub cannot be reached ({type(error).__name__})"
    return kind(what, fix=f"check the network, or set {setting} to a local copy")
