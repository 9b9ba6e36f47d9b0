"""A server with S3's API for tests, over HTTP, and the variables that point programs to it."""

import contextlib
import logging
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

BUCKET = "bucket"


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server with an empty bucket; yields the environment variables that point to it."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        post(variables, "reset")
        client(variables).create_bucket(Bucket=BUCKET)
        yield variables
    finally:
        post(variables, "reset-auth", b"1e9")
        server.stop()


def client(variables: dict[str, str], service: str = "s3") -> Any:
    """boto3's client of the server."""
    return boto3.session.Session().client(
        service,
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )


def post(variables: dict[str, str], task: str, body: bytes = b"") -> None:
    """Ask the server to change its state."""
    url = f"{variables['AWS_ENDPOINT_URL']}/moto-api/{task}"
    request = urllib.request.Request(url, data=body, method="POST", headers={"Content-Type": "text/plain"})
    with urllib.request.urlopen(request, timeout=10):
        pass


def use_keys_only(variables: dict[str, str]) -> dict[str, str]:
    """Let the server refuse unknown keys from now on; returns variables with a key that may do anything."""
    iam = client(variables, "iam")
    iam.create_user(UserName="user")
    policy = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}'
    iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=policy)
    key = iam.create_access_key(UserName="user")["AccessKey"]
    post(variables, "reset-auth", b"0")
    return {
        **variables,
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
    }


def temporary_key(variables: dict[str, str]) -> dict[str, str]:
    """The variables with a key and session token of a role that may do anything."""
    iam = client(variables, "iam")
    trust = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*","Action":"sts:AssumeRole"}]}'
    role = iam.create_role(RoleName="role", AssumeRolePolicyDocument=trust)["Role"]
    policy = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}'
    iam.put_role_policy(RoleName="role", PolicyName="all", PolicyDocument=policy)
    key = client(variables, "sts").assume_role(RoleArn=role["Arn"], RoleSessionName="session")["Credentials"]
    return {
        **variables,
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        "AWS_SESSION_TOKEN": key["SessionToken"],
    }


def keys(variables: dict[str, str], prefix: str = "") -> list[str]:
    """Keys of all objects of the bucket."""
    pages = client(variables).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def unfinished(variables: dict[str, str]) -> list[str]:
    """Keys of unfinished uploads."""
    found = client(variables).list_multipart_uploads(Bucket=BUCKET)
    return [entry["Key"] for entry in found.get("Uploads", [])]


def forget(key: dict[str, str]) -> None:
    """Delete a key of `use_keys_only`: the server refuses its requests from now on."""
    client(key, "iam").delete_access_key(UserName="user", AccessKeyId=key["AWS_ACCESS_KEY_ID"])


def remove_bucket(variables: dict[str, str]) -> None:
    """Delete the bucket with all that it holds, while a job writes there."""
    while True:
        found = [{"Key": name} for name in keys(variables)]
        with contextlib.suppress(ClientError):  # something was written in between
            # All in one request, or the job would miss single files.
            client(variables).delete_objects(Bucket=BUCKET, Delete={"Objects": found})
            client(variables).delete_bucket(Bucket=BUCKET)
            return
