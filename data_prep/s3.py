"""S3: settings as AWS's tools find them, reads through pyarrow, writes through boto3.

Credentials, region, endpoint and number of attempts come from AWS's environment variables and profiles, or from the
query of a URI, as in pyarrow: `s3://bucket/folder?endpoint_override=host:9000&scheme=http&region=eu-west-1`. pyarrow
cannot give up an upload or write on a condition, so boto3 writes.
"""

import contextlib
import functools
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyarrow import fs

from ovd_models.errors import InputError

SCHEME = "s3://"
OPTIONS = ("endpoint_override", "region", "scheme")
"""What the query of a URI may set."""
ATTEMPTS = 5
"""Attempts of a request, unless `AWS_MAX_ATTEMPTS` says otherwise."""
adopted: dict[str, str] = {}
"""Environment variables that URIs have set in this process, for those of a cluster, which do not inherit them."""
CONNECT_SECONDS, READ_SECONDS = 5, 60
QUICK: dict[str, Any] = {"connect_timeout": 3, "read_timeout": 5, "retries": {"total_max_attempts": 2}}
"""Settings of a client that finds out within seconds whether a server answers."""


@dataclass(frozen=True)
class Place:
    """A bucket, a key in it, and the options of the URI's query."""

    bucket: str
    key: str
    options: tuple[tuple[str, str], ...] = field(default=())


def parse(uri: str) -> Place:
    """Split a URI. The key is taken literally, without percent-decoding, as AWS's tools do.

    Raises:
        InputError: it names no bucket, holds credentials or an unknown option.
    """
    address, mark, query = uri.removeprefix(SCHEME).rpartition("?")
    if not mark or "=" not in query:  # a "?" of the key
        address, query = uri.removeprefix(SCHEME), ""
    bucket, _, key = address.partition("/")
    if "@" in bucket:
        raise InputError("s3://...@...: credentials in a URI would be logged, expected AWS_ACCESS_KEY_ID or a profile")
    options = dict(urllib.parse.parse_qsl(query))
    for name in options:
        if name not in OPTIONS:
            raise InputError(f"{uri}: unknown option {name}, expected {', '.join(OPTIONS)}")
    if not bucket:
        raise InputError(f"{uri}: names no bucket, expected s3://BUCKET/FOLDER")
    return Place(bucket, key.strip("/"), tuple(sorted(options.items())))


def adopt(uri: str) -> str:
    """Move the options of a URI to the environment, for all libraries and processes of this job; returns the rest."""
    options, variables = dict(parse(uri).options), dict[str, str]()
    if endpoint := _endpoint(options):
        variables["AWS_ENDPOINT_URL_S3"] = endpoint
    if region := options.get("region"):
        variables |= {"AWS_REGION": region, "AWS_DEFAULT_REGION": region}
    os.environ.update(variables)
    adopted.update(variables)
    return uri.rpartition("?")[0] if options else uri


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI in pyarrow, shared by all URIs with the same settings, and `bucket/key` on it.

    Raises:
        InputError: the URI is malformed, or its profile or region cannot be found.
    """
    place = parse(uri)
    return _filesystem(place.bucket, place.options, _environment()), f"{place.bucket}/{place.key}".rstrip("/")


def client(place: Place, *, quick: bool = False) -> Any:
    """boto3's client for a place, shared by all places with the same settings.

    Raises:
        InputError: the profile of the environment does not exist.
    """
    return _client(place.options, _environment(), quick)


def upload(uri: str, chunks: Iterable[bytes]) -> None:
    """Write an object, in parts if it is large; readers see all of it or none, also after an error or a kill.

    Raises:
        OSError: the server refuses, or does not answer.
    """
    place = parse(uri)
    with errors(uri, "cannot be written"):
        client(place).upload_fileobj(_ChunkReader(chunks), place.bucket, place.key)


def abort_uploads(uri: str) -> int:
    """Remove the parts of unfinished uploads below a URI, which killed processes leave; returns their number."""
    place, count = parse(uri), 0
    with errors(uri, "cannot be cleaned"):
        pages = client(place).get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=place.bucket, Prefix=f"{place.key}/"):
            for found in page.get("Uploads", []):
                client(place).abort_multipart_upload(Bucket=place.bucket, Key=found["Key"], UploadId=found["UploadId"])
                count += 1
    return count


def remove_folder(uri: str) -> None:
    """Delete all objects below a URI; pyarrow would leave an empty one in place of the folder above.

    Raises:
        OSError: the server refuses, or does not answer.
    """
    place = parse(uri)
    with errors(uri, "cannot be removed"):
        pages = client(place).get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=f"{place.key}/")
        for page in pages:
            found = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
            if found:
                answer = client(place).delete_objects(Bucket=place.bucket, Delete={"Objects": found, "Quiet": True})
                for refused in answer.get("Errors", ())[:1]:
                    raise OSError(f"{uri}: cannot be removed: {refused['Key']}: {refused['Message']}")


def check(uri: str, *, writes: bool) -> None:
    """Check within seconds that a folder can be listed, and with `writes` that objects can be written to it.

    Raises:
        InputError: it cannot.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    place = parse(uri)
    quick = client(place, quick=True)
    task = "written" if writes else "read"
    try:
        quick.list_objects_v2(Bucket=place.bucket, Prefix=f"{place.key}/", MaxKeys=1)
        if writes:
            probe = {"Bucket": place.bucket, "Key": f"{place.key}/.probe-{os.getpid()}".lstrip("/")}
            quick.put_object(**probe, Body=b"x")
            with contextlib.suppress(ClientError):  # one that may write but not delete leaves it
                quick.delete_object(**probe)
    except (BotoCoreError, ClientError) as error:
        server = quick.meta.endpoint_url
        raise InputError(
            f"{uri}: cannot be {task} ({reason(error)}), expected a bucket at {server}, and credentials that may do so "
            "in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in AWS_PROFILE"
        ) from error


@contextlib.contextmanager
def errors(uri: str, what: str) -> Iterator[None]:
    """Raise boto3's errors in the block as OSError with the URI and what happened."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(f"{uri}: {what}: S3 error {reason(error)}") from error


def reason(error: Exception) -> str:
    """One line about an error of boto3: the server's code and message, or what happened on the way."""
    answer: Mapping[str, Any] = (getattr(error, "response", None) or {}).get("Error", {})
    message = f"{answer['Code']}: {answer.get('Message', '')}" if "Code" in answer else str(error)
    return " ".join(message.split())


class _ChunkReader:
    """Chunks as a file, of which boto3 reads a part at a time."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._rest = iter(chunks), b""

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer at the end."""
        parts, missing = [self._rest], size - len(self._rest)
        while size < 0 or missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            parts.append(chunk)
            missing -= len(chunk)
        whole = b"".join(parts)
        self._rest = whole[size:] if size >= 0 else b""
        return whole[:size] if size >= 0 else whole


def _endpoint(options: Mapping[str, str]) -> str:
    """The endpoint of a URI's options with its scheme; empty without one."""
    endpoint = options.get("endpoint_override", "")
    return endpoint if not endpoint or "://" in endpoint else f"{options.get('scheme', 'https')}://{endpoint}"


def _region(options: Mapping[str, str]) -> str | None:
    """The region of a URI's options or the environment; boto3 itself reads `AWS_DEFAULT_REGION` and profiles."""
    return options.get("region") or os.environ.get("AWS_REGION")


def _environment() -> tuple[tuple[str, str], ...]:
    """AWS's environment variables, on which clients depend."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@functools.lru_cache(maxsize=16)
def _client(options: tuple[tuple[str, str], ...], environment: tuple[tuple[str, str], ...], quick: bool) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    given = dict(options)
    settings: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        settings["retries"] = {"total_max_attempts": ATTEMPTS, "mode": os.environ.get("AWS_RETRY_MODE", "standard")}
    try:
        session = boto3.session.Session()
        return session.client(
            "s3",
            region_name=_region(given) or session.region_name,
            endpoint_url=_endpoint(given) or None,
            config=Config(**(settings | QUICK if quick else settings)),
        )
    except (BotoCoreError, ValueError) as error:
        raise InputError(
            f"S3: {reason(error)}, expected AWS's variables or a profile as its tools take them"
        ) from error


@functools.lru_cache(maxsize=16)
def _filesystem(
    bucket: str, options: tuple[tuple[str, str], ...], environment: tuple[tuple[str, str], ...]
) -> fs.FileSystem:
    import boto3

    endpoint = str(_client(options, environment, False).meta.endpoint_url)
    is_amazon = (urllib.parse.urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    region = _region(dict(options)) or boto3.session.Session().region_name
    try:
        if is_amazon and not region:
            region = fs.resolve_s3_region(bucket)
    except OSError as error:
        raise InputError(f"{SCHEME}{bucket}: its region cannot be found ({error}), expected AWS_REGION") from error
    return fs.S3FileSystem(
        region=region or "us-east-1",
        endpoint_override=None if is_amazon else endpoint,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))),
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
    )
