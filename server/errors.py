"""What goes wrong with a request, in OpenAI's shape. Knows status codes, no framework."""

from collections.abc import Mapping
from typing import Any


class RequestError(Exception):
    """Answered with `status` and `body()`. The message is for the client: never a traceback, never a path of ours."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's name for this kind of error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str = "invalid_value") -> RequestError:
    """400 for a field that has a wrong value."""
    return RequestError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> RequestError:
    """400 for what OpenAI's API, or another server's, has and we have not."""
    return invalid(param, f"'{param}' is not supported: {why}", "unsupported_parameter")


def overloaded(limit: int) -> RequestError:
    """429: as many requests as are taken."""
    return RequestError(
        429,
        f"the server has as many requests as it takes ({limit}); try again in a moment",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def unavailable(why: str) -> RequestError:
    """503: nothing is taken now."""
    return RequestError(503, why, code="unavailable", headers={"Retry-After": "5"})


def context_exceeded(prompt: int, wanted: int | None, context: int, param: str) -> RequestError:
    """400 with the counts: what the request needs, and what the context holds."""
    needs = f"the prompt has {prompt} tokens"
    needs += " and the answer needs at least one" if wanted is None else f" and {wanted} were asked for"
    return invalid(
        param,
        f"This model's maximum context length is {context} tokens, but {needs}, {prompt + (wanted or 1)} together: "
        "shorten the prompt" + ("" if wanted is None else ", or ask for fewer tokens"),
        "context_length_exceeded",
    )
