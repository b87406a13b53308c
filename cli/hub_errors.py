"""What went wrong between here and Hugging Face, in one line each: who can mend it, and how. Knows huggingface_hub's
errors and no files.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cli.hub_fetch import TRANSPORT_ERROR
from config.errors import UserError
from config.hub_cache import HubName
from config.registry import near_names

HOW_TO_GIVE_A_TOKEN = "HF_TOKEN in the environment, --token, or `hf auth login` once"


@contextmanager
def told(name: HubName, *, has_token: bool) -> Iterator[None]:
    """The errors of what is done in it as UserError; those of the disk as they are."""
    try:
        yield
    except GatedRepoError as error:
        raise _gated(name, has_token) from error
    except RepositoryNotFoundError as error:
        raise _not_found(name, has_token) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name.hub_id}: has no revision {name.revision or 'main'!r} on Hugging Face") from error
    except HfHubHTTPError as error:
        raise _answered(name, error) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{name}: is not on this machine, and HF_HUB_OFFLINE is set: unset it to download, or give the directory "
            "of a model that is here (`torchchat list --here`)"
        ) from error
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise UserError(f"{name}: {error}") from error
    except TRANSPORT_ERROR as error:
        raise UserError(
            f"{name}: {constants.ENDPOINT} cannot be reached, or the connection broke ({type(error).__name__}: "
            f"{str(error)[:120] or 'no reason given'}); what has arrived is kept: run it again when the network is back"
        ) from error


def _gated(name: HubName, has_token: bool) -> UserError:
    page = f"{constants.ENDPOINT}/{name.hub_id}"
    if has_token:
        return UserError(
            f"{name}: the account of this token has no access yet: ask for it at {page}, or give the token of another "
            f"account ({HOW_TO_GIVE_A_TOKEN})"
        )
    return UserError(
        f"{name}: its makers want to be asked: accept their terms at {page}, then give a token from "
        f"{constants.ENDPOINT}/settings/tokens ({HOW_TO_GIVE_A_TOKEN})"
    )


def _not_found(name: HubName, has_token: bool) -> UserError:
    near = near_names(name.hub_id)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    private = "this token may not see it" if has_token else f"it is private and needs a token ({HOW_TO_GIVE_A_TOKEN})"
    return UserError(f"{name.hub_id}: is not on Hugging Face, or {private}{meant}")


def _answered(name: HubName, error: HfHubHTTPError) -> UserError:
    code = error.response.status_code
    if code in (401, 403):
        return UserError(
            f"{name}: Hugging Face refused the token or its rights ({code}): give one that may read this repository "
            f"({HOW_TO_GIVE_A_TOKEN})"
        )
    if code == 429:
        wait = error.response.headers.get("Retry-After", "")
        when = f"in {wait} s" if wait.isdecimal() else "later"
        return UserError(f"{name}: Hugging Face has had too many requests from here (429): try again {when}")
    if code == 404:
        return UserError(f"{name}: a file that its list names is not there (404): try again, or name a revision")
    return UserError(f"{name}: Hugging Face answered with the error {code}: try again later")
