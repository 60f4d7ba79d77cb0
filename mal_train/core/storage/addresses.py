"""Addresses of files: local paths, and objects in stores. Opens nothing.

    s3://BUCKET/KEY                           Amazon S3 and stores that speak its protocol
    gs://BUCKET/KEY                           Google Cloud Storage
    az://CONTAINER/KEY, abfs://CONTAINER/KEY  Azure Blob Storage
    https://HOST/PATH, http://HOST/PATH       web servers, read only

Everything else is a local path. An address may grant access: by a user and password, or by a signed query. `redact`
removes both; every message, journal and provenance names an address by `redact`.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import quote, urlsplit

from mal_train.core.errors import BadImage, ConfigError

OBJECT_SCHEMES: Final = ("s3", "gs", "az", "abfs")
"""Schemes of stores that are read with the user's credentials."""
WEB_SCHEMES: Final = ("https", "http")
"""Schemes that are read without credentials, other than those in the address."""

Location = Path | str
"""A local path, or the address of an object or of a prefix of objects; an address is always a string."""

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BUCKET: Final = re.compile("[^:]*")
_HOST: Final = re.compile(r"(\[[^]]*]|[^:]*)(:[0-9]*)?")
_REDACTED: Final = "?[redacted]"


def scheme_of(address: Location) -> str:
    """Returns the scheme of an address in lower case; "" for a local path.

    >>> scheme_of("S3://bucket/a.jpg"), scheme_of("photos/a.jpg"), scheme_of("C:/photos")
    ('s3', '', '')
    """
    match = _SCHEME.match(address) if isinstance(address, str) else None
    return match[1].lower() if match else ""


def is_remote(address: Location) -> bool:
    """Returns True for the address of an object in a store or on a web server; False for a local path.

    >>> is_remote("s3://bucket/a.jpg"), is_remote("http://host/a.jpg"), is_remote("a.jpg"), is_remote(Path("a.jpg"))
    (True, True, False, False)
    """
    return scheme_of(address) in (*OBJECT_SCHEMES, *WEB_SCHEMES)


def parse_location(text: str) -> Location:
    """Returns the location that a user gave: a path, or a checked address.

    >>> parse_location("s3://bucket/boxes.json")
    's3://bucket/boxes.json'

    Raises:
        ConfigError: the scheme is not supported, or the address names no bucket, container or host, or a version.
    """
    scheme = scheme_of(text)
    if not scheme:
        return Path(text)
    if not is_remote(text):
        known = ", ".join(f"{name}://" for name in (*OBJECT_SCHEMES, *WEB_SCHEMES))
        raise ConfigError(f"{redact(text)}: scheme {scheme!r} is not supported; use {known} or a local path")
    if scheme == "s3" and "?versionId=" in text:
        raise ConfigError(f"{redact(text)}: names a version; the current version of an object is read: omit ?versionId")
    if not _has_place(text):
        place = "host" if scheme in WEB_SCHEMES else "bucket"
        raise ConfigError(f"{redact(text)}: names no {place}; give {scheme}://{place.upper()}/PATH")
    return text


def _has_place(address: str) -> bool:
    if scheme_of(address) in OBJECT_SCHEMES:
        bucket = split_object(address)[0]
        return bool(bucket) and ":" not in bucket
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def redact(address: Location) -> str:
    """Returns an address for messages and files: without user, password, query and fragment.

    >>> redact("https://me:secret@example.org/a.jpg?X-Amz-Signature=0f3c#top")
    'https://example.org/a.jpg?[redacted]'
    >>> redact("s3://bucket/a#1.jpg"), redact(Path("a?.jpg"))
    ('s3://bucket/a#1.jpg', 'a?.jpg')
    """
    scheme = scheme_of(address)
    if not scheme:
        return str(address)
    head, _, rest = str(address).partition("://")
    if _begins_with_user(rest, scheme):
        rest = rest.rpartition("@")[2] if "@" in rest else "[redacted]"
    # "#" may be part of a key.
    visible = re.split("[?]" if scheme in OBJECT_SCHEMES else "[?#]", rest, maxsplit=1)
    place, slash, path = visible[0].partition("/")
    # abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/KEY
    shown = place if scheme == "abfs" and ":" not in place else place.rpartition("@")[2]
    return f"{head}://{shown}{slash}{path}{_REDACTED if len(visible) > 1 else ''}"


def _begins_with_user(rest: str, scheme: str) -> bool:
    """Returns True for USER:PASSWORD with "/", "?" or "#" in the password, which should be encoded but often is not."""
    place = re.split("[/?#]", rest, maxsplit=1)[0]
    return "@" not in place and (_BUCKET if scheme in OBJECT_SCHEMES else _HOST).fullmatch(place) is None


def has_user(address: str) -> bool:
    """Returns True for an address with a user or password before the host.

    >>> has_user("https://me:secret@example.org/a"), has_user("https://example.org/a@b")
    (True, False)
    """
    return "@" in re.split("[/?#]", address.partition("://")[2], maxsplit=1)[0]


def join(folder: Location, name: str) -> Location:
    """Returns the location of a file below a folder or prefix; `name` is relative, with "/" between its parts.

    The name is quoted in a web address, whose query is kept: a signature may cover all files below it.

    >>> join("s3://bucket/images/", "2021/a b.jpg")
    's3://bucket/images/2021/a b.jpg'
    >>> join("https://host/images?sig=1", "a b.jpg")
    'https://host/images/a%20b.jpg?sig=1'

    Raises:
        BadImage: the name leads out of a prefix (reason IMAGE_NOT_FOUND); local folders are checked by their readers.
    """
    if not is_remote(folder):
        return Path(folder) / name
    if name.startswith("/") or ".." in name.split("/"):
        raise BadImage(f"{name}: outside {redact(folder)}; give a name without '..' and '/' at its start",
                       "IMAGE_NOT_FOUND")  # fmt: skip
    text = str(folder)
    if scheme_of(text) in OBJECT_SCHEMES:
        return f"{text.rstrip('/')}/{name}"
    base, mark, query = text.partition("?")
    return f"{base.rstrip('/')}/{quote_name(name)}{mark}{query}"


def quote_name(name: str) -> str:
    """Returns a file name for a URL: every character but letters, digits and `_.-~/` percent-encoded.

    A name that is not UTF-8 keeps the bytes that it has on the disk.

    >>> quote_name("plus+ 50%#1?.jpg"), quote_name("a" + chr(0xDCE9))
    ('plus%2B%2050%25%231%3F.jpg', 'a%E9')
    """
    try:
        return quote(name.encode(errors="surrogateescape"))
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold; no disk has such a name
        return quote(name.encode(errors="surrogatepass"))


def sibling(address: Location, name: str) -> Location:
    """Returns the location of another file in the same folder or prefix.

    >>> sibling("s3://bucket/out/masks.json", "masks.errors.jsonl"), sibling("s3://bucket//masks.json", "a.json")
    ('s3://bucket/out/masks.errors.jsonl', 's3://bucket//a.json')
    """
    if not is_remote(address):
        return Path(address).with_name(name)
    # Not by `join`: another number of "/" is another prefix.
    return f"{_without_query(str(address)).rpartition('/')[0]}/{name}"


def base_name(address: Location) -> str:
    """Returns the last part of a location, without a query.

    >>> base_name("https://host/a/boxes.json?sig=1"), base_name(Path("a/boxes.json"))
    ('boxes.json', 'boxes.json')
    """
    if not is_remote(address):
        return Path(address).name
    return PurePosixPath(_without_query(str(address)).partition("://")[2]).name


def _without_query(address: str) -> str:
    """Returns a web address without query and fragment; in the key of an object, "?" and "#" are letters."""
    return re.split("[?#]", address, maxsplit=1)[0] if scheme_of(address) in WEB_SCHEMES else address


def split_object(address: str) -> tuple[str, str]:
    """Returns bucket and key of the address of an object.

    >>> split_object("s3://bucket/a/b.jpg")
    ('bucket', 'a/b.jpg')
    """
    bucket, _, key = address.partition("://")[2].partition("/")
    return bucket, key
