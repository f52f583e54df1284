"""Whatever a hub's library raised, made into one message: what happened, with which repository, what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from finetune.errors import FinetuneError, HubError, did_you_mean
from finetune.files import write_fault
from finetune.model.hubs.hub import Hub, Repo, WrongHash, user_error

KNOWN_MODELS = [
    f"Qwen/{family}-{size}{kind}"
    for family, sizes in (("Qwen2", ("0.5B", "1.5B", "7B")), ("Qwen2.5", ("0.5B", "1.5B", "3B", "7B")))
    for size in sizes
    for kind in ("", "-Instruct")
]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_BROKEN = ("ConnectionError", "ConnectError", "ChunkedEncodingError", "NetworkError")
_AGAIN = "Run the command again: it goes on where it stopped."


def explain(error: BaseException, repo: Repo, hub: Hub, *, reached: bool = False) -> FinetuneError | None:
    """The error to raise for what `hub` raised over `repo`; None where it is a fault of the program.

    Libraries wrap what happened in errors of their own; the causes are looked through as well.

    Args:
        reached: The hub had answered before.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, FinetuneError):
            return cause
        if isinstance(cause, OSError) and cause.errno in _DISK:
            fix = f"Make room, or set {hub.cache} to a folder on another disk. What has arrived is kept."
            return write_fault(cause, hub.root(repo), fix=fix)
        if isinstance(cause, WrongHash):
            return wrong_hash(cause, repo, hub)
    for cause in causes:
        if (status := _status(cause)) is not None:
            return refusal(status, _retry_after(cause), repo, hub)
    if any(_is_kind(cause, "Timeout") for cause in causes):
        return HubError(f"{hub.title} did not answer in time", where=str(repo), fix=_AGAIN)
    if any(_is_kind(cause, *_BROKEN) for cause in causes):
        if reached:
            return HubError(f"the connection to {hub.title} broke off", where=str(repo), fix=_AGAIN)
        return unreachable(repo, hub, _reason(causes))
    return None


def _probable(repo: Repo) -> list[str]:
    """What a model's name was probably meant to be: a known model, or where it has no owner, a folder here."""
    if repo.kind != "model":
        return []
    try:
        here = [] if "/" in repo.id else sorted(entry.name for entry in os.scandir() if entry.is_dir())
    except OSError:  # the current folder was removed, or may not be listed
        here = []
    return [*here, *KNOWN_MODELS]


def is_refused(error: BaseException) -> bool:
    """Whether the hub answered that there is nothing for this user, so that what is cached must not be used."""
    return any(_status(cause) in (401, 403, 404) for cause in _causes(error))


def refusal(status: int, retry_after: str | None, repo: Repo, hub: Hub) -> FinetuneError:
    """What a hub's HTTP status means for the user."""
    kind = user_error(repo.kind)
    token = f"Set {hub.token} to a token that may read it." if hub.token else "It may have been moved."
    if status == 401:
        what = f"{hub.title} does not show it (401): it is private or gated, or there is no such {repo.kind}"
        return kind(what, where=str(repo), fix=did_you_mean(repo.id, _probable(repo), token))
    if status == 403:
        what = f"{hub.title} does not give access to it (403)"
        return kind(what, where=str(repo), fix=f"Accept its terms on its page, if it has any. {token}")
    if status == 404:
        what = f"there is neither such a folder here nor such a {repo.kind} on {hub.title} (404)"
        if repo.revision:
            what = f"{hub.title} has no such {repo.kind}, or it has no revision {repo.revision!r} (404)"
        return kind(what, where=str(repo), fix=did_you_mean(repo.id, _probable(repo), f"If it is private: {token}"))
    if status == 429:
        wait = f"in {retry_after} seconds" if retry_after and retry_after.isdigit() else "in some minutes"
        what = f"{hub.title} has had too many requests from here (429)"
        return HubError(what, where=str(repo), fix=f"Run the command again {wait}; a token may raise the limit.")
    return HubError(f"{hub.title} answers with error {status}", where=str(repo), fix=_AGAIN)


def unreachable(repo: Repo, hub: Hub, reason: str) -> FinetuneError:
    """The hub cannot be asked, and nothing is cached."""
    return user_error(repo.kind)(
        f"there is no such folder here, it is not in the hub cache, and {hub.title} cannot be reached ({reason})",
        where=str(repo),
        fix=did_you_mean(repo.id, _probable(repo), f"Go online, or copy the {repo.kind}'s folder here and name it."),
    )


def wrong_hash(error: WrongHash, repo: Repo, hub: Hub) -> FinetuneError:
    """A file arrived damaged, and was removed."""
    return HubError(
        f"{error.file.name} arrived damaged ({error.found} where {hub.title} says {error.file.digest}) and was removed",
        where=str(repo),
        fix="Run the command again. If it happens again, the hub or the mirror itself has a damaged file.",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and what a batch of downloads collected."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        collected = getattr(cause, "failed_files", None)
        waiting += [cause.__cause__, cause.__context__, *(collected.values() if isinstance(collected, dict) else ())]


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _retry_after(error: BaseException) -> str | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = getattr(error, "retry_after", None) or headers.get("Retry-After")
    return None if seconds is None else str(seconds)


def _is_kind(error: BaseException, *names: str) -> bool:
    """Whether a class of the error is called so: four libraries have four classes for the same thing."""
    return any(kind.__name__.endswith(names) for kind in type(error).__mro__)


def _reason(causes: list[BaseException]) -> str:
    """The innermost reason, in one short line."""
    text = str(causes[-1]) or type(causes[-1]).__name__
    return text.splitlines()[0][:120]
