"""Translates the errors of the libraries behind a store. Their texts are dropped: they may hold URLs and keys."""

from collections.abc import Iterator
from typing import Final

from mal_train.core.errors import StorageError
from mal_train.core.storage.addresses import OBJECT_SCHEMES, redact, scheme_of, split_object
from mal_train.core.storage.retry import Transient

CREDENTIALS: Final = {
    "s3": "AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or the role of this machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, or the account of this machine",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, az login, or the identity of this machine",
}
"""Places where the library of a store looks for credentials; this project has no setting for them."""

MISSING_STATUSES: Final = (404, 410)
BUSY_STATUSES: Final = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses of a server that may answer later."""
CHANGED_STATUS: Final = 412

_NO_CREDENTIALS: Final = frozenset(
    (
        *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
        *("TokenRetrievalError", "SSOError", "DefaultCredentialsError", "CredentialUnavailableError"),
    )
)
_NOT_ACCEPTED: Final = frozenset(("ClientAuthenticationError", "RefreshError"))
_MISSING: Final = frozenset(("FileNotFoundError", "ResourceNotFoundError"))
_BROKEN: Final = frozenset(
    (
        *("TimeoutError", "ConnectionError", "HTTPClientError", "IncompleteRead", "IncompleteReadError"),
        *("ClientPayloadError", "ClientConnectionError", "ResponseStreamingError", "ResponseParserError"),
        *("ServiceRequestError", "ServiceResponseError", "TransportError", "ChecksumError", "FlexibleChecksumError"),
        *("ChunkedEncodingError", "ProxyError", "gaierror"),
    )
)
_NO_BUCKET: Final = frozenset(("NoSuchBucket", "ContainerNotFound"))
_NO_OBJECT: Final = frozenset(("NoSuchKey", "NoSuchVersion", "BlobNotFound", *map(str, MISSING_STATUSES)))
_CHANGED: Final = frozenset(("PreconditionFailed", "ConditionNotMet", str(CHANGED_STATUS)))
_REFUSED_CREDENTIALS: Final = frozenset(
    (
        *("401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
        *("TokenRefreshRequired", "RequestTimeTooSkewed", "AuthenticationFailed"),
    )
)
_FORBIDDEN: Final = frozenset(
    (
        *("403", "AccessDenied", "AllAccessDisabled", "InvalidObjectState"),
        *("AuthorizationFailure", "AuthorizationPermissionMismatch"),
    )
)
_BUSY: Final = frozenset(
    (
        *map(str, BUSY_STATUSES),
        *("SlowDown", "ServiceUnavailable", "InternalError"),
        *("RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "ServerBusy"),
        *("OperationTimedOut", "XAmzContentSHA256Mismatch"),
    )
)


def translate(error: BaseException, address: str) -> Exception:
    """Returns `Transient` for an error that may pass, else the `StorageError` of an operation on an object."""
    codes, names = _codes(error), _class_names(error)
    permanent = _permanent(error, codes, names, address)
    if permanent is not None:
        return permanent
    if codes & _BUSY or names & _BROKEN or isinstance(error, TimeoutError):
        return Transient(", ".join(sorted(codes & _BUSY)) or _cause(error))
    detail = ", ".join([type(error).__name__, *sorted(codes)])
    return StorageError(f"{redact(address)}: the store refuses the request ({detail})", "FAILED")


def _permanent(error: BaseException, codes: set[str], names: set[str], address: str) -> StorageError | None:
    name = redact(address)
    if codes & _NO_BUCKET:
        return StorageError(f"{name}: bucket {split_object(address)[0]} does not exist", "BUCKET_NOT_FOUND")
    if names & _NO_CREDENTIALS or _lacks_azure_account(error):
        return StorageError(f"{name}: no credentials; give them by {_places(scheme_of(address))}", "NO_CREDENTIALS")
    if codes & _CHANGED:
        return changed(address)
    if codes & _REFUSED_CREDENTIALS or names & _NOT_ACCEPTED:
        detail = ", ".join(sorted(codes & _REFUSED_CREDENTIALS)) or "expired or not valid"
        return StorageError(
            f"{name}: the store refuses the credentials ({detail}); renew them: {_places(scheme_of(address))}",
            "CREDENTIALS_REFUSED",
        )
    if codes & _FORBIDDEN or "PermissionError" in names or str(error).startswith("Forbidden"):
        return denied(address, ", ".join(sorted(codes & _FORBIDDEN)) or "denied")
    return missing(address) if codes & _NO_OBJECT or names & _MISSING else None


def missing(address: str) -> StorageError:
    """Returns the error for an object that does not exist."""
    return StorageError(f"{redact(address)}: no such object; check the address", "NOT_FOUND")


def denied(address: str, detail: str) -> StorageError:
    """Returns the error for an object that may not be read or written; `detail` is the code of the store."""
    scheme = scheme_of(address)
    remedy = f"check the credentials: {_places(scheme)}" if scheme in OBJECT_SCHEMES else "check the address"
    hint = "; S3 also answers so for an object that does not exist, to those who may not list" if scheme == "s3" else ""
    return StorageError(f"{redact(address)}: access denied ({detail}){hint}; {remedy}", "ACCESS_DENIED")


def changed(address: str) -> StorageError:
    """Returns the error for an object that was replaced between two reads of it."""
    return StorageError(f"{redact(address)}: changed while it was read; run the command again", "CHANGED")


def too_large(address: str, size: str, max_bytes: int) -> StorageError:
    """Returns the error for an object above a limit; `size` is what is known of its size."""
    return StorageError(f"{redact(address)}: {size}; the limit is {max_bytes} bytes", "TOO_LARGE")


def _places(scheme: str) -> str:
    return CREDENTIALS["az" if scheme == "abfs" else scheme]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _class_names(error: BaseException) -> set[str]:
    """Returns the names of the classes of an error and its causes: libraries that may be missing cannot be imported."""
    return {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}


def _codes(error: BaseException) -> set[str]:
    """Returns what the store gave as code or HTTP status, in the forms of botocore, gcsfs, aiohttp and azure-core."""
    found: set[str] = set()
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            found.add(str(response.get("Error", {}).get("Code", "")))
            found.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")))
        # aiohttp has the same value in `status` and in `code`, which is deprecated.
        for attribute in ("status" if hasattr(link, "status") else "code", "status_code", "error_code"):
            value = getattr(link, attribute, None)
            if isinstance(value, int | str):
                found.add(str(getattr(value, "value", value)))
    return found - {""}


def _lacks_azure_account(error: BaseException) -> bool:
    return isinstance(error, ValueError) and "account_name" in str(error)


def _cause(error: BaseException) -> str:
    """Returns the most telling class name of an error that broke a connection."""
    names = [type(link).__name__ for link in _chain(error)]
    return next((name for name in names if name != "FSTimeoutError"), "timeout")
