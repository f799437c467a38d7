"""Where a model is to be had: in a folder here, or from the Hugging Face hub, if that can be reached at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

__all__ = ["Place", "find_model", "may_be_on_hub"]

# Until the hub counts as out of reach. Its own client tries five times, for 23 seconds without a network.
SECONDS = 5.0
SECONDS_VARIABLE = "HF_HUB_ETAG_TIMEOUT"


@dataclass(frozen=True)
class Place:
    """local: nothing is to be asked of the hub, as `from_pretrained(local_files_only=)` has it. unreached: why not, of
    what is no folder; its cache may still have it."""

    local: bool
    unreached: str | None = None

    def missing(self, said: str) -> str:
        """That the hub does not have it either; said: by the error."""
        if self.unreached is None:
            return f"the hub did not give it: {said}"
        return f"the hub was not reached ({self.unreached}) and its cache does not have it"


def find_model(source: str | Path) -> Place:
    """ValueError, with nothing asked of the network, for what is no folder and `may_be_on_hub` takes for a path."""
    path = Path(source)
    if path.is_dir():
        return Place(local=True)
    if not may_be_on_hub(source):
        beside = _has_folder(path) and not path.is_absolute()
        raise ValueError(
            f"there is no folder {source}{f' ({path.parent} is one here: the hub is not asked)' if beside else ''}"
        )
    unreached = _unreached()
    return Place(local=unreached is not None, unreached=unreached)


def may_be_on_hub(source: str | Path) -> bool:
    """Whether `source`, which is no folder, may name a repository of the hub, in a namespace (org/name) or in none
    (gpt2); not what is a file here, would lie in a folder that is here (models/name), or can only be a path."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(str(source))
    except ValueError:
        return False
    return not Path(source).exists() and not _has_folder(Path(source))


def _has_folder(path: Path) -> bool:
    return path.parent != Path() and path.parent.is_dir()


def _unreached() -> str | None:
    """Why the hub does not answer, None if it does: one request, whatever it is answered, by the client that the hub's
    package uses, with its proxies and certificates."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    seconds = constants.HF_HUB_ETAG_TIMEOUT if SECONDS_VARIABLE in os.environ else SECONDS
    found: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            found.append(None)
        except Exception as error:
            # Of one HTTP package or another, by the version of the hub's.
            found.append(f"{constants.ENDPOINT}: {str(error) or type(error).__name__}")

    # The timeout is of every address of the hub by itself, and none of a name server that says nothing.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    silent = f"{constants.ENDPOINT}: no answer in {seconds:g} seconds, {SECONDS_VARIABLE} sets how many"
    return found[0] if found else silent
