"""Reads the URLs of images from the rows of a COCO file. Fetches nothing."""

from typing import Any

from mal_train.core.coco.fields import URL_FIELD, file_name_of
from mal_train.core.coco.stream import read_list
from mal_train.core.errors import BadDataset
from mal_train.core.storage.addresses import WEB_SCHEMES, Location, has_user, redact, scheme_of


def image_urls(annotations: Location) -> dict[str, str]:
    """Returns the URL of each image by its file name.

    The rows come from the author of the file, who may be a stranger: only https and http are taken, since other schemes
    would be read with the credentials of this user, and no URL with a user or password.

    Raises:
        BadDataset: the file is unreadable, no row has a usable URL, or two rows give one file name different URLs.
    """
    urls: dict[str, str] = {}
    name = redact(annotations)
    for row in read_list(annotations, "images"):
        file_name, url = _name_and_url(row)
        if url and urls.setdefault(file_name, url) != url:
            raise BadDataset(
                f"{name}: two rows have file_name {file_name!r} and different {URL_FIELD}; make the names unique"
            )
    if not urls:
        raise BadDataset(
            f"{name}: no row of images has a {URL_FIELD} with https:// or http://; give the folder of the images"
        )
    return urls


def _name_and_url(row: Any) -> tuple[str, str]:
    name, url = (file_name_of(row), row.get(URL_FIELD)) if isinstance(row, dict) else ("", None)
    if not name or not isinstance(url, str):
        return "", ""
    return (name, url) if scheme_of(url) in WEB_SCHEMES and not has_user(url) else ("", "")
